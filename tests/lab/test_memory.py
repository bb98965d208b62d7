"""Memory that a guest gives back is the host's again."""

import mmap
import time
from pathlib import Path

import pytest

from lab_guest.machine import Machine

pytestmark = pytest.mark.timeout(180)

TOUCHED_MIB = 160
GIVEN_MIB = 128
DEADLINE_S = 40.0


def resident_mib() -> int:
    """This process's resident memory: the guest's is part of it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE >> 20


def touch_and_free(machine: Machine) -> None:
    machine.run(f"head -c {TOUCHED_MIB}M /dev/zero >/tmp/touched && rm /tmp/touched", timeout_s=60)


def wait_below(limit_mib: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while resident_mib() > limit_mib:
        assert time.monotonic() < deadline, f"still {resident_mib()} MiB, not {limit_mib}"
        time.sleep(0.2)


def test_a_balloon_takes_memory_and_gives_it_back(guest: Machine) -> None:
    balloon = guest.balloon
    assert balloon is not None
    touch_and_free(guest)
    full = resident_mib()
    balloon.set_target(GIVEN_MIB << 8)
    wait_below(full - GIVEN_MIB * 3 // 4)
    deadline = time.monotonic() + DEADLINE_S
    while balloon.actual_pages < GIVEN_MIB << 8:
        assert time.monotonic() < deadline, f"{balloon.actual_pages} pages"
        time.sleep(0.1)
    total = int(guest.run("awk '/MemAvailable/ {print $2}' /proc/meminfo"))
    balloon.set_target(0)
    while balloon.actual_pages > 0:
        assert time.monotonic() < deadline, f"{balloon.actual_pages} pages"
        time.sleep(0.1)
    assert int(guest.run("awk '/MemAvailable/ {print $2}' /proc/meminfo")) > total + (100 << 10)
    # What was given up can be used again.
    touch_and_free(guest)


def test_free_memory_is_reported(smp: Machine) -> None:
    touch_and_free(smp)
    wait_below(resident_mib() - GIVEN_MIB * 3 // 4)
