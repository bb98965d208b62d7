"""QEMU as a machine monitor: one child process, its monitor, its console, its last words.

Owned by one sandbox, used on the event loop's thread. Nothing here runs in the background: output
is read by descriptor callbacks, and whoever awaits :meth:`QemuHypervisor.exited` does the waiting.

    new ──start──▶ running ──process gone──▶ exited
     └──────────────── stop ───────────────────▲
"""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

from kata_hybrid.aio.process import Process, ProcessReaper
from kata_hybrid.errors import InvalidArgumentError, InvalidStateError, KataError, VmmError
from kata_hybrid.hypervisor.base import MachineConfig, check_serial
from kata_hybrid.hypervisor.console import OutputReader
from kata_hybrid.hypervisor.qemu_command import (
    Accelerator,
    QemuMachine,
    build_command,
    disk_pci_path,
    network_pci_path,
    plugged_disk,
    plugged_pci_path,
)
from kata_hybrid.hypervisor.qmp import ExitCauses, Monitor
from kata_hybrid.hypervisor.vsock import (
    USER_GUEST_CID,
    KernelVsock,
    UserVsock,
    VsockBackend,
    VsockBackendFactory,
    free_hybrid_path,
    hybrid_address,
    open_kernel_vsock,
)
from kata_hybrid.types import (
    BlockDevice,
    FolderDevice,
    GuestDisk,
    NetworkDevice,
    ProcessIdentity,
    VhostUserFs,
    VmExit,
)

VSOCK_SOCKET = "vhost-user-vsock.sock"
_MONITOR_TIMEOUT_S = 30.0
_COMMAND_TIMEOUT_S = 30.0
_UNPLUG_TIMEOUT_S = 10.0
"""For the guest's kernel to take its part."""
_STOP_TIMEOUT_S = 10.0
_LAST_WORDS_TIMEOUT_S = 2.0
"""How long after the process is gone its streams may take to end."""
_STDERR_TAIL_BYTES = 8 << 10
_PANIC_MARK = "Kernel panic - not syncing"

_console_log = logging.getLogger("kata_hybrid.guest.console")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuSettings:
    """How to run QEMU on this host: from the configuration and the probe."""

    program: Path
    accelerator: Accelerator
    has_kernel_vsock: bool
    machine_type: str = "q35"
    machine_options: str = ""
    cpu_features: str = ""
    entropy_source: Path = Path("/dev/urandom")


