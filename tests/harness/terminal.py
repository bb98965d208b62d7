"""A terminal for ``ctr -t``: a pty whose size changes reach the command as ``SIGWINCH``.

Used by one test at a time, on the test thread.
"""

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from types import TracebackType
from typing import Self

from harness.deadline import DeadlineError


class Terminal:
    """Runs a command as the foreground job of a new terminal."""

    def __init__(
        self, argv: list[str], *, environment: dict[str, str], columns: int, rows: int
    ) -> None:
        self._argv = argv
        self._environment = {**environment, "TERM": "xterm"}
        self._size = (columns, rows)
        self._master = -1
        self._process: subprocess.Popen[bytes] | None = None
        self.seen = b""

    def __enter__(self) -> Self:
        """Start the command."""
        self._master, slave = pty.openpty()
        try:
            self.resize(columns=self._size[0], rows=self._size[1])
            # setsid gives the command this terminal as its controlling one (setsid --ctty).
            self._process = subprocess.Popen(
                ["setsid", "--ctty", "--wait", *self._argv],
                env=self._environment,
                stdin=slave,
                stdout=slave,
                stderr=slave,
            )
        finally:
            os.close(slave)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Hang up."""
        os.close(self._master)
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
            return
        self._process.kill()
        self._process.wait(10)

    def resize(self, *, columns: int, rows: int) -> None:
        """Give the terminal another size."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def send(self, text: str) -> None:
        """Type something."""
        os.write(self._master, text.encode())

    def expect(self, text: str, *, timeout_s: float = 30.0) -> str:
        """Read on until ``text`` was shown; return everything up to and with it.

        Raises:
            DeadlineError: it was not shown in time, or the command ended before.
        """
        deadline = time.monotonic() + timeout_s
        wanted = text.encode()
        while wanted not in self.seen:
            left = deadline - time.monotonic()
            if left <= 0 or not self._read(left):
                msg = f"terminal never showed {text!r}; it showed {self.seen!r}"
                raise DeadlineError(msg)
        head, _, self.seen = self.seen.partition(wanted)
        return (head + wanted).decode(errors="replace")

    def finish(self, *, timeout_s: float = 30.0) -> tuple[int, str]:
        """Wait for the command's end; return its status and what was shown since.

        Raises:
            DeadlineError: it goes on.
        """
        deadline = time.monotonic() + timeout_s
        while self._read(max(0.0, deadline - time.monotonic())):
            pass
        assert self._process is not None
        try:
            status = self._process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as exc:
            msg = f"command on the terminal did not end; it showed {self.seen!r}"
            raise DeadlineError(msg) from exc
        return status, self.seen.decode(errors="replace")

    def _read(self, timeout_s: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], timeout_s)
        if not ready:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: the last holder of the slave side is gone
            return False
        self.seen += data
        return bool(data)
