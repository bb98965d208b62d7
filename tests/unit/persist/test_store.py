import json
import os
from pathlib import Path
from typing import Any

import pytest

from harness.mounts import in_own_mounts, make_tmpfs
from kata_hybrid.aio.process import identify
from kata_hybrid.errors import InternalError, ResourceExhaustedError
from kata_hybrid.persist.store import FILE_NAME, SandboxStore
from kata_hybrid.types import ContainerId, ProcessIdentity, SandboxId

QEMU = ProcessIdentity(name="qemu", pid=11, start_ticks=21)
C1 = ContainerId("c1")


def make_store(folder: Path) -> SandboxStore:
    return SandboxStore(folder, sandbox_id=SandboxId("s"), namespace="k8s")


def written(folder: Path) -> Any:
    return json.loads((folder / FILE_NAME).read_bytes())


def test_nothing_is_written_before_the_first_update(tmp_path: Path) -> None:
    make_store(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_record_names_this_process(tmp_path: Path) -> None:
    make_store(tmp_path).update()
    shim = identify("shim", os.getpid())
    assert written(tmp_path)["shim"] == {
        "name": "shim",
        "pid": os.getpid(),
        "start_ticks": shim.start_ticks,
    }


def test_an_update_keeps_what_it_does_not_name(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.update(containers=(C1,))
    store.update(processes=(QEMU,))
    assert written(tmp_path)["containers"] == ["c1"]
    assert [process["name"] for process in written(tmp_path)["processes"]] == ["qemu"]
    store.update(containers=())
    assert written(tmp_path)["containers"] == []
    assert store.record.processes == (QEMU,)


@in_own_mounts
def test_a_full_disk_is_named_and_the_old_record_stands(tmp_path: Path) -> None:
    small = make_tmpfs(tmp_path / "small", size="8k")
    store = make_store(small)
    store.update(containers=(C1,))
    (small / "filler").write_bytes(bytes(4096))
    with pytest.raises(ResourceExhaustedError, match=f"{small}/{FILE_NAME}: No space left.*; free"):
        store.update(processes=(QEMU,))
    assert written(small)["processes"] == []
    assert store.record.processes == ()


@in_own_mounts
def test_a_disk_with_room_again_takes_the_record(tmp_path: Path) -> None:
    small = make_tmpfs(tmp_path / "small", size="8k")
    store = make_store(small)
    store.update()
    (small / "filler").write_bytes(bytes(4096))
    with pytest.raises(ResourceExhaustedError):
        store.update(containers=(C1,))
    (small / "filler").unlink()
    store.update(containers=(C1,))
    assert written(small)["containers"] == ["c1"]


def test_any_other_failure_is_named(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match=f"{tmp_path}/missing/{FILE_NAME}: No such file"):
        make_store(tmp_path / "missing").update()
