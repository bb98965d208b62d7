"""Starting a machine: from nothing to ``/init``, its memory, and from a snapshot to an answer.

Both sides are timed from outside, exec to the line on the serial port, by the same code.
"""

import os
import re
import subprocess
import time
from pathlib import Path

from images import Images
from qemu_machine import QEMU
from recording import Recorder

from lab_guest.machine import Machine

BOOT_ROUNDS = 5
_COUNTED_ROUNDS = 2
RESTORE_ROUNDS = 5
_MARK = b"init: here"
_MEMORY_MIB = 256
_PARAMETERS = "console=ttyS0 quiet reboot=k panic=-1 tsc=reliable no_timer_check"
_BOOT_TIMEOUT_S = 120.0


class BootError(Exception):
    """A machine did not come up; the text has what it printed."""


def boot(recorder: Recorder, images: Images) -> None:
    """Measure ``vmm_boot`` and, of the same machines, ``vmm_memory``."""
    ours, reference, memory = _boots(images, rounds=BOOT_ROUNDS)
    recorder.keep("vmm_boot", ours=ours, reference=reference)
    recorder.keep("vmm_memory", ours=memory, reference=[1.0])


def boot_counted(recorder: Recorder, images: Images) -> None:
    """Measure ``vmm_boot_counted``, where nothing varies once everything was read from disk."""
    _boots(images, rounds=1)
    ours, reference, _ = _boots(images, rounds=_COUNTED_ROUNDS)
    recorder.keep("vmm_boot_counted", ours=ours, reference=reference)


def _boots(images: Images, *, rounds: int) -> tuple[list[float], list[float], list[float]]:
    """Boot both in turn; give milliseconds of ours and of QEMU, and MiB of ours."""
    ours: list[float] = []
    reference: list[float] = []
    memory: list[float] = []
    for _ in range(rounds):
        milliseconds, output = _time_to_init(_runner(images))
        ours.append(milliseconds)
        found = re.search(rb"memory_kib=(\d+)", output)
        if found is None:
            raise BootError(_end_of(output))
        memory.append(int(found[1]) / 1024)
        milliseconds, _ = _time_to_init(_microvm(images))
        reference.append(milliseconds)
    return ours, reference, memory


def _runner(images: Images) -> list[str]:
    return [
        *(os.fspath(images.runner), os.fspath(images.guest.kernel)),
        *("--initrd", os.fspath(images.boot_initrd), "--memory-mib", str(_MEMORY_MIB)),
        *("--command-line", f"{_PARAMETERS} pci=off", "--until", _MARK.decode()),
    ]


def _microvm(images: Images) -> list[str]:
    """QEMU's lightest machine, without what this guest does not use."""
    machine = "microvm,accel=kvm,pit=off,pic=off,rtc=off,x-option-roms=off,auto-kernel-cmdline=off"
    return [
        *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", machine, "-cpu", "host", "-smp", "1", "-m", f"{_MEMORY_MIB}M"),
        *("-kernel", os.fspath(images.guest.kernel), "-initrd", os.fspath(images.boot_initrd)),
        *("-append", f"{_PARAMETERS} pci=off", "-serial", "stdio"),
    ]


def _time_to_init(command: list[str]) -> tuple[float, bytes]:
    """Run a monitor until its guest's /init speaks; give milliseconds, and all it printed."""
    output = bytearray()
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        while _MARK not in output:
            data = os.read(descriptor, 65536)
            if not data or time.monotonic() - began > _BOOT_TIMEOUT_S:
                raise BootError(f"{command[0]}: {_end_of(bytes(output))}")
            output += data
        milliseconds = (time.monotonic() - began) * 1000
        if command[0] == QEMU:
            process.kill()
        while data := os.read(descriptor, 65536):
            output += data
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return milliseconds, bytes(output)


def _end_of(output: bytes) -> str:
    return output.decode(errors="replace").strip()[-600:]


def restore(recorder: Recorder, images: Images, run_dir: Path) -> None:
    """Measure ``vmm_restore``: a machine's first answer, from a snapshot and from a cold boot."""
    folder = run_dir / "snapshot"
    folder.mkdir()
    restored: list[float] = []
    booted: list[float] = []
    for number in range(RESTORE_ROUNDS):
        began = time.monotonic()
        with Machine(images.guest, run_dir, has_host_root=False) as machine:
            machine.start()
            machine.run(":")
            booted.append((time.monotonic() - began) * 1000)
            if number == 0:
                machine.vm.pause()
                machine.vm.snapshot(folder)
        began = time.monotonic()
        with Machine(images.guest, run_dir, has_host_root=False) as machine:
            machine.restore(folder)
            machine.run(":")
            restored.append((time.monotonic() - began) * 1000)
    recorder.keep("vmm_restore", ours=restored, reference=booted)
