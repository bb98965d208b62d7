"""Runs containers of one image with one runtime on one daemon, as a person with ``ctr`` would.

The tests talk to this; what differs between runtimes (a virtual machine or not) is asked of it.
Called from the test thread.
"""

import contextlib
import itertools
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.daemon import Containerd, DaemonError, Output
from harness.deadline import wait_gone
from harness.leaks import find_processes

_NUMBERS = itertools.count(1)

KATA_RUNTIME = "io.containerd.kata-hybrid.v2"
CRI_TYPE = "io.kubernetes.cri.container-type"
CRI_SANDBOX = "io.kubernetes.cri.sandbox-id"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLine:
    """One line of ``ctr tasks ls``."""

    container_id: str
    pid: int
    status: str


class Containers:
    """One runtime on one daemon."""

    def __init__(
        self,
        containerd: Containerd,
        *,
        runtime: str,
        image: str,
        boot_timeout_s: float,
        configuration: Path | None = None,
    ) -> None:
        self.containerd = containerd
        self.runtime = runtime
        self.image = image
        self.boot_timeout_s = boot_timeout_s
        # As the option ConfigPath, which is how containerd's own configuration names it.
        self._options = (
            ["--runtime-config-path", str(configuration)]
            if configuration is not None and self.is_virtual
            else []
        )

    @property
    def is_virtual(self) -> bool:
        """Whether each sandbox is a virtual machine."""
        return "kata" in self.runtime

    def new_id(self) -> str:
        """Return a container id that was not used before."""
        return f"c{next(_NUMBERS)}"

    def run_arguments(
        self, container_id: str, command: Sequence[str], options: Sequence[str]
    ) -> list[str]:
        """Return the arguments of ``ctr`` that run a command."""
        target = [] if "--rootfs" in options else [self.image]
        fifos = ["--fifo-dir", str(self.containerd.fifo_dir)]
        return [
            *("run", "--runtime", self.runtime, *self._options, *fifos, *options),
            *(*target, container_id, *command),
        ]

    def attempt(
        self,
        *command: str,
        options: Sequence[str] = (),
        stdin: bytes | None = None,
        container_id: str | None = None,
        timeout_s: float = 120.0,
    ) -> Output:
        """Run a command in a new container in the foreground, remove it, return what it left."""
        name = container_id or self.new_id()
        arguments = self.run_arguments(name, command, ["--rm", *options])
        output = self.containerd.attempt(*arguments, stdin=stdin, timeout_s=timeout_s)
        # --rm removes the container only when its task was made.
        self.containerd.attempt("c", "rm", name)
        return output

    def run(self, *command: str, options: Sequence[str] = (), stdin: bytes | None = None) -> Output:
        """Run a command, which has to end with status 0.

        Raises:
            DaemonError: it did not.
        """
        output = self.attempt(*command, options=options, stdin=stdin)
        if output.status != 0:
            raise DaemonError(f"{command}: {output}\n{self.containerd.log_tail()}")
        return output

    @contextlib.contextmanager
    def detached(
        self,
        *command: str,
        options: Sequence[str] = ("--null-io",),
        container_id: str | None = None,
    ) -> Iterator[str]:
        """Run a command in the background; kill and remove the container at the end."""
        name = container_id or self.new_id()
        try:
            arguments = self.run_arguments(name, command, ["-d", *options])
            self.containerd.ctr(*arguments, timeout_s=self.boot_timeout_s)
            yield name
        finally:
            self.remove(name)

    @contextlib.contextmanager
    def foreground(
        self, *command: str, options: Sequence[str] = (), stdin: int = subprocess.DEVNULL
    ) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
        """Run ``ctr run --rm`` beside the test; kill the container at the end if it still runs."""
        name = self.new_id()
        arguments = self.run_arguments(name, command, ["--rm", *options])
        process = self.containerd.popen(*arguments, stdin=stdin)
        try:
            yield name, process
        finally:
            if process.poll() is None:
                self.containerd.attempt("t", "kill", "-s", "SIGKILL", name)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                process.kill()
            process.communicate()
            self.remove(name)

    def remove(self, name: str) -> None:
        """Kill and remove a container, whatever state it is in."""
        if any(task.container_id == name for task in self.tasks()):
            self.containerd.attempt("t", "kill", "-s", "SIGKILL", "--all", name)
            self.containerd.attempt("t", "rm", "-f", name)
        self.containerd.attempt("c", "rm", name)

    def exec(
        self,
        container_id: str,
        *command: str,
        options: Sequence[str] = (),
        stdin: bytes | None = None,
        exec_id: str | None = None,
    ) -> Output:
        """Run one more process in a container and return what it left."""
        arguments = self.exec_arguments(container_id, command, options, exec_id=exec_id)
        return self.containerd.attempt(*arguments, stdin=stdin)

    def exec_arguments(
        self,
        container_id: str,
        command: Sequence[str],
        options: Sequence[str] = (),
        *,
        exec_id: str | None = None,
    ) -> list[str]:
        """Return the arguments of ``ctr`` that run one more process."""
        name = exec_id or f"e{next(_NUMBERS)}"
        fifos = ["--fifo-dir", str(self.containerd.fifo_dir)]
        return ["t", "exec", *fifos, "--exec-id", name, *options, container_id, *command]

    def tasks(self) -> list[TaskLine]:
        """Return what ``ctr tasks ls`` lists."""
        lines = self.containerd.ctr("t", "ls").text.splitlines()[1:]
        rows = [line.split() for line in lines]
        return [TaskLine(container_id=row[0], pid=int(row[1]), status=row[2]) for row in rows]

    def task(self, container_id: str) -> TaskLine:
        """Return the line of one task.

        Raises:
            LookupError: there is none.
        """
        for task in self.tasks():
            if task.container_id == container_id:
                return task
        msg = f"no task {container_id} in {self.tasks()}"
        raise LookupError(msg)

    def shim_pid(self, container_id: str) -> int:
        """Return the process id of the shim that serves a running container.

        Where the machine is built in, the task's process is the shim itself; else it is its child.
        """
        pid = self.task(container_id).pid
        if b"shim" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("PPid:"))

    def wait_for_shims(self, *, timeout_s: float = 10.0) -> None:
        """Wait for every process of every container to be gone.

        Raises:
            DeadlineError: one stayed.
        """
        for process in find_processes(self.containerd):
            wait_gone(process.pid, timeout_s=timeout_s)
