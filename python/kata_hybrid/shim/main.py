"""What the shim binary does, by its command line.

Each action's module is imported only when asked for. The short actions end with ``_exit``: there
is nothing to flush, and taking the interpreter down would cost more than some of them.
"""

# ruff: noqa: PLC0415 - imports wait until they are needed: start-up time is this folder's subject

import posix
import sys

from kata_hybrid.shim.args import Arguments, parse
from kata_hybrid.shim.failure import ShimError

NAME = "containerd-shim-kata-hybrid-v2"


def main(argv: list[str]) -> None:
    """Run the action named by ``argv`` and end the process."""
    try:
        arguments = parse(argv)
        if not (arguments.action or arguments.is_version or arguments.is_info):
            _serve(arguments)
            return
        output = _act(arguments)
        while output:
            output = output[posix.write(1, output) :]
    except (ShimError, OSError) as exc:
        _fail(f"{NAME}: {_text(exc)}\n")
    posix._exit(0)  # noqa: SLF001 - public in os, which is not imported here


def _act(arguments: Arguments) -> bytes:
    """Run a short action and return what it prints."""
    if arguments.is_version:
        from kata_hybrid import __version__

        return f"{NAME}: version {__version__}\n".encode()
    if arguments.is_info:
        from kata_hybrid.shim.info import runtime_info

        return runtime_info()
    if arguments.action == "start":
        from kata_hybrid.shim.start import start

        return start(arguments)
    if arguments.action == "delete":
        from kata_hybrid.shim.delete import delete

        return delete(arguments)
    raise ShimError(f"unknown action {arguments.action!r}: expected start or delete")


def _serve(arguments: Arguments) -> None:
    """Become the server."""
    if sys.flags.no_site:
        # Run by the launcher without an action: the server does need installed packages.
        import site

        site.main()
    from kata_hybrid.shim.run import serve

    sys.exit(serve(arguments))


def _fail(text: str) -> None:
    posix.write(2, text.encode("utf-8", "replace"))
    posix._exit(1)  # noqa: SLF001


def _text(error: Exception) -> str:
    """Return the error as one line: what failed, on which path."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
