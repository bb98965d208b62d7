"""The command line of one QEMU, built from frozen values; nothing is opened or started here.

Every value that is not ours goes through :func:`option`, which doubles commas: QEMU splits options
at a comma and reads ``,,`` as one. Devices sit at fixed slots of the PCI root, so that a disk's
place is known before the guest boots.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from kata_hybrid.errors import InvalidArgumentError, ResourceExhaustedError
from kata_hybrid.hypervisor.base import MachineConfig, check_serial
from kata_hybrid.hypervisor.vsock import KernelVsock, UserVsock
from kata_hybrid.types import BlockDevice, JsonObject, NetworkDevice, VhostUserFs

MEMORY_ID = "guest-memory"
_VIRTIO_FS_QUEUE_SIZE = 1024
_SLOT_RNG = 0x01
_SLOT_VSOCK = 0x02
_FOLDER_SLOTS = range(0x03, 0x07)
_SLOT_BRIDGE = 0x07
"""Behind it devices come and go: those of the root are there for good."""
_BRIDGE_SLOTS = range(0x01, 0x20)
_BRIDGE = "plug"
_DISK_SLOTS = range(0x08, 0x17)
_NETWORK_SLOTS = range(0x17, 0x1F)
"""0x1f is the chipset's ISA bridge."""
_SECCOMP = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


class Accelerator(Enum):
    """How QEMU runs guest code."""

    KVM = "kvm"
    TCG = "tcg"


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuMachine:
    """Everything a QEMU command line says."""

    machine: MachineConfig
    program: Path
    accelerator: Accelerator
    machine_type: str = "q35"
    machine_options: str = ""
    """Kata's ``machine_accelerators``, taken as written."""
    cpu_features: str = ""
    entropy_source: Path = Path("/dev/urandom")
    vsock: KernelVsock | UserVsock
    folders: tuple[VhostUserFs, ...] = ()
    disks: tuple[BlockDevice, ...] = field(default=())
    networks: tuple[NetworkDevice, ...] = ()
    monitor_fd: int
    console_fd: int


def option(head: str, **values: object) -> str:
    """Lay out one QEMU option: ``head,key=value,...`` with commas in values doubled.

    ``_`` in a key stands for ``-``. A value of None leaves the key out; True and False become
    ``on`` and ``off``.
    """
    parts = [_escape(head)] if head else []
    for key, value in values.items():
        if value is None:
            continue
        text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
        parts.append(f"{key.replace('_', '-')}={_escape(text)}")
    return ",".join(parts)


def _escape(text: str) -> str:
    if "\0" in text:
        msg = f"{text!r} has a NUL character"
        raise InvalidArgumentError(msg)
    return text.replace(",", ",,")


def disk_pci_path(index: int) -> str:
    """Return the PCI path of disk ``index``: its slot of the root, two hex digits.

    Raises:
        ResourceExhaustedError: there is no slot left.
    """
    return f"{_slot(_DISK_SLOTS, index, what='disk'):02x}"


def network_pci_path(index: int) -> str:
    """Return the PCI path of network card ``index``, as of a disk.

    Raises:
        ResourceExhaustedError: there is no slot left.
    """
    return f"{_slot(_NETWORK_SLOTS, index, what='network card'):02x}"


def plugged_pci_path(index: int) -> str:
    """Return the PCI path of disk ``index`` of those that come while the machine runs.

    Raises:
        ResourceExhaustedError: there is no slot left.
    """
    return f"{_SLOT_BRIDGE:02x}/{_slot(_BRIDGE_SLOTS, index, what='disk'):02x}"


