"""A namespace of a process's own, made by a process that is there for it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_PROGRAM = """
import asyncio, json, os, subprocess, threading
from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.resource.network.own import OwnNamespace

def here(pid="self"):
    return os.readlink(f"/proc/{pid}/ns/net")

async def main():
    reaper = ProcessReaper()
    before = here()
    own = OwnNamespace()
    reaper.spawn_from(own.outside)
    children, seen, done = [], set(), threading.Event()
    def watch():
        while not done.is_set():
            seen.add(here(os.getpid()))
    watcher = threading.Thread(target=watch)
    watcher.start()
    for program in ("spawn", "spawn_mapped"):
        read, write = os.pipe()
        words = ["/bin/readlink", "/proc/self/ns/net"]
        if program == "spawn":
            child = await reaper.spawn(words, stdout=write)
        else:
            child = await reaper.spawn_mapped(words, name="x", env={}, fds={1: write})
        assert await child.exited() == 0
        children.append(os.read(read, 100).decode().strip())
    done.set()
    watcher.join()
    outside = own.outside(lambda: here("thread-self"))
    try:
        own.outside(lambda: 1 / 0)
    except ZeroDivisionError:
        raised = True
    links = subprocess.run(["ip", "-j", "link"], capture_output=True, check=True).stdout
    print(json.dumps({
        "before": before, "inside": os.readlink(own.path), "here": here(), "outside": outside,
        "children": children, "seen": sorted(seen), "raised": raised,
        "links": json.loads(links), "pid": os.getpid(), "path": str(own.path),
    }))

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, check=True, timeout=30
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_process_is_in_it_and_is_found_by_its_pid(said: dict[str, Any]) -> None:
    assert said["path"] == f"/proc/{said['pid']}/ns/net"
    assert said["here"] == said["inside"] != said["before"]


def test_whoever_looks_finds_it_there_also_while_a_child_is_started(said: dict[str, Any]) -> None:
    assert said["seen"] == [said["inside"]]


def test_its_loopback_is_up_and_there_is_nothing_else(said: dict[str, Any]) -> None:
    names = {link["ifname"] for link in said["links"] if "UP" in link["flags"]}
    assert names == {"lo"}


def test_children_are_where_the_process_was(said: dict[str, Any]) -> None:
    assert said["children"] == [said["before"]] * 2
    assert said["raised"]
    assert said["outside"] == said["before"] == str(Path("/proc/self/ns/net").readlink())
