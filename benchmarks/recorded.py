"""Runs a program that measures and appends its records to a file, keeping each as it comes.

pytest with the ``bench_*.py`` files is one, the lab with ``lab/measure.py`` another; both write
with ``recording.py``. What they print goes to the log. Called by ``run.py``; standard library only.
"""

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
RECORDS = BUILD / "bench-records.jsonl"
LOG = BUILD / "logs" / "bench.log"
_END_TIMEOUT_S = 20.0
_TICK_S = 0.2
_REASON_CHARACTERS = 160

Record = dict[str, Any]
"""What a part measured of one figure: see ``figures.evaluate``."""
Keep = Callable[[Record], None]


class PartError(Exception):
    """A part could not be measured, or not all of it; the text says why."""


def run_recorded(command: list[str], keep: Keep, *, timeout_s: float) -> None:
    """Run a program that appends to :data:`RECORDS`.

    Raises:
        PartError: a measurement failed.
    """
    RECORDS.write_text("")
    deadline = time.monotonic() + timeout_s
    failures: list[str] = []
    with LOG.open("ab") as log, RECORDS.open() as records:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            while True:
                is_over = _is_over(process)
                for line in records:
                    record = json.loads(line)
                    if "failed" in record:
                        failures.append(f"{record['failed']}: {record['reason']}")
                    else:
                        keep(record)
                if is_over:
                    break
                if time.monotonic() > deadline:
                    raise PartError(f"not done in {timeout_s:g} s")
        finally:
            _end(process)
    if process.returncode != 0:
        name = Path(command[0]).name
        failed = f"{name} ended with {process.returncode}"
        raise PartError(" | ".join(_shorten(text) for text in failures) or failed)


def _is_over(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_TICK_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process that still runs, so that its fixtures clean up; then insist."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_TIMEOUT_S)


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _REASON_CHARACTERS else line[:_REASON_CHARACTERS] + " …"
