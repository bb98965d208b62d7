"""Cgroups of a sandbox, on the hierarchies of this host."""

import asyncio
import os
import secrets
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_hybrid.errors import FailedPreconditionError, InvalidSpecError
from kata_hybrid.persist import mounts
from kata_hybrid.persist.cgroups import remove_cgroups
from kata_hybrid.resource import cgroup
from kata_hybrid.resource.cgroup import SandboxCgroup, sandbox_path

_KUBEPODS = "kubepods-besteffort"


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("/k8s.io/abc", "/k8s.io/abc"),
        ("k8s.io/abc", "/k8s.io/abc"),
        ("", "/kata_sandboxed_pod/box"),
        (
            "kubepods-besteffort-pod1.slice:cri-containerd:abc",
            f"/kubepods.slice/{_KUBEPODS}.slice/{_KUBEPODS}-pod1.slice/cri-containerd-abc.scope",
        ),
        (":docker:abc", "/system.slice/docker-abc.scope"),
        ("-.slice:a:b", "/a-b.scope"),
        ("a.slice::b", "/a.slice/b.scope"),
        ("a.slice:x:b.slice", "/a.slice/b.slice"),
        ("/a:b:c", "/a:b:c"),
    ],
)
def test_a_path_is_written_in_either_way(written: str, path: str) -> None:
    assert sandbox_path(written, "box") == path


@pytest.mark.parametrize(
    "written", ["/../x", "a/../../b", "a..slice:b:c", "a:b:c", "..", "x:../y:z"]
)
def test_a_path_that_leads_elsewhere_is_refused(written: str) -> None:
    try:
        path = sandbox_path(written, "box")
    except InvalidSpecError:
        return
    assert ".." not in path.split("/")


def can_move() -> bool:
    return os.geteuid() == 0 and any(
        os.access(each.mount_point, os.W_OK) for each in cgroup._hierarchies()
    )


needs_cgroups = pytest.mark.skipif(not can_move(), reason="needs writable cgroup hierarchies")


@pytest.fixture
def path() -> Iterator[str]:
    parent = f"kata-hybrid-test-{secrets.token_hex(4)}"
    yield f"/{parent}/box"
    for folder in (*folders(f"/{parent}/box"), *folders(f"/{parent}")):
        assert remove_cgroups([os.fspath(folder)]) == {}


def folders(path: str) -> list[Path]:
    return [each.mount_point / path.lstrip("/") for each in cgroup._hierarchies()]


def members(folder: Path) -> set[int]:
    return {int(word) for word in (folder / "cgroup.procs").read_text().split()}


class Written:
    """What was recorded last."""

    def __init__(self) -> None:
        self.cgroups: tuple[str, ...] = ()
        self.are_made = True

    def __call__(self, *, cgroups: tuple[str, ...]) -> None:
        self.cgroups = cgroups
        self.are_made = any(Path(each).exists() for each in cgroups)


