"""A root file system on a block device or image file, given to the guest as a disk.

Only before the machine runs (no hot-plug yet): a later container's device is mounted on the host
and shared instead; an image file is refused then. As a disk the host never mounts it, so nothing on
the host parses what a container wrote.
"""

import stat
from pathlib import Path
from typing import Final

from kata_hybrid.types import BlockDevice, GuestDisk, GuestStorage, Mount

_FILE_SYSTEMS: Final = frozenset({"ext4", "xfs", "erofs", "ext3", "btrfs", "squashfs"})
# Consumed here, or about how the host would have attached the file.
_HOST_OPTIONS: Final = frozenset({"loop", "rw"})


def is_block_rootfs(mounts: tuple[Mount, ...]) -> bool:
    """Say whether the mounts are one file system on one device or one image file."""
    if len(mounts) != 1 or mounts[0].type not in _FILE_SYSTEMS:
        return False
    try:
        mode = Path(mounts[0].source).stat().st_mode
    except OSError:
        return False
    return stat.S_ISBLK(mode) or (stat.S_ISREG(mode) and "loop" in mounts[0].options)


class BlockRootfs:
    """Implements :class:`~kata_hybrid.resource.rootfs.base.Rootfs`."""

    def __init__(self, entry: Mount, *, name: str, serial: str) -> None:
        """Describe the disk; the caller gives it to the machine and calls :meth:`attached`."""
        self.guest_path = f"/run/kata-containers/shared/containers/passthrough/{name}/rootfs"
        self.disk = BlockDevice(
            id=serial, path=Path(entry.source), is_read_only="ro" in entry.options
        )
        self._entry = entry
        self.storages: tuple[GuestStorage, ...] = ()

    def attached(self, disk: GuestDisk) -> None:
        """Note where the guest finds the disk."""
        options = [option for option in self._entry.options if option not in _HOST_OPTIONS]
        if self._entry.type == "xfs":
            options.append("nouuid")
        self.storages = (
            GuestStorage(
                driver=disk.driver,
                source=disk.source,
                fstype=self._entry.type,
                options=tuple(options),
                mount_point=self.guest_path,
            ),
        )

    def release(self) -> None:
        """Nothing is held on the host."""
