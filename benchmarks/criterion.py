"""Runs the crates' criterion benchmarks and reads their samples.

The two sides of a ratio are functions of one benchmark program, run one after the other. A busy
moment would hit one side only, so the program is run in several short rounds: A B A B A B. What
else the machine does can only add time, so of each function the round with the lowest median
counts. Called by ``run.py``; standard library only.
"""

import json
import os
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 6
_WARM_UP_S = 0.3
_MEASURE_S = 1.0
_RESAMPLES = 1000
_BUILD_TIMEOUT_S = 900.0
_ROUND_TIMEOUT_S = 120.0


class CriterionError(Exception):
    """A benchmark program could not be built or run; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A built benchmark program."""

    name: str
    executable: Path
    directory: Path


def build(package: str, *, benches: tuple[str, ...], log: Path) -> dict[str, Program]:
    """Build the named benchmarks of a crate with cargo.

    Raises:
        CriterionError: they do not build.
    """
    command = ["cargo", "bench", "--locked", "--no-run", "--message-format=json", "-p", package]
    for name in benches:
        command += ["--bench", name]
    with log.open("ab") as errors:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            timeout=_BUILD_TIMEOUT_S,
            check=False,
        )
    if done.returncode != 0:
        raise CriterionError(f"cargo bench --no-run failed ({done.returncode}); all of it: {log}")
    programs = {}
    for line in done.stdout.splitlines():
        message = json.loads(line)
        target = message.get("target", {})
        if message.get("executable") and "bench" in target.get("kind", ()):
            programs[target["name"]] = Program(
                name=target["name"],
                executable=Path(message["executable"]),
                directory=Path(message["manifest_path"]).parent,
            )
    absent = set(benches) - set(programs)
    if absent:
        raise CriterionError(f"cargo built no benchmark named {', '.join(sorted(absent))}")
    return programs


def run(
    program: Program,
    *,
    functions: tuple[str, ...],
    samples: int,
    home: Path,
    log: Path,
    rounds: int = ROUNDS,
) -> dict[str, list[float]]:
    """Run functions (``group/function``) in rounds; return each one's best, in seconds a sample.

    A round takes ``samples`` of each function in about a second. The more there are, the shorter:
    one kept below a time slice is mostly undisturbed on a busy machine too.

    Raises:
        CriterionError: the program failed, or has no such function.
    """
    best: dict[str, list[float]] = {}
    command = [
        *(os.fspath(program.executable), "--bench", "--noplot"),
        *("--warm-up-time", str(_WARM_UP_S), "--measurement-time", str(_MEASURE_S)),
        *("--sample-size", str(samples), "--nresamples", str(_RESAMPLES)),
        f"^({'|'.join(functions)})$",
    ]
    environment = {**os.environ, "CRITERION_HOME": os.fspath(home)}
    for _ in range(rounds):
        with log.open("ab") as output:
            done = subprocess.run(
                command,
                cwd=program.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=_ROUND_TIMEOUT_S,
                check=False,
            )
        if done.returncode != 0:
            raise CriterionError(f"{program.name} failed ({done.returncode}); all of it: {log}")
        for name in functions:
            taken = _read_samples(home / name / "new" / "sample.json")
            if name not in best or statistics.median(taken) < statistics.median(best[name]):
                best[name] = taken
    return best


def _read_samples(path: Path) -> list[float]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        pairs = zip(content["times"], content["iters"], strict=True)
        read = [time / iterations / 1e9 for time, iterations in pairs]
    except (OSError, ValueError, KeyError) as exc:
        raise CriterionError(f"criterion left no samples in {path}: {exc}") from exc
    # The next round must not be taken for this one.
    path.unlink()
    return read
