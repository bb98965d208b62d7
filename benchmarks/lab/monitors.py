"""The commands that start a machine: our bare runner, and QEMU as it is at its best.

    runner     ours: virtio-mmio devices
    microvm    QEMU's lightest machine: virtio-mmio devices, no firmware but qboot; tuned or not
    q35        QEMU's usual machine: virtio-pci devices; for shared folders, which microvm lacks

Both sides get the same files, memory, processor and kernel parameters, but what one of them needs
to find its devices at all. The serial port is standard output.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

QEMU = "qemu-system-x86_64"
GUEST_CID = 77
"""Of QEMU's guest: the host's kernel knows it by this."""
# Without what this guest has no use for, as QEMU's manual shows it.
MICROVM = (
    "microvm,accel=kvm,x-option-roms=off,pit=off,pic=off,isa-serial=on,acpi=on,"
    "auto-kernel-cmdline=off"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """What a machine runs."""

    kernel: Path
    initrd: Path
    parameters: str
    memory_mib: int


def runner(program: Path, software: Software) -> list[str]:
    """Our bare runner, without devices."""
    return [
        *(os.fspath(program), os.fspath(software.kernel), "--initrd", os.fspath(software.initrd)),
        *("--memory-mib", str(software.memory_mib), "--command-line", software.parameters),
    ]


def runner_disks(disks: Sequence[Path]) -> list[str]:
    """Disks for our runner, read-only, through the host's page cache, with io_uring."""
    return [word for disk in disks for word in ("--read-only-disk", os.fspath(disk))]


def microvm(software: Software, *, has_clock: bool = True) -> list[str]:
    """QEMU's microvm, without devices.

    ``has_clock``: with a clock chip, which QEMU leaves out where KVM is used unless it is asked
    for. The kernel looks for one, and waits for a missing one as for one that is busy.
    """
    machine = f"{MICROVM},rtc={'on' if has_clock else 'off'}"
    return [
        *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", machine, "-cpu", "host", "-smp", "1", "-m", f"{software.memory_mib}M"),
        *_software(software),
    ]


def q35(software: Software) -> list[str]:
    """QEMU's q35, without devices, its memory fit to be shared with a device's process."""
    memory = f"memory-backend-memfd,id=memory,size={software.memory_mib}M,share=on"
    return [
        *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "q35,accel=kvm,memory-backend=memory", "-object", memory),
        *("-cpu", "host", "-smp", "1", "-m", f"{software.memory_mib}M"),
        *_software(software),
    ]


def _software(software: Software) -> list[str]:
    return [
        *("-kernel", os.fspath(software.kernel), "-initrd", os.fspath(software.initrd)),
        *("-append", software.parameters, "-serial", "stdio"),
    ]


def qemu_disks(disks: Sequence[Path], *, driver: str, aio: str = "io_uring") -> list[str]:
    """Disks for QEMU, as ours are; their serial number is the file's name."""
    words = []
    for number, disk in enumerate(disks):
        # cache=writeback: through the host's page cache.
        drive = f"id=disk{number},if=none,format=raw,readonly=on,cache=writeback,aio={aio}"
        words += [
            *("-drive", f"{drive},file={disk}"),
            *("-device", f"{driver},drive=disk{number},serial={disk.name}"),
        ]
    return words
