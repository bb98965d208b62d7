"""What the monitors' benchmarks compare: both sides get the same, read from the same files."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from module_file import loaded_module

_PATH = Path(__file__).resolve().parents[3] / "benchmarks" / "lab" / "monitors.py"
_DISKS = (Path("/data/root.img"), Path("/data/data.img"))


@pytest.fixture(scope="module")
def monitors() -> Iterator[ModuleType]:
    with loaded_module("bench_monitors", _PATH) as module:
        yield module


def test_all_machines_run_the_same(monitors: ModuleType) -> None:
    software = monitors.Software(
        kernel=Path("/data/vmlinux"),
        initrd=Path("/data/initrd"),
        parameters="console=ttyS0 quiet",
        memory_mib=256,
    )
    commands = [
        monitors.runner(Path("/data/boot"), software),
        monitors.microvm(software),
        monitors.q35(software),
    ]
    for command in commands:
        assert {"/data/vmlinux", "/data/initrd", "console=ttyS0 quiet"} <= set(command)
        assert "256" in " ".join(command)


def test_microvm_differs_by_its_clock_alone(monitors: ModuleType) -> None:
    software = monitors.Software(
        kernel=Path("/data/vmlinux"), initrd=Path("/data/initrd"), parameters="", memory_mib=256
    )
    tuned, plain = (monitors.microvm(software, has_clock=has_clock) for has_clock in (True, False))
    assert [pair for pair in zip(tuned, plain, strict=True) if pair[0] != pair[1]] == [
        (f"{monitors.MICROVM},rtc=on", f"{monitors.MICROVM},rtc=off")
    ]


def test_a_disk_is_the_same_file_and_read_only_on_both_sides(monitors: ModuleType) -> None:
    assert monitors.runner_disks(_DISKS) == [
        *("--read-only-disk", "/data/root.img", "--read-only-disk", "/data/data.img")
    ]
    words = monitors.qemu_disks(_DISKS, driver="virtio-blk-device")
    drives = [word for word in words if word.startswith("id=")]
    devices = [word for word in words if word.startswith("virtio-blk-device")]
    assert [drive.rpartition("file=")[2] for drive in drives] == [
        "/data/root.img",
        "/data/data.img",
    ]
    assert all("readonly=on" in drive and "cache=writeback" in drive for drive in drives)
    assert [device.rpartition("serial=")[2] for device in devices] == ["root.img", "data.img"]
