"""Exits: each process has one watcher, which waits in the guest and reports the exit once.

Order is what containerd relies on: a start is reported before its exit (both hold the process's
lock), and every exec's exit before its container's. When the guest is gone, every process is ended
with :data:`LOST_STATUS`, so nobody waits for ever.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Container as Collection
from typing import Final

from kata_hybrid.aio.supervisor import Supervisor
from kata_hybrid.errors import KataError
from kata_hybrid.runtimes.base import EventSink, TaskExited, TaskOom
from kata_hybrid.runtimes.virt.container import Container
from kata_hybrid.runtimes.virt.guest import WAIT_KEEPS_OUTPUT, Guest
from kata_hybrid.runtimes.virt.process import Process
from kata_hybrid.types import ContainerId

_log = logging.getLogger(__name__)

LOST_STATUS: Final = 255
"""Exit status of a process whose guest is gone."""
KILLED_STATUS: Final = 137
DRAIN_TIMEOUT_S: Final = 5.0
"""How long an end waits for output that nobody reads."""
REPORT_DELAY_S: Final = 2.0
"""How long the report of an exit waits for output that is on its way."""
EXEC_END_TIMEOUT_S: Final = 4.0
"""Execs die with their container; how long their own exits may take to arrive first."""


class Exits:
    """Watches the processes of one sandbox."""

    def __init__(self, events: EventSink, *, pid: Callable[[], int]) -> None:
        """Report to ``events``; ``pid`` is the one that stands for the guest's processes."""
        self._events = events
        self._pid = pid
        self._supervisor = Supervisor("exits")

    def watch(self, guest: Guest, container: Container, process: Process) -> None:
        """Begin to wait for a process, unless that has begun."""
        if process.watcher is None:
            process.watcher = self._supervisor.start(
                self._watch(guest, container, process), name=f"watcher of {process}"
            )

    def watch_oom(self, guest: Guest, containers: Collection[ContainerId]) -> None:
        """Report memory kills in those of ``containers`` for as long as the guest answers."""
        self._supervisor.start(self._report_oom(guest, containers), name="oom watcher")

    async def _report_oom(self, guest: Guest, containers: Collection[ContainerId]) -> None:
        while True:
            try:
                container_id = await guest.agent.oom_event()
            except KataError as exc:
                _log.debug("no more oom events", extra={"error": str(exc)})
                return
            if container_id in containers:
                self._events.emit(TaskOom(container_id=container_id))

    async def _watch(self, guest: Guest, container: Container, process: Process) -> None:
        keeps_output = WAIT_KEEPS_OUTPUT in guest.details.extra_features
        status = LOST_STATUS
        try:
            if process.copies is not None and not keeps_output:
                # This agent drops what is unread when the exit is collected: read to the end first.
                await process.copies.drained()
            status = await guest.agent.wait_process(process.container_id, process.exec_id)
        except KataError as exc:
            _log.warning("wait failed", extra={"subject": str(process), "error": str(exc)})
        exited_at_ns = time.time_ns()
        if process.copies is not None:
            # Clients exist that stop reading when they learn of the exit: what was written first.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_DELAY_S):
                    await process.copies.drained()
        await self._ended(container, process, status, exited_at_ns=exited_at_ns)

    async def _ended(
        self,
        container: Container,
        process: Process,
        status: int,
        *,
        exited_at_ns: int | None = None,
    ) -> None:
        if process.exec_id is None:
            await self.end_execs(container)
        async with process.lock:
            ended = process.end(status, exited_at_ns=exited_at_ns)
        if ended is not None:
            self._events.emit(
                TaskExited(
                    container_id=process.container_id,
                    exec_id=process.exec_id,
                    pid=self._pid(),
                    exit=ended,
                )
            )

    async def end_execs(self, container: Container) -> None:
        """See to it that every exec of a container that ends has ended, and is reported."""
        running = [
            process.watcher
            for process in container.execs.values()
            if process.watcher is not None and not process.is_stopped
        ]
        if running:
            await asyncio.wait(running, timeout=EXEC_END_TIMEOUT_S)
        for process in container.execs.values():
            if process.watcher is not None and not process.is_stopped:
                await self._ended(container, process, KILLED_STATUS)

    async def end_all(self, containers: Iterable[Container], status: int = LOST_STATUS) -> None:
        """End everything: the guest is gone, or never came."""
        for container in containers:
            for process in (*container.execs.values(), container.process):
                if process.copies is not None:
                    process.copies.stop()
                if process.watcher is not None or process.exec_id is None:
                    await self._ended(container, process, status)
                else:
                    process.end(status)

    def bound_drain(self, process: Process) -> None:
        """After a kill, give readers a while; then the exit must not wait for them."""
        if process.copies is not None:
            self._supervisor.start(self._stop_copies(process), name=f"drain of {process}")

    async def _stop_copies(self, process: Process) -> None:
        if not await self.drain(process) and process.copies is not None:
            process.copies.stop()

    async def drain(self, process: Process) -> bool:
        """Wait a bounded time until a process's output is delivered, and say whether it is."""
        if process.copies is None:
            return True
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                await process.copies.drained()
        except TimeoutError:
            _log.warning("output dropped: nobody reads it", extra={"subject": str(process)})
            return False
        return True

    async def close(self) -> None:
        """Stop watching. Idempotent."""
        await self._supervisor.close()
