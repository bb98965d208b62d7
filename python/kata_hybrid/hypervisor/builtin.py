"""The machine monitor in this process: an adapter of ``_native.vmm`` to the contract.

Owned by one sandbox, used on the event loop's thread. The machine is threads of ours: there is no
process to spawn, to watch or to leave behind; it goes with the shim, however that goes.

    new ──start──▶ running ──guest or host ends it──▶ exited
     └──────────────── stop ────────────────────────────▲

Making and ending a machine opens files and waits for threads, so both happen off the loop
(``aio/blocking.py``); that it ended by itself is an event of the port.
"""

import asyncio
import contextlib
import errno
import logging
import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from kata_hybrid._native import vmm
from kata_hybrid.aio.blocking import begin_in_thread, call_in_thread
from kata_hybrid.aio.events import NativeEvents
from kata_hybrid.config.model import BlockEngine
from kata_hybrid.errors import (
    InternalError,
    InvalidArgumentError,
    InvalidStateError,
    KataError,
    KvmAccessError,
    ResourceExhaustedError,
    VmmError,
)
from kata_hybrid.hypervisor.base import MachineConfig, check_serial
from kata_hybrid.hypervisor.builtin_settings import BuiltinSettings, DiskLimit
from kata_hybrid.hypervisor.console import OutputReader, printable_lines
from kata_hybrid.hypervisor.vsock import USER_GUEST_CID, free_hybrid_path, hybrid_address
from kata_hybrid.types import (
    BlockDevice,
    FolderDevice,
    GuestDisk,
    HostFolder,
    NetworkDevice,
    ProcessIdentity,
    VmExit,
)

_START_TIMEOUT_S = 60.0
"""Reading a kernel from a slow disk, and filling gigabytes of huge pages with zeros."""
_STOP_TIMEOUT_S = 20.0
_CALL_TIMEOUT_S = 30.0
"""Opening a disk on storage that is slow, and what was under way on one that goes."""
_MAX_DISKS = 11
_NO_ROOM_FOR_DISKS = f"a machine has at most {_MAX_DISKS} disks"
_MAX_NETWORKS = 4
_KVM_DEVICE = "/dev/kvm"
_THREAD_NAME = "vmm-call"

_console_log = logging.getLogger("kata_hybrid.guest.console")
_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _DiskSlot:
    """Where a disk may come while the machine runs."""

    name: str
    index: int
    """Among the disks of the guest."""
    disk_id: str | None = None


class _DiskArguments(TypedDict):
    """Of ``vmm.Vm.add_disk``."""

    id: str
    path: Path
    is_read_only: bool
    is_direct: bool
    engine: Literal["auto", "sync"]
    bandwidth: vmm.Limit | None
    operations: vmm.Limit | None


class _NotDoneError(VmmError):
    """It was not done in time. What was begun goes on, as ``call``, before any other call."""

    call: "asyncio.Future[None] | None" = None


