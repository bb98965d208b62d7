"""The ``kata-hybrid`` command: parses, runs one subcommand, turns failures into one line.

Exit status: 0 done, 1 something is missing or failed, 2 wrong usage, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence

from kata_hybrid.cli import check, config, env, guest, version
from kata_hybrid.cli.output import Output, standard_output
from kata_hybrid.errors import KataError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = make_parser().parse_args(argv)
    output = standard_output(is_json=arguments.json)
    try:
        return run(arguments, output)
    except BrokenPipeError:
        # Whoever read our output is gone (| head): not worth a message.
        sys.stderr.close()
        return EXIT_FAILED


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Run the parsed subcommand; a failure becomes one line and a status."""
    try:
        return int(arguments.run(arguments, output))
    except KataError as error:
        output.error(_chain(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        output.error(_os_error(error))
    except KeyboardInterrupt:
        output.error("interrupted")
        return EXIT_INTERRUPTED
    return EXIT_FAILED


def make_parser() -> argparse.ArgumentParser:
    """Declare the whole command line."""
    parser = argparse.ArgumentParser(
        prog="kata-hybrid", description="Containers in light virtual machines: the operator's tool."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (check, config, guest, env, version):
        command.add_parser(commands)
    return parser


def _chain(error: BaseException) -> str:
    """Join an error and its causes: each text says only what it adds."""
    texts = [str(error)]
    cause = error.__cause__
    while cause is not None:
        text = _os_error(cause) if isinstance(cause, OSError) else str(cause)
        is_said = isinstance(cause, FileNotFoundError) or text in texts[-1]
        if text and not is_said:
            texts.append(text)
        cause = cause.__cause__
    return ": ".join(texts)


def _os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    hint = " (are you root?)" if isinstance(error, PermissionError) else ""
    return f"{where}{error.strerror or error}{hint}"


if __name__ == "__main__":
    sys.exit(main())
