"""Machines as the extension shows them: arguments, errors, reports; guests of few instructions."""

import os
import select
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_hybrid._native.events import Event, EventPort
from kata_hybrid._native.vmm import Limit, Vm, VmConfig, VmmError, probe_kvm
from tiny_kernel import End, tiny_kernel

EXITED = 1
LOG = 2
DEADLINE_S = 20.0
needs_kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm cannot be opened here"
)


class Machine:
    """A machine and the port it reports to."""

    def __init__(self, kernel: Path, *, console_fd: int | None = None) -> None:
        self.port = EventPort()
        self.vm = Vm(
            VmConfig(kernel=kernel, command_line="", memory_mib=64),
            self.port,
            exited_token=EXITED,
            log_token=LOG,
            console_fd=console_fd,
        )

    def event(self) -> Event:
        assert select.select([self.port], [], [], DEADLINE_S)[0]
        (event,) = self.port.drain()
        return event


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: a socket's holds 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="kh") as name:
        yield Path(name)


@pytest.fixture
def image(folder: Path) -> Path:
    path = folder / "image"
    path.write_bytes(bytes(1 << 16))
    return path


def state(vm: Vm) -> str:
    """Not the property itself: a type checker would hold it for constant."""
    return vm.state


def kernel(folder: Path, end: End, message: bytes = b"") -> Path:
    path = folder / "kernel"
    path.write_bytes(tiny_kernel(message, end=end))
    return path


def test_a_configuration_keeps_what_it_was_given(folder: Path) -> None:
    config = VmConfig(
        kernel=folder / "k",
        initrd=os.fspath(folder / "i"),
        command_line="a b",
        vcpu_count=4,
        memory_mib=300,
        memory="shared",
    )
    assert (config.kernel, config.initrd) == (folder / "k", folder / "i")
    assert (config.command_line, config.memory) == ("a b", "shared")
    assert (config.vcpu_count, config.memory_mib) == (4, 300)
    with pytest.raises(AttributeError):
        setattr(config, "memory_mib", 1)  # noqa: B010 - what mypy forbids is what is tested


@pytest.mark.parametrize(
    ("vcpu_count", "memory_mib", "named"),
    [(0, 64, "vcpu_count"), (33, 64, "1 to 32"), (300, 64, "300"), (1, 63, "memory_mib")],
)
def test_numbers_out_of_range_are_named(vcpu_count: int, memory_mib: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        VmConfig(kernel="/k", command_line="", vcpu_count=vcpu_count, memory_mib=memory_mib)


def test_words_that_are_none_are_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="anonymous, shared, hugepages"):
        VmConfig(kernel="/k", command_line="", memory_mib=64, memory="swap")  # type: ignore[arg-type]


def test_a_command_line_longer_than_the_kernel_reads_is_refused() -> None:
    config = VmConfig(kernel="/k", command_line="x" * 2048, memory_mib=64)
    with pytest.raises(ValueError, match="command line bytes is 2048"):
        Vm(config, EventPort(), exited_token=EXITED)


def test_a_console_that_is_no_descriptor_is_refused() -> None:
    with pytest.raises(OSError, match="descriptor"):
        Machine(Path("/k"), console_fd=987654)


def test_disks_are_named_in_their_order(image: Path) -> None:
    vm = Machine(Path("/k")).vm
    limit = Limit(size=1 << 20, refill_time_ms=100, one_time_burst=5)
    assert vm.add_disk(id="one", path=image) == "/dev/vda"
    assert vm.add_disk(id="two", path=image, is_read_only=True, bandwidth=limit) == "/dev/vdb"
    assert (limit.size, limit.refill_time_ms, limit.one_time_burst) == (1 << 20, 100, 5)


def test_what_cannot_be_a_device_says_why(folder: Path, image: Path) -> None:
    vm = Machine(Path("/k")).vm
    with pytest.raises(FileNotFoundError) as caught:
        vm.add_disk(id="x", path=folder / "absent")
    assert caught.value.filename == os.fspath(folder / "absent")
    with pytest.raises(ValueError, match="neither a file nor a block device"):
        vm.add_disk(id="x", path=folder, is_read_only=True)
    with pytest.raises(ValueError, match="auto, io_uring, sync"):
        vm.add_disk(id="x", path=image, engine="threads")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="above 0"):
        vm.add_disk(id="x", path=image, operations=Limit(size=0, refill_time_ms=1))
    with pytest.raises(NotADirectoryError):
        vm.add_folder(tag="x", folder=image)
    with pytest.raises(ValueError, match="1 to 36 bytes"):
        vm.add_folder(tag="x" * 37, folder=folder)
    with pytest.raises(ValueError, match="never, auto, always"):
        vm.add_folder(tag="x", folder=folder, cache="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reserved"):
        vm.add_vsock(socket_path=folder / "s", guest_cid=2)
    with pytest.raises(FileNotFoundError):
        vm.add_vsock(socket_path=folder / "no" / "s")


def test_a_card_that_cannot_be_says_why() -> None:
    vm = Machine(Path("/k")).vm
    mac = bytes.fromhex("020000000001")
    with pytest.raises(OSError, match="tap no-such-tap is missing") as caught:
        vm.add_net(id="eth0", tap="no-such-tap", mac=mac)
    assert caught.value.filename == "no-such-tap"
    with pytest.raises(ValueError, match="is no interface name"):
        vm.add_net(id="eth0", tap="a/b", mac=mac)
    with pytest.raises(ValueError, match="no address of one card"):
        vm.add_net(id="eth0", tap="no-such-tap", mac=b"\xff" * 6)
    with pytest.raises(ValueError, match="6"):
        vm.add_net(id="eth0", tap="no-such-tap", mac=mac[:5])
    with pytest.raises(ValueError, match="queue pairs"):
        vm.add_net(id="eth0", tap="no-such-tap", mac=mac, queue_pairs=9)
    read_end, write_end = os.pipe()
    with pytest.raises(ValueError, match="no queue of a tap"):
        vm.add_net(id="eth0", tap=[read_end], mac=mac)
    os.close(write_end)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(read_end)


