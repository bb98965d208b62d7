from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_hybrid.errors import InvalidArgumentError, ResourceExhaustedError
from kata_hybrid.hypervisor.base import MachineConfig, check_serial
from kata_hybrid.hypervisor.qemu_command import (
    Accelerator,
    QemuMachine,
    build_command,
    disk_pci_path,
    network_pci_path,
    option,
    plugged_disk,
    plugged_pci_path,
)
from kata_hybrid.hypervisor.vsock import KernelVsock, UserVsock
from kata_hybrid.types import BlockDevice, NetworkDevice, VhostUserFs

MACHINE = QemuMachine(
    machine=MachineConfig(
        name="sb1",
        kernel=Path("/g/vmlinux"),
        initrd=Path("/g/initrd"),
        kernel_params=("console=ttyS0", "quiet"),
        vcpu_count=2,
        memory_mib=512,
        run_dir=Path("/run/sb1"),
    ),
    program=Path("/usr/bin/qemu"),
    accelerator=Accelerator.TCG,
    vsock=UserVsock(socket_path=Path("/run/sb1/vsock.sock")),
    monitor_fd=7,
    console_fd=8,
)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
PATHS = TEXTS.filter(bool).map(lambda text: Path(f"/p/{text.replace('/', '_')}x"))


def qemu_split(text: str) -> list[str]:
    """Split an option as QEMU's get_opt_value does: at a comma, with two commas for one."""
    parts = [""]
    index = 0
    while index < len(text):
        if text.startswith(",,", index):
            parts[-1] += ","
            index += 2
        elif text[index] == ",":
            parts.append("")
            index += 1
        else:
            parts[-1] += text[index]
            index += 1
    return parts


def values(command: tuple[str, ...], flag: str) -> list[str]:
    return [word for before, word in pairwise(command) if before == flag]


@given(st.dictionaries(st.sampled_from(["a", "b", "path"]), TEXTS, min_size=1))
def test_an_option_survives_any_text(fields: dict[str, str]) -> None:
    parsed = qemu_split(option("head", **fields))
    assert parsed == ["head", *(f"{key}={value}" for key, value in fields.items())]


@given(PATHS, PATHS, PATHS, TEXTS)
def test_paths_with_commas_reach_qemu_whole(
    vsock: Path, folder: Path, disk: Path, name: str
) -> None:
    command = build_command(
        replace(
            MACHINE,
            machine=replace(MACHINE.machine, name=name),
            vsock=UserVsock(socket_path=vsock),
            folders=(VhostUserFs(tag="a,b", socket_path=folder),),
            disks=(BlockDevice(id="d,1", path=disk, is_read_only=True),),
        )
    )
    chardevs = [qemu_split(value) for value in values(command, "-chardev")]
    assert ["socket", "id=vsock", f"path={vsock}"] in chardevs
    assert ["socket", "id=folder0", f"path={folder}"] in chardevs
    (blockdev,) = values(command, "-blockdev")
    assert f"file.filename={disk}" in qemu_split(blockdev)
    devices = [qemu_split(value) for value in values(command, "-device")]
    assert any("tag=a,b" in device for device in devices)
    assert any("serial=d,1" in device for device in devices)
    assert f"guest=sandbox-{name}" in qemu_split(values(command, "-name")[0])


def test_a_nul_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="NUL"):
        option("socket", path="a\0b")


def test_none_leaves_a_key_out_and_flags_are_on_and_off() -> None:
    assert option("x", a=None, read_only=True, c=False) == "x,read-only=on,c=off"


def test_memory_is_shared() -> None:
    (memory, _rng) = values(build_command(MACHINE), "-object")
    assert "memory-backend-memfd" in memory
    assert "size=512M" in memory
    assert "share=on" in memory


@pytest.mark.parametrize(
    ("accelerator", "accel", "cpu"),
    [(Accelerator.KVM, "kvm", "host"), (Accelerator.TCG, "tcg,thread=multi", "max")],
)
def test_accelerator_decides_the_cpu(accelerator: Accelerator, accel: str, cpu: str) -> None:
    command = build_command(replace(MACHINE, accelerator=accelerator))
    assert values(command, "-accel") == [accel]
    assert values(command, "-cpu") == [cpu]


def test_cpu_features_are_appended() -> None:
    command = build_command(replace(MACHINE, cpu_features="pmu=off, -la57,"))
    assert values(command, "-cpu") == ["max,pmu=off,-la57"]


def test_machine_options_are_appended_without_the_accelerator() -> None:
    command = build_command(replace(MACHINE, machine_options="accel=tcg,usb=on"))
    (machine,) = values(command, "-machine")
    assert machine.startswith("q35,")
    assert machine.endswith(",usb=on")
    assert "accel" not in machine


def test_kernel_vsock_passes_the_descriptor() -> None:
    command = build_command(replace(MACHINE, vsock=KernelVsock(vhost_fd=9, guest_cid=77)))
    assert any(
        value.startswith("vhost-vsock-pci,vhostfd=9,guest-cid=77")
        for value in values(command, "-device")
    )


