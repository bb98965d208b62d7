"""States, signals, resources, metrics, events, log files and pods, as containerd sees them."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from harness.containers import CRI_SANDBOX, CRI_TYPE, KATA_RUNTIME, Containers
from harness.deadline import wait_until
from harness.events import EventWatcher
from harness.leaks import find_processes
from harness.tasks_api import update_resources

_HYPERVISOR = "io.katacontainers.config.hypervisor."
_BUSY = "i=0; while :; do i=$((i+1)); echo $i > /tmp/count; done"
# The file is empty for a moment each time.
_COUNTS_ON = """
read_count() { count=; while [ -z "$count" ]; do read -r count < /tmp/count; done; }
read_count; first=$count
for try in $(seq 100); do
    read_count
    [ "$count" -gt "$first" ] && exit 0
    sleep 0.1
done
exit 1
"""


def test_kill_ends_the_task_and_delete_removes_it(
    containers: Containers, events: EventWatcher
) -> None:
    with containers.detached("sleep", "1000") as name:
        containers.containerd.ctr("t", "kill", "-s", "SIGKILL", name)
        assert events.wait("/tasks/exit", name).exit_status == 137
        assert containers.task(name).status == "STOPPED"
        containers.containerd.attempt("t", "rm", name)
        assert name not in {task.container_id for task in containers.tasks()}


def test_kill_all_reaches_every_process(containers: Containers, events: EventWatcher) -> None:
    with containers.detached("sh", "-c", "sleep 1000 & sleep 1000 & wait") as name:
        containers.containerd.ctr("t", "kill", "-s", "SIGKILL", "--all", name)
        assert events.wait("/tasks/exit", name).exit_status == 137


def test_signal_reaches_init_only(containers: Containers, events: EventWatcher) -> None:
    script = "trap 'exit 21' USR1; while :; do sleep 1 & wait; done"
    with containers.detached("sh", "-c", script) as name:
        # The trap has to be set: the default action of USR1 is ignored for pid 1.
        wait_until(
            lambda: _catches(containers.exec(name, "cat", "/proc/1/status").text, signal=10),
            what="trap set",
        )
        containers.containerd.ctr("t", "kill", "-s", "SIGUSR1", name)
        assert events.wait("/tasks/exit", name, process_id=name).exit_status == 21


def test_pause_stops_the_processes_and_resume_lets_them_go_on(
    containers: Containers, events: EventWatcher
) -> None:
    with containers.detached("sh", "-c", _BUSY) as name:
        containers.containerd.ctr("t", "pause", name)
        events.wait("/tasks/paused", name)
        assert containers.task(name).status == "PAUSED"
        assert containers.exec(name, "true").status != 0

        containers.containerd.ctr("t", "resume", name)
        events.wait("/tasks/resumed", name)
        assert containers.task(name).status == "RUNNING"
        assert containers.exec(name, "sh", "-c", _COUNTS_ON).status == 0


def test_paused_container_can_be_killed(containers: Containers, events: EventWatcher) -> None:
    with containers.detached("sleep", "1000") as name:
        containers.containerd.ctr("t", "pause", name)
        containers.containerd.ctr("t", "kill", "-s", "SIGKILL", name)
        containers.containerd.attempt("t", "resume", name)  # runc delivers after a thaw only
        assert events.wait("/tasks/exit", name).exit_status == 137


def test_update_changes_the_memory_limit(containers: Containers) -> None:
    limit = 96 << 20
    with containers.detached(
        "sleep", "1000", options=["--null-io", "--memory-limit", str(64 << 20)]
    ) as name:
        update_resources(containers.containerd, name, {"memory": {"limit": limit}})
        assert limit in _memory_limits(_metrics(containers, name))


def test_a_containers_memory_limit_sizes_its_machine(containers: Containers, runtime: str) -> None:
    if runtime != KATA_RUNTIME:
        pytest.skip(f"{runtime} has no machine")
    output = containers.run(
        "head", "-n1", "/proc/meminfo", options=["--memory-limit", str(200 << 20)]
    )
    assert 200 << 10 < int(output.text.split()[1]) < 328 << 10


def test_an_annotation_sizes_the_machine_whatever_the_limit(
    containers: Containers, runtime: str
) -> None:
    if runtime != KATA_RUNTIME:
        pytest.skip(f"{runtime} has no machine")
    output = containers.run(
        *("head", "-n1", "/proc/meminfo"),
        options=[
            "--memory-limit",
            str(64 << 20),
            "--annotation",
            f"{_HYPERVISOR}default_memory=300",
        ],
    )
    assert 200 << 10 < int(output.text.split()[1]) < 300 << 10


def test_an_annotation_that_is_not_allowed_is_refused(containers: Containers, runtime: str) -> None:
    if runtime != KATA_RUNTIME:
        pytest.skip(f"{runtime} has no machine")
    output = containers.attempt("true", options=["--annotation", f"{_HYPERVISOR}path=/bin/true"])
    assert output.status != 0
    assert f"annotation {_HYPERVISOR}path is not allowed" in output.error


def test_the_machine_counts_in_its_containers_cgroup(
    vm_containers: Containers, running: str
) -> None:
    wanted = f"/{vm_containers.containerd.namespace}/{running}"
    processes = find_processes(vm_containers.containerd)
    assert processes
    for process in processes:
        places = dict(
            line.split(":", 2)[1:]
            for line in Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()
        )
        # v2's only hierarchy, or that of a controller of v1's.
        assert places.get("memory", places.get("")) == wanted, (process, places)


def test_update_of_unknown_container_is_not_found(containers: Containers, running: str) -> None:
    del running
    with pytest.raises(grpc.RpcError) as caught:
        update_resources(containers.containerd, "absent", {"memory": {"limit": 1 << 26}})
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_metrics_are_readable_by_ctr(containers: Containers, running: str) -> None:
    table = containers.containerd.ctr("t", "metrics", running).text
    assert "cpu" in table
    assert "memory" in table


def test_metrics_count_what_the_container_does(containers: Containers) -> None:
    with containers.detached("sh", "-c", _BUSY) as name:
        first = _cpu_time(_metrics(containers, name))
        wait_until(
            lambda: _cpu_time(_metrics(containers, name)) > first, what="growing processor time"
        )


def test_processes_are_listed(containers: Containers, running: str) -> None:
    lines = containers.containerd.ctr("t", "ps", running).text.splitlines()[1:]
    pids = [int(line.split()[0]) for line in lines]
    assert pids
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)


def test_task_pid_is_a_live_host_process(containers: Containers, running: str) -> None:
    assert Path(f"/proc/{containers.task(running).pid}/ns/net").exists()


def test_events_of_a_run_come_in_order(containers: Containers, events: EventWatcher) -> None:
    name = containers.new_id()
    assert containers.attempt("sh", "-c", "exit 3", container_id=name).status == 3
    events.wait("/tasks/delete", name)
    assert events.topics(name) == ["create", "start", "exit", "delete"]
    create, start, exited, deleted = events.of(name)
    assert exited.body["id"] == name
    assert (exited.exit_status, deleted.exit_status) == (3, 3)
    assert create.body["pid"] == start.body["pid"] == exited.body["pid"] == deleted.body["pid"]
    assert create.body["bundle"] == os.fspath(containers.containerd.bundle(name))


def test_events_of_an_exec_come_in_order(containers: Containers, events: EventWatcher) -> None:
    with containers.detached("sleep", "1000") as name:
        assert containers.exec(name, "sh", "-c", "exit 4", exec_id="ex").status == 4
        assert events.wait("/tasks/exit", name, process_id="ex").exit_status == 4
        assert events.topics(name) == ["create", "start", "exec-added", "exec-started", "exit"]


def test_exit_of_an_exec_precedes_the_exit_of_init(
    containers: Containers, events: EventWatcher
) -> None:
    with containers.detached("sleep", "1000") as name:
        arguments = containers.exec_arguments(name, ["sleep", "1000"], ["-d"], exec_id="ex")
        containers.containerd.ctr(*arguments)
        containers.containerd.ctr("t", "kill", "-s", "SIGKILL", "--all", name)
        events.wait("/tasks/exit", name, process_id=name)
        exits = [event.process_id for event in events.of(name) if event.topic == "/tasks/exit"]
    assert exits == ["ex", name]


def test_absent_binary_is_named_and_leaves_no_task(
    containers: Containers, events: EventWatcher
) -> None:
    name = containers.new_id()
    output = containers.attempt("/bin/no-such-binary", container_id=name)
    assert output.status != 0
    assert "/bin/no-such-binary" in output.error
    assert "no such file or directory" in output.error
    assert name not in {task.container_id for task in containers.tasks()}
    assert "start" not in events.topics(name)


def test_binary_outside_the_path_is_named_as_runc_names_it(containers: Containers) -> None:
    output = containers.attempt("no-such-binary")
    assert output.status != 0
    assert "executable file not found in $PATH" in output.error


def test_file_without_execute_permission_is_refused(containers: Containers) -> None:
    output = containers.attempt("/bin/not-executable")
    assert output.status != 0
    assert "permission denied" in output.error


def test_absent_working_directory_is_made_or_named(containers: Containers) -> None:
    output = containers.attempt("pwd", options=["--cwd", "/not/there"])
    assert output.text == "/not/there" or "/not/there" in output.error


def test_absent_rootfs_is_named(containers: Containers, tmp_path: Path) -> None:
    absent = tmp_path / "absent-rootfs"
    name = containers.new_id()
    arguments = containers.run_arguments(name, [], ["--rm", "--rootfs"])
    output = containers.containerd.attempt(*arguments[:-1], os.fspath(absent), name, "/bin/true")
    containers.containerd.attempt("c", "rm", name)
    assert output.status != 0
    assert "absent-rootfs" in output.error


def test_absent_bind_source_is_named(containers: Containers, tmp_path: Path) -> None:
    mount = f"type=bind,src={tmp_path}/absent-source,dst=/mnt,options=rbind:ro"
    output = containers.attempt("true", options=["--mount", mount])
    assert output.status != 0
    assert "absent-source" in output.error


def test_log_file_gets_both_streams(containers: Containers, events: EventWatcher) -> None:
    log = containers.containerd.home / "tmp" / "container.log"
    script = "echo out; echo err >&2; seq 1 20000"
    with containers.detached("sh", "-c", script, options=["--log-uri", f"file://{log}"]) as name:
        events.wait("/tasks/exit", name)
        containers.containerd.attempt("t", "rm", name)
    lines = log.read_text().splitlines()
    log.unlink()
    assert {"out", "20000"} <= set(lines)
    if containers.is_virtual:  # runc's shim, under load, may close the file before it read stderr
        assert "err" in lines
        assert len(lines) == 20002


def test_logger_binary_gets_both_streams_and_the_ids(
    containers: Containers, events: EventWatcher, tmp_path: Path
) -> None:
    logger = tmp_path / "logger"
    logger.write_text(
        "#!/bin/sh\n"
        "trap '' TERM\n"  # a shim asks it to go at once; end of file is what ends it
        'target="$2"\n'
        'echo "$CONTAINER_ID $CONTAINER_NAMESPACE" > "$target.ids"\n'
        "exec 5>&-\n"
        'cat <&4 > "$target.err" &\n'
        'cat <&3 > "$target.out"\n'
        "wait\n"
        'echo done > "$target.done"\n'
    )
    logger.chmod(stat.S_IRWXU)
    target = tmp_path / "log"
    uri = f"binary://{logger}?target={target}"
    script = "echo out; echo err >&2"
    with containers.detached("sh", "-c", script, options=["--log-uri", uri]) as name:
        events.wait("/tasks/exit", name)
        containers.containerd.attempt("t", "rm", name)
        wait_until(Path(f"{target}.done").exists, what="logger ended by end of file")
        ids = Path(f"{target}.ids").read_text().split()
    assert ids == [name, containers.containerd.namespace]
    assert Path(f"{target}.out").read_text() == "out\n"
    assert Path(f"{target}.err").read_text() == "err\n"


def test_absent_logger_binary_is_named(containers: Containers) -> None:
    name = containers.new_id()
    arguments = containers.run_arguments(
        name, ["true"], ["-d", "--log-uri", "binary:///no/such/logger"]
    )
    output = containers.containerd.attempt(*arguments)
    containers.remove(name)
    assert output.status != 0
    assert "/no/such/logger" in output.error


def test_two_containers_of_a_pod_share_one_sandbox(containers: Containers) -> None:
    with pod(containers) as (sandbox, container):
        assert containers.shim_pid(sandbox) == containers.shim_pid(container)
        if containers.is_virtual:
            shim = containers.shim_pid(sandbox)
            assert len(machines_of(shim, containers)) == 1
            boots = {
                containers.exec(name, "cat", "/proc/sys/kernel/random/boot_id").text
                for name in (sandbox, container)
            }
            assert len(boots) == 1


def machines_of(shim: int, containers: Containers) -> list[str]:
    """The machines of a shim: QEMU among its children, or one with threads in it."""
    children = find_processes(containers.containerd, name="qemu-system")
    threads = Path(f"/proc/{shim}/task").glob("*/comm")
    return [
        *(child.command for child in children if child.parent == shim),
        *(name for name in (path.read_text().strip() for path in threads) if name == "vcpu-0"),
    ]


def descendants_of(shim: int, containers: Containers) -> list[str]:
    """Names of all processes below a shim, which adopts those whose parent is gone.

    Not of others of this daemon: the machine of the test before may still be on its way out.
    """
    processes = find_processes(containers.containerd)
    family = {shim}
    while grown := {process.pid for process in processes if process.parent in family} - family:
        family |= grown
    return [process.name for process in processes if process.pid in family - {shim}]


def test_a_sandbox_is_one_process_unless_qemu_runs_it(vm_containers: Containers) -> None:
    with vm_containers.detached("sleep", "1000") as name:
        shim = vm_containers.shim_pid(name)
        others = descendants_of(shim, vm_containers)
        threads = [path.read_text().strip() for path in Path(f"/proc/{shim}/task").glob("*/comm")]
        if "vmm-io" in threads:
            assert others == []
            # The second of them starts children outside of the sandbox's network namespace.
            assert sorted(threads) == [*["kata-hybrid"] * 2, "vcpu-0", "vmm-io", "vsock-io"]
            assert vm_containers.task(name).pid == shim
        else:
            assert sorted(others) == ["qemu-system-x86", "virtiofsd"]


def test_containers_of_a_pod_have_their_own_files_and_processes(containers: Containers) -> None:
    with pod(containers) as (sandbox, container):
        containers.exec(container, "touch", "/tmp/mine")
        assert containers.exec(sandbox, "ls", "/tmp/mine").status == 1
        shown = containers.exec(container, "ps", "-o", "args").text
    assert "sleep 2000" in shown
    assert "sleep 1000" not in shown


def test_pod_goes_on_without_one_of_its_containers(
    containers: Containers, events: EventWatcher
) -> None:
    with pod(containers) as (sandbox, container):
        containers.containerd.ctr("t", "kill", "-s", "SIGKILL", container)
        assert events.wait("/tasks/exit", container).exit_status == 137
        containers.containerd.attempt("t", "rm", container)
        assert containers.exec(sandbox, "echo", "alive").text == "alive"


def test_sandbox_container_may_go_first(vm_containers: Containers, events: EventWatcher) -> None:
    # Not with runc: its shim misses the last shutdown then, and leaves its socket.
    containers = vm_containers
    with pod(containers) as (sandbox, container):
        containers.containerd.ctr("t", "kill", "-s", "SIGKILL", sandbox)
        events.wait("/tasks/exit", sandbox)
        containers.containerd.attempt("t", "rm", sandbox)
        containers.containerd.attempt("t", "kill", "-s", "SIGKILL", container)
        events.wait("/tasks/exit", container)


@contextlib.contextmanager
def pod(containers: Containers) -> Iterator[tuple[str, str]]:
    """A pod of two, as the CRI plugin annotates it."""
    sandbox = containers.new_id()
    shared = ["--null-io", "--annotation", f"{CRI_SANDBOX}={sandbox}", "--annotation"]
    with (
        containers.detached(
            "sleep", "1000", options=[*shared, f"{CRI_TYPE}=sandbox"], container_id=sandbox
        ),
        containers.detached("sleep", "2000", options=[*shared, f"{CRI_TYPE}=container"]) as other,
    ):
        yield sandbox, other


def _catches(status: str, *, signal: int) -> bool:
    line = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(line.split()[1], 16) & 1 << (signal - 1))


def _metrics(containers: Containers, name: str) -> dict[str, object]:
    """Return the metrics as ctr prints them in JSON: of cgroup v1 or v2, as the shim chose."""
    text = containers.containerd.ctr("t", "metrics", "--format", "json", name).text
    parsed = json.loads(text)
    assert isinstance(parsed, dict)
    return parsed


def _memory_limits(metrics: dict[str, object]) -> set[int]:
    return set(_numbers(metrics.get("memory"), {"usage_limit", "limit"}))


def _cpu_time(metrics: dict[str, object]) -> int:
    return max(_numbers(metrics.get("cpu"), {"usage_usec", "total"}))


def _numbers(value: object, keys: set[str]) -> Iterator[int]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in keys and isinstance(inner, int):
                yield inner
            yield from _numbers(inner, keys)
