"""One process of a container, its own or an exec: its state, its exit, its streams.

            create              start                 exit
    (none) ────────▶ CREATED ─────────▶ RUNNING ───────────────▶ STOPPED ── delete ──▶ (gone)
                        │               │     ▲                     ▲
                        │         pause │     │ resume              │
                        │               ▼     │                     │
                        │             PAUSING ─▶ PAUSED ── exit ────┤
                        └─── start failed · killed · machine gone ──┘

``request`` says for each request in which states it is allowed (containerd's runc shim is the
reference); STOPPED is final, so an exit is reported exactly once. Only the loop thread gets here,
so a transition is never half done.
"""

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Final

from kata_hybrid.errors import InvalidStateError, NotFoundError, UnavailableError
from kata_hybrid.types import ContainerId, ExecId, ExitInfo, ProcessState, Stdio, TaskStatus

if TYPE_CHECKING:
    from kata_hybrid.agent.base import Agent, StreamCopies
    from kata_hybrid.agent.streams import HostStreams

_ALLOWED: Final[dict[str, frozenset[TaskStatus]]] = {
    "start": frozenset({TaskStatus.CREATED}),
    "exec": frozenset({TaskStatus.CREATED, TaskStatus.RUNNING}),
    "pause": frozenset({TaskStatus.RUNNING}),
    "resume": frozenset({TaskStatus.PAUSED}),
    "update": frozenset({TaskStatus.CREATED, TaskStatus.RUNNING, TaskStatus.PAUSED}),
    "delete": frozenset({TaskStatus.CREATED, TaskStatus.STOPPED}),
}
_NEXT: Final[dict[TaskStatus, frozenset[TaskStatus]]] = {
    TaskStatus.CREATED: frozenset({TaskStatus.RUNNING, TaskStatus.STOPPED}),
    TaskStatus.RUNNING: frozenset({TaskStatus.PAUSING, TaskStatus.STOPPED}),
    TaskStatus.PAUSING: frozenset({TaskStatus.PAUSED, TaskStatus.RUNNING, TaskStatus.STOPPED}),
    TaskStatus.PAUSED: frozenset({TaskStatus.RUNNING, TaskStatus.STOPPED}),
    TaskStatus.STOPPED: frozenset(),
}


class Process:
    """State of one process."""

    def __init__(
        self, container_id: ContainerId, exec_id: ExecId | None, *, stdio: Stdio, bundle: str
    ) -> None:
        """Begin in CREATED."""
        self.container_id = container_id
        self.exec_id = exec_id
        self.stdio = stdio
        self.bundle = bundle
        self.lock = asyncio.Lock()
        """Held while a request changes the process, so that start is reported before exit."""
        self.streams: HostStreams | None = None
        self.copies: StreamCopies | None = None
        self.window: tuple[int, int] | None = None
        """Rows and columns asked for before the process ran."""
        self.is_stdin_closed = False
        self.watcher: asyncio.Task[None] | None = None
        self._status = TaskStatus.CREATED
        self._exit: ExitInfo | None = None
        self._exited = asyncio.Event()

    def __str__(self) -> str:
        """Name the process in an error."""
        if self.exec_id is None:
            return f"container {self.container_id}"
        return f"exec {self.exec_id} of container {self.container_id}"

    @property
    def status(self) -> TaskStatus:
        """Where it is in the drawing."""
        return self._status

    @property
    def exit(self) -> ExitInfo | None:
        """How it ended, None while it has not."""
        return self._exit

    @property
    def is_stopped(self) -> bool:
        """It has ended."""
        return self._status is TaskStatus.STOPPED

    def request(self, name: str) -> None:
        """Check that a request fits the present state.

        Raises:
            InvalidStateError: it does not.
        """
        if self._status not in _ALLOWED[name]:
            raise InvalidStateError(str(self), state=self._status.name, request=name)

    def move(self, status: TaskStatus) -> None:
        """Follow an arrow of the drawing other than an exit.

        Raises:
            InvalidStateError: there is no such arrow.
        """
        if status is TaskStatus.STOPPED or status not in _NEXT[self._status]:
            raise InvalidStateError(
                str(self), state=self._status.name, request=f"move to {status.name}"
            )
        self._status = status

    def end(self, status: int, *, exited_at_ns: int | None = None) -> ExitInfo | None:
        """Record the exit, of now or of the given time, and wake who waits for it.

        Returns:
            The exit, or None if it had been recorded already.
        """
        if self.is_stopped:
            return None
        self._status = TaskStatus.STOPPED
        self._exit = ExitInfo(status=status, exited_at_ns=exited_at_ns or time.time_ns())
        self._exited.set()
        return self._exit

    async def wait(self) -> ExitInfo:
        """Wait for the exit. No deadline: the caller's own applies."""
        await self._exited.wait()
        if self._exit is None:
            message = f"{self} has no exit"
            raise AssertionError(message)
        return self._exit

    async def run(self, agent: "Agent") -> None:
        """Take note that it runs in the guest, and connect its streams.

        Raises:
            UnavailableError: it was ended meanwhile.
        """
        if self.is_stopped:
            message = f"{self} ended while it was started"
            raise UnavailableError(message)
        self.move(TaskStatus.RUNNING)
        if self.streams is not None:
            self.copies = agent.copy_streams(self.container_id, self.exec_id, streams=self.streams)
        if self.is_stdin_closed:
            self.close_stdin()
        if self.window is not None:
            rows, columns = self.window
            with contextlib.suppress(NotFoundError):
                await agent.resize_terminal(
                    self.container_id, self.exec_id, rows=rows, columns=columns
                )

    def close_stdin(self) -> None:
        """Let stdin end, now or as soon as the process runs."""
        self.is_stdin_closed = True
        if self.copies is not None:
            self.copies.close_stdin()

    def release(self) -> None:
        """Stop copies and close descriptors. Idempotent."""
        if self.copies is not None:
            self.copies.stop()
        if self.streams is not None:
            self.streams.close()

    def describe(self, *, pid: int) -> ProcessState:
        """Return what ``Task.State`` reports."""
        return ProcessState(
            container_id=self.container_id,
            exec_id=self.exec_id,
            bundle=self.bundle,
            pid=pid,
            status=self._status,
            stdio=self.stdio,
            exit=self._exit,
        )
