"""``ctr tasks exec``: more processes in a running container, each with its own end."""

import concurrent.futures
import hashlib
import secrets
import subprocess

import pytest

from harness.containers import Containers
from harness.deadline import wait_until
from harness.events import EventWatcher
from harness.leaks import count_descriptors
from harness.terminal import Terminal


def test_streams_and_status_are_the_execs_own(containers: Containers, running: str) -> None:
    output = containers.exec(running, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (output.status, output.stdout, output.error) == (3, b"out\n", "err\n")


def test_exec_shares_the_containers_processes(containers: Containers, running: str) -> None:
    assert "sleep" in containers.exec(running, "cat", "/proc/1/cmdline").text


def test_stdin_is_piped_through(containers: Containers, running: str) -> None:
    data = secrets.token_bytes(1 << 20)
    output = containers.exec(running, "cat", stdin=data).stdout
    assert len(output) == len(data)
    assert output == data


def test_user_and_directory_are_set(containers: Containers, running: str) -> None:
    output = containers.exec(
        running, "sh", "-c", "id -u; id -g; pwd", options=["--user", "1000:1000", "--cwd", "/tmp"]
    )
    assert output.text.split() == ["1000", "1000", "/tmp"]


@pytest.mark.timeout(240)
def test_output_is_complete_when_the_process_exits_at_once(
    containers: Containers, running: str
) -> None:
    expected = hashlib.sha256("".join(f"{n}\n" for n in range(1, 5001)).encode()).hexdigest()
    digests = {
        hashlib.sha256(containers.exec(running, "seq", "5000").stdout).hexdigest()
        for _ in range(20)
    }
    assert digests == {expected}


def test_twenty_at_once_don_t_mix(containers: Containers, running: str) -> None:
    # The barrier is in the container: nobody goes on before all twenty are there.
    script = (
        "mkdir -p /tmp/barrier; touch /tmp/barrier/$0; "
        "while [ $(ls /tmp/barrier | wc -l) -lt 20 ]; do usleep 20000; done; "
        "echo $0; exit $0"
    )

    def run(number: int) -> tuple[int, str]:
        output = containers.exec(running, "sh", "-c", script, str(number))
        return output.status, output.text

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        results = list(pool.map(run, range(100, 120)))
    containers.exec(running, "rm", "-r", "/tmp/barrier")
    assert results == [(number, str(number)) for number in range(100, 120)]


def test_terminal_has_the_clients_size(containers: Containers, running: str) -> None:
    script = "trap 'exit 6' INT; while :; do stty size; sleep 1 & wait; done"
    arguments = containers.exec_arguments(running, ["sh", "-c", script], ["-t"])
    with Terminal(
        containers.containerd.ctr_argv(*arguments),
        environment=containers.containerd.environment,
        columns=77,
        rows=22,
    ) as terminal:
        terminal.expect("22 77")
        terminal.resize(columns=99, rows=44)
        terminal.expect("44 99")
        terminal.send("\x03")
        status, _ = terminal.finish()
    assert status == 6


def test_killing_an_exec_leaves_the_container_alone(
    containers: Containers, running: str, events: EventWatcher
) -> None:
    name = "killed-exec"
    arguments = containers.exec_arguments(running, ["sleep", "1000"], exec_id=name)
    process = containers.containerd.popen(*arguments)
    try:
        events.wait("/tasks/exec-started", running, process_id=name)
        containers.containerd.ctr("t", "kill", "-s", "SIGKILL", "--exec-id", name, running)
        assert events.wait("/tasks/exit", running, process_id=name).exit_status == 137
        assert process.wait(20) == 137
    finally:
        process.kill()
        process.communicate()
    assert containers.task(running).status == "RUNNING"


def test_absent_binary_is_named(containers: Containers, running: str) -> None:
    output = containers.exec(running, "/bin/no-such-binary")
    assert output.status != 0
    assert "no such file or directory" in output.error
    assert "/bin/no-such-binary" in output.error


def test_binary_outside_the_path_is_named_as_runc_names_it(
    containers: Containers, running: str
) -> None:
    output = containers.exec(running, "no-such-binary")
    assert output.status != 0
    assert "executable file not found in $PATH" in output.error


def test_file_without_execute_permission_is_refused(containers: Containers, running: str) -> None:
    output = containers.exec(running, "/bin/not-executable")
    assert output.status != 0
    assert "permission denied" in output.error


def test_failed_exec_leaves_the_container_usable(containers: Containers, running: str) -> None:
    containers.exec(running, "/bin/no-such-binary", exec_id="again")
    assert containers.exec(running, "echo", "still here", exec_id="again").text == "still here"


def test_exec_id_in_use_is_refused(
    containers: Containers, running: str, events: EventWatcher
) -> None:
    arguments = containers.exec_arguments(running, ["cat"], exec_id="twice")
    process = containers.containerd.popen(*arguments, stdin=subprocess.PIPE)
    try:
        events.wait("/tasks/exec-started", running, process_id="twice")
        output = containers.exec(running, "true", exec_id="twice")
        assert output.status != 0
        assert "already exists" in output.error
    finally:
        process.communicate(timeout=20)
    assert process.returncode == 0


def test_exec_in_a_stopped_container_is_refused(
    containers: Containers, events: EventWatcher
) -> None:
    with containers.detached("true") as name:
        events.wait("/tasks/exit", name)
        output = containers.exec(name, "true")
    assert output.status != 0


def test_shim_holds_no_descriptor_of_a_finished_exec(containers: Containers, running: str) -> None:
    shim = containers.shim_pid(running)

    def run_ten() -> int:
        for _ in range(10):
            containers.exec(running, "echo", "hello", stdin=b"ignored")
        return count_descriptors(shim)

    # What is opened once, or closed a little later, is no leak; growth with every round is one.
    first = run_ten()
    wait_until(lambda: run_ten() <= first + 2, what=f"about {first} descriptors", timeout_s=10)
