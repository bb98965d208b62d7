"""Whole containers on a real containerd: how long the first byte takes, and what waiting costs.

*First byte*: from starting ``ctr run … echo`` to its first byte of output, with our runtime and
with runc on the same daemon, in turn. It is what a person waits for; most of it is the guest's
kernel, so it is reported and not gated.

*Idle memory*: the proportional set size of the shim's process with one idle container. One shim
runs per pod and mostly waits, so this is the price of a pod on the host beside the machine
itself. Shared pages count by the share; guest memory, which the shim maps for its vhost-user
device, is the guest's and does not count.
"""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from recording import Recorder

from harness.containers import Containers

_ROUNDS = 5
_READINGS = 5
_SETTLE_S = 1.0
_GUEST_MEMORY = ("/memfd:", "/dev/shm/", "/dev/hugepages/")  # noqa: S108 - told apart, not used
_TIMEOUT_S = 120.0


@pytest.mark.timeout(280)
def test_create_to_first_byte(
    kata: Containers, runc: Containers, benchmark: BenchmarkFixture, recorder: Recorder
) -> None:
    theirs: list[float] = []
    ours: list[float] = []

    def prepare() -> None:
        theirs.append(_first_byte_s(runc))

    def measure() -> None:
        ours.append(_first_byte_s(kata))

    # pytest-benchmark's own time includes the end of the container; the record is the first byte.
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        measure, setup=prepare, rounds=_ROUNDS, warmup_rounds=1, iterations=1
    )
    recorder.keep(
        "create_to_first_byte",
        ours=[seconds * 1e3 for seconds in ours[-_ROUNDS:]],
        reference=[seconds * 1e3 for seconds in theirs[-_ROUNDS:]],
    )


@pytest.mark.timeout(120)
def test_idle_shim_pss(kata: Containers, bin_dir: Path, recorder: Recorder) -> None:
    with kata.detached("sleep", "100000"):
        shim = int(_only_sandbox(kata).joinpath("shim.pid").read_text().split()[0])
        readings = []
        for _ in range(_READINGS):
            time.sleep(_SETTLE_S)
            readings.append(read_memory(shim))
    middle = sorted(readings, key=lambda memory: memory.pss)[_READINGS // 2]
    bare = _bare_interpreter(bin_dir)
    recorder.keep(
        "idle_shim_pss",
        ours=[reading.pss for reading in readings],
        reference=[1.0],
        note=f"shim {middle}; bare interpreter {bare}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a process holds, in MiB, without guest memory."""

    pss: float
    private: float
    resident: float

    def __str__(self) -> str:
        return f"{self.pss:.1f} MiB, private {self.private:.1f}, resident {self.resident:.1f}"


def read_memory(pid: int) -> Memory:
    """Add up the mappings of a process.

    Raises:
        OSError: it is gone.
    """
    pss = private = resident = 0
    is_counted = True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            # address permissions offset device inode path
            words = line.split(None, 5)
            path = words[5] if len(words) > 5 else ""
            is_counted = not path.startswith(_GUEST_MEMORY)
        elif is_counted and first == "Pss:":
            pss += int(rest.split()[0])
        elif is_counted and first == "Rss:":
            resident += int(rest.split()[0])
        elif is_counted and first in {"Private_Clean:", "Private_Dirty:"}:
            private += int(rest.split()[0])
    return Memory(pss=pss / 1024, private=private / 1024, resident=resident / 1024)


def _bare_interpreter(bin_dir: Path) -> Memory:
    """Measure an interpreter that waits for input and has done nothing else."""
    with subprocess.Popen(
        [os.fspath(bin_dir / "python3"), "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.read(1)
        memory = read_memory(process.pid)
        process.stdin.write(b"\n")
        process.stdin.close()
    return memory


def _first_byte_s(containers: Containers) -> float:
    """Run ``echo`` in a new container and return the seconds to its first byte."""
    name = containers.new_id()
    arguments = containers.run_arguments(name, ["echo", "hello"], ["--rm"])
    began = time.perf_counter()
    process = containers.containerd.popen(*arguments, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        first = process.stdout.read(1)
        took = time.perf_counter() - began
        # What communicate() returns would lack the bytes that are buffered already.
        output = first + process.stdout.read()
        status = process.wait(_TIMEOUT_S)
        assert (status, output) == (0, b"hello\n"), containers.containerd.log_tail()
    finally:
        process.kill()
        process.wait(_TIMEOUT_S)
        containers.remove(name)
    containers.wait_for_shims()
    return took


def _only_sandbox(containers: Containers) -> Path:
    (folder,) = (containers.containerd.run_dir / "sb").iterdir()
    return folder
