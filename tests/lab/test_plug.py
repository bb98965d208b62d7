"""Disks that come and go while a real guest runs: its kernel finds them, and loses nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_hybrid._native import vmm
from lab_guest.image import GuestImage
from lab_guest.machine import GuestError, Machine

pytestmark = pytest.mark.timeout(180)

_SLOTS = ("slot-0", "slot-1", "slot-2")


@pytest.fixture(scope="module")
def machine(
    image: GuestImage, run_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """A machine with a disk of its own and three slots."""
    fixed = _disk(tmp_path_factory.mktemp("fixed") / "fixed", size=1 << 20)
    with Machine(image, run_dir, vcpu_count=2) as machine:
        machine.vm.add_disk(id="fixed", path=fixed)
        nodes = [machine.vm.add_disk_slot(name=name) for name in _SLOTS]
        assert nodes == ["/dev/vdb", "/dev/vdc", "/dev/vdd"]
        machine.start()
        yield machine


def _disk(path: Path, *, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def _wait_size(machine: Machine, node: str, size: int) -> None:
    machine.run(
        f"for n in $(seq 100); do test $(blockdev --getsize64 {node} || echo x) = {size} && exit 0;"
        " sleep 0.05; done; exit 1"
    )


def test_slots_are_not_there_before_their_first_disks(machine: Machine, tmp_path: Path) -> None:
    assert machine.run("ls /sys/block | grep vd") == "vda"
    for number, (slot, node) in enumerate(zip(_SLOTS[:2], ("/dev/vdb", "/dev/vdc"), strict=True)):
        disk = _disk(tmp_path / slot, size=(8 + number) << 20)
        machine.vm.plug_disk(slot=slot, id=f"disk-{number}", path=disk)
        _wait_size(machine, node, (8 + number) << 20)
        assert machine.run(f"cat /sys/block/{Path(node).name}/serial") == f"disk-{number}"
    assert machine.run("ls /sys/block | grep vd").split() == ["vda", "vdb", "vdc"]
    for slot in _SLOTS[:2]:
        machine.vm.unplug_disk(slot=slot)
        machine.vm.unplug_disk(slot=slot)
    _wait_size(machine, "/dev/vdb", 0)


def test_each_disk_of_a_slot_is_its_own(machine: Machine, tmp_path: Path) -> None:
    for number in range(4):
        disk = _disk(tmp_path / f"disk{number}", size=(16 + 4 * number) << 20)
        machine.vm.plug_disk(slot="slot-0", id=f"round-{number}", path=disk)
        _wait_size(machine, "/dev/vdb", disk.stat().st_size)
        assert machine.run("cat /sys/block/vdb/serial") == f"round-{number}"
        assert machine.run("blkid /dev/vdb || true") == "", "what was there before is not seen"
        machine.run(
            "mkfs.ext4 -q -F /dev/vdb && mkdir -p /run/disk && mount /dev/vdb /run/disk &&"
            f" echo {number} >/run/disk/number && umount /run/disk",
            timeout_s=60,
        )
        machine.vm.unplug_disk(slot="slot-0")
        _wait_size(machine, "/dev/vdb", 0)
        assert f"{number}\n".encode() in disk.read_bytes()


def test_a_disk_taken_while_it_is_used_fails_and_nothing_else_does(
    machine: Machine, tmp_path: Path
) -> None:
    disk = _disk(tmp_path / "disk", size=64 << 20)
    machine.vm.plug_disk(slot="slot-0", id="gone", path=disk)
    _wait_size(machine, "/dev/vdb", 64 << 20)
    writer = machine.begin("dd if=/dev/zero of=/dev/vdb bs=1M oflag=direct status=none; echo $?")
    machine.vm.unplug_disk(slot="slot-0")
    before = disk.stat()
    assert writer.wait(timeout_s=60).splitlines()[-1] in {"0", "1"}
    with pytest.raises(GuestError):
        machine.run("dd if=/dev/vdb of=/dev/null bs=512 count=1 iflag=direct | grep -q .")
    machine.run("dd if=/dev/vda of=/dev/null bs=512 count=1 iflag=direct status=none")
    assert disk.stat().st_mtime_ns == before.st_mtime_ns, "nothing is written once it is out"


def test_a_disk_that_may_not_be_written_is_not(machine: Machine, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"kept" * 128 * 1024)
    machine.vm.plug_disk(slot="slot-0", id="kept", path=disk, is_read_only=True)
    _wait_size(machine, "/dev/vdb", disk.stat().st_size)
    assert machine.run("head -c 4 /dev/vdb") == "kept"
    with pytest.raises(GuestError):
        machine.run("dd if=/dev/zero of=/dev/vdb bs=512 count=1 oflag=direct")
    machine.vm.unplug_disk(slot="slot-0")
    assert disk.read_bytes() == b"kept" * 128 * 1024


def test_what_cannot_be_plugged_is_named(machine: Machine, tmp_path: Path) -> None:
    disk = _disk(tmp_path / "disk", size=1 << 20)
    with pytest.raises(FileNotFoundError):
        machine.vm.plug_disk(slot="slot-1", id="none", path=tmp_path / "none")
    with pytest.raises(vmm.VmmError, match="none is called slot-9"):
        machine.vm.plug_disk(slot="slot-9", id="none", path=disk)
    with pytest.raises(vmm.VmmError, match="fixed is no slot"):
        machine.vm.plug_disk(slot="fixed", id="none", path=disk)
    machine.vm.plug_disk(slot="slot-1", id="first", path=disk)
    with pytest.raises(vmm.VmmError, match="slot-1 is occupied"):
        machine.vm.plug_disk(slot="slot-1", id="second", path=disk)
    machine.vm.unplug_disk(slot="slot-1")
    machine.vm.pause()
    with pytest.raises(vmm.VmmError, match="cannot plug a disk into a machine that is paused"):
        machine.vm.plug_disk(slot="slot-1", id="second", path=disk)
    machine.vm.resume()


def test_many_come_and_go_under_load(machine: Machine, tmp_path: Path) -> None:
    load = machine.begin(
        "fio --name=load --filename=/dev/vda --size=1m --rw=randrw --bs=4k --direct=1"
        " --ioengine=libaio --iodepth=8 --time_based --runtime=8 --minimal",
        timeout_s=60,
    )
    disk = _disk(tmp_path / "disk", size=4 << 20)
    for number in range(60):
        slot = _SLOTS[number % 3]
        machine.vm.plug_disk(slot=slot, id=f"{number}", path=disk)
        machine.vm.unplug_disk(slot=slot)
    machine.vm.plug_disk(slot="slot-2", id="last", path=disk)
    _wait_size(machine, "/dev/vdd", 4 << 20)
    assert machine.run("cat /sys/block/vdd/serial") == "last"
    load.wait(timeout_s=60)
    machine.vm.unplug_disk(slot="slot-2")
