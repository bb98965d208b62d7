"""Disks of a real guest: written is read, flushed, freed or refused, and a file system holds."""

import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab_guest.machine import GuestError, Machine

pytestmark = pytest.mark.timeout(180)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """How a disk of the shared machine is called on either side."""

    serial: str
    node: str


DISKS = {
    "io_uring": Disk(serial="uring-disk", node="/dev/vda"),
    "sync": Disk(serial="sync-disk", node="/dev/vdb"),
    "read-only": Disk(serial="read-only", node="/dev/vdc"),
}
WRITABLE = ("io_uring", "sync")
# Direct, so that each request of fio's is one of the device's.
FIO = "fio --name=verify --direct=1 --ioengine=libaio --verify=crc32c --verify_fatal=1 --minimal"


@pytest.mark.parametrize("name", DISKS)
def test_the_serial_is_the_disks_id(guest: Machine, name: str) -> None:
    disk = DISKS[name]
    assert guest.run(f"cat /sys/block/{Path(disk.node).name}/serial") == disk.serial


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize(
    "work",
    [
        pytest.param(
            "--rw=randwrite --bsrange=512-128k --blockalign=512 --iodepth=16", id="random"
        ),
        pytest.param("--rw=write --bs=1m --iodepth=4", id="sequential"),
    ],
)
def test_what_fio_writes_it_reads_back(guest: Machine, name: str, work: str) -> None:
    disk = DISKS[name]
    before = guest.counters("block", disk.serial)
    guest.run(f"{FIO} --filename={disk.node} --size=12m {work}", timeout_s=120)
    after = guest.counters("block", disk.serial)
    assert after["written_bytes"] - before["written_bytes"] >= 12 << 20
    assert after["read_bytes"] - before["read_bytes"] >= 12 << 20
    assert after["failed_requests"] == before["failed_requests"]


@pytest.mark.parametrize("name", WRITABLE)
def test_a_sync_is_a_flush_and_the_image_has_the_data(
    guest: Machine, disks: dict[str, Path], name: str
) -> None:
    disk = DISKS[name]
    flushes = guest.counters("block", disk.serial)["flushes"]
    text = guest.run(
        f"grep -q 'write back' /sys/block/{Path(disk.node).name}/queue/write_cache &&"
        f" head -c 300000 /dev/urandom >/tmp/data &&"
        f" dd if=/tmp/data of={disk.node} bs=1M conv=fsync status=none && sha256sum </tmp/data"
    )
    assert guest.counters("block", disk.serial)["flushes"] > flushes
    content = disks[name].read_bytes()[:300000]
    assert hashlib.sha256(content).hexdigest() == text.split()[0]


@pytest.mark.parametrize("name", WRITABLE)
def test_a_discard_frees_blocks_of_the_image(
    guest: Machine, disks: dict[str, Path], name: str
) -> None:
    disk, image = DISKS[name], disks[name]
    guest.run(
        f"tr '\\0' x </dev/zero | head -c 8M | dd of={disk.node} bs=1M conv=fsync status=none"
    )
    used = image.stat().st_blocks
    assert used * 512 >= 8 << 20
    guest.run(f"blkdiscard --offset 1M --length 6M {disk.node}")
    assert image.stat().st_blocks * 512 <= used * 512 - (6 << 20) + (64 << 10)
    content = image.read_bytes()[: 8 << 20]
    assert content == b"x" * (1 << 20) + bytes(6 << 20) + b"x" * (1 << 20)
    # The guest sees the same, past its page cache.
    seen = guest.run(f"dd if={disk.node} bs=1M count=8 iflag=direct status=none | sha256sum")
    assert seen.split()[0] == hashlib.sha256(content).hexdigest()


def test_a_read_only_disk_refuses_writes(guest: Machine, disks: dict[str, Path]) -> None:
    node = DISKS["read-only"].node
    before = disks["read-only"].read_bytes()
    assert guest.run(f"blockdev --getro {node}; head -c 15 {node}") == "1\nonly to be read"
    for command in (f"dd if=/dev/zero of={node} count=1 conv=fsync", f"blkdiscard {node}"):
        # Not offered, so not supported, is the most a disk can say of a discard.
        with pytest.raises(GuestError, match=r"not permitted|[Rr]ead-only|not supported"):
            guest.run(command)
    assert disks["read-only"].read_bytes() == before


@pytest.mark.parametrize("name", WRITABLE)
def test_a_file_system_on_it_is_whole(guest: Machine, disks: dict[str, Path], name: str) -> None:
    node = DISKS[name].node
    guest.run(
        f"""set -e
        mkfs.ext4 -q -F {node}
        mkdir -p /run/disk
        mount {node} /run/disk
        cd /run/disk
        mkdir a b
        for number in $(seq 100); do echo "content $number" >"a/$number"; done
        head -c 5000000 /dev/urandom >b/large
        cp b/large b/copy
        rm a/1? a/2?
        ln b/large b/link
        sync
        cmp b/large b/copy
        cd /
        umount /run/disk
        mount -o ro {node} /run/disk
        cmp /run/disk/b/link /run/disk/b/copy
        test "$(ls /run/disk/a | wc -l)" = 80
        test "$(cat /run/disk/a/100)" = "content 100"
        umount /run/disk
        e2fsck -fn {node}
        """,
        timeout_s=120,
    )
    # And from outside, without the device.
    subprocess.run(["e2fsck", "-fn", disks[name]], check=True, capture_output=True, timeout=60)
