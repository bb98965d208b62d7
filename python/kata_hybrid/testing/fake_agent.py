"""A guest agent in memory. Implements :class:`kata_hybrid.agent.base.Agent`.

Processes run until :meth:`FakeAgent.exit` or a signal ends them. Every request first passes
:attr:`FakeAgent.gate`, which a test may replace to decide when each goes on, and so in which order
answers arrive.
"""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kata_hybrid.agent.streams import HostStreams
from kata_hybrid.aio.supervisor import Supervisor
from kata_hybrid.errors import (
    AgentUnavailableError,
    AlreadyExistsError,
    InternalError,
    InvalidArgumentError,
    KataError,
    NotFoundError,
)
from kata_hybrid.types import (
    ContainerId,
    ContainerStats,
    CpuStats,
    ExecId,
    GuestDetails,
    GuestDevice,
    GuestNetwork,
    GuestStorage,
    JsonObject,
    MemoryStats,
    SandboxId,
)

_SIGKILL = 9
_SIGTERM = 15
_T = TypeVar("_T")
_Key = tuple[ContainerId, ExecId | None]


@dataclass(slots=True)
class FakeProcess:
    """A process in the fake guest."""

    is_started: bool = False
    exit: asyncio.Future[int] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    end_of_output: asyncio.Event = field(default_factory=asyncio.Event)

    async def ended(self) -> int:
        """Wait for its end and return its status."""
        return await asyncio.shield(self.exit)

    def end(self, status: int) -> None:
        """End it, once."""
        self.end_of_output.set()
        if not self.exit.done():
            self.exit.set_result(status)


class FakeCopies:
    """Copies of a fake process: drained when it has ended, or was stopped."""

    def __init__(self, process: FakeProcess, streams: HostStreams) -> None:
        """Take over ``streams``."""
        self._process = process
        self._streams = streams
        self._stopped = asyncio.Event()
        self.is_stdin_closed = False

    async def drained(self) -> None:
        """Return when the process has ended or the copies were stopped."""
        async with Supervisor("fake copies") as supervisor:
            ends = {
                supervisor.start(self._process.end_of_output.wait(), name="end of output"),
                supervisor.start(self._stopped.wait(), name="stopped"),
            }
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)

    def close_stdin(self) -> None:
        """Note it."""
        self.is_stdin_closed = True

    def stop(self) -> None:
        """End the copies. Idempotent."""
        self._stopped.set()
        self._streams.close()


async def _open_gate(_method: str) -> None:
    """Let every request pass at once."""


