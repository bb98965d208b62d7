"""One private containerd: its files, its process, and ``ctr`` pointed at it.

Owned by a test session or by the demo; called from one thread. Readiness is told by containerd
itself through ``NOTIFY_SOCKET``, as systemd would be told, so nothing is polled.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_CONFIG_V2 = """\
version = 2
root = "{home}/root"
state = "{home}/state"
temp = "{home}/tmp"
disabled_plugins = [{disabled}]
[debug]
  level = "warn"
[grpc]
  address = "{home}/c.sock"
[ttrpc]
  address = "{home}/c.sock.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "{home}/opt"
"""

_CONFIG_V4 = """\
version = 4
root = "{home}/root"
state = "{home}/state"
temp = "{home}/tmp"
imports = []
disabled_plugins = [{disabled}]
[debug]
  level = "warn"
[plugins."io.containerd.server.v1.grpc"]
  address = "{home}/c.sock"
[plugins."io.containerd.server.v1.ttrpc"]
  address = "{home}/c.sock.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "{home}/opt"
[plugins."io.containerd.shim.v1.manager"]
  socket_dir = "{home}/s"
[plugins."io.containerd.snapshotter.v1.blockfile"]
  root_path = "{home}/blockfile"
  scratch_file = "{home}/scratch.ext4"
  fs_type = "ext4"
  recreate_scratch = false
"""
# Pods: the handler that is tested is the default one. The images are in the store already.
_CRI_V2 = """\
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true  # Not every machine lets root lower it; runc insists.
  sandbox_image = "{pause_image}"
  stream_server_address = "127.0.0.1"
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "{handler}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{handler}]
    runtime_type = "{runtime}"
    privileged_without_host_devices = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{home}/cni"
"""
_CRI_V4 = """\
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{pause_image}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "{handler}"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{handler}]
    runtime_type = "{runtime}"
    sandboxer = "{sandboxer}"
    privileged_without_host_devices = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "{home}/cni"
[plugins."io.containerd.grpc.v1.cri"]
  stream_server_address = "127.0.0.1"
"""
# What each container's disk is a copy of: an empty file system, larger than the test image.
_SCRATCH_MIB = 32

# Not needed by a shim's tests, and each would reach outside the private directory.
_DISABLED = {
    1: ("io.containerd.internal.v1.restart",),
    2: ("io.containerd.monitor.container.v1.restart", "io.containerd.nri.v1.nri"),
}
_DISABLED_WITHOUT_CRI = {
    1: ("io.containerd.grpc.v1.cri",),
    2: (
        "io.containerd.cri.v1.images",
        "io.containerd.cri.v1.runtime",
        "io.containerd.grpc.v1.cri",
    ),
}
_SNAPSHOTTERS = ("aufs", "btrfs", "devmapper", "erofs", "zfs")
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class DaemonError(RuntimeError):
    """containerd did not start or a ``ctr`` command failed; the text holds what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerdInstall:
    """Where one version of containerd, ``ctr`` and its runc shim are, and runc, which all share."""

    major: int
    bin_dir: Path
    runc: Path

    @property
    def label(self) -> str:
        """What the version is called in test ids."""
        return f"containerd{self.major}"

    def missing(self) -> str:
        """Say what is not there, or return an empty string."""
        programs = [
            self.bin_dir / name for name in ("containerd", "ctr", "containerd-shim-runc-v2")
        ]
        absent = [path for path in (*programs, self.runc) if not os.access(path, os.X_OK)]
        return ", ".join(map(os.fspath, absent))


