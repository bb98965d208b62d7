"""What the contract suite does not ask: which error is which, and what the log and console get."""

import asyncio
import logging
import os
import resource
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guest_console import ConsoleWatch
from harness.loop import on_loop, until
from kata_hybrid._native import vmm
from kata_hybrid._native.events import EventPort
from kata_hybrid.aio.events import NativeEvents
from kata_hybrid.config.model import BlockEngine, BuiltinConfig
from kata_hybrid.errors import (
    InvalidArgumentError,
    InvalidConfigError,
    KataError,
    KvmAccessError,
    ResourceExhaustedError,
    VmmError,
)
from kata_hybrid.hypervisor import builtin
from kata_hybrid.hypervisor.base import MachineConfig
from kata_hybrid.hypervisor.builtin import BuiltinHypervisor
from kata_hybrid.hypervisor.builtin_settings import BuiltinSettings, DiskLimit, builtin_settings
from kata_hybrid.types import BlockDevice, HostFolder, NetworkDevice, VhostUserFs
from tiny_kernel import End, tiny_kernel

needs_kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm cannot be opened here"
)
DEADLINE_S = 30.0


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A folder with a short path: a socket's holds 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="kh") as name:
        yield Path(name)


def make(
    run_dir: Path,
    *,
    end: End = End.HALT,
    memory_mib: int = 64,
    settings: BuiltinSettings | None = None,
) -> BuiltinHypervisor:
    kernel = run_dir / "kernel"
    kernel.write_bytes(tiny_kernel(b"a line\n", end=end))
    return BuiltinHypervisor(
        MachineConfig(
            name="test",
            kernel=kernel,
            initrd=None,
            kernel_params=("console=ttyS0",),
            vcpu_count=1,
            memory_mib=memory_mib,
            run_dir=run_dir,
        ),
        settings=settings or BuiltinSettings(),
        events=NativeEvents(EventPort()),
    )


def refusing(error: Exception) -> Callable[[vmm.Vm], None]:
    def start(_vm: vmm.Vm) -> None:
        raise error

    return start


@on_loop
async def test_it_is_this_process_and_no_other(run_dir: Path) -> None:
    machine = make(run_dir)
    assert machine.name == "builtin (kvm)"
    assert machine.task_pid == os.getpid()
    assert machine.processes == ()
    assert machine.agent_address == f"hvsock://{run_dir}/agent.sock"


@on_loop
async def test_the_agent_finds_disks_by_their_nodes(run_dir: Path) -> None:
    machine = make(run_dir)
    disks = [
        await machine.add_disk(BlockDevice(id=f"d{index}", path=run_dir / "x", is_read_only=True))
        for index in range(11)
    ]
    assert {disk.driver for disk in disks} == {"mmioblk"}
    assert [disk.source for disk in disks[:2]] == ["/dev/vda", "/dev/vdb"]
    with pytest.raises(ResourceExhaustedError, match="at most 11 disks"):
        await machine.add_disk(BlockDevice(id="d12", path=run_dir / "x", is_read_only=True))


@on_loop
async def test_it_has_room_for_some_network_cards_and_no_pci(run_dir: Path) -> None:
    machine = make(run_dir)
    card = NetworkDevice(id="eth0", tap_fds=(20,), mac="02:00:00:00:00:01", mtu=1500)
    assert [machine.add_network(card) for _ in range(4)] == [""] * 4
    with pytest.raises(ResourceExhaustedError, match="at most 4 network cards"):
        machine.add_network(card)


@on_loop
async def test_a_folder_that_a_daemon_serves_is_refused(run_dir: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="serves folders itself"):
        make(run_dir).add_shared_folder(VhostUserFs(tag="t", socket_path=run_dir / "s"))


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (PermissionError(13, "use KVM: denied", "/dev/kvm"), KvmAccessError, "use KVM: denied"),
        (FileNotFoundError(2, "use KVM: absent", "/dev/kvm"), KvmAccessError, "absent"),
        (OSError(12, "allocate: no memory"), ResourceExhaustedError, "allocate"),
        (FileNotFoundError(2, "open kernel", "/k"), VmmError, "start machine: open kernel"),
        (vmm.VmmError("KVM_RUN: bad"), VmmError, "start machine: KVM_RUN: bad"),
        (ValueError("a number"), InvalidArgumentError, "start machine: a number"),
        (TimeoutError("did not start"), VmmError, "start machine: did not start"),
    ],
)
def test_each_native_error_becomes_the_class_it_is(
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    expected: type[KataError],
    text: str,
) -> None:
    monkeypatch.setattr(BuiltinHypervisor, "_launch", lambda _self, vm: refusing(error)(vm))

    async def main() -> None:
        machine = make(run_dir)
        with pytest.raises(expected, match=text) as caught:
            await machine.start()
        assert caught.value.__cause__ is error
        assert (await machine.exited()).reason == "failed"
        await machine.stop()
        await machine.cleanup()

    asyncio.run(main())


