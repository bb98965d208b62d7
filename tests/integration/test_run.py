"""``ctr run``: what goes in comes out, whole, with the right status."""

import functools
import hashlib
import os
import platform
import secrets
import subprocess
from pathlib import Path

import pytest

from harness.containers import Containers
from harness.events import EventWatcher
from harness.terminal import Terminal

_MIB = 1 << 20
# ctr 2.4 drops what it has not copied yet when it learns of the exit, with runc too (5 times in 165
# on a loaded machine): a process with much output gives it a moment.
_LINGER = "sleep 1"


def test_output_reaches_the_client(containers: Containers) -> None:
    assert containers.run("echo", "hello").stdout == b"hello\n"


@pytest.mark.parametrize("status", [0, 3, 255])
def test_exit_status_is_the_process_status(containers: Containers, status: int) -> None:
    assert containers.attempt("sh", "-c", f"exit {status}").status == status


@pytest.mark.parametrize(("signal", "status"), [("SIGKILL", 137), ("SIGTERM", 143)])
def test_exit_status_tells_the_signal(
    containers: Containers, events: EventWatcher, signal: str, status: int
) -> None:
    # A trap makes pid 1 take SIGTERM at all; the shell then ends itself as the signal would.
    script = "trap 'exit 143' TERM; echo ready; while :; do sleep 1 & wait $!; done"
    with containers.foreground("sh", "-c", script) as (name, process):
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        events.wait("/tasks/start", name)
        containers.containerd.ctr("t", "kill", "-s", signal, name)
        assert process.wait(30) == status
        assert events.wait("/tasks/exit", name).exit_status == status


def test_kernel_is_the_guests(vm_containers: Containers) -> None:
    assert vm_containers.run("uname", "-r").text not in ("", platform.release())


def test_streams_stay_separate(containers: Containers) -> None:
    output = containers.run("sh", "-c", "echo out; echo err >&2")
    assert (output.stdout, output.error) == (b"out\n", "err\n")


def test_stdin_is_piped_through(containers: Containers) -> None:
    data = secrets.token_bytes(3 * _MIB)
    output = containers.run("sh", "-c", f"cat; {_LINGER}", stdin=data).stdout
    assert len(output) == len(data)
    assert output == data


def test_closed_stdin_is_end_of_file(containers: Containers) -> None:
    # Closed only once the container runs: ctr itself forgets an end of file that comes earlier.
    with containers.foreground("sh", "-c", "echo ready; cat; echo end", stdin=subprocess.PIPE) as (
        _,
        process,
    ):
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdin.close()
        process.stdin = None
        assert process.stdout.read() == b"end\n"
        assert process.wait(30) == 0


@pytest.mark.parametrize("attempt", range(3))
def test_output_is_complete_when_init_exits_at_once(containers: Containers, attempt: int) -> None:
    del attempt
    expected = "".join(f"{number}\n" for number in range(1, 5001)).encode()
    assert containers.run("seq", "5000").stdout == expected


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_256_mib_of_output_arrive_unchanged(containers: Containers) -> None:
    # Known bytes, no two blocks alike: a counter in front of each.
    count, block = 32, 8 * _MIB
    script = (
        "for i in 1 2 3 4 5 6 7 8; do head -c 1048575 /bin/busybox; echo; done > /dev/shm/body; "
        f"i=0; while [ $i -lt {count} ]; do printf '%08d' $i; tail -c +9 /dev/shm/body; "
        f"i=$((i+1)); done; {_LINGER}"
    )
    body = ((Path("/bin/busybox").read_bytes()[: _MIB - 1] + b"\n") * 8)[8:]
    expected = hashlib.sha256()
    for number in range(count):
        expected.update(b"%08d" % number)
        expected.update(body)

    with containers.foreground("sh", "-c", script) as (_, process):
        assert process.stdout is not None
        received, size = hashlib.sha256(), 0
        for chunk in iter(functools.partial(process.stdout.read, _MIB), b""):
            received.update(chunk)
            size += len(chunk)
        assert process.wait(30) == 0
    assert size == count * block
    assert received.hexdigest() == expected.hexdigest()


def test_environment_and_directory_are_set(containers: Containers) -> None:
    options = ["--env", "COLOUR=grün", "--cwd", "/tmp"]
    output = containers.run("sh", "-c", "echo $COLOUR; pwd", options=options)
    assert output.text.splitlines() == ["grün", "/tmp"]


