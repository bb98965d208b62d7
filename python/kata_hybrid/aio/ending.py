"""The end of something: it comes once, and is complete, whoever asks and gives up waiting."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from kata_hybrid.aio.supervisor import Supervisor


class Ending:
    """Begins ``work`` when first awaited for; every caller waits for its one end."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]], *, name: str) -> None:
        """Begin nothing yet; ``name`` appears in the log."""
        self._work = work
        self._name = name
        self._supervisor = Supervisor(name)
        self._task: asyncio.Task[None] | None = None

    @property
    def has_begun(self) -> bool:
        """Somebody has asked for it."""
        return self._task is not None

    async def __call__(self) -> None:
        """Wait for the end. A caller that is cancelled leaves it under way.

        Raises:
            Exception: whatever the work raised, to every caller.
        """
        if self._task is None:
            self._task = self._supervisor.start(self._work(), name=self._name)
        await asyncio.shield(self._task)
