import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from kata_hybrid.aio.process import identify
from kata_hybrid.persist import mounts, recovery

TIMEOUT_S = 10.0


def no_unmount(path: str) -> None:
    pytest.fail(f"unmounted {path}")


def write(run_dir: Path, **state: object) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "state.json").write_text(json.dumps({"version": 1, **state}))


def entry(pid: int, *, ticks: int | None = None) -> dict[str, object]:
    start = identify("x", pid).start_ticks if ticks is None else ticks
    return {"name": "x", "pid": pid, "start_ticks": start}


def test_nothing_there_is_no_problem(tmp_path: Path) -> None:
    assert recovery.clean_up(str(tmp_path / "absent"), unmount=no_unmount) == []


def test_shim_and_helpers_are_killed(tmp_path: Path) -> None:
    with (
        subprocess.Popen(["sleep", "600"]) as shim,
        subprocess.Popen(["sleep", "600"]) as helper,
    ):
        write(tmp_path / "s", shim=entry(shim.pid), processes=[entry(helper.pid)])
        assert recovery.clean_up(str(tmp_path / "s"), unmount=no_unmount) == []
        assert shim.wait(TIMEOUT_S) == -signal.SIGKILL
        assert helper.wait(TIMEOUT_S) == -signal.SIGKILL
    assert not (tmp_path / "s").exists()


def test_the_pid_file_is_enough(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as shim:
        ticks = identify("x", shim.pid).start_ticks
        (tmp_path / "s").mkdir()
        (tmp_path / "s" / "shim.pid").write_text(f"{shim.pid} {ticks}")
        recovery.clean_up(str(tmp_path / "s"), unmount=no_unmount)
        assert shim.wait(TIMEOUT_S) == -signal.SIGKILL


@pytest.mark.parametrize(
    "item",
    [
        {"pid": -1, "start_ticks": 1},
        {"pid": 0, "start_ticks": 1},
        {"pid": 1, "start_ticks": 1},
        {"pid": "2", "start_ticks": 1},
        {"pid": 2},
        None,
        "x",
    ],
)
def test_nonsense_kills_nobody(tmp_path: Path, item: object) -> None:
    write(tmp_path / "s", processes=[item], mounts=[1, "relative"], cgroups="x", shim=item)
    assert recovery.clean_up(str(tmp_path / "s"), unmount=no_unmount) == []


def test_it_never_kills_itself(tmp_path: Path) -> None:
    write(tmp_path / "s", shim=entry(os.getpid()))
    assert recovery.clean_up(str(tmp_path / "s"), unmount=no_unmount) == []


def test_mounts_are_released_last_first(tmp_path: Path) -> None:
    write(tmp_path / "s", mounts=["/a", "/a/b"])
    seen: list[str] = []
    recovery.clean_up(str(tmp_path / "s"), unmount=seen.append)
    assert seen == ["/a/b", "/a"]


def test_a_failed_step_does_not_stop_the_next(tmp_path: Path) -> None:
    def refuse(path: str) -> None:
        raise OSError(16, os.strerror(16), path)

    write(tmp_path / "s", mounts=["/a"])
    assert recovery.clean_up(str(tmp_path / "s"), unmount=refuse) == [
        "release /a: Device or resource busy"
    ]
    assert not (tmp_path / "s").exists()


def test_links_are_removed_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    (tmp_path / "s" / "deep").mkdir(parents=True)
    (tmp_path / "s" / "deep" / "link").symlink_to(precious)
    assert recovery.clean_up(str(tmp_path / "s"), unmount=no_unmount) == []
    assert (precious / "file").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_bind_mount_left_in_the_folder_is_detached_not_emptied(tmp_path: Path) -> None:
    # Of the same file system, so that only the mount table tells.
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    (tmp_path / "s" / "shared").mkdir(parents=True)
    subprocess.run(["mount", "--bind", precious, tmp_path / "s" / "shared"], check=True)
    assert recovery.clean_up(str(tmp_path / "s"), unmount=no_unmount) == []
    assert (precious / "file").exists()
    assert not (tmp_path / "s").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_mount_that_cannot_be_detached_keeps_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "s" / "shared"
    shared.mkdir(parents=True)
    subprocess.run(["mount", "--bind", tmp_path, shared], check=True)
    monkeypatch.setattr(mounts, "unmount_below", lambda _: ["unmount: busy"])
    try:
        problems = recovery.clean_up(str(tmp_path / "s"), unmount=no_unmount)
        assert problems == ["unmount: busy", f"release {shared}: Device or resource busy"]
        assert shared.exists()
    finally:
        subprocess.run(["umount", shared], check=True)


def test_cgroups_are_removed_and_what_stays_is_told(tmp_path: Path) -> None:
    write(tmp_path / "s", cgroups=["/sys/fs/cgroup/kata-hybrid-test-gone", "/etc"])
    assert recovery.clean_up(str(tmp_path / "s"), unmount=no_unmount) == [
        "remove cgroup /etc: not a cgroup"
    ]
    assert not (tmp_path / "s").exists()


def test_what_dead_shims_left_is_swept_and_what_others_have_is_not(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as shim:
        alive = identify("x", shim.pid)
        for name, words in {
            "live": f"{alive.pid} {alive.start_ticks}",
            "dead": f"{alive.pid} {alive.start_ticks + 1}",
            "unreadable": "x",
        }.items():
            write(tmp_path / name)
            (tmp_path / name / "shim.pid").write_text(words)
        (tmp_path / "starting").mkdir()
        assert recovery.sweep(str(tmp_path)) == []
        assert {path.name for path in tmp_path.iterdir()} == {"live", "unreadable", "starting"}
        assert shim.poll() is None
        shim.kill()
