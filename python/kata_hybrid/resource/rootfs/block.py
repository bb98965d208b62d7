"""A root file system on a block device or image file, given to the guest as a disk.

As a disk the host never mounts it, so nothing on the host parses what a container wrote.
"""

import stat
from pathlib import Path
from typing import Final

from kata_hybrid.types import GuestDisk, GuestStorage, Mount

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

    def __init__(self, entry: Mount, *, name: str, disk: GuestDisk) -> None:
        """Describe a file system on a disk that the guest has; whoever attached it detaches it."""
        self.guest_path = f"/run/kata-containers/shared/containers/passthrough/{name}/rootfs"
        options = [option for option in entry.options if option not in _HOST_OPTIONS]
        if entry.type == "xfs":
            # A copy of a snapshot has the original's identity.
            options.append("nouuid")
        self.storages = (
            GuestStorage(
                driver=disk.driver,
                source=disk.source,
                fstype=entry.type,
                options=tuple(options),
                mount_point=self.guest_path,
            ),
        )

    def release(self) -> None:
        """Nothing is held on the host."""
