"""Images of ``emptyDir`` volumes, made by the real programs."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from harness.loop import on_loop
from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.errors import FailedPreconditionError, UnimplementedError
from kata_hybrid.resource.disks import Disks
from kata_hybrid.resource.volume.empty_dir import BlockEmptyDirs
from kata_hybrid.testing.fake_hypervisor import FakeHypervisor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("e2fsprogs is not installed")
    folder = tmp_path / "kubernetes.io~empty-dir" / "cache"
    folder.mkdir(parents=True)
    folder.chmod(0o2777)
    return folder


@contextlib.asynccontextmanager
async def made(machine_dir: Path) -> AsyncIterator[tuple[BlockEmptyDirs, FakeHypervisor]]:
    reaper = ProcessReaper()
    machine = FakeHypervisor(run_dir=machine_dir)
    try:
        yield BlockEmptyDirs(Disks(machine), reaper=reaper), machine
    finally:
        reaper.close()


def debugfs(image: Path, request: str) -> str:
    done = subprocess.run(
        ["debugfs", "-R", request, image], check=True, capture_output=True, text=True, timeout=30
    )
    return done.stdout


@on_loop
async def test_it_is_one_disk_whose_root_is_as_the_folder_is(folder: Path, tmp_path: Path) -> None:
    async with made(tmp_path) as (volumes, machine):
        first = await volumes.storage(os.fspath(folder))
        assert first is not None
        assert await volumes.storage(f"{folder}/") == first
    image = folder / "disk.img"
    assert [disk.path for disk in machine.disks] == [image]
    assert (first.fstype, first.is_shared) == ("ext4", True)
    assert first.mount_point.startswith("/run/kata-containers/sandbox/storage/")
    root = debugfs(image, "stat <2>")
    assert "Mode:  02777" in root
    assert image.stat().st_size == os.statvfs(folder).f_blocks * os.statvfs(folder).f_frsize
    assert image.stat().st_blocks * 512 < 256 << 20, "it is sparse"
    assert os.listdir(folder) == ["disk.img"]  # noqa: PTH208 - instantly done


@on_loop
async def test_what_was_in_it_stays_for_the_next_machine(folder: Path, tmp_path: Path) -> None:
    async with made(tmp_path) as (volumes, _):
        await volumes.storage(os.fspath(folder))
    image = folder / "disk.img"
    number = image.stat().st_ino
    async with made(tmp_path) as (volumes, _):
        await volumes.storage(os.fspath(folder))
    assert image.stat().st_ino == number


@on_loop
async def test_other_folders_are_none(tmp_path: Path) -> None:
    async with made(tmp_path) as (volumes, machine):
        assert await volumes.storage(os.fspath(tmp_path)) is None
        absent = tmp_path / "kubernetes.io~empty-dir" / "absent"
        assert await volumes.storage(os.fspath(absent)) is None
    assert machine.disks == []


@on_loop
async def test_what_is_no_image_of_ours_is_not_given_to_a_guest(
    folder: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the host's")
    for make in (os.symlink, os.link):
        make(secret, folder / "disk.img")
        async with made(tmp_path) as (volumes, machine):
            with pytest.raises(FailedPreconditionError, match="no image file of this volume's"):
                await volumes.storage(os.fspath(folder))
        assert machine.disks == []
        (folder / "disk.img").unlink()


@on_loop
async def test_a_program_that_is_missing_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    async with made(tmp_path) as (volumes, _):
        with pytest.raises(FailedPreconditionError, match="emptydir_mode needs e2fsprogs"):
            await volumes.storage(os.fspath(folder))


@on_loop
async def test_a_folder_in_one_is_refused_and_any_other_is_not(tmp_path: Path) -> None:
    pod = tmp_path / "pods" / "uid"
    (pod / "volumes" / "kubernetes.io~empty-dir" / "cache").mkdir(parents=True)
    async with made(tmp_path) as (volumes, machine):
        with pytest.raises(UnimplementedError, match='a subPath of emptyDir "cache"'):
            await volumes.storage(f"{pod}/volume-subpaths/cache/container/0")
        assert await volumes.storage(f"{pod}/volume-subpaths/config/container/0") is None
        assert await volumes.storage("/data") is None
        assert machine.disks == []
