"""What the task service asks of a runtime, in our own values, and what a runtime reports back.

The service translates containerd's messages to these and calls; a runtime decides. Another kind
of sandbox is another implementation of :class:`Runtime`, found by name in ``registry.py``.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kata_hybrid.types import (
    ContainerId,
    ContainerStats,
    ExecId,
    ExitInfo,
    JsonObject,
    Mount,
    ProcessState,
    Stdio,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateRequest:
    """``Task.Create``."""

    container_id: ContainerId
    bundle: Path
    rootfs: tuple[Mount, ...]
    stdio: Stdio
    config_path: Path | None
    """``ConfigPath`` of the runtime options, if containerd gave one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCreated:
    """A container exists."""

    container_id: ContainerId
    bundle: str
    rootfs: tuple[Mount, ...]
    stdio: Stdio
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStarted:
    """A container's process runs."""

    container_id: ContainerId
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskExited:
    """A process ended; ``exec_id`` is None for the container's own."""

    container_id: ContainerId
    exec_id: ExecId | None
    pid: int
    exit: ExitInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDeleted:
    """A container is gone."""

    container_id: ContainerId
    pid: int
    exit: ExitInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOom:
    """The guest kernel killed in a container for lack of memory."""

    container_id: ContainerId


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecAdded:
    """An exec is registered."""

    container_id: ContainerId
    exec_id: ExecId


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecStarted:
    """An exec runs."""

    container_id: ContainerId
    exec_id: ExecId
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPaused:
    """A container is frozen."""

    container_id: ContainerId


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResumed:
    """A container is thawed."""

    container_id: ContainerId


TaskEvent = (
    TaskCreated
    | TaskStarted
    | TaskExited
    | TaskDeleted
    | TaskOom
    | ExecAdded
    | ExecStarted
    | TaskPaused
    | TaskResumed
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxRequest:
    """``Sandbox.CreateSandbox``: a pod's sandbox that is to be there before its containers."""

    bundle: Path
    hostname: str = ""
    resolver: tuple[str, ...] = ()
    """Lines of resolv.conf(5)."""
    network: str = ""
    """Path of the pod's network namespace; empty: it is to have no network."""
    annotations: dict[str, str] = field(default_factory=dict)
    sysctls: dict[str, str] = field(default_factory=dict)
    cgroup_parent: str = ""
    cpu_quota_us: int = 0
    cpu_period_us: int = 0
    memory_bytes: int = 0
    """The sums of what its containers are limited to; 0: no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxStatus:
    """What ``Sandbox.SandboxStatus`` reports."""

    is_ready: bool
    pid: int
    created_at_ns: int
    exit: ExitInfo | None = None


class Sandbox(Protocol):
    """A sandbox with a life of its own, for containerd's Sandbox API.

        create ──▶ start ──▶ stop (or its own end) ──▶ shutdown

    Its containers come by :class:`Runtime`. Every method but ``create`` raises NotFoundError
    before there is one.
    """

    async def create(self, request: SandboxRequest) -> None:
        """Take a description; nothing is started.

        Raises:
            AlreadyExistsError: there is one.
        """

    async def start(self) -> SandboxStatus:
        """Start it. Repeated: what it is by now."""

    async def stop(self) -> None:
        """End it, and whatever runs in it. Idempotent."""

    async def wait(self) -> ExitInfo:
        """Wait for its end."""

    def status(self) -> SandboxStatus:
        """Describe it, from memory."""

    async def shutdown(self) -> None:
        """Forget it: the shim is of no more use. Idempotent, in every state."""


class EventSink(Protocol):
    """Takes events in the order in which containerd must see them. Never blocks."""

    def emit(self, event: TaskEvent) -> None:
        """Queue ``event``."""


class Runtime(Protocol):
    """One sandbox and its containers.

    ``state``, ``pids`` and ``task_pid`` answer from memory and wait for nothing. Every method
    raises NotFoundError for a container or exec that is not there, InvalidStateError for a
    request that does not fit its state.
    """

    async def create(self, request: CreateRequest) -> int:
        """Create a container (the first one starts the sandbox) and return its task pid."""

    async def start(self, container_id: ContainerId, exec_id: ExecId | None) -> int:
        """Start a container or an exec and return its pid."""

    async def delete(
        self, container_id: ContainerId, exec_id: ExecId | None
    ) -> tuple[int, ExitInfo]:
        """Forget a process that does not run; return its pid and how it ended."""

    async def exec(
        self, container_id: ContainerId, exec_id: ExecId, *, process: JsonObject, stdio: Stdio
    ) -> None:
        """Register an exec."""

    async def kill(
        self, container_id: ContainerId, exec_id: ExecId | None, *, signal: int, is_all: bool
    ) -> None:
        """Signal a process, or all of a container's."""

    async def wait(self, container_id: ContainerId, exec_id: ExecId | None) -> ExitInfo:
        """Wait for a process to end."""

    async def pause(self, container_id: ContainerId) -> None:
        """Freeze a container."""

    async def resume(self, container_id: ContainerId) -> None:
        """Thaw a container."""

    async def resize(
        self, container_id: ContainerId, exec_id: ExecId | None, *, rows: int, columns: int
    ) -> None:
        """Set a terminal's size; remembered until the process runs."""

    async def close_stdin(self, container_id: ContainerId, exec_id: ExecId | None) -> None:
        """Let stdin end after what was written."""

    async def update(self, container_id: ContainerId, *, resources: JsonObject) -> None:
        """Change a container's limits."""

    async def stats(self, container_id: ContainerId) -> ContainerStats:
        """Read a container's resource use."""

    def state(self, container_id: ContainerId, exec_id: ExecId | None) -> ProcessState:
        """Describe a process."""

    def execs(self, container_id: ContainerId) -> tuple[ExecId, ...]:
        """List the execs of a container."""

    def task_pid(self, container_id: ContainerId) -> int:
        """Return the pid that stands for a container, 0 if it is not there."""

    @property
    def is_empty(self) -> bool:
        """No container is there."""

    @property
    def is_over(self) -> bool:
        """No container can ever be created here again."""

    async def close(self) -> None:
        """End the sandbox and release everything. Idempotent."""
