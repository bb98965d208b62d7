"""A machine that is snapshot and restored: what it is made of, and its life after a restore.

Run as a program by ``test_lifecycle``, so that the restored machine is in another process than the
one of the snapshot. Arguments: run directory, folder of the snapshot, disk, shared folder. Prints
what it saw as JSON.
"""

# ruff: noqa: T201 - what it prints is what the test reads

import asyncio
import json
import sys
import time
from pathlib import Path

from lab_guest.image import GuestImage, guest_image
from lab_guest.machine import Machine
from lab_guest.streams import HostStream, random_bytes

CHECKS = Path(__file__).parent / "in_guest"
VCPUS = 4
ECHO_PORT = 6000
HELD_PORT = 6001
_TICKS_AFTER = 20
_DEADLINE_S = 40.0


def describe(image: GuestImage, run_dir: Path, *, disk: Path, folder: Path) -> Machine:
    """Describe the machine: the same for the snapshot and each restore."""
    machine = Machine(image, run_dir, vcpu_count=VCPUS)
    machine.vm.add_disk(id="data", path=disk)
    machine.vm.add_folder(tag="shared", folder=folder)
    machine.vm.add_folder(tag="checks", folder=CHECKS, is_read_only=True)
    machine.balloon = machine.vm.add_balloon(reports_free_pages=True)
    return machine


def wait_for(machine: Machine, script: str) -> float:
    """Run a script in the guest until its status is 0; say how long that took."""
    began = time.monotonic()
    machine.run(f"until {script}; do sleep 0.1; done", timeout_s=_DEADLINE_S)
    return time.monotonic() - began


def _live(machine: Machine, snapshot: Path) -> dict[str, object]:
    began = time.monotonic()
    machine.restore(snapshot)
    restored = time.monotonic()
    seen: dict[str, object] = {"counter": int(machine.run("cat /run/counter"))}
    answered = time.monotonic()
    # The host's first stream was held until the guest had ended those it had before.
    counters = machine.counters("vsock")
    assert (counters["transport_resets"], counters["transport_reset_timeouts"]) == (1, 0), counters
    wait_for(machine, "grep -q ended /run/hold.log")
    seen["held_stream"] = machine.run("cat /run/hold.log")
    # The echo's listener and epoll remain.
    wait_for(machine, "test $(ls /proc/$(cat /run/echo.pid)/fd | wc -l) -le 5")
    first = seen["counter"]
    wait_for(machine, f"test $(cat /run/counter) -ge $(({first} + {_TICKS_AFTER}))")
    asyncio.run(_exchange(machine))
    machine.run("kill $(cat /run/ticker.pid); sync")
    for name in ("disk", "shared"):
        numbers = machine.run(f"cat /run/{name}/log").split()
        seen[f"{name}_log"] = len(numbers)
        assert numbers == [str(number + 1) for number in range(len(numbers))], numbers
    # A file that was open is served again only if it is still the same one, and this is a copy.
    seen["shared_anew"] = machine.run("echo anew >>/run/shared/log && tail -n 1 /run/shared/log")
    seen["processors"] = machine.run("nproc")
    seen["complaints"] = machine.run(
        "dmesg | grep -iE 'bug:|stall|lockup|i/o error|ext4-fs error|fuse:.*error' || true"
    )
    seen["restore_s"] = round(restored - began, 2)
    seen["answer_s"] = round(answered - restored, 2)
    return seen


async def _exchange(machine: Machine) -> None:
    stream = await HostStream.dial(machine.socket, ECHO_PORT)
    await stream.exchange(random_bytes(200_000, seed=3))


def main(run_dir: Path, snapshot: Path, disk: Path, folder: Path) -> None:
    with describe(guest_image(), run_dir, disk=disk, folder=folder) as machine:
        seen = _live(machine, snapshot)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
