"""Waiting for a line on a guest's console, without polling: the log is where the lines go."""

import asyncio
import logging
from types import TracebackType
from typing import Self

_LOGGER = logging.getLogger("kata_hybrid.guest.console")


class ConsoleWatch(logging.Handler):
    """Knows when a text has been on the console since this context was entered."""

    def __init__(self, text: str) -> None:
        super().__init__(logging.INFO)
        self._text = text
        self._seen = asyncio.Event()

    def __enter__(self) -> Self:
        self._level_before = _LOGGER.level
        _LOGGER.setLevel(logging.INFO)
        _LOGGER.addHandler(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _LOGGER.removeHandler(self)
        _LOGGER.setLevel(self._level_before)

    def emit(self, record: logging.LogRecord) -> None:
        if self._text in str(getattr(record, "line", "")):
            self._seen.set()

    async def seen(self) -> None:
        """Wait; the caller sets the deadline."""
        await self._seen.wait()
