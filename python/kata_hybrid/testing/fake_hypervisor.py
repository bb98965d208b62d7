"""A machine in memory. Implements ``hypervisor.base.Hypervisor`` and keeps its promises."""

import asyncio
import os
from pathlib import Path

from kata_hybrid.errors import InvalidStateError, KataError
from kata_hybrid.hypervisor.base import check_serial
from kata_hybrid.types import (
    BlockDevice,
    FolderDevice,
    GuestDisk,
    NetworkDevice,
    ProcessIdentity,
    VmExit,
)


class FakeHypervisor:
    """A machine that runs nothing: a test ends it with :meth:`end`."""

    def __init__(self, *, run_dir: Path, failure: KataError | None = None) -> None:
        """Describe a machine whose start raises ``failure``, if given."""
        self.folders: list[FolderDevice] = []
        self.disks: list[BlockDevice] = []
        self.networks: list[NetworkDevice] = []
        self._run_dir = run_dir
        self._failure = failure
        self._console: list[str] = []
        self._is_started = False
        self._disk_count = 0
        self._plugged: set[str] = set()
        self._end: asyncio.Future[VmExit] = asyncio.get_running_loop().create_future()

    # --- what a test does to the guest ----------------------------------------------------------

    def end(self, reason: str, detail: str = "") -> None:
        """End the machine, as its guest or its host would."""
        if not self._end.done():
            self._end.set_result(VmExit(reason=reason, detail=detail))

    def say(self, line: str) -> None:
        """Print a line on the guest's console."""
        self._console.append(line)

    # --- the hypervisor -------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """``fake``."""
        return "fake"

    @property
    def agent_address(self) -> str:
        """An address where nobody answers."""
        return f"hvsock://{self._run_dir}/fake.sock"

    @property
    def processes(self) -> tuple[ProcessIdentity, ...]:
        """None."""
        return ()

    @property
    def task_pid(self) -> int:
        """This process."""
        return os.getpid()

    def add_shared_folder(self, folder: FolderDevice) -> None:
        """Take a folder of any kind."""
        self._refuse_if_started("add a shared folder to")
        self.folders.append(folder)

    async def add_disk(self, disk: BlockDevice) -> GuestDisk:
        """Take a disk and number it."""
        if self._end.done():
            raise InvalidStateError("fake machine", state="exited", request="add a disk to")
        check_serial(disk.id)
        self.disks.append(disk)
        self._disk_count += 1
        if self._is_started:
            self._plugged.add(disk.id)
        return GuestDisk(driver="fake", source=str(self._disk_count))

    async def remove_disk(self, disk_id: str) -> None:
        """Forget a disk that came while it ran."""
        if disk_id in self._plugged and not self._end.done():
            self._plugged.discard(disk_id)
            self.disks = [disk for disk in self.disks if disk.id != disk_id]

    def add_network(self, device: NetworkDevice) -> str:
        """Take a network card."""
        self._refuse_if_started("add a network card to")
        self.networks.append(device)
        return ""

    def _refuse_if_started(self, request: str) -> None:
        if self._is_started or self._end.done():
            state = "exited" if self._end.done() else "running"
            raise InvalidStateError("fake machine", state=state, request=request)

    async def start(self) -> None:
        """Run, or fail as described."""
        self._refuse_if_started("start")
        self._is_started = True
        if self._failure is not None:
            self.end("failed", "the machine was not started")
            raise self._failure

    async def stop(self) -> None:
        """End. Idempotent."""
        self.end("killed", "stopped by the host")

    async def exited(self) -> VmExit:
        """Wait for the end."""
        return await asyncio.shield(self._end)

    def console_tail(self) -> str:
        """What :meth:`say` was told."""
        return "\n".join(self._console)

    async def cleanup(self) -> None:
        """Nothing is held."""
