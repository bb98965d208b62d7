"""One machine with the test guest: its devices, commands in it, its end, and that nothing is left.

    with Machine(image, run_dir) as machine:
        machine.vm.add_disk(id="data", path=path)
        machine.start()
        assert machine.run("cat /sys/block/vda/serial") == "data"

Commands go over vsock to the guest's ``program.c``; the console is watched through a pipe. Plain
blocking calls, each with a deadline: nothing else happens in the process meanwhile.
"""

import os
import secrets
import select
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from harness.deadline import wait_until
from kata_hybrid._native import events, vmm
from lab_guest.image import GuestImage
from open_descriptors import open_descriptors

COMMAND_PORT = 1
BOOT_TIMEOUT_S = 60.0
# Fewer probes and self-tests: the guest is emulated twice over. `guest_root` is init.sh's.
KERNEL_PARAMETERS = (
    "console=ttyS0 quiet reboot=k panic=-1 pci=off cryptomgr.notests noreplace-smp nokaslr"
    " norandmaps mitigations=off tsc=reliable no_timer_check audit=0"
)
_STATUS = "status "
_EXITED_TOKEN = 1
_LOG_TOKEN = 2


class GuestError(Exception):
    """A command in the guest failed or had no answer; the text has the console's end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftovers:
    """What a machine could leave in this process."""

    descriptors: frozenset[str]
    threads: frozenset[str]

    @classmethod
    def now(cls) -> Self:
        """Look."""
        threads = frozenset(path.name for path in Path("/proc/self/task").iterdir())
        return cls(descriptors=frozenset(open_descriptors()), threads=threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the guest sends for a command: its output, then a line with its status."""

    output: str
    """Without the space around it."""
    status: str | None
    """None where the connection ended before that line."""

    @classmethod
    def parse(cls, received: bytes | bytearray) -> Self:
        """Take all that came until the end of the connection."""
        text = received.decode(errors="replace")
        output, _, last = text.rstrip().rpartition("\n")
        if not last.startswith(_STATUS):
            return cls(output=text.strip(), status=None)
        return cls(output=output.strip(), status=last.removeprefix(_STATUS))


class Running:
    """A command that runs in the guest."""

    def __init__(self, machine: "Machine", connection: socket.socket, script: str) -> None:
        """Read what comes from ``connection``, which is closed at the end."""
        self._machine = machine
        self._connection = connection
        self._script = script

    def wait(self, *, timeout_s: float) -> str:
        """Wait for its end and give its output, without the space around it.

        Raises:
            GuestError: its status is not 0, or it is not done in time.
        """
        deadline = time.monotonic() + timeout_s
        received = bytearray()
        try:
            with self._connection as connection:
                while data := _receive(connection, deadline):
                    received += data
        except OSError as error:
            self._machine.is_in_doubt = True
            raise self._failed(str(error) or "no answer", received) from error
        answer = Answer.parse(received)
        if answer.status is None:
            self._machine.is_in_doubt = True
            raise self._failed("no status", received)
        if answer.status != "0":
            raise self._failed(f"status {answer.status}", received)
        return answer.output

    def close(self) -> None:
        """Give up on it."""
        self._connection.close()

    def _failed(self, what: str, received: bytearray) -> GuestError:
        output = received.decode(errors="replace")
        return GuestError(
            f"{self._script}\n--> {what}\n{output}\n--- console\n{self._machine.console_tail()}"
        )


