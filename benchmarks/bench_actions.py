"""The ``start`` and ``delete`` actions, whole, against starting the interpreter and doing nothing.

containerd executes the shim binary again for each of them, once and once more per container, and
waits. Ours goes through an interpreter; that is bearable only if the action adds little to what
the interpreter itself takes. Each round runs the reference and then ours, so both see the same
machine; both are processes started the same way, and timed to their end.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from recording import Recorder

_SHIM = "containerd-shim-kata-hybrid-v2"
_ROUNDS = 40
_WARM_UP_ROUNDS = 3
_TIMEOUT_S = 20.0


class Action:
    """One bundle, one run directory, and the shim binary to act on them."""

    def __init__(self, bin_dir: Path, *, home: Path) -> None:
        self._python = os.fspath(bin_dir / "python3")
        self._shim = os.fspath(bin_dir / _SHIM)
        self._sandboxes = home / "run" / "sb"
        self._bundle = home / "bundle"
        self._bundle.mkdir()
        spec = {"ociVersion": "1.0.2", "process": {"args": ["true"], "cwd": "/"}, "root": {}}
        (self._bundle / "config.json").write_text(json.dumps(spec))
        self._flags = ["-namespace", "bench", "-id", "bench", "-address", f"{home}/c.sock"]
        self._environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "KATA_HYBRID_RUN_DIR": os.fspath(home / "run"),
            "TTRPC_ADDRESS": f"{home}/c.sock.ttrpc",
        }

    def bare(self) -> float:
        """Start the interpreter for nothing; return the seconds it took."""
        began = time.perf_counter()
        self._run([self._python, "-c", "pass"])
        return time.perf_counter() - began

    def start(self) -> None:
        """Run the ``start`` action."""
        self._run([self._shim, *self._flags, "start"])

    def delete(self) -> None:
        """Run the ``delete`` action."""
        self._run([self._shim, *self._flags, "delete"])

    def end_server(self, *, is_orderly: bool) -> None:
        """Kill the server that ``start`` left; after an orderly exit its folder is gone too."""
        for folder in list(self._sandboxes.iterdir()) if self._sandboxes.exists() else []:
            _kill(int((folder / "shim.pid").read_text().split()[0]))
            if is_orderly:
                shutil.rmtree(folder)

    def check_running(self) -> None:
        """Make sure that ``start`` did what it is for: a server, and its address in the bundle."""
        address = (self._bundle / "address").read_text().removeprefix("unix://")
        (folder,) = self._sandboxes.iterdir()
        assert address == os.fspath(folder / "shim.sock")
        os.kill(int((folder / "shim.pid").read_text().split()[0]), 0)

    def _run(self, argv: list[str]) -> None:
        subprocess.run(
            argv,
            cwd=self._bundle,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_TIMEOUT_S,
            check=True,
        )


@pytest.fixture
def action(bin_dir: Path) -> Iterator[Action]:
    # Short: a unix socket's path may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="kb", dir="/tmp") as home:
        made = Action(bin_dir, home=Path(home))
        try:
            yield made
        finally:
            made.end_server(is_orderly=True)


def test_start_action(action: Action, benchmark: BenchmarkFixture, recorder: Recorder) -> None:
    bare: list[float] = []

    def prepare() -> None:
        action.end_server(is_orderly=True)
        bare.append(action.bare())

    ours = _measure(benchmark, action.start, prepare)
    action.check_running()
    recorder.keep(
        "start_action", ours=_milliseconds(ours), reference=_milliseconds(bare[-_ROUNDS:])
    )


@pytest.mark.parametrize(
    "name",
    ["delete_action", "delete_action_after_crash"],
)
def test_delete_action(
    action: Action, benchmark: BenchmarkFixture, recorder: Recorder, name: str
) -> None:
    bare: list[float] = []

    def prepare() -> None:
        action.start()
        action.end_server(is_orderly=name == "delete_action")
        bare.append(action.bare())

    ours = _measure(benchmark, action.delete, prepare)
    recorder.keep(name, ours=_milliseconds(ours), reference=_milliseconds(bare[-_ROUNDS:]))


def _measure(
    benchmark: BenchmarkFixture, act: Callable[[], None], prepare: Callable[[], None]
) -> list[float]:
    """Run both in turn; return the seconds that ``act`` took."""
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        act, setup=prepare, rounds=_ROUNDS, warmup_rounds=_WARM_UP_ROUNDS, iterations=1
    )
    assert benchmark.stats is not None, "run with --benchmark-enable"
    return list(benchmark.stats.stats.data)


def _milliseconds(seconds: list[float]) -> list[float]:
    return [sample * 1e3 for sample in seconds]


def _kill(pid: int) -> None:
    """SIGKILL a process that is not our child, and wait for its end."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            ready, _, _ = select.select([descriptor], [], [], _TIMEOUT_S)
            assert ready, f"process {pid} survives SIGKILL"
        finally:
            os.close(descriptor)
