"""A guest in memory, around a :class:`FakeAgent`. Implements ``runtimes.virt.guest.Guest``."""

import asyncio
import os
from pathlib import Path

from kata_hybrid.agent.streams import HostStreams
from kata_hybrid.resource.disks import Disks
from kata_hybrid.resource.share_fs.base import SharedFolder
from kata_hybrid.runtimes.base import CreateRequest
from kata_hybrid.runtimes.oci.hooks import Hooks
from kata_hybrid.runtimes.oci.spec import Spec
from kata_hybrid.runtimes.virt.container import Container
from kata_hybrid.runtimes.virt.guest import Guest, Record
from kata_hybrid.runtimes.virt.volumes import Volumes
from kata_hybrid.testing.fake_agent import FakeAgent
from kata_hybrid.testing.fake_hypervisor import FakeHypervisor
from kata_hybrid.types import (
    ContainerId,
    GuestDetails,
    GuestStorage,
    JsonObject,
    SandboxId,
    Stdio,
)


class FakeGuest:
    """A guest that is up at once."""

    def __init__(self, agent: FakeAgent, *, folder: Path) -> None:
        """Hold ``agent``; ``folder`` stands for the shared one."""
        self.agent = agent
        self.folder = SharedFolder(host_path=folder)
        self.task_pid = 0
        self.awaits_links = False
        self.machine = FakeHypervisor(run_dir=folder)
        self.disks = Disks(self.machine)
        self.empty_dirs = None
        self.is_seccomp_disabled = False
        self.details = GuestDetails(
            agent_version="fake",
            storage_handlers=(),
            extra_features=frozenset(),
            supports_seccomp=True,
            memory_block_bytes=0,
        )
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(
        self,
        *,
        hostname: str,
        dns: tuple[str, ...],
        record: Record,
    ) -> None:
        """Be up once the agent answers."""
        await self.machine.start()
        await self.agent.create_sandbox(
            SandboxId("fake"),
            hostname=hostname,
            dns=dns,
            storages=(),
        )
        self.details = await self.agent.guest_details()
        self.task_pid = os.getpid()
        record(processes=())

    def lose(self, reason: str) -> None:
        """Go away, as a machine that crashes."""
        self.agent.disconnect()
        if not self._lost.done():
            self._lost.set_result(reason)

    async def lost(self) -> str:
        """Wait for :meth:`lose` or :meth:`stop`."""
        return await asyncio.shield(self._lost)

    def console_tail(self) -> str:
        """Have no console."""
        return ""

    async def stop(self) -> None:
        """Go away. Idempotent."""
        self.lose("stopped")
        await self.disks.close()
        await self.machine.stop()


class FakeRootfs:
    """A root file system that is nowhere."""

    guest_path = "/fake"
    storages: tuple[GuestStorage, ...] = ()

    def release(self) -> None:
        """Nothing is held."""


class FakeHooks:
    """Runs no hooks, and remembers which it was to run, and with what state."""

    def __init__(self) -> None:
        """Nothing was asked for yet."""
        self.failure: Exception | None = None
        """What the creation's end with."""
        self.gates: dict[str, asyncio.Event] = {}
        """What each point waits for."""
        self.ran: list[tuple[str, JsonObject]] = []

    async def create(self, hooks: Hooks, state: JsonObject) -> None:
        """Remember."""
        await self._remember("create", hooks, state)
        if self.failure is not None:
            raise self.failure

    async def started(self, hooks: Hooks, state: JsonObject) -> None:
        """Remember."""
        await self._remember("start", hooks, state)

    async def deleted(self, hooks: Hooks, state: JsonObject) -> None:
        """Remember."""
        await self._remember("delete", hooks, state)

    async def _remember(self, point: str, hooks: Hooks, state: JsonObject) -> None:
        if hooks:
            self.ran.append((point, state))
            if point in self.gates:
                await self.gates[point].wait()


class FakeStreams:
    """Opens no descriptors."""

    async def open(self, stdio: Stdio, *, container_id: ContainerId) -> HostStreams:
        """Return closed streams."""
        del container_id
        return HostStreams(is_terminal=stdio.terminal)

    async def close(self) -> None:
        """Nothing is held."""


async def prepare_nothing(request: CreateRequest, spec: Spec, *, guest: Guest) -> Container:
    """Prepare a container without touching the host."""
    name = request.container_id
    volumes = Volumes(
        folder=guest.folder, disks=guest.disks, empty_dirs=None, bundle=request.bundle, name=name
    )
    return Container(request, spec, rootfs=FakeRootfs(), volumes=volumes)
