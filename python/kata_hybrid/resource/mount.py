"""mount(2) and umount2(2) with errors that name the mount.

Mounts are made in the shim's private mount namespace: they vanish with its last process.
"""

import os
from pathlib import Path

from kata_hybrid._native import host
from kata_hybrid.errors import FailedPreconditionError, InvalidArgumentError
from kata_hybrid.types import Mount


def mount(entry: Mount, target: Path) -> None:
    """Mount ``entry`` on ``target``, which must exist.

    Raises:
        InvalidArgumentError: what is to be mounted is not there or not of that kind.
        FailedPreconditionError: the kernel refused for another reason.
    """
    try:
        host.mount(entry.source, os.fspath(target), entry.type, list(entry.options))
    except (FileNotFoundError, NotADirectoryError) as exc:
        message = f"mount {entry.type} {entry.source} on {target}: {os.strerror(exc.errno or 0)}"
        raise InvalidArgumentError(message) from exc
    except OSError as exc:
        message = (
            f"mount {entry.type} {entry.source} on {target} "
            f"(options {','.join(entry.options) or 'none'}): {os.strerror(exc.errno or 0)}"
        )
        raise FailedPreconditionError(message) from exc


def bind(source: Path, target: Path, *, is_read_only: bool) -> None:
    """Make ``source`` and everything mounted below it visible at ``target``, which must exist.

    Raises:
        InvalidArgumentError: ``source`` is not there.
        FailedPreconditionError: the kernel refused for another reason.
    """
    options = ("rbind", "ro") if is_read_only else ("rbind",)
    mount(Mount(type="bind", source=os.fspath(source), target="", options=options), target)


def unmount(target: Path) -> None:
    """Detach whatever is mounted on ``target``; nothing there is no error.

    Raises:
        FailedPreconditionError: the kernel refused.
    """
    try:
        host.unmount(os.fspath(target))
    except OSError as exc:
        message = f"unmount {target}: {os.strerror(exc.errno or 0)}"
        raise FailedPreconditionError(message) from exc
