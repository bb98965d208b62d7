"""Crashes and shortages: containerd ends with a consistent state, and nothing is left behind.

The autouse leak check of conftest.py is half of each test: after the fault and the clean-up that a
client does anyway, no process, mount, socket, file or cgroup may remain.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.containers import Containers
from harness.daemon import Containerd
from harness.deadline import wait_gone, wait_until
from harness.events import EventWatcher
from harness.leaks import HostProcess, count_descriptors, find_processes, take_census
from kata_hybrid.protos import ttrpc_pb2
from kata_hybrid.ttrpc.frame import FrameType, encode_frame

_LOST = {137, 255}  # by SIGKILL, or "nobody knows"


def test_shim_killed(containers: Containers, daemon: Containerd, events: EventWatcher) -> None:
    with containers.detached("sleep", "1000") as name:
        shim = containers.shim_pid(name)
        os.kill(shim, signal.SIGKILL)
        wait_gone(shim)
        assert events.wait("/tasks/exit", name).exit_status in _LOST
        events.wait("/tasks/delete", name)
        wait_until(
            lambda: name not in {task.container_id for task in containers.tasks()},
            what="task gone from containerd",
        )
        assert not daemon.bundle(name).exists()
        wait_until(lambda: not find_processes(daemon), what="no process left")
    # The id is free again and the daemon works on.
    assert containers.attempt("echo", "again", container_id=name).text == "again"


def test_shim_killed_while_the_client_waits(containers: Containers, events: EventWatcher) -> None:
    with containers.foreground("sh", "-c", "echo ready; sleep 1000") as (name, process):
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        events.wait("/tasks/start", name)
        os.kill(containers.shim_pid(name), signal.SIGKILL)
        assert process.wait(30) != 0


def test_machine_killed(
    qemu_containers: Containers, daemon: Containerd, events: EventWatcher
) -> None:
    with qemu_containers.detached("sleep", "1000") as name:
        os.kill(the_process(daemon, "qemu-system").pid, signal.SIGKILL)
        assert_lost_but_deletable(qemu_containers, events, name)


def test_machine_killed_while_the_client_waits(
    qemu_containers: Containers, daemon: Containerd, events: EventWatcher
) -> None:
    with qemu_containers.foreground("sh", "-c", "echo ready; sleep 1000") as (name, process):
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        events.wait("/tasks/start", name)
        os.kill(the_process(daemon, "qemu-system").pid, signal.SIGKILL)
        assert process.wait(30) in _LOST


def test_machine_killed_during_an_exec(
    qemu_containers: Containers, daemon: Containerd, events: EventWatcher
) -> None:
    with qemu_containers.detached("sleep", "1000") as name:
        arguments = qemu_containers.exec_arguments(name, ["sleep", "1000"], exec_id="ex")
        process = daemon.popen(*arguments)
        try:
            events.wait("/tasks/exec-started", name, process_id="ex")
            os.kill(the_process(daemon, "qemu-system").pid, signal.SIGKILL)
            assert events.wait("/tasks/exit", name, process_id="ex").exit_status in _LOST
            assert process.wait(30) in _LOST
        finally:
            process.kill()
            process.communicate()
        assert_lost_but_deletable(qemu_containers, events, name)


def test_share_daemon_killed(
    qemu_containers: Containers, daemon: Containerd, events: EventWatcher
) -> None:
    with qemu_containers.detached("sleep", "1000") as name:
        for process in find_processes(daemon, name="virtiofsd"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        assert_lost_but_deletable(qemu_containers, events, name)


def test_guest_kernel_panics(vm_containers: Containers, events: EventWatcher) -> None:
    # Only ever in a virtual machine: vm_containers skips any other runtime.
    with vm_containers.detached("sleep", "1000", options=["--null-io", "--privileged"]) as name:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        inside = vm_containers.exec(name, "cat", "/proc/sys/kernel/random/boot_id").text
        assert inside not in ("", boot), "this is the host's kernel"
        arguments = vm_containers.exec_arguments(
            name, ["sh", "-c", "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger"]
        )
        process = vm_containers.containerd.popen(*arguments)
        try:
            assert_lost_but_deletable(vm_containers, events, name)
            assert process.wait(30) != 0
        finally:
            process.kill()
            process.communicate()


def test_agent_ends(vm_containers: Containers, daemon: Containerd, events: EventWatcher) -> None:
    # No signal reaches a guest's pid 1 from inside, so its own protocol tells it to go.
    with vm_containers.detached("sleep", "1000") as name:
        (path,) = daemon.run_dir.glob("sb/*/agent.sock")
        request = ttrpc_pb2.Request(service="grpc.AgentService", method="DestroySandbox")
        payload = request.SerializeToString()
        with socket.socket(socket.AF_UNIX) as agent:
            agent.settimeout(30)
            agent.connect(os.fspath(path))
            agent.sendall(b"CONNECT 1024\n")
            assert agent.recv(64).startswith(b"OK ")
            agent.sendall(encode_frame(1, frame_type=FrameType.REQUEST, payload=payload))
            assert_lost_but_deletable(vm_containers, events, name)


def test_frozen_guest_does_not_freeze_the_shim(
    qemu_containers: Containers, daemon: Containerd, events: EventWatcher
) -> None:
    # An agent that no longer answers looks just like a machine that is stopped.
    with qemu_containers.detached("sleep", "1000") as name:
        os.kill(the_process(daemon, "qemu-system").pid, signal.SIGSTOP)
        assert qemu_containers.task(name).status == "RUNNING"
        killer = daemon.popen("t", "kill", "-s", "SIGKILL", name)
        try:
            assert events.wait("/tasks/exit", name, timeout_s=90).exit_status in _LOST
        finally:
            killer.communicate(timeout=60)
        assert qemu_containers.task(name).status == "STOPPED"
        daemon.attempt("t", "rm", name)


def test_containerd_killed_and_started_again(containers: Containers, daemon: Containerd) -> None:
    with containers.detached("sleep", "1000") as name:
        pid = containers.task(name).pid
        daemon.kill()
        daemon.start()
        task = containers.task(name)
        assert (task.pid, task.status) == (pid, "RUNNING")
        assert containers.exec(name, "sh", "-c", "echo alive; exit 6").status == 6
        with EventWatcher(daemon) as events:
            daemon.ctr("t", "kill", "-s", "SIGKILL", name)
            assert events.wait("/tasks/exit", name).exit_status == 137
        daemon.attempt("t", "rm", name)


def test_containerd_restarted_in_order(containers: Containers, daemon: Containerd) -> None:
    with containers.detached("sleep", "1000") as name:
        daemon.restart()
        assert containers.task(name).status == "RUNNING"
        assert containers.exec(name, "echo", "alive").text == "alive"


def test_task_that_ended_without_containerd_is_found_stopped(
    containers: Containers, daemon: Containerd
) -> None:
    with contextlib.ExitStack() as stack:
        gate = daemon.home / "tmp" / "gate"
        gate.mkdir(exist_ok=True)
        stack.callback(shutil.rmtree, gate)
        mount = f"type=bind,src={gate},dst=/gate,options=rbind:rw"
        script = "while [ ! -e /gate/open ]; do usleep 50000; done; touch /gate/gone; exit 9"
        name = stack.enter_context(
            containers.detached("sh", "-c", script, options=["--null-io", "--mount", mount])
        )
        daemon.kill()
        (gate / "open").touch()
        wait_until((gate / "gone").exists, what="container ended", timeout_s=30)
        daemon.start()
        if containers.is_virtual:
            # The shell still has to end after its last command.
            wait_until(
                lambda: containers.task(name).status == "STOPPED",
                what="task stopped",
                timeout_s=30,
            )
            assert "non-zero exit code 9" in daemon.ctr("t", "rm", name).error
        else:  # runc's shim names no process of a stopped task, which containerd takes for a leak
            states = [task.status for task in containers.tasks() if task.container_id == name]
            assert states in (["STOPPED"], [])


@pytest.mark.timeout(240)
def test_containerd_killed_during_create_leaves_nothing(
    vm_containers: Containers, daemon: Containerd
) -> None:
    # Not with runc: containerd 1.6 keeps its shim for ever, and nobody knows of it.
    containers = vm_containers
    name = containers.new_id()
    client = daemon.popen(*containers.run_arguments(name, ["sleep", "1000"], ["--rm"]))
    try:
        wait_until(lambda: find_processes(daemon), what="a shim", timeout_s=30)
    finally:
        daemon.kill()
        client.kill()
        client.communicate()
    daemon.start()
    containers.remove(name)
    wait_until(lambda: not find_processes(daemon), what="no shim", timeout_s=90)


@pytest.mark.newest
@pytest.mark.timeout(400)
def test_a_shim_killed_at_any_point_of_the_creation_leaves_nothing(
    vm_containers: Containers, daemon: Containerd, tmp_path: Path
) -> None:
    mount = f"type=bind,src={tmp_path},dst=/data,options=rbind:rw"

    def shims() -> set[Path]:
        return set((daemon.run_dir / "sb").glob("*/shim.pid"))

    def create(*, kill_after_s: float | None) -> float:
        """Run a container; kill its shim so long after it came up, or say how long it took."""
        name, before = vm_containers.new_id(), shims()
        arguments = vm_containers.run_arguments(name, ["true"], ["--rm", "--mount", mount])
        client = daemon.popen(*arguments)
        try:
            wait_until(lambda: shims() - before, what="a shim")
            began = time.monotonic()
            if kill_after_s is not None:
                time.sleep(kill_after_s)
                for shim in shims() - before:
                    with contextlib.suppress(ProcessLookupError, FileNotFoundError, IndexError):
                        os.kill(int(shim.read_text().split()[0]), signal.SIGKILL)
            client.communicate(timeout=60)
            took: float = time.monotonic() - began
        finally:
            client.kill()
            client.communicate()
        vm_containers.remove(name)
        wait_until(lambda: not find_processes(daemon), what="no process left", timeout_s=30)
        return took

    whole = create(kill_after_s=None)
    for number in range(10):
        create(kill_after_s=whole * number / 10)
    # containerd asks for nothing to be deleted of a shim that it was not connected to yet: what
    # that one left goes with the next shim that ends.
    create(kill_after_s=None)
    wait_until(lambda: list((daemon.run_dir / "sb").iterdir()) == [], what="no sandbox left")
    # Mounts, links, cgroups and files are compared after the test, as after each.


def test_full_disk_for_state_is_told_and_survived(
    vm_containers: Containers, daemon: Containerd
) -> None:
    with small_disk(daemon.run_dir):
        (daemon.run_dir / "ballast").write_bytes(b"\0" * fill_size(daemon.run_dir))
        output = vm_containers.attempt("true")
        assert output.status != 0
        assert "no space left" in output.error.lower()
        (daemon.run_dir / "ballast").unlink()
        wait_until(lambda: not find_processes(daemon), what="no process left")
        assert list(daemon.run_dir.rglob("*.sock")) == []
    assert vm_containers.run("echo", "fine").text == "fine"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thirty_cycles_leak_nothing(containers: Containers, daemon: Containerd) -> None:
    containers.run("true")
    before, descriptors = take_census(daemon), count_descriptors(daemon.pid)
    for number in range(30):
        assert containers.attempt("sh", "-c", f"exit {number}").status == number
    left = wait_until(lambda: [take_census(daemon).since(before)], what="census", timeout_s=1)[0]
    wait_until(lambda: not take_census(daemon).since(before), what=f"no leftovers: {left}")
    assert count_descriptors(daemon.pid) <= descriptors + 5


def test_repeated_failures_leak_nothing(containers: Containers, daemon: Containerd) -> None:
    before, descriptors = take_census(daemon), count_descriptors(daemon.pid)
    for _ in range(3):
        assert containers.attempt("/bin/no-such-binary").status != 0
    wait_until(lambda: not take_census(daemon).since(before), what="no leftovers")
    assert count_descriptors(daemon.pid) <= descriptors + 5


def assert_lost_but_deletable(containers: Containers, events: EventWatcher, name: str) -> None:
    """The container's machine is gone: containerd knows, and a client can clear it away."""
    event = events.wait("/tasks/exit", name, process_id=name)
    assert event.exit_status in _LOST
    wait_until(
        lambda: (
            [task.status for task in containers.tasks() if task.container_id == name]
            in ([], ["STOPPED"])
        ),
        what="STOPPED, or gone",
    )
    # Killing the dead is no failure that a client would repeat for ever.
    killed = containers.containerd.attempt("t", "kill", "-s", "SIGKILL", name)
    assert killed.status == 0 or "not found" in killed.error
    containers.containerd.attempt("t", "rm", name)
    assert name not in {task.container_id for task in containers.tasks()}


def the_process(daemon: Containerd, name: str) -> HostProcess:
    """The one process of that name."""
    found = find_processes(daemon, name=name)
    assert len(found) == 1, found
    return found[0]


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """Make a directory a file system of 256 KiB for a while."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "tmpfs", directory], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def fill_size(directory: Path) -> int:
    """Return how many bytes fill the file system up to the last block."""
    state = os.statvfs(directory)
    return state.f_bavail * state.f_frsize