class BuiltinHypervisor:
    """One virtual machine in this process (implements ``Hypervisor``)."""

    def __init__(
        self, machine: MachineConfig, *, settings: BuiltinSettings, events: NativeEvents
    ) -> None:
        """Describe a machine; nothing is started."""
        self._machine = machine
        self._settings = settings
        self._events = events
        self._folders: list[HostFolder] = []
        self._disks: list[BlockDevice] = []
        self._networks: list[NetworkDevice] = []
        self._slots: list[_DiskSlot] = []
        self._calls = asyncio.Lock()
        self._vm: vmm.Vm | None = None
        self._console: OutputReader | None = None
        self._console_end = ""
        self._ended: asyncio.Future[object] | None = None
        self._began = asyncio.Event()
        self._is_started = False
        self._launching: asyncio.Future[None] | None = None
        self._exit: VmExit | None = None

    @property
    def name(self) -> str:
        """``builtin (kvm)``: there is no other way to run its machines."""
        return "builtin (kvm)"

    @property
    def agent_address(self) -> str:
        """Where the guest's vsock ports are reached."""
        return hybrid_address(self._machine.run_dir)

    @property
    def processes(self) -> tuple[ProcessIdentity, ...]:
        """None besides this one."""
        return ()

    @property
    def task_pid(self) -> int:
        """This process: the guest runs on threads of it."""
        return os.getpid()

    def add_shared_folder(self, folder: FolderDevice) -> None:
        """Give the guest a virtio-fs device that is served here. Before ``start``."""
        self._refuse_if_started("add a shared folder to")
        if not isinstance(folder, HostFolder):
            message = f"shared folder {folder.tag}: the built-in monitor serves folders itself"
            raise InvalidArgumentError(message)
        self._folders.append(folder)

    async def add_disk(self, disk: BlockDevice) -> GuestDisk:
        """Give the guest a virtio-blk device, found by its node."""
        check_serial(disk.id)
        if self._is_running:
            return await self._plug(disk)
        self._refuse_if_started("add a disk to")
        if len(self._disks) >= _MAX_DISKS:
            raise ResourceExhaustedError(_NO_ROOM_FOR_DISKS)
        self._disks.append(disk)
        return _guest_disk(len(self._disks) - 1)

    async def _plug(self, disk: BlockDevice) -> GuestDisk:
        # The lowest: slots are first used in their order, and the guest names them by that.
        slot = next((slot for slot in self._slots if slot.disk_id is None), None)
        if slot is None:
            raise ResourceExhaustedError(_NO_ROOM_FOR_DISKS)
        slot.disk_id = disk.id
        arguments = self._disk_arguments(disk)
        try:
            await self._call(
                lambda vm: vm.plug_disk(slot=slot.name, **arguments),
                what=f"plug disk {disk.path}",
            )
        except _NotDoneError as error:
            if error.call is None:
                slot.disk_id = None
            else:
                error.call.add_done_callback(lambda call: self._give_up(slot, call))
            raise
        except KataError:
            slot.disk_id = None
            raise
        return _guest_disk(slot.index)

    def _give_up(self, slot: _DiskSlot, call: "asyncio.Future[None]") -> None:
        """Free a slot that a disk has come to, or not, when nobody waited any more."""
        vm = self._vm
        if vm is None or call.exception() is not None:
            slot.disk_id = None
            return

        def is_out(removal: "asyncio.Future[None]") -> None:
            if removal.exception() is None:
                slot.disk_id = None

        removal = begin_in_thread(lambda: vm.unplug_disk(slot=slot.name), name=_THREAD_NAME)
        removal.add_done_callback(is_out)

    async def remove_disk(self, disk_id: str) -> None:
        """Take a disk out of its slot."""
        slot = next((slot for slot in self._slots if slot.disk_id == disk_id), None)
        if slot is None or not self._is_running:
            return
        await self._call(lambda vm: vm.unplug_disk(slot=slot.name), what=f"unplug disk {disk_id}")
        slot.disk_id = None

    async def _call(self, work: Callable[[vmm.Vm], None], *, what: str) -> None:
        """Have the machine do something that opens or waits, off the loop, one after another."""
        vm = self._vm
        if vm is None:
            raise InvalidStateError(self._machine.name, state="exited", request=what)
        call = None
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                await self._calls.acquire()
                call = begin_in_thread(lambda: work(vm), name=_THREAD_NAME)
                call.add_done_callback(lambda _: self._calls.release())
                await asyncio.wait({call})
        except TimeoutError as timeout:
            error = _NotDoneError(what, f"not done in {_CALL_TIMEOUT_S:g} s")
            error.call = call
            raise error from timeout
        with _native_errors(what):
            call.result()

    @property
    def _is_running(self) -> bool:
        return self._began.is_set() and self._exit is None and self._vm is not None

    def _disk_arguments(self, disk: BlockDevice) -> "_DiskArguments":
        settings = self._settings
        return {
            "id": disk.id,
            "path": disk.path,
            "is_read_only": disk.is_read_only,
            "is_direct": settings.is_block_direct,
            "engine": "auto" if settings.block_engine is BlockEngine.IO_URING else "sync",
            "bandwidth": _native_limit(settings.disk_bandwidth),
            "operations": _native_limit(settings.disk_operations),
        }

    def add_network(self, device: NetworkDevice) -> str:
        """Give the guest a virtio-net device, found by its hardware address. Before ``start``."""
        self._refuse_if_started("add a network card to")
        if len(self._networks) >= _MAX_NETWORKS:
            message = f"a machine has at most {_MAX_NETWORKS} network cards"
            raise ResourceExhaustedError(message)
        self._networks.append(device)
        return ""

    def _refuse_if_started(self, request: str) -> None:
        if self._is_started or self._exit is not None:
            state = "running" if self._exit is None else "exited"
            raise InvalidStateError(self._machine.name, state=state, request=request)

    async def start(self) -> None:
        """Make the machine and let the guest run.

        Raises:
            KataError: see ``Hypervisor.start``.
        """
        self._refuse_if_started("start")
        self._is_started = True
        try:
            with _native_errors("start machine"):
                self._vm = vm = self._describe()
                self._launching = begin_in_thread(lambda: self._launch(vm), name=_THREAD_NAME)
                async with asyncio.timeout(_START_TIMEOUT_S):
                    await asyncio.shield(self._launching)
        except BaseException:
            await self._end_failed_start()
            raise
        self._began.set()

    def _describe(self) -> vmm.Vm:
        """Make the native object: nothing of KVM exists yet."""
        machine = self._machine
        config = vmm.VmConfig(
            kernel=machine.kernel,
            initrd=machine.initrd,
            command_line=" ".join(machine.kernel_params),
            vcpu_count=machine.vcpu_count,
            memory_mib=machine.memory_mib,
            memory="hugepages" if self._settings.has_hugepages else "anonymous",
        )
        exited_token, self._ended = self._events.expect()
        log_token = self._events.follow(_log_machine)
        read_end, write_end = os.pipe()
        # Its own tail is not asked for: the machine keeps one, which a slow loop cannot miss.
        self._console = OutputReader(read_end, sink=_log_console, tail_bytes=0)
        return vmm.Vm(
            config,
            self._events.port,
            exited_token=exited_token,
            log_token=log_token,
            console_fd=write_end,
        )

    def _launch(self, vm: vmm.Vm) -> None:
        """Open everything and start. On a thread of its own."""
        settings = self._settings
        _raise_descriptor_limit()
        vm.add_vsock(socket_path=free_hybrid_path(self._machine.run_dir), guest_cid=USER_GUEST_CID)
        vm.add_rng()
        if settings.reclaims_freed_memory:
            vm.add_balloon(reports_free_pages=True)
        for folder in self._folders:
            vm.add_folder(tag=folder.tag, folder=folder.path, cache=folder.cache.value)
        for index, disk in enumerate(self._disks):
            _check_node(vm.add_disk(**self._disk_arguments(disk)), index)
        for network in self._networks:
            vm.add_net(
                id=network.id,
                # Copies, which are taken over.
                tap=[os.dup(fd) for fd in network.tap_fds],
                mac=bytes.fromhex(network.mac.replace(":", "")),
                mtu=network.mtu,
                queue_pairs=len(network.tap_fds),
            )
        self._slots = [
            _DiskSlot(name=f"slot-{index}", index=index)
            for index in range(len(self._disks), _MAX_DISKS)
        ]
        for slot in self._slots:
            _check_node(vm.add_disk_slot(name=slot.name), slot.index)
        vm.start()

    async def _end_failed_start(self) -> None:
        try:
            await self._stop_native()
        except KataError as error:
            _log.warning("a failed start left something", extra={"error": str(error)})
        self._exit = VmExit(reason="failed", detail="the machine was not started")
        self._began.set()
        self._release()

    async def stop(self) -> None:
        """End the machine and wait until all of it is released.

        Raises:
            VmmError: it is still there after several seconds.
        """
        if not self._is_started and self._exit is None:
            self._exit = VmExit(reason="killed", detail="never started")
            self._began.set()
        await self._stop_native()

    async def _stop_native(self) -> None:
        vm = self._vm
        if vm is None:
            return
        with _native_errors("stop machine"):
            await call_in_thread(vm.stop, name=_THREAD_NAME, timeout_s=_STOP_TIMEOUT_S)
            await self._see_launch_end()
        if self._exit is None:
            self._exit = _explain(vm)

    async def _see_launch_end(self) -> None:
        """Wait for a start that was given up: it is refused what it asks next, and lets go."""
        if self._launching is None:
            return
        await asyncio.wait({self._launching}, timeout=_STOP_TIMEOUT_S)
        if not self._launching.done():
            message = "its start has not come back"
            raise TimeoutError(message)
        # What it was refused is no news to whoever gave it up; asyncio would report it unheard.
        self._launching.exception()

    async def exited(self) -> VmExit:
        """Wait for the machine to be gone and say why."""
        await self._began.wait()
        if self._exit is None and self._ended is not None:
            try:
                await asyncio.shield(self._ended)
            except KataError as error:
                # The port is gone, and with it whatever would have been heard.
                return VmExit(reason="failed", detail=str(error))
        if self._exit is None:
            self._exit = _explain(self._vm)
        return self._exit

    def console_tail(self) -> str:
        """Return the last lines of the guest's console."""
        return self._console_end if self._vm is None else _console_tail(self._vm)

    async def cleanup(self) -> None:
        """Release what is left. After ``stop``. Idempotent."""
        self._release()

    def _release(self) -> None:
        if self._console is not None:
            self._console.close()
        if self._vm is not None:
            self._console_end = _console_tail(self._vm)
            self._vm = None