class QemuHypervisor:
    """One virtual machine run by QEMU (implements ``Hypervisor``)."""

    def __init__(
        self,
        machine: MachineConfig,
        *,
        settings: QemuSettings,
        reaper: ProcessReaper,
        vsock_backend: VsockBackendFactory,
    ) -> None:
        """Describe a machine; nothing is started.

        ``vsock_backend`` is called when the host has no vhost-vsock.
        """
        self._machine = machine
        self._settings = settings
        self._reaper = reaper
        self._start_backend = vsock_backend
        self._folders: list[VhostUserFs] = []
        self._disks: list[BlockDevice] = []
        self._networks: list[NetworkDevice] = []
        self._resources = contextlib.ExitStack()
        self._kernel_vsock: KernelVsock | None = None
        self._vsock_backend: VsockBackend | None = None
        self._process: Process | None = None
        self._causes = ExitCauses()
        self._monitor = Monitor(self._causes)
        self._console: OutputReader | None = None
        self._stderr: OutputReader | None = None
        self._began = asyncio.Event()
        self._is_started = False
        self._has_resumed = False
        self._is_stopping = False
        self._plugged: dict[str, int] = {}
        """Disks that came while it runs, and their places."""
        self._exit: VmExit | None = None

    @property
    def name(self) -> str:
        """``qemu (tcg)`` or ``qemu (kvm)``."""
        return f"qemu ({self._settings.accelerator.value})"

    @property
    def agent_address(self) -> str:
        """Where the guest's vsock ports are reached."""
        if not self._settings.has_kernel_vsock:
            return hybrid_address(self._machine.run_dir)
        if self._kernel_vsock is None:
            raise InvalidStateError(self._machine.name, state="new", request="get the CID of")
        return f"vsock://{self._kernel_vsock.guest_cid}"

    @property
    def processes(self) -> tuple[ProcessIdentity, ...]:
        """The QEMU process, once it is started."""
        return () if self._process is None else (self._process.identity,)

    @property
    def task_pid(self) -> int:
        """The QEMU process's pid."""
        if self._process is None:
            raise InvalidStateError(self._machine.name, state="new", request="get the pid of")
        return self._process.pid

    def add_shared_folder(self, folder: FolderDevice) -> None:
        """Give the guest a virtio-fs device that a daemon serves. Before ``start``."""
        self._refuse_if_started("add a shared folder to")
        if not isinstance(folder, VhostUserFs):
            message = f"shared folder {folder.tag}: QEMU needs a daemon to serve it"
            raise InvalidArgumentError(message)
        self._folders.append(folder)

    async def add_disk(self, disk: BlockDevice) -> GuestDisk:
        """Give the guest a virtio-blk device, found by its PCI path."""
        check_serial(disk.id)
        if self._is_running:
            return await self._plug(disk)
        self._refuse_if_started("add a disk to")
        pci_path = disk_pci_path(len(self._disks))
        self._disks.append(disk)
        return GuestDisk(driver="blk", source=pci_path)

    async def _plug(self, disk: BlockDevice) -> GuestDisk:
        used = self._plugged.values()
        index = next(index for index in itertools.count() if index not in used)
        backend, device = plugged_disk(disk, index)
        self._plugged[disk.id] = index
        try:
            await self._monitor.execute("blockdev-add", backend, timeout_s=_COMMAND_TIMEOUT_S)
        except BaseException:
            del self._plugged[disk.id]
            raise
        try:
            await self._monitor.execute("device_add", device, timeout_s=_COMMAND_TIMEOUT_S)
        except BaseException:
            with contextlib.suppress(KataError):
                await self.remove_disk(disk.id)
            raise
        return GuestDisk(driver="blk", source=plugged_pci_path(index))

    async def remove_disk(self, disk_id: str) -> None:
        """Have the guest let a device go, then close what is behind it."""
        if disk_id not in self._plugged or not self._is_running:
            return
        await self._monitor.remove_device(disk_id, timeout_s=_UNPLUG_TIMEOUT_S)
        await self._monitor.execute(
            "blockdev-del", {"node-name": disk_id}, timeout_s=_COMMAND_TIMEOUT_S
        )
        del self._plugged[disk_id]

    @property
    def _is_running(self) -> bool:
        is_over = self._exit is not None or self._is_stopping
        return self._has_resumed and not is_over

    def add_network(self, device: NetworkDevice) -> str:
        """Give the guest a virtio-net device, found by its PCI path. Before ``start``."""
        self._refuse_if_started("add a network card to")
        pci_path = network_pci_path(len(self._networks))
        self._networks.append(device)
        return pci_path

    def _refuse_if_started(self, request: str) -> None:
        if self._is_started or self._exit is not None:
            state = "running" if self._exit is None else "exited"
            raise InvalidStateError(self._machine.name, state=state, request=request)

    async def start(self) -> None:
        """Start QEMU and let the guest run.

        Raises:
            VmmError: QEMU could not start; the text has its own last words.
            InvalidStateError: it was started or stopped before.
        """
        self._refuse_if_started("start")
        self._is_started = True
        try:
            await self._launch()
            await self._monitor.execute("cont", timeout_s=_COMMAND_TIMEOUT_S)
            self._has_resumed = True
        except VmmError as error:
            await self._end_failed_start()
            raise self._with_last_words(error) from error
        except OSError as error:
            await self._end_failed_start()
            raise self._with_last_words(VmmError("start qemu", str(error))) from error
        except BaseException:
            await self._end_failed_start()
            raise

    async def _launch(self) -> None:
        vsock = self._open_vsock()
        monitor, monitor_peer = self._socket_pair()
        console, console_peer = self._socket_pair()
        stderr_read, stderr_write = os.pipe()
        self._stderr = OutputReader(stderr_read, sink=_log_stderr, tail_bytes=_STDERR_TAIL_BYTES)
        self._console = OutputReader(console.detach(), sink=_log_console)
        try:
            inherited = [monitor_peer.fileno(), console_peer.fileno()]
            if isinstance(vsock, KernelVsock):
                inherited.append(vsock.vhost_fd)
            inherited += [fd for network in self._networks for fd in network.tap_fds]
            command = build_command(
                QemuMachine(
                    machine=self._machine,
                    program=self._settings.program,
                    accelerator=self._settings.accelerator,
                    machine_type=self._settings.machine_type,
                    machine_options=self._settings.machine_options,
                    cpu_features=self._settings.cpu_features,
                    entropy_source=self._settings.entropy_source,
                    vsock=vsock,
                    folders=tuple(self._folders),
                    disks=tuple(self._disks),
                    networks=tuple(self._networks),
                    monitor_fd=monitor_peer.fileno(),
                    console_fd=console_peer.fileno(),
                )
            )
            _log.debug("qemu command", extra={"argv": command})
            self._process = await self._reaper.spawn(
                command, name="qemu", pass_fds=tuple(inherited), stderr=stderr_write
            )
        finally:
            os.close(stderr_write)
            monitor_peer.close()
            console_peer.close()
            self._began.set()
        await self._monitor.connect(monitor, timeout_s=_MONITOR_TIMEOUT_S)

    def _open_vsock(self) -> KernelVsock | UserVsock:
        if self._settings.has_kernel_vsock:
            self._kernel_vsock = open_kernel_vsock()
            self._resources.callback(os.close, self._kernel_vsock.vhost_fd)
            return self._kernel_vsock
        socket_path = self._machine.run_dir / VSOCK_SOCKET
        # Left by a shim that was killed: the folder is ours alone.
        socket_path.unlink(missing_ok=True)
        hybrid_path = free_hybrid_path(self._machine.run_dir)
        backend = self._start_backend(
            socket_path=os.fspath(socket_path),
            hybrid_path=os.fspath(hybrid_path),
            guest_cid=USER_GUEST_CID,
        )
        self._resources.callback(backend.close)
        return UserVsock(socket_path=socket_path)

    def _socket_pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        self._resources.callback(ours.close)
        return ours, theirs

    async def _end_failed_start(self) -> None:
        self._began.set()
        if self._process is None:
            self._exit = VmExit(reason="failed", detail="qemu was not started")
        else:
            self._process.kill()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await self._process.exited()
            await self._hear_last_words()
        self._release()

    def _with_last_words(self, error: VmmError) -> VmmError:
        words = self._stderr.tail() if self._stderr is not None else ""
        text = str(error).removeprefix(f"{error.operation}: ")
        return VmmError(error.operation, f"{text}: {words}" if words else text)

    async def stop(self) -> None:
        """Kill QEMU and wait until it is gone.

        Raises:
            VmmError: it is still there after several seconds (stuck in the kernel).
        """
        self._is_stopping = True
        if self._process is None:
            if not self._is_started and self._exit is None:
                self._exit = VmExit(reason="killed", detail="never started")
                self._began.set()
            return
        # First, or the monitor's reader reports the end of its connection as an error.
        await self._monitor.disconnect(timeout_s=_LAST_WORDS_TIMEOUT_S)
        self._process.kill()
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self.exited()
        except TimeoutError as error:
            msg = "stop qemu"
            raise VmmError(
                msg, f"pid {self._process.pid} outlives SIGKILL by {_STOP_TIMEOUT_S:g} s"
            ) from error

    async def exited(self) -> VmExit:
        """Wait for QEMU to be gone and say why."""
        await self._began.wait()
        if self._exit is not None:
            return self._exit
        if self._process is None:
            return VmExit(reason="failed", detail="qemu was not started")
        status = await self._process.exited()
        await self._hear_last_words()
        if self._exit is None:
            self._exit = self._explain(status)
        return self._exit

    async def _hear_last_words(self) -> None:
        """Let the monitor, console and error output reach their ends; the process is gone."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
                for reader in (self._console, self._stderr):
                    if reader is not None:
                        await reader.ended()
        await self._monitor.disconnect(timeout_s=_LAST_WORDS_TIMEOUT_S)

    def _explain(self, status: int) -> VmExit:
        said = self._causes.exit()
        if self._is_stopping and (said is None or said.reason == "killed"):
            return VmExit(reason="killed", detail="stopped by the shim")
        panic = _panic_line(self.console_tail())
        if panic and (said is None or said.reason == "guest-reset"):
            # panic=-1 turns a panic into a reset at once; only the console tells them apart.
            return VmExit(reason="guest-panic", detail=panic)
        if said is not None:
            return said
        if status in {-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGKILL}:
            return VmExit(reason="killed", detail=f"qemu ended by signal (status {status})")
        words = self._stderr.tail() if self._stderr is not None else ""
        return VmExit(reason="failed", detail=f"qemu exit status {status}: {words}".rstrip(": "))

    def console_tail(self) -> str:
        """Return the last lines of the guest's console."""
        return "" if self._console is None else self._console.tail()

    async def cleanup(self) -> None:
        """Release sockets, files and descriptors. After ``stop``. Idempotent."""
        await self._monitor.disconnect(timeout_s=_LAST_WORDS_TIMEOUT_S)
        self._release()

    def _release(self) -> None:
        for reader in (self._console, self._stderr):
            if reader is not None:
                reader.close()
        self._resources.close()


def _panic_line(console: str) -> str:
    """Return the line that begins the last kernel panic on the console, or an empty string."""
    begin = console.rfind(_PANIC_MARK)
    return "" if begin < 0 else console[begin:].split("\n", 1)[0]


def _log_console(line: str) -> None:
    _console_log.info("guest console", extra={"line": line})


def _log_stderr(line: str) -> None:
    _log.warning("qemu says", extra={"line": line})