def plugged_disk(disk: BlockDevice, index: int) -> tuple[JsonObject, JsonObject]:
    """Lay out the arguments of ``blockdev-add`` and ``device_add`` for disk ``index`` of those.

    Both get the disk's id as a name, by which ``device_del`` and ``blockdev-del`` know it.

    Raises:
        ResourceExhaustedError: there is no slot left.
        InvalidArgumentError: its id is no serial.
    """
    check_serial(disk.id)
    backend: JsonObject = {
        "driver": "raw",
        "node-name": disk.id,
        "read-only": disk.is_read_only,
        "file": {
            "driver": "host_device" if disk.path.is_block_device() else "file",
            "filename": os.fspath(disk.path),
            "locking": "off" if disk.is_read_only else "auto",
        },
    }
    device: JsonObject = {
        "driver": "virtio-blk-pci",
        "id": disk.id,
        "drive": disk.id,
        "serial": disk.id,
        "bus": _BRIDGE,
        "addr": f"{_slot(_BRIDGE_SLOTS, index, what='disk'):#x}",
        "disable-legacy": "on",
        **({"share-rw": True} if disk.is_read_only else {}),
    }
    return backend, device


def _slot(slots: range, index: int, *, what: str) -> int:
    if index >= len(slots):
        msg = f"a machine has at most {len(slots)} {what}s"
        raise ResourceExhaustedError(msg)
    return slots[index]


def build_command(qemu: QemuMachine) -> tuple[str, ...]:
    """Lay out the whole command line.

    Raises:
        ResourceExhaustedError: more devices than slots.
        InvalidArgumentError: a value cannot be expressed.
    """
    return (
        os.fspath(qemu.program),
        *("-name", option("", guest=f"sandbox-{qemu.machine.name}", debug_threads=True)),
        *("-machine", _machine_option(qemu)),
        *("-accel", _accelerator_option(qemu.accelerator)),
        *("-cpu", _cpu_option(qemu)),
        *("-smp", str(qemu.machine.vcpu_count)),
        *("-m", f"{qemu.machine.memory_mib}M"),
        *_memory(qemu.machine.memory_mib),
        *("-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-no-reboot", "-S"),
        *("-sandbox", _SECCOMP),
        *_boot(qemu.machine),
        *_monitor(qemu.monitor_fd),
        *_console(qemu.console_fd),
        *_rng(qemu.entropy_source),
        *_vsock(qemu.vsock),
        *_bridge(),
        *(word for index, folder in enumerate(qemu.folders) for word in _folder(folder, index)),
        *(word for index, disk in enumerate(qemu.disks) for word in _disk(disk, index)),
        *(word for index, card in enumerate(qemu.networks) for word in _network(card, index)),
    )


def _machine_option(qemu: QemuMachine) -> str:
    # No SMBus, SATA, USB, vmport or HPET: nothing the guest uses, and each costs boot time.
    base = option(
        qemu.machine_type,
        memory_backend=MEMORY_ID,
        **(_Q35_WITHOUT if qemu.machine_type == "q35" else {}),
    )
    extra = ",".join(
        part for part in qemu.machine_options.split(",") if part and not part.startswith("accel=")
    )
    return f"{base},{extra}" if extra else base


_Q35_WITHOUT: Mapping[str, object] = {
    "smbus": False,
    "sata": False,
    "usb": False,
    "vmport": False,
    "hpet": False,
}


def _accelerator_option(accelerator: Accelerator) -> str:
    match accelerator:
        case Accelerator.KVM:
            return option("kvm")
        case Accelerator.TCG:
            return option("tcg", thread="multi")


def _cpu_option(qemu: QemuMachine) -> str:
    model = "host" if qemu.accelerator is Accelerator.KVM else "max"
    features = ",".join(part.strip() for part in qemu.cpu_features.split(",") if part.strip())
    return f"{model},{features}" if features else model


def _memory(memory_mib: int) -> tuple[str, ...]:
    size = f"{memory_mib}M"
    backend = option("memory-backend-memfd", id=MEMORY_ID, size=size, share=True)
    return ("-object", backend)


def _boot(machine: MachineConfig) -> tuple[str, ...]:
    words = ["-kernel", os.fspath(machine.kernel)]
    if machine.initrd is not None:
        # Taken literally for a PVH kernel, unlike every other option here.
        words += ["-initrd", os.fspath(machine.initrd)]
    return (*words, "-append", " ".join(machine.kernel_params))


