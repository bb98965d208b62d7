"""The test guest in some monitor's machine: driven over vsock, the same way in each.

The machine is a process that is killed in the end; what it prints goes to the benchmark's log.
Commands go to the guest's ``program.c``, whose protocol ``lab_guest.machine`` has too.
"""

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from monitors import GUEST_CID

from lab_guest.machine import COMMAND_PORT, dial

_BOOT_TIMEOUT_S = 120.0
_CALL_TIMEOUT_S = 60.0
_ERROR_CHARACTERS = 500

Dial = Callable[[int], socket.socket]


class GuestError(Exception):
    """A machine or a command in it failed; the text says how."""


class Guest:
    """A machine with the test guest, from entering its context to leaving it."""

    def __init__(self, command: list[str], *, dialled: Dial, log: Path) -> None:
        """Describe it; nothing is started."""
        self._command = command
        self._log = log
        self._stack = contextlib.ExitStack()
        self.dial = dialled
        """Connects to a port of the guest; an ``OSError`` where nobody listens."""

    def __enter__(self) -> Self:
        try:
            log = self._stack.enter_context(self._log.open("ab"))
            process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            self._stack.callback(process.wait)
            self._stack.callback(process.kill)
            self._wait(process)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until it takes commands."""
        deadline = time.monotonic() + _BOOT_TIMEOUT_S
        while True:
            try:
                self.run("true")
            except OSError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    message = f"{self._command[0]}: no guest: {error}; see {self._log}"
                    raise GuestError(message) from error
                time.sleep(0.2)
            else:
                return

    def run(self, script: str, *, timeout_s: float = _CALL_TIMEOUT_S) -> str:
        """Run a shell script in the guest and give its output.

        Raises:
            OSError: the guest does not answer.
            GuestError: the script failed.
        """
        with self.dial(COMMAND_PORT) as connection:
            connection.settimeout(timeout_s)
            connection.sendall(script.encode())
            connection.shutdown(socket.SHUT_WR)
            received = bytearray()
            while data := connection.recv(65536):
                received += data
        output, _, status = received.decode(errors="replace").rstrip().rpartition("\n")
        if status != "status 0":
            raise GuestError(f"{script}: {status}: {output[-_ERROR_CHARACTERS:]}")
        return output.strip()


def hybrid(path: Path) -> Dial:
    """Dial through our machine's socket."""

    def connect(port: int) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        try:
            dial(connection, path, port, timeout_s=_CALL_TIMEOUT_S)
        except BaseException:
            connection.close()
            raise
        return connection

    return connect


def vhost(port: int) -> socket.socket:
    """Dial through the host's kernel, to QEMU's guest."""
    connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        connection.settimeout(_CALL_TIMEOUT_S)
        connection.connect((GUEST_CID, port))
    except BaseException:
        connection.close()
        raise
    return connection
