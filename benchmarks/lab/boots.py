"""Starting a machine: from nothing to ``/init``, its memory, and from a snapshot to an answer.

Both sides of a figure are timed from outside, from exec on, by the same code.
"""

import contextlib
import dataclasses
import os
import re
import select
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import monitors
from guest import hybrid
from images import MARK, Images
from monitors import Software
from recording import Recorder

from lab_guest.machine import KERNEL_PARAMETERS

BOOT_ROUNDS = 5
START_ROUNDS = 5
RESTORE_ROUNDS = 5
COUNTED_ROUNDS = 3
"""Each of two series of boots where time is the count of instructions. Odd: now and then one
is a few hundredths off, which a median leaves out."""
_MEMORY_MIB = 256
_TIMEOUT_S = 30.0
_COUNTED_TIMEOUT_S = 8.0
"""Of a second of counted instructions, the emulator makes half a minute."""
_COUNTED_TRIES = 3
_ECHO_PORT = 7000
_RETRY_S = 0.002


class BootError(Exception):
    """A machine did not come up; the text has what it printed."""


def boot(recorder: Recorder, images: Images) -> None:
    """Measure ``vmm_boot`` and ``vmm_boot_tuned``, and with them ``vmm_memory``."""
    ours: list[float] = []
    plain: list[float] = []
    tuned: list[float] = []
    memory: list[float] = []
    software = _software(images, images.boot_initrd)
    # The first time of each fills caches.
    for _ in range(1 + BOOT_ROUNDS):
        milliseconds, mebibytes = _boot_ours(images, software)
        ours.append(milliseconds)
        memory.append(mebibytes)
        plain.append(_boot_microvm(software, has_clock=False))
        tuned.append(_boot_microvm(software, has_clock=True))
    recorder.keep("vmm_boot", ours=ours[1:], reference=plain[1:])
    recorder.keep("vmm_boot_tuned", ours=ours[1:], reference=tuned[1:])
    recorder.keep("vmm_memory", ours=memory[1:], reference=[1.0])


def boot_counted(recorder: Recorder, images: Images) -> None:
    """Measure ``vmm_boot_icount`` in two series, and ``vmm_boot_repeats``, their distance."""
    ours: list[float] = []
    reference: list[float] = []
    ratios = []
    software = _software(images, images.boot_initrd)

    def boot_ours() -> float:
        return _boot_ours(images, software, timeout_s=_COUNTED_TIMEOUT_S)[0]

    def boot_microvm() -> float:
        return _boot_microvm(software, has_clock=False, timeout_s=_COUNTED_TIMEOUT_S)

    _counted(boot_ours)
    for _ in range(2):
        for _ in range(COUNTED_ROUNDS):
            ours.append(_counted(boot_ours))
            reference.append(_counted(boot_microvm))
        ratios.append(
            statistics.median(ours[-COUNTED_ROUNDS:])
            / statistics.median(reference[-COUNTED_ROUNDS:])
        )
    recorder.keep("vmm_boot_icount", ours=ours, reference=reference)
    recorder.keep("vmm_boot_repeats", ours=[max(ratios)], reference=[min(ratios)])


def _counted(boot: Callable[[], float]) -> float:
    """Boot until it goes well: in this mode the emulator breaks a guest now and then."""
    for _ in range(_COUNTED_TRIES - 1):
        try:
            return boot()
        except BootError as error:
            print(f"once more: {error}", flush=True)
    return boot()


def start(recorder: Recorder, images: Images) -> None:
    """Measure ``vmm_start``: all that a monitor does before a guest runs, and nothing else."""
    software = dataclasses.replace(_software(images, images.boot_initrd), kernel=images.hello)
    ours: list[float] = []
    reference: list[float] = []
    for _ in range(1 + START_ROUNDS):
        ours.append(_boot_ours(images, software)[0])
        reference.append(_boot_microvm(software, has_clock=True))
    recorder.keep("vmm_start", ours=ours[1:], reference=reference[1:])


