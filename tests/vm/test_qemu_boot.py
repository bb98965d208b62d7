"""A real kernel in a real QEMU: console, disks, and every way a machine can end."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from guest_console import ConsoleWatch
from guest_program import Ending, say
from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.config.model import Config, HypervisorName
from kata_hybrid.errors import InvalidStateError, VmmError
from kata_hybrid.guest.cpio import character_device, directory, regular_file, write_archive
from kata_hybrid.hypervisor.base import MachineConfig
from kata_hybrid.hypervisor.kernel_params import kernel_params
from kata_hybrid.hypervisor.qemu import QemuHypervisor, QemuSettings
from kata_hybrid.hypervisor.qemu_command import Accelerator
from kata_hybrid.types import BlockDevice, VhostUserFs, VmExit
from open_descriptors import is_alive, open_descriptors

pytestmark = pytest.mark.vm

DEADLINE_S = 50.0


class Machines:
    """Makes machines that boot a given init."""

    def __init__(self, *, qemu: Path, guest_dir: Path, run_dir: Path) -> None:
        self.qemu = qemu
        self.kernel = guest_dir / "vmlinux"
        self.run_dir = run_dir
        self.backends: list[QuietBackend] = []

    def make(
        self, init: bytes, *, reaper: ProcessReaper, kernel: Path | None = None
    ) -> QemuHypervisor:
        initrd = self.run_dir / "initrd"
        initrd.write_bytes(
            write_archive(
                [
                    directory("dev"),
                    character_device("dev/console", major=5, minor=1),
                    regular_file("init", data=init, mode=0o755),
                ]
            )
        )
        machine = MachineConfig(
            name="test",
            kernel=kernel or self.kernel,
            initrd=initrd,
            kernel_params=kernel_params(Config(), HypervisorName.QEMU),
            vcpu_count=1,
            memory_mib=256,
            run_dir=self.run_dir,
        )
        return QemuHypervisor(
            machine,
            settings=QemuSettings(
                program=self.qemu, accelerator=Accelerator.TCG, has_kernel_vsock=False
            ),
            reaper=reaper,
            vsock_backend=self._backend,
        )

    def _backend(self, *, socket_path: str, hybrid_path: str, guest_cid: int) -> "QuietBackend":
        assert guest_cid == 3
        backend = QuietBackend(socket_path, hybrid_path)
        self.backends.append(backend)
        return backend


class QuietBackend:
    """A vhost-user back end's place on disk, for machines whose vsock is not under test."""

    def __init__(self, socket_path: str, hybrid_path: str) -> None:
        self.paths = (socket_path, hybrid_path)
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def machines(
    qemu: Path, guest_dir: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Machines:
    # The device under test elsewhere needs a live back end to let QEMU start at all.
    monkeypatch.setattr("kata_hybrid.hypervisor.qemu_command._vsock", lambda _vsock: ())
    return Machines(qemu=qemu, guest_dir=guest_dir, run_dir=run_dir)


Use = Callable[[QemuHypervisor], Awaitable[None]]


def run(machines: Machines, init: bytes, use: Use, *, kernel: Path | None = None) -> None:
    """Use a machine, then check that nothing of it is left."""

    async def main() -> None:
        reaper = ProcessReaper()
        machine = machines.make(init, reaper=reaper, kernel=kernel)
        before = open_descriptors()
        try:
            async with asyncio.timeout(DEADLINE_S):
                await use(machine)
        finally:
            await machine.stop()
            await machine.cleanup()
            reaper.close()
        for process in machine.processes:
            assert not is_alive(process.pid)
        assert open_descriptors() == before
        assert all(backend.is_closed for backend in machines.backends)

    asyncio.run(main())


def test_a_guest_that_powers_off(machines: Machines) -> None:
    async def use(machine: QemuHypervisor) -> None:
        await machine.start()
        end = await machine.exited()
        assert end == VmExit(reason="guest-shutdown", detail="guest-shutdown")
        assert "hello from init" in machine.console_tail()
        assert await machine.exited() == end

    run(machines, say(b"hello from init\n", ending=Ending.POWER_OFF), use)


def test_a_guest_that_restarts_is_not_restarted(machines: Machines) -> None:
    async def use(machine: QemuHypervisor) -> None:
        await machine.start()
        assert (await machine.exited()).reason == "guest-reset"

    run(machines, say(b"", ending=Ending.RESTART), use)


def test_a_kernel_panic_is_told_from_a_restart(machines: Machines) -> None:
    async def use(machine: QemuHypervisor) -> None:
        await machine.start()
        end = await machine.exited()
        assert end.reason == "guest-panic"
        assert "Attempted to kill init" in end.detail

    run(machines, say(b"", ending=Ending.EXIT), use)


def test_stop_ends_a_running_guest(machines: Machines) -> None:
    async def use(machine: QemuHypervisor) -> None:
        with ConsoleWatch("still here") as console:
            await machine.start()
            await console.seen()
        await machine.stop()
        assert (await machine.exited()).reason == "killed"
        await machine.stop()

    run(machines, say(b"still here\n", ending=Ending.PAUSE), use)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_monitor_killed_by_somebody_else_is_killed(machines: Machines, number: int) -> None:
    async def use(machine: QemuHypervisor) -> None:
        await machine.start()
        os.kill(machine.task_pid, number)
        assert (await machine.exited()).reason == "killed"

    run(machines, say(b"", ending=Ending.PAUSE), use)


def test_the_end_may_be_awaited_before_the_start(machines: Machines) -> None:
    async def use(machine: QemuHypervisor) -> None:
        async with asyncio.TaskGroup() as group:
            ends = [group.create_task(machine.exited()) for _ in range(3)]
            await machine.start()
        assert {end.result().reason for end in ends} == {"guest-shutdown"}

    run(machines, say(b"", ending=Ending.POWER_OFF), use)


def test_a_kernel_that_is_none_is_said_in_qemus_words(machines: Machines) -> None:
    async def use(machine: QemuHypervisor) -> None:
        with pytest.raises(VmmError, match="could not"):
            await machine.start()
        assert (await machine.exited()).reason == "failed"

    run(machines, say(b"", ending=Ending.PAUSE), use, kernel=Path("/nowhere/vmlinux"))


def test_a_qemu_that_is_not_there_is_named(machines: Machines) -> None:
    machines.qemu = Path("/nowhere/qemu")

    async def use(machine: QemuHypervisor) -> None:
        with pytest.raises(VmmError, match="/nowhere/qemu"):
            await machine.start()
        assert (await machine.exited()).reason == "failed"

    run(machines, b"", use)


def test_a_folder_nobody_serves_fails_the_start(machines: Machines) -> None:
    async def use(machine: QemuHypervisor) -> None:
        machine.add_shared_folder(
            VhostUserFs(tag="x", socket_path=machines.run_dir / "no-such.sock")
        )
        with pytest.raises(VmmError, match=r"no-such\.sock"):
            await machine.start()

    run(machines, say(b"", ending=Ending.PAUSE), use)


def test_a_machine_stopped_before_its_start_stays_so(machines: Machines) -> None:
    async def use(machine: QemuHypervisor) -> None:
        await machine.stop()
        assert (await machine.exited()).reason == "killed"
        with pytest.raises(InvalidStateError):
            await machine.start()

    run(machines, b"", use)


def test_a_start_that_is_cancelled_leaves_nothing(machines: Machines) -> None:
    async def use(machine: QemuHypervisor) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await machine.start()
        assert (await machine.exited()).reason in {"failed", "killed"}

    run(machines, say(b"", ending=Ending.PAUSE), use)


def test_disks_do_not_keep_a_guest_from_booting(machines: Machines) -> None:
    image = machines.run_dir / "disk,one.img"
    image.write_bytes(bytes(1 << 16))

    async def use(machine: QemuHypervisor) -> None:
        first = await machine.add_disk(BlockDevice(id="one", path=image, is_read_only=True))
        second = await machine.add_disk(BlockDevice(id="two", path=image, is_read_only=True))
        assert (first.source, second.source) == ("08", "09")
        await machine.start()
        assert (await machine.exited()).reason == "guest-shutdown"

    run(machines, say(b"", ending=Ending.POWER_OFF), use)


def test_devices_are_refused_after_the_start(machines: Machines) -> None:
    async def use(machine: QemuHypervisor) -> None:
        await machine.start()
        with pytest.raises(InvalidStateError):
            machine.add_shared_folder(VhostUserFs(tag="x", socket_path=Path("/x")))

    run(machines, say(b"", ending=Ending.PAUSE), use)


def test_a_console_flood_does_not_hold_up_the_guest(machines: Machines) -> None:
    async def use(machine: QemuHypervisor) -> None:
        await machine.start()
        assert (await machine.exited()).reason == "guest-shutdown"
        assert len(machine.console_tail()) <= 64 << 10

    run(machines, say(b"flood " * 20 + b"\n", ending=Ending.POWER_OFF, times=1000), use)