def _raise_descriptor_limit() -> None:
    """Open what this process may: each file a guest knows and each stream is one of ours."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _explain(vm: vmm.Vm | None) -> VmExit:
    exit_ = None if vm is None else vm.exit
    if exit_ is None:
        return VmExit(reason="failed", detail="the machine was not started")
    return VmExit(reason=exit_.reason, detail=exit_.detail)


def _console_tail(vm: vmm.Vm) -> str:
    return printable_lines(vm.console_tail())


def _native_limit(limit: DiskLimit | None) -> vmm.Limit | None:
    if limit is None:
        return None
    return vmm.Limit(
        size=limit.per_second, refill_time_ms=1000, one_time_burst=limit.one_time_burst
    )


def _disk_node(index: int) -> str:
    return f"/dev/vd{chr(ord('a') + index)}"


def _guest_disk(index: int) -> GuestDisk:
    return GuestDisk(driver="mmioblk", source=_disk_node(index))


def _check_node(node: str, index: int) -> None:
    if node != _disk_node(index):
        message = f"a disk is {node}, {_disk_node(index)} was promised"
        raise InternalError(message)


@contextlib.contextmanager
def _native_errors(operation: str) -> Iterator[None]:
    """Turn what native code raises into errors of ours, the cause kept."""
    try:
        yield
    except TimeoutError as error:
        raise VmmError(operation, str(error) or "not done in time") from error
    except OSError as error:
        raise _os_error(operation, error) from error
    except vmm.VmmError as error:
        raise VmmError(operation, str(error)) from error
    except ValueError as error:
        message = f"{operation}: {error}"
        raise InvalidArgumentError(message) from error


def _os_error(operation: str, error: OSError) -> KataError:
    text = error.strerror or str(error)
    if error.filename == _KVM_DEVICE:
        return KvmAccessError(f"{operation}: {text}")
    if error.errno == errno.ENOMEM:
        return ResourceExhaustedError(f"{operation}: {text}")
    return VmmError(operation, text)


def _log_console(line: str) -> None:
    _console_log.info("guest console", extra={"line": line})


def _log_machine(line: str) -> None:
    _log.warning("machine says", extra={"line": line})