def _boot_ours(
    images: Images, software: Software, *, timeout_s: float = _TIMEOUT_S
) -> tuple[float, float]:
    """Boot ours; give the milliseconds, and the MiB that it holds besides the guest's memory."""
    command = monitors.runner(images.runner, software)
    until = ("--until", MARK.decode())
    milliseconds, output = _time_to_init([*command, *until], is_ended=False, timeout_s=timeout_s)
    return milliseconds, _memory_mib(output)


def _boot_microvm(software: Software, *, has_clock: bool, timeout_s: float = _TIMEOUT_S) -> float:
    command = monitors.microvm(software, has_clock=has_clock)
    return _time_to_init(command, is_ended=True, timeout_s=timeout_s)[0]


def _software(images: Images, initrd: Path) -> Software:
    return Software(
        kernel=images.guest.kernel,
        initrd=initrd,
        parameters=KERNEL_PARAMETERS,
        memory_mib=_MEMORY_MIB,
    )


def _memory_mib(output: bytes) -> float:
    found = re.search(rb"memory_kib=(\d+)", output)
    if found is None:
        raise BootError(_end_of(output))
    return int(found[1]) / 1024


@contextlib.contextmanager
def _started(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a monitor, and end it."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _time_to_init(
    command: list[str], *, is_ended: bool, timeout_s: float = _TIMEOUT_S
) -> tuple[float, bytes]:
    """Run a monitor until its guest's /init speaks; give milliseconds, and all it printed.

    ``is_ended``: end it then; else it ends itself.
    """
    output = bytearray()
    began = time.monotonic()
    with _started(command) as process:
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        while MARK not in output:
            left = began + timeout_s - time.monotonic()
            is_ready = bool(select.select([descriptor], (), (), max(0.0, left))[0])
            data = os.read(descriptor, 65536) if is_ready else b""
            if not data:
                what = _end_of(bytes(output)) or f"no word in {timeout_s:g} s"
                raise BootError(f"{command[0]}: {what}")
            output += data
        milliseconds = (time.monotonic() - began) * 1000
        if is_ended:
            process.kill()
        while data := os.read(descriptor, 65536):
            output += data
    return milliseconds, bytes(output)


def _end_of(output: bytes) -> str:
    return output.decode(errors="replace").strip()[-600:]


# --- restore ------------------------------------------------------------------------------------


def restore(recorder: Recorder, images: Images, run_dir: Path) -> None:
    """Measure ``vmm_restore``: a byte there and back, from a snapshot and from a cold boot."""
    folder = run_dir / "snapshot"
    folder.mkdir()
    software = _software(images, images.echo_initrd)
    path = run_dir / "echo"
    command = [*monitors.runner(images.runner, software), "--vsock", os.fspath(path)]
    until = ("--until", MARK.decode(), "--snapshot", os.fspath(folder))
    _, output = _time_to_init([*command, *until], is_ended=False)
    # Written once it is stopped, so the snapshot is whole by then.
    _memory_mib(output)
    restored: list[float] = []
    booted: list[float] = []
    for _ in range(1 + RESTORE_ROUNDS):
        booted.append(_time_to_answer(command, path))
        restored.append(_time_to_answer([*command, "--restore", os.fspath(folder)], path))
    recorder.keep("vmm_restore", ours=restored[1:], reference=booted[1:])


def _time_to_answer(command: list[str], path: Path) -> float:
    """Run a monitor until its guest sends a byte back; give milliseconds."""
    path.unlink(missing_ok=True)
    connect = hybrid(path)
    began = time.monotonic()
    with _started(command) as process:
        assert process.stdout is not None
        while True:
            try:
                with connect(_ECHO_PORT) as stream:
                    stream.sendall(b"?")
                    if stream.recv(1) == b"?":
                        return (time.monotonic() - began) * 1000
            except OSError:
                # Not there yet, or nobody listens yet.
                pass
            if process.poll() is not None or time.monotonic() - began > _TIMEOUT_S:
                raise BootError(f"{command[0]}: {_end_of(os.read(process.stdout.fileno(), 65536))}")
            time.sleep(_RETRY_S)
