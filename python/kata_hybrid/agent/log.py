"""The agent's own log: JSON objects, a line each, read from the guest's log port.

Everything in it is the guest's word: lines are bounded in length and number, and become records
of the logger ``kata_hybrid.guest.agent`` whatever they hold.
"""

import asyncio
import json
import logging
import socket
import time
from typing import Final

_LINES_PER_SECOND: Final = 200
_MAX_LINE_BYTES: Final = 16 << 10
_LEVELS: Final = {
    "TRCE": logging.DEBUG,
    "DEBG": logging.DEBUG,
    "INFO": logging.DEBUG,
    "WARN": logging.WARNING,
    "ERRO": logging.ERROR,
    "CRIT": logging.ERROR,
}
"""The agent's *info* is about its own doings, which for the host is *debug*."""

_log = logging.getLogger("kata_hybrid.guest.agent")


async def forward(connection: socket.socket) -> None:
    """Log what arrives on ``connection``, which is taken over, until it ends."""
    connection.setblocking(False)  # noqa: FBT003 - the standard library's signature
    reader, writer = await asyncio.open_connection(sock=connection, limit=_MAX_LINE_BYTES)
    second, lines, dropped = 0, 0, 0
    try:
        while line := await _line(reader):
            now = int(time.monotonic())
            if now != second:
                if dropped:
                    _log.warning("agent log lines dropped", extra={"count": dropped})
                second, lines, dropped = now, 0, 0
            lines += 1
            if lines > _LINES_PER_SECOND:
                dropped += 1
            else:
                _record(line)
    except ConnectionError:
        pass
    finally:
        writer.close()


async def _line(reader: asyncio.StreamReader) -> bytes:
    """Read a line; of one that is too long, what fits."""
    try:
        return await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as exc:
        return exc.partial
    except asyncio.LimitOverrunError as exc:
        return await reader.readexactly(min(max(exc.consumed, 1), _MAX_LINE_BYTES))


def _record(line: bytes) -> None:
    level, message = logging.DEBUG, line.decode("utf-8", "replace").strip()
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict):
        level = _LEVELS.get(str(record.get("level")), logging.DEBUG)
        message = str(record.get("msg", message))
    _log.log(level, "%s", message)