def test_a_start_that_hangs_is_given_up(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_START_TIMEOUT_S", 0.02)
    monkeypatch.setattr(BuiltinHypervisor, "_launch", lambda _self, _vm: _sleep())

    async def main() -> None:
        machine = make(run_dir)
        with pytest.raises(VmmError, match="not done in time"):
            await machine.start()
        assert (await machine.exited()).reason == "failed"

    asyncio.run(main())


@pytest.mark.parametrize("gives_up", ["start", "stop"])
def test_whoever_ends_a_start_sees_its_thread_let_go(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, gives_up: str
) -> None:
    gate = threading.Event()
    launched = threading.Event()

    def launch(_self: BuiltinHypervisor, _vm: vmm.Vm) -> None:
        gate.wait(DEADLINE_S)
        launched.set()

    monkeypatch.setattr(BuiltinHypervisor, "_launch", launch)

    async def main() -> None:
        machine = make(run_dir)
        asyncio.get_running_loop().call_later(0.05, gate.set)
        async with asyncio.TaskGroup() as group:
            start = group.create_task(machine.start())
            await asyncio.sleep(0)
            if gives_up == "start":
                start.cancel()
                await asyncio.wait({start})
            else:
                await machine.stop()
            assert launched.is_set()
        await machine.stop()
        await machine.cleanup()

    asyncio.run(main())


def test_a_start_that_does_not_come_back_is_told(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(builtin, "_STOP_TIMEOUT_S", 0.02)
    monkeypatch.setattr(BuiltinHypervisor, "_launch", lambda _self, _vm: gate.wait(DEADLINE_S))

    async def main() -> None:
        machine = make(run_dir)
        async with asyncio.TaskGroup() as group:
            group.create_task(machine.start())
            await asyncio.sleep(0)
            with pytest.raises(VmmError, match="its start has not come back"):
                await machine.stop()
            gate.set()
        await machine.stop()
        await machine.cleanup()

    asyncio.run(main())


def _sleep() -> None:
    import time  # noqa: PLC0415 - what blocks is the point

    time.sleep(0.3)


@on_loop
async def test_a_number_nothing_can_be_made_of_is_an_argument(run_dir: Path) -> None:
    machine = make(run_dir, memory_mib=1)
    with pytest.raises(InvalidArgumentError, match="memory_mib is 1"):
        await machine.start()


@needs_kvm
@on_loop
async def test_a_disk_that_is_not_there_is_named(run_dir: Path) -> None:
    machine = make(run_dir)
    await machine.add_disk(BlockDevice(id="root", path=run_dir / "absent", is_read_only=False))
    with pytest.raises(VmmError, match=r"disk root: open disk .*absent"):
        await machine.start()
    assert not (run_dir / "agent.sock").exists()


@needs_kvm
@on_loop
async def test_every_device_is_taken_and_a_stale_socket_replaced(run_dir: Path) -> None:
    (run_dir / "agent.sock").touch()
    (run_dir / "image").write_bytes(bytes(4096))
    settings = BuiltinSettings(
        block_engine=BlockEngine.THREADS,
        disk_bandwidth=DiskLimit(per_second=1 << 20),
        disk_operations=DiskLimit(per_second=100, one_time_burst=5),
        reclaims_freed_memory=True,
    )
    machine = make(run_dir, settings=settings)
    await machine.add_disk(BlockDevice(id="root", path=run_dir / "image", is_read_only=True))
    machine.add_shared_folder(HostFolder(tag="t", path=run_dir))
    async with asyncio.timeout(DEADLINE_S):
        await machine.start()
        assert (run_dir / "agent.sock").is_socket()
        await machine.stop()
        await machine.cleanup()
    assert not (run_dir / "agent.sock").exists()


@needs_kvm
@on_loop
async def test_a_machine_may_open_as_many_files_as_the_host_allows(run_dir: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
    hypervisor = make(run_dir)
    try:
        await hypervisor.start()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        await hypervisor.stop()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@needs_kvm
@on_loop
async def test_what_the_guest_prints_is_in_the_log_and_in_the_tail(run_dir: Path) -> None:
    machine = make(run_dir, end=End.POWER_OFF)
    async with asyncio.timeout(DEADLINE_S):
        with ConsoleWatch("a line") as console:
            await machine.start()
            await console.seen()
            await machine.exited()
        await machine.stop()
        await machine.cleanup()
    assert machine.console_tail() == "a line"


@on_loop
async def test_an_event_port_that_is_closed_first_does_not_leave_a_waiter(run_dir: Path) -> None:
    events = NativeEvents(EventPort())
    events.close()
    machine = make(run_dir)
    machine._events = events
    with pytest.raises(KataError):
        await machine.start()
    assert (await machine.exited()).reason == "failed"


def test_settings_are_what_is_configured() -> None:
    config = BuiltinConfig(
        enable_hugepages=True,
        block_engine=BlockEngine.THREADS,
        is_block_direct=True,
        reclaim_guest_freed_memory=True,
        disk_bandwidth_bits=800,
        disk_bandwidth_burst_bits=80,
        disk_operations=7,
    )
    assert builtin_settings(config) == BuiltinSettings(
        disk_bandwidth=DiskLimit(per_second=100, one_time_burst=10),
        disk_operations=DiskLimit(per_second=7),
        has_hugepages=True,
        block_engine=BlockEngine.THREADS,
        is_block_direct=True,
        reclaims_freed_memory=True,
    )


def test_memory_that_is_no_number_of_huge_pages_is_refused() -> None:
    with pytest.raises(InvalidConfigError, match="default_memory = 513"):
        builtin_settings(BuiltinConfig(enable_hugepages=True, memory_mib=513))
    assert not builtin_settings(BuiltinConfig(memory_mib=513)).has_hugepages


def test_a_machines_odd_moments_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        builtin._log_machine("block root: queue 0")
    assert [getattr(record, "line", "") for record in caplog.records] == ["block root: queue 0"]


class SlowVm:
    """Takes disks when it is let."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.plugged: list[str] = []
        self.failure: vmm.VmmError | None = None

    def plug_disk(self, *, slot: str, **_: object) -> None:
        assert self.gate.wait(10)
        if self.failure is not None:
            raise self.failure
        self.plugged.append(slot)

    def unplug_disk(self, *, slot: str) -> None:
        self.plugged.remove(slot)


@pytest.mark.parametrize("is_taken", [True, False])
@on_loop
async def test_a_disk_that_comes_too_late_is_taken_out_and_none_comes_before_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, *, is_taken: bool
) -> None:
    monkeypatch.setattr(builtin, "_CALL_TIMEOUT_S", 0.1)
    machine, vm = make(run_dir), SlowVm()
    monkeypatch.setattr(machine, "_vm", vm)
    machine._began.set()
    machine._slots = [builtin._DiskSlot(name=f"slot-{index}", index=index) for index in (0, 1)]
    for number in range(2):
        # The second waits for the first, which the guest has yet to see: they go by their order.
        with pytest.raises(VmmError, match="not done in"):
            await machine.add_disk(
                BlockDevice(id=f"d{number}", path=run_dir / "x", is_read_only=True)
            )
    if not is_taken:
        vm.failure = vmm.VmmError("no")
    assert [slot.disk_id for slot in machine._slots] == ["d0", None]
    vm.gate.set()
    await until(lambda: machine._slots[0].disk_id is None)
    assert vm.plugged == []
    vm.failure = None
    disk = await machine.add_disk(BlockDevice(id="d2", path=run_dir / "x", is_read_only=True))
    assert (disk.source, vm.plugged) == ("/dev/vda", ["slot-0"])
    monkeypatch.undo()
