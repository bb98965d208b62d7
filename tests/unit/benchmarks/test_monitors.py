"""What the monitors' benchmarks compare: both sides get the same, read from the same files."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

_PATH = Path(__file__).resolve().parents[3] / "benchmarks" / "lab" / "monitors.py"
_DISKS = (Path("/data/root.img"), Path("/data/data.img"))


@pytest.fixture(scope="module")
def monitors() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("bench_monitors", _PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


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
