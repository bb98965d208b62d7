"""Owns background tasks: each has a name, its failure is logged once, none outlives the owner.

Used where a ``TaskGroup`` does not fit because the tasks come and go independently, such as one
per request. The only place that calls ``create_task``. Event loop thread only.
"""

import asyncio
import logging
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Final, Self, TypeVar

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_CANCEL_S: Final = 10.0


class Supervisor:
    """A set of running tasks."""

    def __init__(self, name: str) -> None:
        """Own nothing yet; ``name`` appears in the log."""
        self._name = name
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    def __len__(self) -> int:
        """Return how many tasks run."""
        return len(self._tasks)

    async def __aenter__(self) -> Self:
        """Enter; leaving closes."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Cancel what runs."""
        await self.close()

    def start(
        self, work: Coroutine[Any, Any, _T], *, name: str, is_awaited: bool = False
    ) -> asyncio.Task[_T]:
        """Run ``work`` as a task.

        Its exception, if any, is logged here, unless it ``is_awaited``: then whoever waits gets it.

        Raises:
            RuntimeError: the supervisor is closed; ``work`` has been closed.
        """
        if self._is_closed:
            work.close()
            msg = f"supervisor {self._name} is closed"
            raise RuntimeError(msg)
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._hear if is_awaited else self._forget)
        return task

    async def drained(self) -> None:
        """Wait until no task runs."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Cancel every task and wait until they have ended. Idempotent.

        One that does not end within ten seconds is logged and left behind.
        """
        self._is_closed = True
        others = self._tasks - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            _, stuck = await asyncio.wait(others, timeout=_CANCEL_S)
            for task in stuck:
                _LOG.error("task does not end", extra={"task": task.get_name()})

    def _hear(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # Whoever gave up waiting does not make it news.

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error(
                "task failed",
                extra={"task": task.get_name(), "owner": self._name},
                exc_info=error,
            )
