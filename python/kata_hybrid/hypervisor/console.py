"""Output of a machine or a daemon: a bounded tail for errors, and lines for the log.

Reads a descriptor on the event loop without a task. What the guest writes is hostile: lines are
cut, control characters replaced, and past a rate they are counted instead of logged. Nothing is
kept on disk.
"""

import asyncio
import os
from collections.abc import Callable

TAIL_BYTES = 64 << 10
_READ_BYTES = 64 << 10
_MAX_LINE_BYTES = 1024
_LINES_PER_SECOND = 200.0
_BURST_LINES = 1000.0

LineSink = Callable[[str], None]
"""Gets one printable line, without its end."""


class OutputReader:
    """Follows one descriptor to its end. Made and used on the event loop's thread."""

    def __init__(self, fd: int, *, sink: LineSink | None, tail_bytes: int = TAIL_BYTES) -> None:
        """Take over ``fd`` (readable, any kind) and start reading."""
        self._fd = fd
        self._sink = sink
        self._tail_bytes = tail_bytes
        self._tail = bytearray()
        self._line = bytearray()
        self._budget = _BURST_LINES
        self._refilled_at_s = 0.0
        self._dropped_lines = 0
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._read)

    def tail(self) -> str:
        """Return the last lines as printable text."""
        return printable_lines(bytes(self._tail))

    async def ended(self) -> None:
        """Wait until the other side has closed."""
        await self._ended.wait()

    def close(self) -> None:
        """Take what is there, then stop and close the descriptor. Idempotent."""
        if self._fd < 0:
            return
        for _ in range(self._tail_bytes // _READ_BYTES + 1):
            if not self._read():
                break
        self._finish()

    def _read(self) -> bool:
        """Read once; False when there is nothing more for now."""
        if self._fd < 0:
            return False
        try:
            chunk = os.read(self._fd, _READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            chunk = b""
        if not chunk:
            self._finish()
            return False
        self._tail.extend(chunk)
        if len(self._tail) > self._tail_bytes:
            del self._tail[: len(self._tail) - self._tail_bytes]
        self._split_lines(chunk)
        return True

    def _split_lines(self, chunk: bytes) -> None:
        if self._sink is None:
            return
        *complete, rest = chunk.split(b"\n")
        for part in complete:
            self._line.extend(part[:_MAX_LINE_BYTES])
            self._emit(bytes(self._line[:_MAX_LINE_BYTES]))
            self._line.clear()
        if len(self._line) < _MAX_LINE_BYTES:
            self._line.extend(rest[:_MAX_LINE_BYTES])

    def _emit(self, line: bytes) -> None:
        text = _printable(line)
        if self._sink is None or not text:
            return
        now_s = self._loop.time()
        elapsed_s = now_s - self._refilled_at_s
        self._budget = min(_BURST_LINES, self._budget + elapsed_s * _LINES_PER_SECOND)
        self._refilled_at_s = now_s
        # Once over the rate, silent for a second: whole stretches, not every twentieth line.
        if self._budget < (_LINES_PER_SECOND if self._dropped_lines else 1):
            self._dropped_lines += 1
            return
        self._budget -= 1
        self._report_dropped()
        self._sink(text)

    def _report_dropped(self) -> None:
        if self._sink is not None and self._dropped_lines:
            self._sink(f"[{self._dropped_lines} lines dropped]")
            self._dropped_lines = 0

    def _finish(self) -> None:
        if self._fd < 0:
            return
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1
        if self._line:
            self._emit(bytes(self._line[:_MAX_LINE_BYTES]))
            self._line.clear()
        self._report_dropped()
        self._ended.set()


def printable_lines(output: bytes) -> str:
    """Decode lines for people: see :func:`_printable`."""
    return "\n".join(_printable(line) for line in output.split(b"\n")).strip("\n")


def _printable(line: bytes) -> str:
    """Decode a line for people: no control characters, no terminal escapes."""
    text = line.decode("utf-8", "replace").replace("\t", " ").rstrip()
    return "".join(char if char.isprintable() else "\ufffd" for char in text)
