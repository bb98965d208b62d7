"""What every machine monitor promises (``hypervisor/base.py``), asked of each that can run here.

The fake runs anywhere; the built-in one needs a ``/dev/kvm`` that can be opened and boots a kernel
of a few bytes (``tiny_kernel.py``), so it is asked on a host whose KVM runs no Linux, too.
"""

import asyncio
import contextlib
import gc
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from kata_hybrid._native.events import EventPort
from kata_hybrid.aio.events import NativeEvents
from kata_hybrid.errors import InvalidArgumentError, InvalidStateError, KataError, VmmError
from kata_hybrid.hypervisor.base import Hypervisor, MachineConfig
from kata_hybrid.hypervisor.builtin import BuiltinHypervisor
from kata_hybrid.hypervisor.builtin_settings import BuiltinSettings
from kata_hybrid.testing.fake_hypervisor import FakeHypervisor
from kata_hybrid.types import BlockDevice, HostFolder, VmExit
from open_descriptors import open_descriptors
from tiny_kernel import End, tiny_kernel

DEADLINE_S = 50.0
REASONS = {
    End.POWER_OFF: "guest-shutdown",
    End.RESTART: "guest-reset",
    End.TRIPLE_FAULT: "guest-triple-fault",
}
Use = Callable[[Hypervisor], Awaitable[None]]


class Monitor(Protocol):
    """Makes machines of one kind and lets a test use them."""

    def run(self, use: Use, *, end: End, is_broken: bool = False) -> None:
        """Use a machine whose guest says "hello" and ends so; a broken one cannot start."""


class FakeMonitor:
    """Machines in memory."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def run(self, use: Use, *, end: End, is_broken: bool = False) -> None:
        async def main() -> None:
            failure = VmmError("start machine", "it is broken") if is_broken else None
            machine = ScriptedFake(run_dir=self._run_dir, end=end, failure=failure)
            await use(machine)

        asyncio.run(main())


class ScriptedFake(FakeHypervisor):
    """Says hello and ends by itself once it is started."""

    def __init__(self, *, run_dir: Path, end: End, failure: KataError | None) -> None:
        super().__init__(run_dir=run_dir, failure=failure)
        self._script_end = end

    async def start(self) -> None:
        await super().start()
        self.say("hello")
        if reason := REASONS.get(self._script_end):
            asyncio.get_running_loop().call_soon(self.end, reason)


class BuiltinMonitor:
    """Machines of the built-in monitor."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def run(self, use: Use, *, end: End, is_broken: bool = False) -> None:
        kernel = self._run_dir / "kernel"
        kernel.write_bytes(b"no kernel at all" if is_broken else tiny_kernel(b"hello\n", end=end))

        async def main() -> None:
            events = NativeEvents(EventPort())
            machine = BuiltinHypervisor(
                MachineConfig(
                    name="test",
                    kernel=kernel,
                    initrd=None,
                    kernel_params=("console=ttyS0",),
                    vcpu_count=1,
                    memory_mib=128,
                    run_dir=self._run_dir,
                ),
                settings=BuiltinSettings(),
                events=events,
            )
            gc.collect()  # what an earlier test left to the collector is not this machine's
            before = open_descriptors()
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await use(machine)
            finally:
                await machine.stop()
                await machine.cleanup()
            assert open_descriptors() == before
            assert not [path for path in self._run_dir.iterdir() if path.is_socket()]
            events.close()

        asyncio.run(main())


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A folder with a short path: a socket's holds 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="kh"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(params=["fake", "builtin"])
def monitor(request: pytest.FixtureRequest, run_dir: Path) -> Monitor:
    if request.param == "fake":
        return FakeMonitor(run_dir)
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm cannot be opened here")
    return BuiltinMonitor(run_dir)


@pytest.mark.parametrize(("end", "reason"), REASONS.items())
def test_a_guest_that_ends_itself_is_told_by_how(monitor: Monitor, end: End, reason: str) -> None:
    async def use(machine: Hypervisor) -> None:
        await machine.start()
        exit_ = await machine.exited()
        assert exit_.reason == reason
        assert await machine.exited() == exit_
        assert machine.console_tail() == "hello"
        await machine.stop()
        await machine.cleanup()
        assert await machine.exited() == exit_
        assert machine.console_tail() == "hello"

    monitor.run(use, end=end)


def test_stop_ends_a_running_guest_and_repeats(monitor: Monitor) -> None:
    async def use(machine: Hypervisor) -> None:
        await machine.start()
        await machine.stop()
        assert (await machine.exited()).reason == "killed"
        await machine.stop()
        await machine.cleanup()
        await machine.cleanup()
        await machine.stop()

    monitor.run(use, end=End.HALT)


def test_the_end_may_be_awaited_before_the_start_and_by_many(monitor: Monitor) -> None:
    async def use(machine: Hypervisor) -> None:
        async with asyncio.TaskGroup() as group:
            ends = [group.create_task(machine.exited()) for _ in range(3)]
            await asyncio.sleep(0)
            await machine.start()
        assert {end.result().reason for end in ends} == {"guest-reset"}

    monitor.run(use, end=End.RESTART)


def test_whoever_stops_waiting_does_not_end_the_wait_of_others(monitor: Monitor) -> None:
    async def use(machine: Hypervisor) -> None:
        await machine.start()
        async with asyncio.TaskGroup() as group:
            patient = group.create_task(machine.exited())
            hasty = group.create_task(machine.exited())
            await asyncio.sleep(0)
            hasty.cancel()
            await asyncio.sleep(0)
            await machine.stop()
        assert patient.result().reason == "killed"

    monitor.run(use, end=End.HALT)


