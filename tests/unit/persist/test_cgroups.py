"""Cgroup folders are removed when nobody is in them, on the hierarchies of this host."""

import os
import secrets
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_hybrid.persist.cgroups import remove_cgroups


def roots() -> list[Path]:
    """Hierarchies a test may use: v2, alone or beside v1, and the pids controller of v1."""
    candidates = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")]
    found = [path for path in candidates if (path / "cgroup.controllers").exists()]
    pids = Path("/sys/fs/cgroup/pids")
    if (pids / "cgroup.procs").exists() and found[:1] != candidates[:1]:
        found.append(pids)
    return [path for path in found if os.geteuid() == 0 and os.access(path, os.W_OK)]


needs_cgroups = pytest.mark.skipif(not roots(), reason="needs a writable cgroup hierarchy")


@pytest.fixture
def folders() -> Iterator[list[Path]]:
    name = f"kata-hybrid-test-{secrets.token_hex(4)}"
    made = [root / name for root in roots()]
    for folder in made:
        folder.mkdir()
    yield made
    for folder in made:
        for each in (folder / "inner", folder):
            if each.exists():
                each.rmdir()


def enter(folders: list[Path], pid: int) -> None:
    for folder in folders:
        (folder / "cgroup.procs").write_text(str(pid))


@pytest.mark.parametrize(
    "path", ["/sys/fs/cgroup/../../etc", "/etc", "/sys/fs/cgroup", "/sys/fs/cgroup/x/.."]
)
def test_only_cgroup_folders_are_removed(path: str) -> None:
    assert remove_cgroups([path]) == {path: "not a cgroup"}


def test_what_is_gone_is_no_problem() -> None:
    assert remove_cgroups(["/sys/fs/cgroup/kata-hybrid-test-absent"]) == {}


@needs_cgroups
def test_the_last_to_leave_is_waited_for(folders: list[Path]) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as member:
        enter(folders, member.pid)
        assert member.stdin is not None
        leaving = threading.Timer(0.2, member.stdin.close)
        leaving.start()
        assert remove_cgroups(map(str, folders)) == {}
        leaving.join()
    assert not any(folder.exists() for folder in folders)


@needs_cgroups
def test_whoever_is_in_one_lives_and_is_named(folders: list[Path]) -> None:
    with subprocess.Popen(["sleep", "600"]) as other:
        try:
            enter(folders, other.pid)
            began = time.monotonic()
            staying = remove_cgroups(map(str, folders))
            # A second for all, whatever their number.
            assert time.monotonic() - began < 1 + 0.5 * len(folders)
            assert staying.keys() == set(map(str, folders))
            assert all(f"processes {other.pid} are in it" in each for each in staying.values())
            assert other.poll() is None
        finally:
            other.kill()


@needs_cgroups
def test_folders_of_others_below_one_are_left_alone(folders: list[Path]) -> None:
    for folder in folders:
        (folder / "inner").mkdir()
    staying = remove_cgroups(map(str, folders))
    assert staying.keys() == set(map(str, folders))
    assert all("there are folders in it" in each for each in staying.values())
    assert all((folder / "inner").exists() for folder in folders)