def containerd_installs(build: Path) -> dict[str, ContainerdInstall]:
    """Say where ``make setup`` puts each version, by its number."""
    old = build / "containerd-1" / "usr"
    runc = old / "sbin" / "runc"
    return {
        "1": ContainerdInstall(major=1, bin_dir=old / "bin", runc=runc),
        "2": ContainerdInstall(major=2, bin_dir=build / "containerd-2" / "bin", runc=runc),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a finished command left."""

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output as text, without the last newline."""
        return self.stdout.decode(errors="replace").rstrip("\n")

    @property
    def error(self) -> str:
        """Standard error as text, without what ctr says of its own about the host."""
        lines = self.stderr.decode(errors="replace").splitlines(keepends=True)
        return "".join(line for line in lines if "DEPRECATION" not in line)


@dataclass(frozen=True, slots=True, kw_only=True)
class CriSettings:
    """What containerd's Kubernetes part needs."""

    runtime: str
    pause_image: str
    network: Path
    """The network namespace that stands for the node's: bridges are made in it."""
    handler: str = "tested"
    """The runtime's name, which is also the default."""
    configuration: Path | None = None
    """The runtime's option ``ConfigPath``."""
    sandboxer: str = "podsandbox"
    """Who makes sandboxes (containerd 2): ``podsandbox`` by a pause container, or ``shim``."""


class Containerd:
    """A containerd of our own, started, restarted and stopped at will."""

    def __init__(
        self,
        install: ContainerdInstall,
        *,
        home: Path,
        namespace: str,
        shim_dir: Path | None = None,
        environment: dict[str, str] | None = None,
        cri: CriSettings | None = None,
    ) -> None:
        self.install = install
        self._cri = cri
        self.home = home
        self.namespace = namespace
        self.shim_dir = shim_dir
        self.address = home / "c.sock"
        self.run_dir = home / "run"
        self.fifo_dir = home / "fifo"
        self.log = home / "containerd.log"
        path = [os.fspath(shim_dir)] if shim_dir is not None else []
        self.environment = {
            "PATH": ":".join(
                [*path, *map(os.fspath, (install.bin_dir, install.runc.parent)), _SYSTEM_PATH]
            ),
            "HOME": os.fspath(home),
            "KATA_HYBRID_RUN_DIR": os.fspath(self.run_dir),
            **(environment or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the daemon.

        Raises:
            DaemonError: it does not run.
        """
        if self._process is None:
            msg = "containerd is not running"
            raise DaemonError(msg)
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the daemon was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def has_cri(self) -> bool:
        """Whether it runs pods."""
        return self._cri is not None

    @property
    def has_block_snapshots(self) -> bool:
        """Whether the snapshotter ``blockfile``, whose root file systems are disk images, is there.

        containerd has it from 1.7 on.
        """
        return self.install.major > 1

    @property
    def bundles(self) -> Path:
        """Where the bundles of our namespace are."""
        return self.home / "state" / "io.containerd.runtime.v2.task" / self.namespace

    def bundle(self, container_id: str) -> Path:
        """Return the bundle directory of one container."""
        return self.bundles / container_id

    def start(self, *, timeout_s: float = 30.0) -> None:
        """Start the daemon and return when it serves.

        Raises:
            DaemonError: it ended, or did not say it was ready in time.
        """
        for name in ("", "root", "state", "tmp", "opt", "s", "run", "fifo"):
            (self.home / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        config = self.home / "config.toml"
        config.write_text(self._config())
        if self.has_block_snapshots:
            _make_scratch(self.home / "scratch.ext4")
        with contextlib.ExitStack() as stack:
            ready = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            notify = self.home / "notify"
            notify.unlink(missing_ok=True)
            ready.bind(os.fspath(notify))
            stack.callback(notify.unlink, missing_ok=True)
            ready.settimeout(timeout_s)
            log = stack.enter_context(self.log.open("ab"))
            self._process = subprocess.Popen(
                [
                    *self.on_node(os.fspath(self.install.bin_dir / "containerd")),
                    *("--config", os.fspath(config)),
                ],
                env={**self.environment, "NOTIFY_SOCKET": os.fspath(notify)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
            try:
                while b"READY=1" not in ready.recv(4096):
                    pass
            except TimeoutError as exc:
                state = self._process.poll()
                self.kill()
                msg = f"containerd (exit status {state}) was not ready in {timeout_s:g} s:\n"
                raise DaemonError(msg + self.log_tail()) from exc

    def on_node(self, *command: str) -> list[str]:
        """Return a command that runs in the network namespace of the daemon."""
        if self._cri is None:
            return [*command]
        return ["nsenter", f"--net={self._cri.network}", "--", *command]

    def stop(self, *, timeout_s: float = 15.0) -> None:
        """End the daemon in order; running containers and their shims stay."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout_s)
        self._process = None

    def kill(self) -> None:
        """End the daemon as a crash would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(15)
            self._process = None

    def restart(self) -> None:
        """Stop and start again, over the same state."""
        self.stop()
        self.start()

    def destroy(self) -> None:
        """Stop everything and remove the private directory."""
        if self.is_running:
            with contextlib.suppress(DaemonError, subprocess.TimeoutExpired):
                self.remove_all()
        self.stop()
        self._unmount_below_home()
        shutil.rmtree(self.home, ignore_errors=True)

    def remove_all(self) -> None:
        """Kill and remove every task and container of our namespace."""
        for task in self.ctr("t", "ls", "-q").text.split():
            self.attempt("t", "kill", "-s", "SIGKILL", task)
            self.attempt("t", "rm", "-f", task)
        for container in self.ctr("c", "ls", "-q").text.split():
            self.attempt("c", "rm", container)

    def log_tail(self, *, lines: int = 40) -> str:
        """Return the end of containerd's log, which holds the shims' logs too."""
        if not self.log.exists():
            return "(no log)"
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def ctr_argv(self, *arguments: str) -> list[str]:
        """Return the whole command line of a ``ctr`` command."""
        return [
            os.fspath(self.install.bin_dir / "ctr"),
            "--address",
            os.fspath(self.address),
            "--namespace",
            self.namespace,
            *arguments,
        ]

    def attempt(
        self, *arguments: str, stdin: bytes | None = None, timeout_s: float = 60.0
    ) -> Output:
        """Run ``ctr`` and return what came of it, whatever its exit status.

        Raises:
            subprocess.TimeoutExpired: it did not end in time.
        """
        done = subprocess.run(
            self.ctr_argv(*arguments),
            env=self.environment,
            input=stdin if stdin is not None else b"",
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
        return Output(status=done.returncode, stdout=done.stdout, stderr=done.stderr)

    def ctr(self, *arguments: str, stdin: bytes | None = None, timeout_s: float = 60.0) -> Output:
        """Run ``ctr``, which has to succeed.

        Raises:
            DaemonError: it ended with another status than 0.
            subprocess.TimeoutExpired: it did not end in time.
        """
        output = self.attempt(*arguments, stdin=stdin, timeout_s=timeout_s)
        if output.status != 0:
            command = " ".join(arguments)
            msg = f"ctr {command}: exit status {output.status}: {output.error}{output.text}"
            raise DaemonError(msg)
        return output

    def popen(
        self, *arguments: str, stdin: int = subprocess.DEVNULL, stderr: int = subprocess.PIPE
    ) -> subprocess.Popen[bytes]:
        """Start a ``ctr`` command in the background; the caller ends it."""
        return subprocess.Popen(
            self.ctr_argv(*arguments),
            env=self.environment,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )

    def _config(self) -> str:
        disabled = [
            *_DISABLED[self.install.major],
            *(_DISABLED_WITHOUT_CRI[self.install.major] if self._cri is None else ()),
            *(f"io.containerd.snapshotter.v1.{name}" for name in _SNAPSHOTTERS),
        ]
        is_old = self.install.major == 1
        text = (_CONFIG_V2 if is_old else _CONFIG_V4).format(
            home=self.home, disabled=", ".join(f'"{plugin}"' for plugin in disabled)
        )
        if self._cri is not None:
            text += (_CRI_V2 if is_old else _CRI_V4).format(
                home=self.home,
                runtime=self._cri.runtime,
                pause_image=self._cri.pause_image,
                handler=self._cri.handler,
                sandboxer=self._cri.sandboxer,
            )
            if self._cri.configuration is not None:
                plugin = "io.containerd.grpc.v1.cri" if is_old else "io.containerd.cri.v1.runtime"
                table = f'plugins."{plugin}".containerd.runtimes.{self._cri.handler}.options'
                text += f'[{table}]\n  ConfigPath = "{self._cri.configuration}"\n'
        return text

    def _unmount_below_home(self) -> None:
        points = [
            line.split()[4].encode().decode("unicode_escape")
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
        ]
        for point in reversed(points):
            if Path(point).is_relative_to(self.home):
                subprocess.run(["umount", "--lazy", point], check=False, capture_output=True)


@contextlib.contextmanager
def private_containerd(
    install: ContainerdInstall,
    *,
    namespace: str,
    shim_dir: Path | None,
    archive: Path,
    environment: dict[str, str] | None = None,
    cri: CriSettings | None = None,
    prepare: Callable[[Path], None] | None = None,
) -> Iterator[Containerd]:
    """Run a daemon with an archive's images in its store, in a folder that goes with it.

    ``prepare`` is called with the folder before the daemon starts.
    """
    # Short: a unix socket's path may have 107 bytes, and the shim adds its own part.
    home = Path(tempfile.mkdtemp(prefix="kh", dir="/tmp"))
    daemon = Containerd(
        install,
        home=home,
        namespace=namespace,
        shim_dir=shim_dir,
        environment=environment,
        cri=cri,
    )
    try:
        if prepare is not None:
            prepare(home)
        daemon.start()
        daemon.ctr("image", "import", os.fspath(archive))
        yield daemon
    finally:
        daemon.destroy()


def _make_scratch(image: Path) -> None:
    if image.exists():
        return
    with image.open("wb") as file:
        file.truncate(_SCRATCH_MIB << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", os.fspath(image)], check=True, timeout=30)
