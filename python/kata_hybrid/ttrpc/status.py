"""Exceptions to status codes: the only place that reads ``KataError.code``.

containerd chooses its error class by the code alone and passes the message on, so the message of
one of our errors goes out as it is. What is not ours is a bug: it is logged with its trace and
goes out as INTERNAL. The way back is ``errors.error_from_code``.
"""

import asyncio
import logging
from typing import Final

from kata_hybrid.errors import InternalError, KataError

OK: Final = 0
CANCELLED: Final = 1
UNKNOWN: Final = 2

_LOG = logging.getLogger(__name__)


def status_of(error: BaseException) -> tuple[int, str]:
    """Return the status code and message that tell a client of ``error``.

    Logs anything that is not one of our errors, since nobody else will.
    """
    if isinstance(error, KataError):
        return error.code, message_of(error)
    if isinstance(error, asyncio.CancelledError):
        return CANCELLED, "cancelled"
    _LOG.error("unexpected error in a handler", exc_info=error)
    return InternalError.code, f"{type(error).__name__}: {error}"


def message_of(error: BaseException) -> str:
    """Return the text of ``error`` and of its explicit causes, outermost first."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        text = str(current) or type(current).__name__
        if not parts or not parts[-1].endswith(text):
            parts.append(text)
        current = current.__cause__
    return ": ".join(parts)