def test_a_balloons_target_is_the_hosts() -> None:
    balloon = Machine(Path("/k")).vm.add_balloon(target_pages=7)
    assert (balloon.target_pages, balloon.actual_pages) == (7, 0)
    balloon.set_target(9)
    assert balloon.target_pages == 9


def test_a_machine_that_is_stopped_before_its_start_reports_that_it_never_ran(
    folder: Path,
) -> None:
    machine = Machine(Path("/k"))
    machine.vm.add_vsock(socket_path=folder / "s")
    machine.vm.stop()
    machine.vm.stop()
    event = machine.event()
    assert (event.token, event.code) == (EXITED, 1)
    assert state(machine.vm) == "stopped"
    assert machine.vm.exit is None
    assert not (folder / "s").exists()
    with pytest.raises(VmmError, match="cannot start a machine that is stopped"):
        machine.vm.start()


def test_a_machine_that_is_given_up_reports_that_it_never_ran() -> None:
    machine = Machine(Path("/k"))
    del machine.vm
    assert machine.event().code == 1


@needs_kvm
def test_a_kernel_that_is_not_there_is_named_and_the_end_told() -> None:
    machine = Machine(Path("/nowhere/kernel"))
    with pytest.raises(FileNotFoundError, match="open kernel") as caught:
        machine.vm.start()
    assert caught.value.filename == "/nowhere/kernel"
    assert machine.event().code == 1
    assert state(machine.vm) == "stopped"


@needs_kvm
@pytest.mark.parametrize("content", [b"", b"text", b"\x7fELF", bytes(4096)])
def test_a_kernel_that_is_none_is_an_error_of_the_machine(folder: Path, content: bytes) -> None:
    (folder / "kernel").write_bytes(content)
    with pytest.raises(VmmError, match=f"load kernel {folder}/kernel"):
        Machine(folder / "kernel").vm.start()


@needs_kvm
def test_a_guests_end_is_one_event_and_its_console_is_passed_on(folder: Path) -> None:
    read_end, write_end = os.pipe()
    machine = Machine(kernel(folder, End.RESTART, b"hi\n"), console_fd=write_end)
    assert state(machine.vm) == "created"
    machine.vm.start()
    event = machine.event()
    assert (event.token, event.code, event.value) == (EXITED, 0, None)
    assert state(machine.vm) == "stopped"
    exit_ = machine.vm.exit
    assert exit_ is not None
    assert (exit_.reason, exit_.detail) == ("guest-reset", "the guest restarted itself")
    assert machine.vm.console_tail() == b"hi\n"
    with os.fdopen(read_end, "rb") as console:
        assert console.read() == b"hi\n"
    machine.vm.stop()
    assert machine.port.drain() == []


@needs_kvm
def test_a_running_machine_shows_its_threads_and_counters(folder: Path) -> None:
    machine = Machine(kernel(folder, End.HALT))
    machine.vm.add_rng()
    assert machine.vm.thread_ids() == {}
    machine.vm.start()
    threads = machine.vm.thread_ids()
    assert set(threads) == {"vcpu-0", "vmm-io"}
    assert all(Path(f"/proc/self/task/{number}").exists() for number in threads.values())
    (metrics,) = machine.vm.metrics()
    assert metrics.kind == "rng"
    assert metrics.counters["requests"] == 0
    machine.vm.stop()
    assert machine.vm.thread_ids() == {}
    assert not any(Path(f"/proc/self/task/{number}").exists() for number in threads.values())


@needs_kvm
def test_time_stands_still_and_goes_on(folder: Path) -> None:
    vm = Machine(kernel(folder, End.HALT)).vm
    with pytest.raises(VmmError, match="cannot pause a machine that is created"):
        vm.pause()
    vm.start()
    vm.pause()
    vm.pause()
    assert state(vm) == "paused"
    vm.resume()
    assert state(vm) == "running"
    with pytest.raises(VmmError, match="cannot add a device"):
        vm.add_rng()
    vm.stop()


@needs_kvm
def test_a_snapshot_comes_back_paused_and_of_another_machine_does_not(folder: Path) -> None:
    (folder / "snapshot").mkdir()
    path = kernel(folder, End.HALT)
    vm = Machine(path).vm
    vm.start()
    with pytest.raises(VmmError, match="running"):
        vm.snapshot(folder / "snapshot")
    vm.pause()
    vm.snapshot(folder / "snapshot")
    vm.stop()
    copy = Machine(path).vm
    copy.restore(folder / "snapshot")
    assert state(copy) == "paused"
    copy.resume()
    copy.stop()
    other = Machine(path).vm
    other.add_rng()
    with pytest.raises(VmmError, match="the snapshot has"):
        other.restore(folder / "snapshot")
    with pytest.raises(FileNotFoundError):
        Machine(path).vm.restore(folder / "absent")


@needs_kvm
def test_dropping_a_machine_ends_it(folder: Path) -> None:
    machine = Machine(kernel(folder, End.HALT))
    machine.vm.start()
    threads = machine.vm.thread_ids()
    del machine.vm
    assert machine.event().code == 0
    assert not any(Path(f"/proc/self/task/{number}").exists() for number in threads.values())


def test_the_probe_says_why() -> None:
    found = probe_kvm()
    assert found.reason
    assert found.is_usable <= (found.api_version is not None)
