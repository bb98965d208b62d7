import asyncio
import os
from pathlib import Path

import pytest

from harness.loop import on_loop, until
from kata_hybrid.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    UnavailableError,
    VmmError,
)
from kata_hybrid.resource.disks import Disks
from kata_hybrid.types import BlockDevice, GuestDisk


class Machine:
    """Takes disks, and holds a call back if it is told to."""

    def __init__(self) -> None:
        self.there: dict[str, Path] = {}
        self.failure: VmmError | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = 0

    async def add_disk(self, disk: BlockDevice) -> GuestDisk:
        self.asked += 1
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.there[disk.id] = disk.path
        return GuestDisk(driver="blk", source=disk.id)

    async def remove_disk(self, disk_id: str) -> None:
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        del self.there[disk_id]


def image(folder: Path, name: str = "image") -> Path:
    path = folder / name
    path.touch()
    return path


@on_loop
async def test_a_file_is_one_disk_by_whatever_path_and_goes_with_its_last_user(
    tmp_path: Path,
) -> None:
    machine = Machine()
    disks = Disks(machine)
    path = image(tmp_path)
    other = tmp_path / "other"
    os.link(path, other)
    first = await disks.attach(path, is_read_only=False)
    assert await disks.attach(other, is_read_only=True) == first
    third = await disks.attach(image(tmp_path, "third"), is_read_only=True)
    assert third != first
    assert list(machine.there.values()) == [path, tmp_path / "third"]
    await disks.detach(first)
    assert len(machine.there) == 2
    await disks.detach(first)
    await disks.detach(first)
    assert list(machine.there.values()) == [tmp_path / "third"]
    again = await disks.attach(path, is_read_only=False)
    assert again != first, "an id is used once"


@on_loop
async def test_what_is_used_read_only_is_not_written_by_another(tmp_path: Path) -> None:
    disks = Disks(Machine())
    path = image(tmp_path)
    await disks.attach(path, is_read_only=True)
    with pytest.raises(FailedPreconditionError, match="used read-only by another container"):
        await disks.attach(path, is_read_only=False)


@pytest.mark.parametrize("name", ["absent", ".", "a\0b"])
@on_loop
async def test_what_is_no_disk_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="disk "):
        await Disks(Machine()).attach(tmp_path / name, is_read_only=True)


@on_loop
async def test_a_disk_that_the_machine_does_not_take_is_not_there(tmp_path: Path) -> None:
    machine = Machine()
    disks = Disks(machine)
    path = image(tmp_path)
    machine.failure = VmmError("plug", "no")
    with pytest.raises(VmmError):
        await disks.attach(path, is_read_only=True)
    machine.failure = None
    await disks.attach(path, is_read_only=True)
    assert machine.asked == 2


@on_loop
async def test_a_disk_that_does_not_go_is_told_and_asked_again_before_it_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine()
    disks = Disks(machine)
    path = image(tmp_path)
    disk = await disks.attach(path, is_read_only=True)
    machine.failure = VmmError("unplug", "stuck")
    await disks.detach(disk)
    assert "disk stays in the machine" in caplog.text
    with pytest.raises(VmmError, match="stuck"):
        await disks.attach(path, is_read_only=True)
    machine.failure = None
    again = await disks.attach(path, is_read_only=False)
    assert list(machine.there) == [again.source]
    assert again != disk
    await disks.detach(disk)
    assert list(machine.there) == [again.source], "it is another's"


@on_loop
async def test_an_attach_that_is_given_up_is_undone(tmp_path: Path) -> None:
    machine = Machine()
    disks = Disks(machine)
    machine.gate.clear()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(disks.attach(image(tmp_path), is_read_only=True))
        await until(lambda: machine.asked == 1)
        task.cancel()
        await asyncio.sleep(0)
        machine.gate.set()
    await until(lambda: not machine.there and not len(disks._supervisor))
    assert machine.asked == 1


@on_loop
async def test_a_detach_that_is_given_up_is_done(tmp_path: Path) -> None:
    machine = Machine()
    disks = Disks(machine)
    disk = await disks.attach(image(tmp_path), is_read_only=True)
    machine.gate.clear()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(disks.detach(disk))
        await asyncio.sleep(0)
        task.cancel()
    machine.gate.set()
    await until(lambda: not machine.there)


@on_loop
async def test_closing_forgets_all(tmp_path: Path) -> None:
    machine = Machine()
    disks = Disks(machine)
    disk = await disks.attach(image(tmp_path), is_read_only=True)
    await disks.close()
    await disks.close()
    assert machine.there, "it goes with the machine"
    await disks.detach(disk)
    with pytest.raises(UnavailableError, match="the machine is gone"):
        await disks.attach(tmp_path / "image", is_read_only=True)


@on_loop
async def test_what_is_under_way_ends_with_the_machine(tmp_path: Path) -> None:
    machine = Machine()
    disks = Disks(machine)
    disk = await disks.attach(image(tmp_path), is_read_only=True)
    machine.gate.clear()
    async with asyncio.TaskGroup() as group:
        detaching = group.create_task(disks.detach(disk))
        attaching = group.create_task(refused(disks, image(tmp_path, "other")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await disks.close()
    assert not detaching.cancelled(), "its caller is told nothing"
    assert attaching.done()


async def refused(disks: Disks, path: Path) -> None:
    with pytest.raises(UnavailableError, match="the machine is gone"):
        await disks.attach(path, is_read_only=True)