@needs_cgroups
def test_this_process_and_its_children_go_in_and_come_back(path: str) -> None:
    before = Path("/proc/self/cgroup").read_text()
    written = Written()
    sandbox = SandboxCgroup(path)
    asyncio.run(sandbox.enter(written))
    assert not written.are_made, "recorded after they were made"
    assert [Path(each) for each in written.cgroups] == folders(path)
    # A logger, say, which is to write down what is still in its pipe.
    with subprocess.Popen(["sh", "-c", "sleep 60 & echo; wait"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            (inside,) = {frozenset(members(folder)) for folder in folders(path)}
            assert {os.getpid(), child.pid} < inside
            asyncio.run(sandbox.leave(written))
            assert child.poll() is None
            for pid in inside:
                assert Path(f"/proc/{pid}/cgroup").read_text() == before
        finally:
            subprocess.run(["pkill", "-P", str(child.pid)], check=False)
    assert written.cgroups == ()
    assert not any(folder.exists() for folder in folders(path))
    asyncio.run(sandbox.leave(written))


@needs_cgroups
def test_who_came_later_stays_and_lives(path: str) -> None:
    written = Written()
    sandbox = SandboxCgroup(path)
    asyncio.run(sandbox.enter(written))
    owned = written.cgroups
    outside = subprocess.run(
        ["sh", "-c", "sleep 60 >&- 2>&- & echo $!"], capture_output=True, text=True, check=True
    )
    other = int(outside.stdout)
    try:
        for folder in folders(path):
            (folder / "cgroup.procs").write_text(str(other))
        asyncio.run(sandbox.leave(written))
        assert all(members(folder) == {other} for folder in folders(path))
        assert written.cgroups == owned, "still recorded, for who cleans up later"
    finally:
        os.kill(other, signal.SIGKILL)


@needs_cgroups
def test_an_entry_given_up_is_waited_for_before_leaving(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Path("/proc/self/cgroup").read_text()
    go_on = threading.Event()
    make = cgroup._make

    def slow(folder: Path, hierarchy: cgroup.Hierarchy) -> None:
        assert go_on.wait(10)
        make(folder, hierarchy)

    monkeypatch.setattr(cgroup, "_make", slow)

    async def give_up() -> None:
        sandbox = SandboxCgroup(path)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await sandbox.enter(Written())
        async with asyncio.TaskGroup() as group:
            leaving = group.create_task(sandbox.leave(Written()))
            await asyncio.sleep(0.05)
            assert not leaving.done()
            go_on.set()

    asyncio.run(give_up())
    assert Path("/proc/self/cgroup").read_text() == before
    assert not any(folder.exists() for folder in folders(path))


@needs_cgroups
def test_on_v2_the_controllers_of_the_root_count_in_it(path: str) -> None:
    (first, *_) = cgroup._hierarchies()
    if not first.is_v2:
        pytest.skip("the controllers are v1's here")
    sandbox = SandboxCgroup(path)
    asyncio.run(sandbox.enter(Written()))
    try:
        offered = (first.mount_point / "cgroup.controllers").read_text().split()
        (folder,) = folders(path)
        assert (folder / "cgroup.controllers").read_text().split() == offered
    finally:
        asyncio.run(sandbox.leave(Written()))


@needs_cgroups
def test_a_folder_with_somebody_in_it_is_joined_and_left_alone(path: str) -> None:
    for folder in folders(path):
        cgroup._make(
            folder, next(h for h in cgroup._hierarchies() if folder.is_relative_to(h.mount_point))
        )
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            for folder in folders(path):
                (folder / "cgroup.procs").write_text(str(other.pid))
            written = Written()
            sandbox = SandboxCgroup(path)
            asyncio.run(sandbox.enter(written))
            assert written.cgroups == ()
            assert all(os.getpid() in members(folder) for folder in folders(path))
            asyncio.run(sandbox.leave(written))
            assert other.poll() is None
            assert all(members(folder) == {other.pid} for folder in folders(path))
        finally:
            other.kill()


@needs_cgroups
def test_a_folder_with_others_below_it_is_not_removed(path: str) -> None:
    parent = path.rpartition("/")[0]
    for folder in folders(path):
        folder.mkdir(parents=True)
    written = Written()
    sandbox = SandboxCgroup(parent)
    if next(cgroup._hierarchies()).is_v2:
        pytest.skip("on v2 nobody is in a folder whose controllers are handed down")
    asyncio.run(sandbox.enter(written))
    asyncio.run(sandbox.leave(written))
    assert written.cgroups == ()
    assert all(folder.exists() for folder in folders(path))


@needs_cgroups
def test_a_populated_folder_of_v2_hands_nothing_down(path: str) -> None:
    """It would become a threaded domain, which nobody can enter below."""
    version2 = next((each for each in cgroup._hierarchies() if each.is_v2), None)
    if version2 is None:
        pytest.skip("the controllers are v1's here")
    folder = version2.mount_point / path.lstrip("/")
    cgroup._make(folder.parent, version2)
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            (folder.parent / "cgroup.procs").write_text(str(other.pid))
            sandbox = SandboxCgroup(path)
            asyncio.run(sandbox.enter(Written()))
            assert (folder.parent / "cgroup.type").read_text() == "domain\n"
            assert os.getpid() in members(folder)
            asyncio.run(sandbox.leave(Written()))
        finally:
            other.kill()


# --- which trees there are ------------------------------------------------------------------------

_V2 = "30 20 0:30 / {} rw - cgroup2 cgroup2 rw"
_PIDS = "31 20 0:31 {} /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids"


def trees(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *lines: str, own: str
) -> list[cgroup.Hierarchy]:
    table = [mounts.Mount(line.encode()) for line in lines]
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(cgroup, "mount_table", lambda: table)
    monkeypatch.setattr(cgroup, "_OWN", tmp_path / "own")
    return [*cgroup._hierarchies()]


@pytest.mark.parametrize(("controllers", "count"), [("cpu memory\n", 2), ("\n", 1)])
def test_a_hybrid_hosts_v2_counts_if_it_has_controllers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controllers: str, count: int
) -> None:
    (tmp_path / "cgroup.controllers").write_text(controllers)
    monkeypatch.setattr(cgroup, "_ROOT", Path("/"))
    lines = [_V2.format(tmp_path), _PIDS.format("/"), _PIDS.format("/")]
    found = trees(monkeypatch, tmp_path, *lines, own="4:pids:/a b\x85\n0::/c\n")
    assert [each.is_v2 for each in found] == [False, True][:count]
    assert found[0].own == Path("/sys/fs/cgroup/pids/a b\x85")


@pytest.mark.parametrize(("root", "below"), [("/", "pod/x"), ("/pod", "x"), ("/elsewhere", "")])
def test_a_place_is_found_below_what_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str, below: str
) -> None:
    (found,) = trees(monkeypatch, tmp_path, _PIDS.format(root), own="4:pids:/pod/x\n")
    assert found.own == Path("/sys/fs/cgroup/pids") / below


def test_no_path_is_no_cgroup() -> None:
    written = Written()
    sandbox = SandboxCgroup("")
    asyncio.run(sandbox.enter(written))
    asyncio.run(sandbox.leave(written))
    assert written.cgroups == ()


@needs_cgroups
def test_a_host_that_lets_nobody_in_is_told_with_what_to_do() -> None:
    written = Written()
    sandbox = SandboxCgroup("/kata-hybrid-test-\n")  # no folder of the kernel's may be called so
    with pytest.raises(FailedPreconditionError, match="sandbox_cgroup_only = false"):
        asyncio.run(sandbox.enter(written))
    asyncio.run(sandbox.leave(written))
    assert written.cgroups == ()
