"""The shim's actions, run as containerd runs them, in a run directory of the test's own."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import kata_hybrid.shim

MAIN = Path(kata_hybrid.shim.__file__).with_name("__main__.py")
CONTAINERD = "/run/containerd/containerd.sock"
TIMEOUT_S = 20.0


class Shim:
    """Runs the shim's actions as containerd does, in a run directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"

    def bundle(self, name: str, *, config: str | None = "{}") -> Path:
        bundle = self.folder / name
        bundle.mkdir()
        (bundle / "rootfs").mkdir()
        if config is not None:
            (bundle / "config.json").write_text(config)
        os.mkfifo(bundle / "log")
        return bundle

    def run(
        self,
        *words: str,
        bundle: Path,
        container_id: str,
        stdin: bytes = b"",
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        identity = ["-namespace", "default", "-address", CONTAINERD, "-id", container_id]
        return subprocess.run(
            [sys.executable, "-I", "-S", os.fspath(MAIN), *identity, *words],
            cwd=bundle,
            input=stdin,
            env={"PATH": os.environ["PATH"], "KATA_HYBRID_RUN_DIR": str(self.run_dir)}
            | (env or {}),
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def start(
        self,
        bundle: Path,
        *,
        container_id: str,
        stdin: bytes = b"",
        env: dict[str, str] | None = None,
    ) -> bytes:
        done = self.run("start", bundle=bundle, container_id=container_id, stdin=stdin, env=env)
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout

    def sandboxes(self) -> list[Path]:
        return sorted((self.run_dir / "sb").glob("*"))

    def pid(self) -> int:
        (sandbox,) = self.sandboxes()
        return int((sandbox / "shim.pid").read_text().split()[0])

    def kill(self) -> None:
        """Kill the only server and wait until it is gone."""
        pid = self.pid()
        fd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            assert select.select([fd], [], [], TIMEOUT_S)[0]
        finally:
            os.close(fd)

    def close(self) -> None:
        for pid_file in self.run_dir.glob("sb/*/shim.pid"):
            pid, ticks = pid_file.read_text().split()
            try:
                stat = Path(f"/proc/{pid}/stat").read_text()
                if stat.rpartition(")")[2].split()[19] == ticks:
                    os.kill(int(pid), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                pass
