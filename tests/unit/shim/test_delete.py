"""The delete action as a process: with the server alive, hanging, dead or never there."""

import json
import os
import select
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from harness.shim import TIMEOUT_S, Shim
from kata_hybrid.aio.process import identify
from kata_hybrid.protos import task_pb2

SOME_TIME_AFTER_2024 = 1_700_000_000


def delete(shim: Shim, bundle: Path, *, container_id: str) -> task_pb2.DeleteResponse:
    done = shim.run("-bundle", str(bundle), "delete", bundle=bundle, container_id=container_id)
    assert (done.returncode, done.stderr) == (0, b"")
    return task_pb2.DeleteResponse.FromString(done.stdout)


def write_state(sandbox: Path, *, containers: list[str], pids: list[int]) -> None:
    processes = [identify("helper", pid) for pid in pids]
    state = {
        "version": 1,
        "containers": containers,
        "processes": [
            {"name": item.name, "pid": item.pid, "start_ticks": item.start_ticks}
            for item in processes
        ],
        "mounts": [],
        "cgroups": [],
    }
    (sandbox / "state.json").write_text(json.dumps(state))


def serves(pid: int) -> bool:
    """The server has loaded: it names itself then."""
    return Path(f"/proc/{pid}/comm").read_text() == "kata-hybrid\n"


def wait_until_serving(shim: Shim) -> None:
    (sandbox,) = shim.sandboxes()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(TIMEOUT_S)
        client.connect(str(sandbox / "shim.sock"))
        client.sendall(b"\0\0\0\0\0\0\0\1\1\0")
        assert client.recv(1)


def test_the_answer_is_137_now(shim: Shim) -> None:
    response = delete(shim, shim.bundle("c1"), container_id="c1")
    assert response.exit_status == 137
    assert response.exited_at.seconds > SOME_TIME_AFTER_2024


def test_a_dead_shims_folder_and_helpers_are_released(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    shim.start(bundle, container_id="c1")
    (sandbox,) = shim.sandboxes()
    with subprocess.Popen(["sleep", "600"]) as helper:
        write_state(sandbox, containers=["c1"], pids=[helper.pid])
        shim.kill()
        delete(shim, bundle, container_id="c1")
        assert helper.wait(TIMEOUT_S) == -signal.SIGKILL
    assert shim.sandboxes() == []


def test_it_may_be_repeated(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    shim.start(bundle, container_id="c1")
    for _ in range(3):
        assert delete(shim, bundle, container_id="c1").exit_status == 137
    assert shim.sandboxes() == []


def test_a_living_shim_of_the_last_container_is_killed(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    shim.start(bundle, container_id="c1")
    pid = os.pidfd_open(shim.pid())
    delete(shim, bundle, container_id="c1")
    assert select.select([pid], [], [], TIMEOUT_S)[0]
    os.close(pid)
    assert shim.sandboxes() == []


def test_a_living_shim_with_other_containers_is_left_alone(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    shim.start(bundle, container_id="c1")
    (sandbox,) = shim.sandboxes()
    wait_until_serving(shim)
    write_state(sandbox, containers=["c1", "c2"], pids=[])
    delete(shim, bundle, container_id="c1")
    assert shim.sandboxes() == [sandbox]
    wait_until_serving(shim)


def test_a_hanging_shim_is_killed_though_others_remain(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    shim.start(bundle, container_id="c1")
    (sandbox,) = shim.sandboxes()
    wait_until_serving(shim)
    write_state(sandbox, containers=["c1", "c2"], pids=[])
    os.kill(shim.pid(), signal.SIGSTOP)
    delete(shim, bundle, container_id="c1")
    assert shim.sandboxes() == []


def test_a_process_of_the_same_pid_is_not_killed(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    shim.start(bundle, container_id="c1")
    (sandbox,) = shim.sandboxes()
    with subprocess.Popen(["sleep", "600"]) as stranger:
        write_state(sandbox, containers=["c1"], pids=[stranger.pid])
        state = json.loads((sandbox / "state.json").read_text())
        state["processes"][0]["start_ticks"] -= 1
        (sandbox / "state.json").write_text(json.dumps(state))
        shim.kill()
        delete(shim, bundle, container_id="c1")
        assert stranger.poll() is None
        stranger.kill()


def test_a_bundle_that_is_gone_is_no_obstacle(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    shim.start(bundle, container_id="c1")
    shim.kill()
    (bundle / "config.json").unlink()
    (bundle / "address").unlink()
    delete(shim, bundle, container_id="c1")
    assert shim.sandboxes() == []


def test_a_damaged_config_is_no_obstacle(shim: Shim) -> None:
    bundle = shim.bundle("c1", config="{")
    assert delete(shim, bundle, container_id="c1").exit_status == 137


def test_an_address_that_points_elsewhere_is_not_followed(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    elsewhere = shim.folder / "elsewhere"
    elsewhere.mkdir()
    (bundle / "address").write_text(f"unix://{elsewhere}/shim.sock")
    delete(shim, bundle, container_id="c1")
    assert elsewhere.exists()


def test_a_damaged_state_still_releases_the_folder_and_says_so(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    shim.start(bundle, container_id="c1")
    shim.kill()
    (sandbox,) = shim.sandboxes()
    (sandbox / "state.json").write_text("{")
    done = shim.run("delete", bundle=bundle, container_id="c1")
    assert done.returncode == 0
    assert b"state.json" in done.stderr
    assert shim.sandboxes() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_mounts_left_in_the_rootfs_are_detached(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    subprocess.run(["mount", "-t", "tmpfs", "none", bundle / "rootfs"], check=True)
    delete(shim, bundle, container_id="c1")
    assert not (bundle / "rootfs").is_mount()
