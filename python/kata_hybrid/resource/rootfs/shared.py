"""A root file system mounted on the host inside the shared folder (overlay, bind, native).

The mounts go straight to their place below the shared folder, so there is one mount and no bind.
"""

import contextlib
import os
from pathlib import Path, PurePosixPath

from kata_hybrid.errors import FailedPreconditionError, InvalidArgumentError, KataError
from kata_hybrid.resource import mount
from kata_hybrid.resource.share_fs.base import SharedFolder
from kata_hybrid.types import GuestStorage, Mount


class SharedRootfs:
    """Implements :class:`~kata_hybrid.resource.rootfs.base.Rootfs`."""

    def __init__(
        self, folder: SharedFolder, *, name: str, mounts: tuple[Mount, ...], root_path: Path
    ) -> None:
        """Mount ``mounts`` in order, or bind ``root_path`` when there are none.

        Raises:
            InvalidArgumentError: the root file system is not there, or a target leaves it.
            FailedPreconditionError: the kernel refused a mount.
        """
        self.storages: tuple[GuestStorage, ...] = ()
        relative = PurePosixPath("passthrough", name, "rootfs")
        self.guest_path = os.fspath(folder.guest_path / relative)
        self._target = folder.host_path / relative
        self._mounted: list[Path] = []
        try:
            self._target.mkdir(parents=True, mode=0o755)
        except OSError as exc:
            message = f"make mount point {self._target}: {exc.strerror}"
            raise FailedPreconditionError(message) from exc
        try:
            if not mounts:
                mount.bind(self._existing(root_path), self._target, is_read_only=False)
                self._mounted.append(self._target)
            for entry in mounts:
                place = self._place(entry.target)
                mount.mount(entry, place)
                self._mounted.append(place)
        except BaseException:
            self.release()
            raise

    @staticmethod
    def _existing(root_path: Path) -> Path:
        if not root_path.is_dir():
            message = f"root file system {root_path} is not a directory on this host"
            raise InvalidArgumentError(message)
        return root_path

    def _place(self, target: str) -> Path:
        """Resolve a mount's sub-path, created if needed, without leaving the root."""
        if not target.strip("/"):
            return self._target
        root = self._target.resolve()
        try:
            place = (root / target.lstrip("/")).resolve()
            if not place.is_relative_to(root):
                message = f"rootfs mount target {target!r} leaves the root file system"
                raise InvalidArgumentError(message)
            place.mkdir(parents=True, exist_ok=True, mode=0o755)
        except (OSError, RuntimeError, ValueError) as exc:
            # pathlib reports a loop of symlinks as RuntimeError, a NUL as ValueError.
            message = f"rootfs mount target {target!r} cannot be made a folder"
            raise InvalidArgumentError(message) from exc
        return place

    def release(self) -> None:
        """Unmount and remove the mount point. Idempotent."""
        while self._mounted:
            with contextlib.suppress(KataError):
                mount.unmount(self._mounted[-1])
            self._mounted.pop()
        for folder in (self._target, self._target.parent):
            with contextlib.suppress(OSError):
                folder.rmdir()
