"""Four processors under load, stopped and let go many times, and living on in another process."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab_guest.machine import Machine, dial
from lab_guest.restored import ECHO_PORT, HELD_PORT, VCPUS, wait_for
from lab_guest.streams import random_bytes, trailer

pytestmark = pytest.mark.timeout(240)

LOAD_S = 20
PAUSES = 50
STREAM_TIMEOUT_S = 30.0
TICKER = """
mkdir -p /run/disk && mkfs.ext4 -q -F /dev/vda && mount /dev/vda /run/disk
(
    exec 3>>/run/disk/log 4>>/run/shared/log
    number=0
    while :; do
        number=$((number + 1))
        echo $number >&3
        echo $number >&4
        echo $number >/run/counter.new && mv /run/counter.new /run/counter
        sleep 0.1
    done
) >/dev/null 2>&1 &
echo $! >/run/ticker.pid
"""


class CheckedStream(threading.Thread):
    """Sends to the guest's echo and compares what comes back, until it is told to end."""

    CHUNK_BYTES = 20_000

    def __init__(self, path: Path) -> None:
        super().__init__(name="stream")
        self._path = path
        self._is_over = threading.Event()
        self._rounds = 0
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - raised by finish, where the test sees it
            self._error = error

    def _work(self) -> None:
        sent = bytearray()
        with socket.socket(socket.AF_UNIX) as connection:
            dial(connection, self._path, ECHO_PORT, timeout_s=STREAM_TIMEOUT_S)
            received = connection.makefile("rb")
            while not self._is_over.is_set():
                data = random_bytes(self.CHUNK_BYTES, seed=self._rounds)
                connection.sendall(data)
                assert received.read(len(data)) == data
                sent += data
                self._rounds += 1
            connection.shutdown(socket.SHUT_WR)
            assert received.read() == trailer(bytes(sent))
            received.close()

    def finish(self) -> int:
        """End it; give how many rounds it made."""
        self._is_over.set()
        self.join(STREAM_TIMEOUT_S)
        assert not self.is_alive(), "the stream hangs"
        if self._error is not None:
            raise self._error
        return self._rounds


@pytest.fixture
def echo(smp: Machine) -> Iterator[Machine]:
    """The machine of four processors, with an echo on its port."""
    smp.run(f'"$GUEST_PROGRAM" echo {ECHO_PORT} >/run/echo & echo $! >/run/echo.pid')
    wait_for(smp, "grep -q echo /run/echo")
    yield smp
    smp.run("kill $(cat /run/echo.pid)")


def test_all_processors_are_online_and_work(smp: Machine) -> None:
    assert smp.run("cat /sys/devices/system/cpu/online") == f"0-{VCPUS - 1}"
    for number in range(VCPUS):
        assert smp.run(f"taskset -c {number} awk '{{print $39}}' /proc/self/stat") == str(number)


def user_ticks(machine: Machine) -> list[int]:
    """Return how long each processor of the guest has run programs, in ticks."""
    return [int(word) for word in machine.run("awk '/^cpu[0-9]/ {print $2}' /proc/stat").split()]


def test_pauses_under_load(echo: Machine) -> None:
    before = user_ticks(echo)
    clock = echo.begin(f"python3 -I -S /run/checks/clock_watch.py {LOAD_S}")
    load = echo.begin(
        f"cd /tmp && stress-ng --cpu {VCPUS} --vm 2 --vm-bytes 32m --io 2 --timeout {LOAD_S}s"
        " --verify --oomable"
    )
    stream = CheckedStream(echo.socket)
    stream.start()
    processors = [
        Path(f"/proc/self/task/{thread}/stat")
        for name, thread in echo.vm.thread_ids().items()
        if name.startswith("vcpu")
    ]
    try:
        time.sleep(LOAD_S / 4)
        for _ in range(PAUSES):
            echo.vm.pause()
            # A thread that has said so is still on its way to sleep, which may count as a tick.
            time.sleep(0.01)
            used = [path.read_text().split()[13:15] for path in processors]
            time.sleep(0.02)
            assert [path.read_text().split()[13:15] for path in processors] == used
            echo.vm.resume()
            time.sleep(0.1)
        said = load.wait(timeout_s=120)
    finally:
        load.close()
        rounds = stream.finish()
    assert rounds > PAUSES // 2
    assert "passed" in said or "successful run completed" in said
    assert "steps back: 0" in clock.wait(timeout_s=60)
    shares = [after - earlier for after, earlier in zip(user_ticks(echo), before, strict=True)]
    assert len(shares) == VCPUS
    # However slow the emulator is: none stood by while the others worked.
    fair = sum(shares) / VCPUS
    assert min(shares) > fair / 20, f"a processor had nothing of the load: {shares}"
    assert not echo.run("dmesg | grep -iE 'lockup|stall|bug:|hung' || true")


