"""Bind mounts of host files and folders, carried into the guest by the shared folder.

Each source is bound below the shared folder under a name of its own; the mount in the guest's
spec then has that guest path as its source. What the kernel serves itself (``/proc``, ``/sys``,
``/dev``) means the guest's and is passed as it is.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Final

from kata_hybrid.errors import FailedPreconditionError, InvalidSpecError, KataError
from kata_hybrid.resource import mount
from kata_hybrid.resource.share_fs.base import SharedFolder

_GUEST_OWN: Final = ("/dev", "/proc", "/sys")
GUEST_SHM: Final = "/run/kata-containers/sandbox/shm"
_MAX_SHOWN: Final = 32
"""Characters of a source's name to be recognised by: at most 128 bytes."""


class BindVolumes:
    """The bind mounts of one container. Released as one."""

    def __init__(self, folder: SharedFolder, *, name: str) -> None:
        """Bind below ``folder`` with names that begin with ``name``."""
        self._folder = folder
        self._name = name
        self._targets: list[Path] = []

    def add(self, source: str, *, destination: str, is_read_only: bool) -> str:
        """Make a host path visible to the guest.

        Returns:
            The source to use in the guest.

        Raises:
            InvalidSpecError: the source does not exist on the host or is of no kind to share.
            FailedPreconditionError: the kernel refused.
        """
        if destination == "/dev/shm":  # noqa: S108 - the OCI destination, not a file of ours
            return GUEST_SHM
        if _is_below(source, _GUEST_OWN):
            return source
        if not source:
            message = f"mount {destination}: a bind needs a source"
            raise InvalidSpecError(message)
        path = Path(source)
        # No id holds a '+', so no container's name is another's volume. Cut to fit a file name.
        name = f"{self._name}+{len(self._targets)}+{path.name[:_MAX_SHOWN] or 'root'}"
        relative = PurePosixPath("passthrough", name)
        target = self._folder.host_path / relative
        try:
            self._make_target(path, target, destination=destination)
        except OSError as exc:
            message = f"mount {destination}: share {source}: {exc.strerror}"
            raise FailedPreconditionError(message) from exc
        self._targets.append(target)
        mount.bind(path, target, is_read_only=is_read_only)
        return os.fspath(self._folder.guest_path / relative)

    @staticmethod
    def _make_target(path: Path, target: Path, *, destination: str) -> None:
        if path.is_dir():
            target.mkdir(parents=True, mode=0o755)
        elif path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            target.touch(mode=0o644)
        else:
            problem = "is neither a file nor a folder" if path.exists() else "does not exist"
            message = f"mount {destination}: source {path} {problem} on this host"
            raise InvalidSpecError(message)

    def release(self) -> None:
        """Unmount all and remove the mount points. Idempotent."""
        while self._targets:
            target = self._targets.pop()
            with contextlib.suppress(KataError):
                mount.unmount(target)
            with contextlib.suppress(OSError):
                if target.is_dir():
                    target.rmdir()
                else:
                    target.unlink(missing_ok=True)


def _is_below(path: str, parents: Iterable[str]) -> bool:
    # POSIX lets two leading slashes mean something else; on Linux they do not.
    normal = os.path.normpath("/" + path.lstrip("/"))
    return any(normal == parent or normal.startswith(parent + "/") for parent in parents)
