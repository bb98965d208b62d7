"""What a set-up step is: a name, what it depends on, and the work; run only when inputs changed.

A step's stamp (``build/stamps/NAME``) holds a digest of its inputs. With the stamp current and the
outputs there, the step is skipped, so a second ``make setup`` takes a moment. Standard library
only: this runs before anything is installed.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
STAMPS = BUILD / "stamps"
LOGS = BUILD / "logs"

_SKIPPED_DIRECTORIES = {"__pycache__", "target", "fuzz", "_native.egg-info"}
_SKIPPED_SUFFIXES = {".pyc", ".so"}


class SetupError(Exception):
    """A step failed; the text says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of the set-up."""

    name: str
    title: str
    run: Callable[[], None]
    inputs: tuple[Path, ...] = ()
    salt: str = ""
    """Inputs that are not files, such as versions."""
    outputs: tuple[Path, ...] = ()
    always: bool = False
    """The step decides itself, quickly, whether there is anything to do."""

    def digest(self) -> str:
        """Return the digest of everything the outputs follow from."""
        state = hashlib.sha256(f"{self.name}\0{self.salt}".encode())
        for path in sorted(_files(self.inputs)):
            state.update(f"\0{path.relative_to(ROOT)}\0".encode())
            state.update(hashlib.sha256(path.read_bytes()).digest())
        return state.hexdigest()

    def is_done(self) -> bool:
        """Whether the last run's outputs are there and were made from the present inputs."""
        stamp = STAMPS / self.name
        return (
            not self.always
            and stamp.exists()
            and all(path.exists() for path in self.outputs)
            and stamp.read_text() == self.digest()
        )


def run_steps(steps: Iterable[Step]) -> None:
    """Run what is not done, in order, with a line of progress for each.

    Raises:
        SetupError: a step failed.
    """
    listed = list(steps)
    began = time.monotonic()
    for number, step in enumerate(listed, start=1):
        prefix = f"[{number}/{len(listed)}] {step.title}"
        if step.is_done():
            say(f"{prefix} … up to date")
            continue
        say(f"{prefix} …")
        started = time.monotonic()
        before = step.digest()
        step.run()
        missing = [str(path) for path in step.outputs if not path.exists()]
        if missing:
            raise SetupError(f"{step.title}: did not make {', '.join(missing)}")
        STAMPS.mkdir(parents=True, exist_ok=True)
        (STAMPS / step.name).write_text(before)
        say(f"{prefix} … done in {time.monotonic() - started:.0f} s")
    say(f"Set-up is complete ({time.monotonic() - began:.0f} s).")


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def run(
    argv: list[str | os.PathLike[str]],
    *,
    log: str,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a program, its output in ``build/logs/LOG.log``; show the end of it on failure.

    Raises:
        SetupError: the program is not there or failed.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    path = LOGS / f"{log}.log"
    command = [os.fspath(word) for word in argv]
    if shutil.which(command[0]) is None:
        raise SetupError(f"{command[0]}: not installed")
    with path.open("wb") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        # In the background of a person's machine: lower priority, all cores.
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        tail = "\n".join(path.read_text(errors="replace").splitlines()[-30:])
        sys.stderr.write(f"{tail}\n")
        raise SetupError(f"{Path(command[0]).name} failed ({done.returncode}); all of it: {path}")


def _files(paths: Iterable[Path]) -> Iterable[Path]:
    for path in paths:
        if path.is_file():
            yield path
            continue
        for directory, names, files in os.walk(path):
            names[:] = [name for name in names if name not in _SKIPPED_DIRECTORIES]
            for name in files:
                found = Path(directory) / name
                if found.suffix not in _SKIPPED_SUFFIXES:
                    yield found