def test_a_machine_stopped_before_its_start_stays_so(monitor: Monitor) -> None:
    async def use(machine: Hypervisor) -> None:
        await machine.stop()
        assert (await machine.exited()).reason == "killed"
        with pytest.raises(InvalidStateError):
            await machine.start()

    monitor.run(use, end=End.HALT)


def test_a_machine_that_cannot_start_says_so_and_leaves_nothing(monitor: Monitor) -> None:
    async def use(machine: Hypervisor) -> None:
        with pytest.raises(VmmError):
            await machine.start()
        assert (await machine.exited()).reason == "failed"
        with pytest.raises(InvalidStateError):
            await machine.start()
        await machine.stop()

    monitor.run(use, end=End.HALT, is_broken=True)


def test_a_machine_starts_once(monitor: Monitor) -> None:
    async def use(machine: Hypervisor) -> None:
        await machine.start()
        with pytest.raises(InvalidStateError):
            await machine.start()
        await machine.stop()
        assert (await machine.exited()).reason == "killed"

    monitor.run(use, end=End.HALT)


def test_a_start_that_is_given_up_leaves_nothing(monitor: Monitor) -> None:
    async def use(machine: Hypervisor) -> None:
        async with asyncio.TaskGroup() as group:
            start = group.create_task(machine.start())
            await asyncio.sleep(0)
            start.cancel()
        # Whether it was quicker than the cancellation is a matter of luck.
        if start.cancelled():
            assert (await machine.exited()).reason == "failed"

    monitor.run(use, end=End.HALT)


def test_devices_are_refused_after_the_start(monitor: Monitor, run_dir: Path) -> None:
    async def use(machine: Hypervisor) -> None:
        await machine.start()
        with pytest.raises(InvalidStateError):
            machine.add_shared_folder(HostFolder(tag="x", path=run_dir))

    monitor.run(use, end=End.HALT)


def test_each_disk_has_a_place_of_its_own(monitor: Monitor, run_dir: Path) -> None:
    image = run_dir / "image"
    image.write_bytes(bytes(4096))

    async def use(machine: Hypervisor) -> None:
        disks = [
            await machine.add_disk(BlockDevice(id=name, path=image, is_read_only=True))
            for name in ("one", "two")
        ]
        assert len({disk.source for disk in disks}) == 2
        await machine.start()
        assert (await machine.exited()).reason == "guest-reset"

    monitor.run(use, end=End.RESTART)


@pytest.mark.parametrize("name", ["", "x" * 21, "d\u00e9"])
def test_a_disk_id_that_is_no_serial_is_refused(monitor: Monitor, run_dir: Path, name: str) -> None:
    async def use(machine: Hypervisor) -> None:
        with pytest.raises(InvalidArgumentError):
            await machine.add_disk(BlockDevice(id=name, path=run_dir / "x", is_read_only=True))

    monitor.run(use, end=End.HALT)


def test_disks_come_and_go_while_it_runs_and_each_has_a_place(
    monitor: Monitor, run_dir: Path
) -> None:
    image = run_dir / "image"
    image.write_bytes(bytes(4096))

    def disk(name: str) -> BlockDevice:
        return BlockDevice(id=name, path=image, is_read_only=True)

    async def use(machine: Hypervisor) -> None:
        first = await machine.add_disk(disk("first"))
        await machine.start()
        places = [(await machine.add_disk(disk(f"d{number}"))).source for number in range(3)]
        assert len({first.source, *places}) == 4
        await machine.remove_disk("first")  # It was there from the start, and stays.
        await machine.remove_disk("never")
        for number in range(3):
            await machine.remove_disk(f"d{number}")
            await machine.remove_disk(f"d{number}")
        await machine.add_disk(disk("d0"))
        await machine.stop()
        await machine.remove_disk("d0")
        with pytest.raises(InvalidStateError):
            await machine.add_disk(disk("late"))

    monitor.run(use, end=End.HALT)


def test_a_disk_that_cannot_be_opened_leaves_its_place_free(
    monitor: Monitor, run_dir: Path
) -> None:
    image = run_dir / "image"
    image.write_bytes(bytes(4096))

    async def use(machine: Hypervisor) -> None:
        await machine.start()
        for _ in range(20):
            with contextlib.suppress(VmmError):
                disk = BlockDevice(id="none", path=run_dir / "none", is_read_only=True)
                await machine.add_disk(disk)
            await machine.remove_disk("none")
        await machine.add_disk(BlockDevice(id="some", path=image, is_read_only=True))

    monitor.run(use, end=End.HALT)


def test_the_task_pid_is_a_live_process(monitor: Monitor) -> None:
    async def use(machine: Hypervisor) -> None:
        await machine.start()
        os.kill(machine.task_pid, 0)
        assert all(process.pid == machine.task_pid for process in machine.processes)

    monitor.run(use, end=End.HALT)


def test_a_stop_during_the_start_wins(monitor: Monitor) -> None:
    async def use(machine: Hypervisor) -> None:
        async with asyncio.TaskGroup() as group:
            start = group.create_task(_start(machine))
            await asyncio.sleep(0)
            await machine.stop()
            await start
        assert isinstance(await machine.exited(), VmExit)
        with pytest.raises(InvalidStateError):
            machine.add_shared_folder(HostFolder(tag="x", path=Path("/")))

    monitor.run(use, end=End.HALT)


async def _start(machine: Hypervisor) -> None:
    try:
        await machine.start()
    except KataError:
        return
