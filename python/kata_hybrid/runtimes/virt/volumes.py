"""What a container is given besides its root: the mounts and devices of its spec, for the guest.

    a bind of     a tmpfs of the pod's       ─▶ a tmpfs of the guest's       (ephemeral.py)
                  a path that is described   ─▶ a disk, mounted in the guest (direct.py)
                  an emptyDir, if configured ─▶ a disk of the pod's          (empty_dir.py)
                  anything else              ─▶ a place in the shared folder (bind.py)
    a block device allowed for itself        ─▶ a disk, as it is             (block_node.py)

One for each container. What it acquires is given back in two steps: disks when the guest does not
use them any more, places in the shared folder at the end.
"""

from pathlib import Path

from kata_hybrid.resource.disks import Disks
from kata_hybrid.resource.share_fs.base import SharedFolder
from kata_hybrid.resource.volume.bind import BindVolumes
from kata_hybrid.resource.volume.block_node import host_device
from kata_hybrid.resource.volume.direct import direct_volume
from kata_hybrid.resource.volume.empty_dir import BlockEmptyDirs
from kata_hybrid.resource.volume.ephemeral import ephemeral_storage
from kata_hybrid.runtimes.oci.devices import BlockNode
from kata_hybrid.runtimes.oci.spec import SpecMount
from kata_hybrid.types import GuestDevice, GuestDisk, GuestStorage


class Volumes:
    """The volumes of one container."""

    def __init__(
        self,
        *,
        folder: SharedFolder,
        disks: Disks,
        empty_dirs: BlockEmptyDirs | None,
        bundle: Path,
        name: str,
    ) -> None:
        """Nothing is acquired yet; ``name`` begins those of places in the shared folder.

        Without ``empty_dirs``, volumes of that kind are shared as any folder is.
        """
        self.storages: list[GuestStorage] = []
        """What the agent mounts before the container."""
        self.devices: list[GuestDevice] = []
        """What the agent finds the numbers of."""
        self._bundle = bundle
        self._binds = BindVolumes(folder, name=name)
        self._disks = disks
        self._empty_dirs = empty_dirs
        self._attached: list[GuestDisk] = []

    async def attach(self, path: Path, *, is_read_only: bool) -> GuestDisk:
        """Give the guest a disk for as long as the container needs it.

        Raises:
            KataError: it cannot be had; the text says why.
        """
        disk = await self._disks.attach(path, is_read_only=is_read_only)
        self._attached.append(disk)
        return disk

    async def add_mount(self, mount: SpecMount) -> SpecMount:
        """Make a mount's source available in the guest, and say what to mount there.

        Raises:
            KataError: it cannot be had; the text names the mount.
        """
        if not mount.is_bind:
            return mount
        # A relative source is relative to the bundle (config.md, "Mounts"); an empty one stays so.
        path = str(self._bundle / mount.source) if mount.source else ""
        storage = ephemeral_storage(path) or await self._disk_storage(path)
        if storage is not None:
            self.storages.append(storage)
            source = storage.mount_point
        else:
            source = self._binds.add(
                path, destination=mount.destination, is_read_only=mount.is_read_only
            )
        return SpecMount(
            destination=mount.destination, type="bind", source=source, options=mount.options
        )

    async def _disk_storage(self, source: str) -> GuestStorage | None:
        volume = direct_volume(source) if source else None
        if volume is None:
            return await self._empty_dirs.storage(source) if self._empty_dirs and source else None
        disk = await self.attach(volume.device, is_read_only=volume.is_read_only)
        return volume.storage(disk)

    async def add_device(self, node: BlockNode) -> None:
        """Give the guest a block device of the host's.

        Raises:
            KataError: it cannot be had; the text names it.
        """
        path = host_device(node.major, node.minor)
        disk = await self.attach(path, is_read_only=node.is_read_only)
        self.devices.append(
            GuestDevice(driver=disk.driver, source=disk.source, container_path=node.path)
        )

    @property
    def has_disks(self) -> bool:
        """The guest has a disk for it."""
        return bool(self._attached)

    async def detach(self) -> None:
        """Give up the disks: the guest has unmounted what is on them. Idempotent."""
        while self._attached:
            await self._disks.detach(self._attached.pop())

    def release(self) -> None:
        """Give up the places in the shared folder. Idempotent."""
        self._binds.release()
