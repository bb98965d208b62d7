"""``scripts/lab.py`` watches what it runs: a lab that died is told from one that is slow."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from module_file import loaded_module

_PATH = Path(__file__).resolve().parents[3] / "scripts" / "lab.py"
_BEATING = """
import sys, time
with open(sys.argv[1], "a", buffering=1) as pulse:
    for _ in range(int(sys.argv[2])):
        print(file=pulse)
        time.sleep(0.05)
sys.exit(7)
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[ModuleType]:
    with loaded_module("lab", _PATH) as module:
        yield module


@pytest.fixture
def pulse(tmp_path: Path) -> Path:
    path = tmp_path / "pulse"
    path.touch()
    return path


@contextlib.contextmanager
def _monitor(path: Path) -> Iterator[Path]:
    """Speak the emulator's part of QMP once."""

    def answer() -> None:
        client, _ = server.accept()
        with client, client.makefile("rwb", buffering=0) as stream:
            stream.write(b'{"QMP": {}}\n')
            asked = stream.readline()
            assert b"info registers" in asked
            stream.write(b'{"return": {}}\n')
            stream.write(json.dumps({"return": "RIP=ffffffff81000000"}).encode() + b"\n")

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(path))
        server.listen()
        server.settimeout(10)
        thread = threading.Thread(target=answer)
        thread.start()
        yield path
        thread.join()


def test_a_lab_with_a_pulse_runs_to_its_end(lab: ModuleType, pulse: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", _BEATING, os.fspath(pulse), "60"]
    status = lab.run_watched(
        argv, deadline=None, pulse=pulse, monitor=tmp_path / "none", pulse_lost_s=1.5
    )
    assert status == 7


def test_a_lab_without_one_is_dead_and_ended(
    lab: ModuleType, pulse: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with _monitor(tmp_path / "monitor") as path:
        status = lab.run_watched(
            ["sleep", "60"], deadline=None, pulse=pulse, monitor=path, pulse_lost_s=0.2
        )
    assert status is None
    said = capfd.readouterr().err
    assert "RIP=ffffffff81000000" in said
    assert "no pulse" in said


def test_a_lab_has_a_limit(
    lab: ModuleType, pulse: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status = lab.run_watched(
        ["sleep", "60"], deadline=time.monotonic() + 0.1, pulse=pulse, monitor=tmp_path / "none"
    )
    assert status is None
    assert "not done in time" in capfd.readouterr().err


@pytest.mark.parametrize("end", ["kill -SEGV $$", "exit 255"])
def test_an_emulator_that_ends_by_itself_is_not_the_commands_end(
    lab: ModuleType, pulse: Path, tmp_path: Path, end: str
) -> None:
    argv = ["sh", "-c", end]
    assert lab.run_watched(argv, deadline=None, pulse=pulse, monitor=tmp_path / "none") is None


@pytest.mark.parametrize(
    ("ends", "status", "count"), [([3], 3, 1), ([None, 0], 0, 2), ([None, None], 124, 2)]
)
def test_what_was_lost_is_done_again(
    lab: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    ends: list[int | None],
    status: int,
    count: int,
) -> None:
    tried: list[int | None] = []

    def attempt(*_: object) -> int | None:
        tried.append(ends[len(tried)])
        return tried[-1]

    monkeypatch.setattr(lab.Lab, "_try", attempt)
    monkeypatch.setattr(lab, "find_kernel", lambda: Path("/kernel"))
    monkeypatch.setattr(lab, "_PROGRAMS", ())
    monkeypatch.setattr(lab.signal, "signal", lambda *_: None)
    machine = lab.Lab(cpus=1, memory_mib=1)
    assert machine.run(["true"], timeout_s=None, tries=2) == status
    assert len(tried) == count