def _monitor(fd: int) -> tuple[str, ...]:
    return (
        *("-chardev", option("socket", id="monitor", fd=fd)),
        *("-mon", option("", chardev="monitor", mode="control")),
    )


def _console(fd: int) -> tuple[str, ...]:
    return (
        *("-chardev", option("socket", id="console", fd=fd)),
        *("-serial", "chardev:console"),
    )


def _rng(source: Path) -> tuple[str, ...]:
    return (
        *("-object", option("rng-random", id="rng", filename=source)),
        *(
            "-device",
            option("virtio-rng-pci", rng="rng", disable_legacy=True, addr=f"{_SLOT_RNG:#x}"),
        ),
    )


def _vsock(vsock: KernelVsock | UserVsock) -> tuple[str, ...]:
    addr = f"{_SLOT_VSOCK:#x}"
    match vsock:
        case KernelVsock():
            device = option(
                "vhost-vsock-pci", vhostfd=vsock.vhost_fd, guest_cid=vsock.guest_cid, addr=addr
            )
            return ("-device", device)
        case UserVsock():
            return (
                *("-chardev", option("socket", id="vsock", path=vsock.socket_path)),
                *("-device", option("vhost-user-vsock-pci", chardev="vsock", addr=addr)),
            )


def _bridge() -> tuple[str, ...]:
    # By ACPI alone, which takes devices away without waiting for a person at a button. The firmware
    # gives a bridge without devices no addresses: 1 MiB is 64 times what a disk asks for.
    device = option(
        "pci-bridge",
        id=_BRIDGE,
        shpc=False,
        mem_reserve="1M",
        pref64_reserve="1M",
        addr=f"{_SLOT_BRIDGE:#x}",
    )
    # Its name has the underscore that option() makes a dash of.
    return ("-device", f"{device},chassis_nr=1")


def _folder(folder: VhostUserFs, index: int) -> tuple[str, ...]:
    name = f"folder{index}"
    device = option(
        "vhost-user-fs-pci",
        chardev=name,
        tag=folder.tag,
        queue_size=_VIRTIO_FS_QUEUE_SIZE,
        addr=f"{_slot(_FOLDER_SLOTS, index, what='shared folder'):#x}",
    )
    return (
        *("-chardev", option("socket", id=name, path=folder.socket_path)),
        *("-device", device),
    )


def _disk(disk: BlockDevice, index: int) -> tuple[str, ...]:
    check_serial(disk.id)
    node = f"disk{index}"
    backend = option(
        "",
        driver="raw",
        node_name=node,
        read_only=disk.is_read_only,
        **{
            "file.driver": "host_device" if disk.path.is_block_device() else "file",
            "file.filename": disk.path,
            "file.locking": "off" if disk.is_read_only else "auto",
        },
    )
    device = option(
        "virtio-blk-pci",
        drive=node,
        serial=disk.id,
        share_rw=True if disk.is_read_only else None,
        disable_legacy=True,
        addr=f"0x{disk_pci_path(index)}",
    )
    return ("-blockdev", backend, "-device", device)


def _network(card: NetworkDevice, index: int) -> tuple[str, ...]:
    name = f"network{index}"
    pairs = len(card.tap_fds)
    fds = {"fd": card.tap_fds[0]} if pairs == 1 else {"fds": ":".join(map(str, card.tap_fds))}
    device = option(
        "virtio-net-pci",
        netdev=name,
        mac=card.mac,
        # Two for each pair, one for the configuration, one for control.
        **({"mq": True, "vectors": 2 * pairs + 2} if pairs > 1 else {}),
        disable_legacy=True,
        # No firmware boots from it.
        romfile="",
        addr=f"0x{network_pci_path(index)}",
    )
    return ("-netdev", option("tap", id=name, **fds), "-device", device)