def test_life_goes_on_in_another_process(
    echo: Machine, smp_disk: Path, smp_folder: Path, run_dir: Path, ext4: Path
) -> None:
    snapshot = run_dir / "snapshot"
    snapshot.mkdir()
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as stream,
    ):
        held_path = Path(f"{echo.socket}_{HELD_PORT}")
        listener.bind(os.fspath(held_path))
        listener.listen()
        listener.settimeout(STREAM_TIMEOUT_S)
        echo.run(f'"$GUEST_PROGRAM" hold {HELD_PORT} >/run/hold.log 2>&1 &')
        held, _ = listener.accept()
        with held:
            dial(stream, echo.socket, ECHO_PORT, timeout_s=STREAM_TIMEOUT_S)
            data = random_bytes(300_000, seed=1)
            echo.run(TICKER)
            wait_for(echo, "test $(cat /run/counter) -ge 10")
            # More than its buffers hold: some of it is on its way.
            stream.settimeout(0)
            sent = stream.send(data)
            echo.vm.pause()
            echo.vm.snapshot(snapshot)
            shutil.copy(smp_disk, ext4 / "smp-copy.img")
            shutil.copytree(smp_folder, ext4 / "smp-copy")
            echo.vm.resume()
            # Who was looked at goes on.
            stream.settimeout(STREAM_TIMEOUT_S)
            counted = int(echo.run("cat /run/counter"))
            wait_for(echo, f"test $(cat /run/counter) -ge {counted + 10}")
            stream.shutdown(socket.SHUT_WR)
            received = stream.makefile("rb").read()
            assert received == data[:sent] + trailer(data[:sent])
        wait_for(echo, "grep -q ended /run/hold.log")
        assert echo.run("cat /run/hold.log") == "held\nended: end of stream"
        held_path.unlink()
    # Who is killed may be in the middle of a write, and then has the disk for a moment longer.
    echo.run(
        "kill $(cat /run/ticker.pid); for n in $(seq 100); do umount /run/disk && break; "
        "sleep 0.1; done 2>/dev/null; ! mountpoint -q /run/disk"
    )
    for attempt in ("first", "second"):
        seen = restore(attempt, snapshot, run_dir=run_dir, ext4=ext4)
        sys.stdout.write(f"{attempt} restore: {seen}\n")
        assert seen["processors"] == str(VCPUS)
        assert seen["complaints"] == ""
        assert seen["held_stream"] in {
            "held\nended: Connection reset by peer",
            "held\nended: end of stream",
        }
        assert int(seen["shared_log"]) <= int(seen["counter"]) + 1 < int(seen["disk_log"])
        assert seen["shared_anew"] == "anew"


def restore(attempt: str, snapshot: Path, *, run_dir: Path, ext4: Path) -> dict[str, Any]:
    """Restore in a process of its own, with disk and folder as they were, and say what it saw."""
    place = run_dir / attempt
    place.mkdir()
    disk, folder = ext4 / f"{attempt}.img", ext4 / attempt
    shutil.copy(ext4 / "smp-copy.img", disk)
    shutil.copytree(ext4 / "smp-copy", folder)
    done = subprocess.run(
        [sys.executable, "-m", "lab_guest.restored", place, snapshot, disk, folder],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    disk.unlink()
    seen = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(seen, dict)
    return seen
