"""Cgroups of a sandbox, on the hierarchies of this host."""

import asyncio
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_hybrid.errors import FailedPreconditionError, InvalidSpecError
from kata_hybrid.persist.recovery import remove_cgroup
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
    for folder in folders(f"/{parent}"):
        remove_cgroup(os.fspath(folder))


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
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            for folder in folders(path):
                assert members(folder) == {os.getpid(), child.pid}
            asyncio.run(sandbox.leave(written))
            # A helper that was forgotten is ended with its cgroup.
            assert child.wait(10) == -9
        finally:
            child.kill()
    assert written.cgroups == ()
    assert Path("/proc/self/cgroup").read_text() == before
    assert not any(folder.exists() for folder in folders(path))
    asyncio.run(sandbox.leave(written))


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
