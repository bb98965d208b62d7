import asyncio
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness.loop import on_loop
from kata_hybrid.aio.process import ProcessReaper, identify

TIMEOUT_S = 10.0


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@on_loop
async def test_exit_status_is_reported() -> None:
    reaper = ProcessReaper()
    process = await reaper.spawn(["sh", "-c", "exit 7"])
    async with asyncio.timeout(TIMEOUT_S):
        assert await process.exited() == 7
    assert process.has_exited
    reaper.close()


@on_loop
async def test_death_by_signal_is_negative() -> None:
    reaper = ProcessReaper()
    process = await reaper.spawn(["sleep", "60"])
    process.kill()
    async with asyncio.timeout(TIMEOUT_S):
        assert await process.exited() == -signal.SIGKILL
    reaper.close()


@on_loop
async def test_killing_what_has_exited_does_nothing() -> None:
    reaper = ProcessReaper()
    process = await reaper.spawn(["true"])
    async with asyncio.timeout(TIMEOUT_S):
        await process.exited()
    process.kill()
    reaper.close()


@on_loop
async def test_a_cancelled_wait_does_not_lose_the_exit() -> None:
    reaper = ProcessReaper()
    process = await reaper.spawn(["sleep", "60"])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await process.exited()
    process.kill()
    async with asyncio.timeout(TIMEOUT_S):
        assert await process.exited() == -signal.SIGKILL
    reaper.close()


@on_loop
async def test_many_children_at_once_are_all_reaped() -> None:
    reaper = ProcessReaper()
    children = [await reaper.spawn(["sh", "-c", f"exit {n}"]) for n in range(20)]
    async with asyncio.timeout(TIMEOUT_S):
        assert [await child.exited() for child in children] == list(range(20))
    reaper.close()


@on_loop
async def test_streams_and_passed_descriptors_arrive() -> None:
    reaper = ProcessReaper()
    read_end, write_end = os.pipe()
    process = await reaper.spawn(
        ["sh", "-c", f"cat; echo three >/proc/self/fd/{write_end}"], pass_fds=(write_end,)
    )
    os.close(write_end)
    async with asyncio.timeout(TIMEOUT_S):
        await process.exited()
    with os.fdopen(read_end) as output:
        assert output.read() == "three\n"
    reaper.close()


@on_loop
async def test_a_program_that_is_not_there_is_named() -> None:
    reaper = ProcessReaper()
    with pytest.raises(FileNotFoundError) as caught:
        await reaper.spawn(["/no/such/program"])
    assert caught.value.filename == "/no/such/program"
    reaper.close()


@on_loop
async def test_identity_is_that_of_proc() -> None:
    reaper = ProcessReaper()
    process = await reaper.spawn(["sleep", "60"], name="sleeper")
    assert process.identity == identify("sleeper", process.pid)
    assert process.identity.start_ticks > identify("init", 1).start_ticks
    process.kill()
    async with asyncio.timeout(TIMEOUT_S):
        await process.exited()
    reaper.close()


SUBREAPER = """
import asyncio, ctypes, os, sys
from kata_hybrid.aio.process import ProcessReaper

async def main():
    ctypes.CDLL(None).prctl(36, 1)
    reaper = ProcessReaper()
    # A double fork: the grandchild becomes ours, and nobody waits for it by name.
    child = await reaper.spawn(["sh", "-c", "sleep 0.05 & echo $!"], stdout=1)
    assert await child.exited() == 0
    async with asyncio.timeout(10):
        while os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                if not file.read().split():
                    break
            await asyncio.sleep(0.01)
    reaper.close()
    print("reaped")

asyncio.run(main())
"""


def test_adopted_orphans_are_reaped() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SUBREAPER],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stderr == ""
    orphan, verdict = done.stdout.split()
    assert verdict == "reaped"
    assert not is_there(int(orphan))


PARENT = """
import asyncio, os, sys
from kata_hybrid.aio.process import ProcessReaper

async def main():
    reaper = ProcessReaper()
    child = await reaper.spawn(["sleep", "600"])
    while b"sleep" not in open(f"/proc/{child.pid}/cmdline", "rb").read().split(b"\\0")[0]:
        await asyncio.sleep(0.005)
    print(child.pid, flush=True)
    await child.exited()

asyncio.run(main())
"""


def test_children_die_with_their_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        child = os.pidfd_open(pid)
        parent.kill()
    try:
        signal.pidfd_send_signal(child, 0)
    except ProcessLookupError:
        pass
    else:
        assert select.select([child], [], [], TIMEOUT_S)[0]
    finally:
        os.close(child)