class Machine:
    """A machine with the test guest. Its devices are added to ``vm`` before the start."""

    def __init__(
        self,
        image: GuestImage,
        run_dir: Path,
        *,
        vcpu_count: int = 1,
        memory_mib: int = 512,
        has_host_root: bool = True,
    ) -> None:
        """Describe a machine whose socket is in ``run_dir``; nothing of KVM exists yet."""
        self._before = Leftovers.now()
        # Machines share the folder: each has a name of its own in it.
        self.socket = run_dir / f"vsock-{secrets.token_hex(4)}"
        self._port = events.EventPort()
        self.warnings: list[str] = []
        self.balloon: vmm.Balloon | None = None
        self.is_in_doubt = False
        """A command had no answer: who shares the machine should not use it further."""
        self._has_exited = False
        self._console, console_end = os.pipe()
        self._seen = b""
        parameters = KERNEL_PARAMETERS + (" guest_root=host" if has_host_root else "")
        config = vmm.VmConfig(
            kernel=image.kernel,
            initrd=image.initrd,
            command_line=parameters,
            vcpu_count=vcpu_count,
            memory_mib=memory_mib,
        )
        self._vm: vmm.Vm | None = vmm.Vm(
            config,
            self._port,
            exited_token=_EXITED_TOKEN,
            log_token=_LOG_TOKEN,
            console_fd=console_end,
        )
        self.vm.add_vsock(socket_path=self.socket)
        self.vm.add_rng()
        if has_host_root:
            self.vm.add_folder(tag="host-root", folder="/", cache="always", is_read_only=True)

    @property
    def vm(self) -> vmm.Vm:
        """The machine itself, until :meth:`close`."""
        assert self._vm is not None, "the machine is closed"
        return self._vm

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The frames of an error keep what they were working with.
        self.close(is_checked=error is None)

    def start(self) -> None:
        """Boot, and wait until the guest takes commands.

        Raises:
            GuestError: it does not.
        """
        self.vm.start()
        self.wait_console("test guest: ready", timeout_s=BOOT_TIMEOUT_S)

    def restore(self, folder: Path) -> None:
        """Become the machine of a snapshot, and run."""
        self.vm.restore(folder)
        self.vm.resume()

    def run(self, script: str, *, timeout_s: float = 30.0) -> str:
        """Run a shell script in the guest and give its output, without the space around it.

        Raises:
            GuestError: its status is not 0, or it is not done in time.
        """
        return self.begin(script).wait(timeout_s=timeout_s)

    def begin(self, script: str, *, timeout_s: float = 30.0) -> Running:
        """Start a shell script in the guest.

        Raises:
            GuestError: the guest does not take it.
        """
        connection = socket.socket(socket.AF_UNIX)
        try:
            dial(connection, self.socket, COMMAND_PORT, timeout_s=timeout_s)
            connection.sendall(script.encode())
            connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            connection.close()
            self.is_in_doubt = True
            message = f"{script}\n--> not taken: {error}\n--- console\n{self.console_tail()}"
            raise GuestError(message) from error
        return Running(self, connection, script)

    def mount(self, *tags: str) -> None:
        """Mount folders, each at ``/run/TAG`` of the guest."""
        self.run(
            f"for tag in {' '.join(tags)}; do"
            " mkdir -p /run/$tag && mount -t virtiofs $tag /run/$tag || exit 1; done"
        )

    def wait_console(self, text: str, *, timeout_s: float) -> None:
        """Wait until the guest has printed ``text``.

        Raises:
            GuestError: it did not in time, or ended without.
        """
        deadline = time.monotonic() + timeout_s
        wanted = text.encode()
        while wanted not in self._seen:
            left = deadline - time.monotonic()
            watched = (self._console, self._port.fileno())
            readable, _, _ = select.select(watched, (), (), max(0.0, left))
            if self._console in readable:
                self._seen = self._seen[-len(wanted) :] + os.read(self._console, 65536)
                continue
            self._take_events()
            if not readable or self._has_exited:
                why = self.vm.exit if readable else "not in time"
                message = f"{text!r} was not on the console: {why}\n{self.console_tail()}"
                raise GuestError(message)

    def wait_exit(self, *, timeout_s: float) -> vmm.VmExit:
        """Wait for the machine's own end.

        Raises:
            GuestError: it goes on.
        """
        deadline = time.monotonic() + timeout_s
        while not self._has_exited:
            left = max(0.0, deadline - time.monotonic())
            if not select.select((self._port.fileno(),), (), (), left)[0]:
                message = f"the machine did not end\n{self.console_tail()}"
                raise GuestError(message)
            self._take_events()
        exit_ = self.vm.exit
        assert exit_ is not None
        return exit_

    def _take_events(self) -> None:
        for event in self._port.drain():
            if event.token == _EXITED_TOKEN:
                self._has_exited = True
            else:
                self.warnings.append(event.message)

    @property
    def is_running(self) -> bool:
        """It was started and has not ended."""
        return self._vm is not None and self.vm.state in {"running", "paused"}

    def console_tail(self) -> str:
        """Give the last of what the guest printed."""
        return self.vm.console_tail().decode(errors="replace")

    def counters(self, kind: str, name: str | None = None) -> dict[str, int]:
        """Counters of the device of this kind, and of this name if there are several."""
        (found,) = [
            device.counters
            for device in self.vm.metrics()
            if device.kind == kind and name in {None, device.name}
        ]
        return found

    def close(self, *, is_checked: bool = True) -> None:
        """End the machine and check that nothing of it is left. Idempotent."""
        if self._vm is None:
            return
        self._vm.stop()
        self._take_events()
        assert self._has_exited, "its end was not reported"
        os.close(self._console)
        # The eventfd goes with the port, the other end of the console with the machine.
        self._vm = None
        del self._port
        if not is_checked:
            return
        after = Leftovers.now()
        left = after.descriptors - self._before.descriptors
        named = {number: Path(f"/proc/self/fd/{number}").readlink() for number in left}
        assert not named, f"the machine left descriptors open: {named}"
        # A thread that was joined is to be seen a moment longer.
        wait_until(
            lambda: Leftovers.now().threads <= self._before.threads,
            what="the machine's threads end",
        )
        assert not self.socket.exists(), "the machine left its socket"


def dial(connection: socket.socket, path: Path, port: int, *, timeout_s: float) -> None:
    """Connect to a port of the guest through the machine's socket.

    Raises:
        OSError: nobody listens there.
    """
    connection.settimeout(timeout_s)
    connection.connect(os.fspath(path))
    connection.sendall(b"CONNECT %d\n" % port)
    answer = bytearray()
    # One byte at a time: what follows the line belongs to the stream.
    while not answer.endswith(b"\n"):
        data = connection.recv(1)
        if not data:
            message = f"port {port} of the guest: refused"
            raise ConnectionRefusedError(message)
        answer += data


def _receive(connection: socket.socket, deadline: float) -> bytes:
    connection.settimeout(max(0.001, deadline - time.monotonic()))
    return connection.recv(65536)
