"""Where log records go: the bundle's ``log`` FIFO as logfmt, or standard error as JSON.

containerd reads the FIFO and copies it to its own log. It may be slow, restarting or absent, and
none of that may hold up a container: the FIFO is opened non-blocking, what does not fit is dropped
and counted, and a vanished reader is looked for again at most once a second. SIGPIPE must be
ignored by the process. Extra fields of a record (``extra={...}``) become its keys.
"""

import contextlib
import errno
import json
import logging
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from kata_hybrid.observability.context import current_fields

_LEVELS: Final = {
    logging.DEBUG: "debug",
    logging.INFO: "info",
    logging.WARNING: "warning",
    logging.ERROR: "error",
    logging.CRITICAL: "fatal",
}
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_REOPEN_INTERVAL_S: Final = 1.0
_MAX_RECORD_BYTES: Final = 16384
_NEEDS_QUOTES: Final = frozenset(' ="\\')
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False)


def configure(*, fifo: Path | None, is_debug: bool) -> None:
    """Send every logger's records to ``fifo`` as logfmt, or to standard error as JSON."""
    handler: logging.Handler
    if fifo is None:
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter())
    else:
        handler = FifoHandler(fifo)
        handler.setFormatter(LogfmtFormatter())
    root = logging.getLogger()
    for old in tuple(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if is_debug else logging.INFO)
    logging.raiseExceptions = False
    # Their debug records are about their own insides.
    for name in ("asyncio", "grpc"):
        logging.getLogger(name).setLevel(logging.INFO)


def record_fields(record: logging.LogRecord) -> dict[str, object]:
    """Return what a record says, in the order it is written."""
    when = datetime.fromtimestamp(record.created, tz=UTC)
    fields: dict[str, object] = {
        "time": when.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "level": _LEVELS.get(record.levelno, record.levelname.lower()),
        "msg": record.getMessage(),
        "logger": record.name.removeprefix("kata_hybrid."),
        **current_fields(),
    }
    fields.update((key, value) for key, value in vars(record).items() if key not in _STANDARD)
    if record.exc_info:
        fields["trace"] = logging.Formatter().formatException(record.exc_info)
    return fields


class LogfmtFormatter(logging.Formatter):
    """``time=… level=… msg="…" key=value``, one line whatever the values hold."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        return " ".join(f"{key}={_quote(value)}" for key, value in record_fields(record).items())


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        return json.dumps(record_fields(record), default=str, ensure_ascii=False)


class FifoHandler(logging.Handler):
    """Writes lines to a FIFO without ever waiting for its reader."""

    def __init__(self, path: Path) -> None:
        """Write to ``path``, opened with the first record."""
        super().__init__()
        # Relative to the present directory, which may be left or removed later.
        self._path = path.absolute()
        self._fd = -1
        self._next_open = 0.0
        self._is_inside_line = False
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """Records lost since the last one that got through."""
        return self._dropped

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, or count it as dropped."""
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - a bad record must not fail what it reports
            line = f"level=error msg={_quote(f'unprintable log record from {record.name}')}"
        if self._dropped:
            line += f" dropped={self._dropped}"
        data = line.encode("utf-8", "replace")[:_MAX_RECORD_BYTES] + b"\n"
        # Once more after a vanished reader: containerd may have reopened the FIFO already.
        if self._write(data) or self._write(data):
            self._dropped = 0
        else:
            self._dropped += 1

    def close(self) -> None:
        """Close the FIFO."""
        self._close_fifo()
        super().close()

    def _write(self, data: bytes) -> bool:
        if not self._open():
            return False
        pending = memoryview(b"\n" + data if self._is_inside_line else data)
        try:
            while pending:
                pending = pending[os.write(self._fd, pending) :]
                self._is_inside_line = bool(pending)
        except BlockingIOError:
            # Full: the reader is slow, or holds the FIFO open without reading.
            return False
        except OSError as exc:
            self._close_fifo()
            # Try at once only after a broken pipe, not after, say, EIO.
            self._next_open = 0.0 if exc.errno == errno.EPIPE else self._later()
            return False
        return True

    def _open(self) -> bool:
        if self._fd >= 0:
            return True
        if time.monotonic() < self._next_open:
            return False
        self._next_open = self._later()
        try:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False  # ENXIO: nobody reads it now.
        self._is_inside_line = False
        return True

    @staticmethod
    def _later() -> float:
        return time.monotonic() + _REOPEN_INTERVAL_S

    def _close_fifo(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


def _quote(value: object) -> str:
    text = value if isinstance(value, str) else str(value)
    if text and text.isascii() and text.isprintable() and _NEEDS_QUOTES.isdisjoint(text):
        return text
    return _ENCODER.encode(text)
