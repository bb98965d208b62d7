import asyncio
from pathlib import Path

import pytest

from harness.loop import on_loop
from kata_hybrid.errors import InvalidStateError, VmmError
from kata_hybrid.resource.share_fs.base import TAG, SharedFolder
from kata_hybrid.resource.share_fs.inprocess import InProcessShare
from kata_hybrid.types import FolderCache, HostFolder


def share(folder: Path) -> InProcessShare:
    return InProcessShare(SharedFolder(host_path=folder), cache=FolderCache.ALWAYS)


@on_loop
async def test_the_machine_gets_the_folder_itself(tmp_path: Path) -> None:
    shared = share(tmp_path)
    await shared.start()
    assert shared.device == HostFolder(tag=TAG, path=tmp_path, cache=FolderCache.ALWAYS)
    assert shared.processes == ()
    assert shared.folder.host_path == tmp_path


@on_loop
async def test_it_does_not_die_before_it_is_stopped(tmp_path: Path) -> None:
    shared = share(tmp_path)
    await shared.start()
    async with asyncio.TaskGroup() as group:
        death = group.create_task(shared.died())
        await asyncio.sleep(0)
        assert not death.done()
        await shared.stop()
        await shared.stop()
    assert "stopped" in death.result()


@on_loop
async def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VmmError, match="is not a folder"):
        await share(tmp_path / "absent").start()


@on_loop
async def test_it_starts_once(tmp_path: Path) -> None:
    shared = share(tmp_path)
    await shared.start()
    with pytest.raises(InvalidStateError):
        await shared.start()