def test_bind_mount_is_shared_both_ways(containers: Containers, tmp_path: Path) -> None:
    (tmp_path / "from-host").write_text("host")
    mount = f"type=bind,src={tmp_path},dst=/mnt,options=rbind:rw"
    output = containers.run(
        "sh", "-c", "cat /mnt/from-host; echo guest > /mnt/from-guest", options=["--mount", mount]
    )
    assert output.text == "host"
    assert (tmp_path / "from-guest").read_text() == "guest\n"


def test_read_only_bind_mount_refuses_writes(containers: Containers, tmp_path: Path) -> None:
    mount = f"type=bind,src={tmp_path},dst=/mnt,options=rbind:ro"
    output = containers.attempt("touch", "/mnt/new", options=["--mount", mount])
    assert output.status == 1
    assert "Read-only file system" in output.error
    assert not (tmp_path / "new").exists()


def test_read_only_rootfs_refuses_writes(containers: Containers) -> None:
    output = containers.attempt("touch", "/new", options=["--read-only"])
    assert output.status == 1
    assert "Read-only file system" in output.error


def test_terminal_has_the_clients_size_and_follows_it(containers: Containers) -> None:
    # Waiting in `wait`, a shell takes a signal at once. The first size may come as a signal too.
    script = (
        "trap 'stty size' WINCH; trap 'exit 5' INT; while :; do stty size; sleep 1 & wait; done"
    )
    with open_terminal(containers, "sh", "-c", script) as terminal:
        terminal.expect("33 91")
        terminal.resize(columns=120, rows=40)
        terminal.expect("40 120")
        terminal.send("\x03")
        status, _ = terminal.finish()
    assert status == 5


def test_terminal_talks_to_a_shell(containers: Containers) -> None:
    with open_terminal(containers, "sh") as terminal:
        terminal.send("echo $((6*7))\n")
        terminal.expect("42")
        terminal.send("exit 4\n")
        status, _ = terminal.finish()
    assert status == 4


def test_terminal_turns_control_c_into_sigint(containers: Containers) -> None:
    script = "trap 'exit 9' INT; echo ready; while :; do sleep 1 & wait; done"
    with open_terminal(containers, "sh", "-c", script) as terminal:
        terminal.expect("ready")
        terminal.send("\x03")
        status, _ = terminal.finish()
    assert status == 9


def open_terminal(containers: Containers, *command: str) -> Terminal:
    """A terminal of 91 columns and 33 rows with ``ctr run --rm -t`` in it."""
    arguments = containers.run_arguments(containers.new_id(), command, ["--rm", "-t"])
    return Terminal(
        containers.containerd.ctr_argv(*arguments),
        environment=containers.containerd.environment,
        columns=91,
        rows=33,
    )


def test_output_before_input_is_not_held_back(containers: Containers) -> None:
    with containers.foreground(
        "sh", "-c", "echo question; read answer; echo got $answer", stdin=subprocess.PIPE
    ) as (_, process):
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"question\n"
        process.stdin.write(b"yes\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"got yes\n"
        process.stdin.close()
        process.stdin = None
        assert process.wait(30) == 0


def test_absent_configuration_is_named_in_the_error(
    vm_containers: Containers, tmp_path: Path
) -> None:
    absent = tmp_path / "absent.toml"
    output = vm_containers.attempt("true", options=["--runtime-config-path", os.fspath(absent)])
    assert output.status != 0
    assert "absent.toml" in output.error


def test_two_containers_run_side_by_side(containers: Containers) -> None:
    with containers.detached("sleep", "1000") as first, containers.detached("sleep", "1000") as two:
        hosts = [containers.exec(name, "cat", "/proc/uptime").status for name in (first, two)]
        running = {task.container_id for task in containers.tasks() if task.status == "RUNNING"}
    assert hosts == [0, 0]
    assert {first, two} <= running


def test_ids_are_not_reused_while_in_use(containers: Containers, running: str) -> None:
    output = containers.containerd.attempt(*containers.run_arguments(running, ["true"], ["--rm"]))
    assert output.status != 0
    assert "already exists" in output.error
    assert containers.exec(running, "true").status == 0