def test_nothing_default_and_no_reboot() -> None:
    command = build_command(MACHINE)
    assert {"-nodefaults", "-no-user-config", "-no-reboot", "-S"} <= set(command)


def test_kernel_initrd_and_parameters() -> None:
    command = build_command(MACHINE)
    assert values(command, "-kernel") == ["/g/vmlinux"]
    assert values(command, "-initrd") == ["/g/initrd"]
    assert values(command, "-append") == ["console=ttyS0 quiet"]


def test_an_initrd_is_optional() -> None:
    machine = replace(MACHINE.machine, initrd=None)
    assert "-initrd" not in build_command(replace(MACHINE, machine=machine))


def test_every_device_has_a_slot_of_its_own() -> None:
    command = build_command(
        replace(
            MACHINE,
            folders=tuple(
                VhostUserFs(tag=f"t{index}", socket_path=Path(f"/s{index}")) for index in range(4)
            ),
            disks=tuple(
                BlockDevice(id=f"d{index}", path=Path(f"/d{index}"), is_read_only=True)
                for index in range(15)
            ),
            networks=tuple(
                NetworkDevice(id=f"n{index}", tap_fds=(index + 20,), mac="02::1", mtu=1500)
                for index in range(8)
            ),
        )
    )
    slots = [
        int(part.removeprefix("addr="), 16)
        for value in values(command, "-device")
        for part in qemu_split(value)
        if part.startswith("addr=")
    ]
    assert len(slots) == len(set(slots)) == 30
    assert max(slots) < 0x1F


def test_too_many_disks_are_refused() -> None:
    with pytest.raises(ResourceExhaustedError):
        disk_pci_path(15)


def test_too_many_network_cards_are_refused() -> None:
    with pytest.raises(ResourceExhaustedError, match="at most 8 network cards"):
        network_pci_path(8)


@pytest.mark.parametrize(
    ("fds", "backend", "queues"),
    [((20,), "fd=20", []), ((20, 21), "fds=20:21", ["mq=on", "vectors=6"])],
)
def test_a_network_card_has_the_taps_descriptors(
    fds: tuple[int, ...], backend: str, queues: list[str]
) -> None:
    card = NetworkDevice(id="eth0", tap_fds=fds, mac="02:00:00:00:00:01", mtu=1450)
    command = build_command(replace(MACHINE, networks=(card,)))
    assert values(command, "-netdev") == [f"tap,id=network0,{backend}"]
    (device,) = [
        qemu_split(value)
        for value in values(command, "-device")
        if value.startswith("virtio-net-pci")
    ]
    assert {"netdev=network0", "mac=02:00:00:00:00:01", "romfile=", *queues} <= set(device)
    assert f"addr=0x{network_pci_path(0)}" in device


def test_a_disks_pci_path_is_its_slot() -> None:
    disks = tuple(
        BlockDevice(id=f"d{index}", path=Path("/d"), is_read_only=False) for index in range(2)
    )
    command = build_command(replace(MACHINE, disks=disks))
    device = next(value for value in values(command, "-device") if "serial=d1" in value)
    assert f"addr=0x{disk_pci_path(1)}" in qemu_split(device)


def test_a_read_only_disk_is_read_only_for_qemu() -> None:
    disk = BlockDevice(id="d", path=Path("/d"), is_read_only=True)
    (blockdev,) = values(build_command(replace(MACHINE, disks=(disk,))), "-blockdev")
    assert "read-only=on" in blockdev


@pytest.mark.parametrize("disk_id", ["", "x" * 21, "é"])
def test_a_serial_that_virtio_blk_cannot_hold_is_refused(disk_id: str) -> None:
    with pytest.raises(InvalidArgumentError):
        check_serial(disk_id)


def test_a_disk_that_comes_later_is_behind_the_bridge_and_named_by_its_id() -> None:
    disk = BlockDevice(id="disk-7", path=Path("/d,7"), is_read_only=True)
    backend, device = plugged_disk(disk, 4)
    assert backend == {
        "driver": "raw",
        "node-name": "disk-7",
        "read-only": True,
        "file": {"driver": "file", "filename": "/d,7", "locking": "off"},
    }
    assert (device["id"], device["drive"], device["serial"]) == ("disk-7",) * 3
    assert (device["bus"], device["addr"], plugged_pci_path(4)) == ("plug", "0x5", "07/05")
    assert "share-rw" not in plugged_disk(replace(disk, is_read_only=False), 0)[1]
    bridges = [word for word in values(build_command(MACHINE), "-device") if "bridge" in word]
    assert bridges == [
        "pci-bridge,id=plug,shpc=off,mem-reserve=1M,pref64-reserve=1M,addr=0x7,chassis_nr=1"
    ]
    with pytest.raises(ResourceExhaustedError):
        plugged_disk(disk, 31)