class FakeAgent:
    """One sandbox's agent, in memory."""

    def __init__(self, *, features: frozenset[str] = frozenset()) -> None:
        """Advertise ``features`` as extra features."""
        self.gate: Callable[[str], Coroutine[Any, Any, None]] = _open_gate
        self.failures: dict[str, KataError] = {}
        """Method name to the error its next call raises."""
        self.processes: dict[_Key, FakeProcess] = {}
        self.paused: set[ContainerId] = set()
        self.networks: list[GuestNetwork] = []
        self._features = features
        self._gone = asyncio.Event()
        self._ooms: asyncio.Queue[ContainerId] = asyncio.Queue()

    # --- what a test does to the guest --------------------------------------------------------

    def exit(self, container_id: ContainerId, exec_id: ExecId | None, status: int) -> None:
        """End a process that runs; ending a container's own ends its execs."""
        process = self.processes.get((container_id, exec_id))
        if process is None or not process.is_started:
            return
        if exec_id is None:
            self._end_execs(container_id)
        process.end(status)

    def out_of_memory(self, container_id: ContainerId) -> None:
        """Report a memory kill."""
        self._ooms.put_nowait(container_id)

    def disconnect(self) -> None:
        """Vanish: every request, also those under way, fails."""
        self._gone.set()

    def _end_execs(self, container_id: ContainerId) -> None:
        for (owner, exec_id), process in self.processes.items():
            if owner == container_id and exec_id is not None:
                process.end(128 + _SIGKILL)

    # --- the agent ----------------------------------------------------------------------------

    async def connect(self, *, address: str, port: int, timeout_s: float) -> None:
        """Connect."""
        del address, port, timeout_s
        await self._enter("connect")

    async def close(self) -> None:
        """Disconnect."""
        self._gone.set()

    async def closed(self) -> None:
        """Return when disconnected."""
        await self._gone.wait()

    async def forward_log(self, *, address: str, port: int) -> None:
        """Has no log."""
        del address, port

    async def forward_ports(self, listener: socket.socket, *, address: str, port: int) -> None:
        """Connect nobody."""
        del listener, address, port
        await self._gone.wait()

    async def check(self, *, timeout_s: float) -> None:
        """Answer."""
        del timeout_s
        await self._enter("check")

    async def create_sandbox(
        self,
        sandbox_id: SandboxId,
        *,
        hostname: str,
        dns: tuple[str, ...],
        storages: tuple[GuestStorage, ...],
    ) -> None:
        """Accept."""
        del sandbox_id, hostname, dns, storages
        await self._enter("create_sandbox")

    async def update_network(self, network: GuestNetwork) -> None:
        """Take a network; see :attr:`networks`."""
        await self._enter("update_network")
        self.networks.append(network)

    async def guest_details(self) -> GuestDetails:
        """Describe itself."""
        await self._enter("guest_details")
        return GuestDetails(
            agent_version="fake",
            storage_handlers=(),
            extra_features=self._features,
            supports_seccomp=True,
            memory_block_bytes=0,
        )

    async def create_container(
        self,
        container_id: ContainerId,
        *,
        spec: JsonObject,
        storages: tuple[GuestStorage, ...],
        devices: tuple[GuestDevice, ...] = (),
        has_sandbox_pidns: bool,
    ) -> None:
        """Create a container."""
        del spec, storages, devices, has_sandbox_pidns
        await self._enter("create_container")
        if (container_id, None) in self.processes:
            message = f"container {container_id} exists"
            raise AlreadyExistsError(message)
        self.processes[container_id, None] = FakeProcess()

    async def start_container(self, container_id: ContainerId) -> None:
        """Let it run."""
        await self._enter("start_container")
        process = self._find(container_id, None)
        if process.exit.done():
            message = f"container {container_id} has ended"
            raise InternalError(message)
        process.is_started = True

    async def remove_container(self, container_id: ContainerId, *, timeout_s: int) -> None:
        """Kill and forget it."""
        del timeout_s
        await self._enter("remove_container")
        self._find(container_id, None)
        for key in [key for key in self.processes if key[0] == container_id]:
            self.processes.pop(key).end(128 + _SIGKILL)

    async def exec_process(
        self, container_id: ContainerId, exec_id: ExecId, *, process: JsonObject
    ) -> None:
        """Run another process."""
        del process
        await self._enter("exec_process")
        if self._find(container_id, None).exit.done():
            message = f"container {container_id} has ended"
            raise InternalError(message)
        if (container_id, exec_id) in self.processes:
            message = f"exec {exec_id} exists"
            raise AlreadyExistsError(message)
        self.processes[container_id, exec_id] = FakeProcess(is_started=True)

    async def signal_process(
        self, container_id: ContainerId, exec_id: ExecId | None, signal: int
    ) -> None:
        """Deliver a signal: only SIGKILL and SIGTERM end anything."""
        await self._enter("signal_process")
        process = self._find(container_id, exec_id)
        if process.exit.done():
            message = "process has ended"
            raise NotFoundError(message)
        if signal in {_SIGKILL, _SIGTERM}:
            if exec_id is None:
                self._end_execs(container_id)
            process.end(128 + signal)

    async def wait_process(self, container_id: ContainerId, exec_id: ExecId | None) -> int:
        """Wait for an exit and forget the process, as the official agent does."""
        await self._enter("wait_process")
        process = self._find(container_id, exec_id)
        status = await self._unless_gone(process.ended())
        if exec_id is not None:
            self.processes.pop((container_id, exec_id), None)
        return status

    async def resize_terminal(
        self, container_id: ContainerId, exec_id: ExecId | None, *, rows: int, columns: int
    ) -> None:
        """Accept."""
        del rows, columns
        await self._enter("resize_terminal")
        self._find(container_id, exec_id)

    def copy_streams(
        self, container_id: ContainerId, exec_id: ExecId | None, *, streams: HostStreams
    ) -> FakeCopies:
        """Copy nothing."""
        return FakeCopies(self._find(container_id, exec_id), streams)

    async def update_container(self, container_id: ContainerId, *, resources: JsonObject) -> None:
        """Accept."""
        del resources
        await self._enter("update_container")
        self._find(container_id, None)

    async def stats_container(self, container_id: ContainerId) -> ContainerStats:
        """Return nothing used."""
        await self._enter("stats_container")
        self._find(container_id, None)
        return ContainerStats(cpu=CpuStats(), memory=MemoryStats(), pids_current=1, pids_limit=0)

    async def pause_container(self, container_id: ContainerId) -> None:
        """Freeze."""
        await self._enter("pause_container")
        self._find(container_id, None)
        self.paused.add(container_id)

    async def resume_container(self, container_id: ContainerId) -> None:
        """Thaw."""
        await self._enter("resume_container")
        self._find(container_id, None)
        self.paused.discard(container_id)

    async def oom_event(self) -> ContainerId:
        """Wait for :meth:`out_of_memory`."""
        return await self._unless_gone(self._ooms.get())

    # --- inside -------------------------------------------------------------------------------

    async def _enter(self, method: str) -> None:
        await self._unless_gone(self.gate(method))
        failure = self.failures.pop(method, None)
        if failure is not None:
            raise failure

    async def _unless_gone(self, work: Coroutine[Any, Any, _T]) -> _T:
        if self._gone.is_set():
            work.close()
            message = "connection to the fake agent is closed"
            raise AgentUnavailableError(message)
        async with Supervisor("fake agent") as supervisor:
            gone = supervisor.start(self._gone.wait(), name="gone")
            task = supervisor.start(work, name="work")
            either: set[asyncio.Future[Any]] = {task, gone}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._gone.is_set() and not task.done():
                message = "connection to the fake agent closed"
                raise AgentUnavailableError(message)
            return await task

    def _find(self, container_id: ContainerId, exec_id: ExecId | None) -> FakeProcess:
        if (container_id, None) not in self.processes:
            message = f"container {container_id} unknown"
            raise InvalidArgumentError(message)
        try:
            return self.processes[container_id, exec_id]
        except KeyError:
            message = f"exec {exec_id} unknown"
            raise NotFoundError(message) from None
