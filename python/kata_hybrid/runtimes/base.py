"""What the task service asks of a runtime, in our own values, and what a runtime reports back.

The service translates containerd's messages to these and calls; a runtime decides. Another kind
of sandbox is another implementation of :class:`Runtime`, found by name in ``registry.py``.
"""

from dataclasses import dataclass
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
