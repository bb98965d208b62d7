"""The test guest in some monitor's machine: driven over vsock, the same way in each.

The machine is a process that is killed in the end; what it prints goes to the benchmark's log.
Commands go to the guest's ``program.c``, whose protocol ``lab_guest.machine`` has too.
"""

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from monitors import GUEST_CID

from lab_guest.machine import COMMAND_PORT, Answer, dial

_BOOT_TIMEOUT_S = 120.0
_BOOT_PAUSE_S = 0.2
_CALL_TIMEOUT_S = 60.0
_ERROR_CHARACTERS = 500

Dial = Callable[[int], socket.socket]


class GuestError(Exception):
    """A machine or a command in it failed; the text says how."""


@dataclass(frozen=True, slots=True)
class Guest:
    """A guest that runs."""

    dial: Dial
    """Connects to a port of it; an ``OSError`` where nobody listens."""

    def run(self, script: str, *, timeout_s: float = _CALL_TIMEOUT_S) -> str:
        """Run a shell script in the guest and give its output, without the space around it.

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
        answer = Answer.parse(received)
        if answer.status != "0":
            output = answer.output[-_ERROR_CHARACTERS:]
            raise GuestError(f"{script}: status {answer.status or 'unknown'}: {output}")
        return answer.output


@contextlib.contextmanager
def booted(command: list[str], *, dial: Dial, log: Path) -> Iterator[Guest]:
    """Run a monitor until its guest takes commands, and kill it in the end.

    Raises:
        GuestError: it ended first, or is not there in time.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            guest = Guest(dial)
            deadline = time.monotonic() + _BOOT_TIMEOUT_S
            while (error := _refusal(guest)) is not None:
                if process.poll() is not None or time.monotonic() > deadline:
                    message = f"{command[0]}: no guest: {error}; see {log}"
                    raise GuestError(message) from error
                time.sleep(_BOOT_PAUSE_S)
            yield guest
        finally:
            process.kill()
            process.wait()


def _refusal(guest: Guest) -> OSError | None:
    try:
        guest.run("true")
    except OSError as error:
        return error
    return None


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
