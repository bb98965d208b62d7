"""Run one command in the lab: Debian's kernel in QEMU, with a KVM in it that runs real guests.

For hosts whose own KVM can't: QEMU emulates a processor with nested SVM, virtme-ng boots the kernel
that set-up unpacked over the live root file system, and kvm-amd works inside. What the command
writes is gone afterwards, except below ``build/``.

    python scripts/lab.py -- .venv/bin/python -m pytest tests/lab

The exit status is the command's; 124 if it did not end in time. Standard library and virtme-ng.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from setup_steps import BUILD, ROOT

LAB = BUILD / "lab"
KERNEL = LAB / "kernel"
VENV_BIN = ROOT / ".venv" / "bin"
TIMED_OUT = 124
_INSIDE = Path(__file__).with_name("lab_inside.sh")
_PROGRAMS = (
    ("qemu-system-x86_64", "Debian's qemu-system-x86"),
    ("modprobe", "Debian's kmod"),
    ("vng", "virtme-ng from PyPI"),
)
# Processor: SVM is what makes kvm-amd work; five-level page tables would only cost the emulator.
_CPU = "max,svm=on,la57=off"
_PASSED_ON = ("KATA_HYBRID_", "PYTEST_", "RUST_")


class LabError(Exception):
    """The lab can't be started; the text says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """What the machine is like."""

    cpus: int = 2
    memory_mib: int = 6144
    icount_shift: int | None = None
    """Guest time follows the count of instructions, 2**shift nanoseconds each: repeatable, slower."""
    verbose: bool = False

    def run(self, command: list[str], *, timeout_s: float) -> int:
        """Boot, run the command in the checkout, and return its exit status.

        Raises:
            LabError: something that the lab is made of is missing.
        """
        kernel = _kernel()
        for program, source in _PROGRAMS:
            if shutil.which(program, path=_search_path()) is None:
                raise LabError(f"no {program} ({source}): run make setup")
        with _script(command) as script:
            return _run_group(self._argv(kernel, script), timeout_s=timeout_s)

    def _argv(self, kernel: Path, script: Path) -> list[str]:
        accelerator = "-accel tcg,thread=multi,tb-size=1024"
        if self.icount_shift is not None:
            accelerator = f"-accel tcg,thread=single -icount shift={self.icount_shift}"
        return [
            *("vng", "--run", os.fspath(kernel)),
            *("--disable-kvm", "--force-9p", "--disable-microvm"),
            *("--cpus", str(self.cpus), "--memory", f"{self.memory_mib}M"),
            *("--cwd", os.fspath(ROOT), f"--rwdir={BUILD}"),
            "--append=mitigations=off nokaslr audit=0",
            *(["--verbose"] if self.verbose else []),
            f"--qemu-opts=-cpu {_CPU} {accelerator}",
            *("--exec", f"sh {shlex.quote(os.fspath(script))}"),
        ]


def _kernel() -> Path:
    found = sorted(KERNEL.glob("boot/vmlinuz-*"))
    if not found:
        raise LabError(f"no kernel below {KERNEL}: run make setup")
    return found[-1]


@contextlib.contextmanager
def _script(command: list[str]) -> Iterator[Path]:
    """Write the command to a file: a kernel's command line has no room for it."""
    environment = {
        **{key: value for key, value in os.environ.items() if key.startswith(_PASSED_ON)},
        "KATA_HYBRID_LAB": "1",
        "HOME": os.environ.get("HOME", "/root"),
        "TERM": "dumb",
        "LANG": "C.UTF-8",
        "PATH": _search_path(),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    lines = [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]
    inside = shlex.join(["sh", os.fspath(_INSIDE), os.fspath(ROOT), *command])
    with tempfile.NamedTemporaryFile("w", dir=LAB, prefix="run-", suffix=".sh") as file:
        file.write("\n".join([*lines, f"exec {inside}", ""]))
        file.flush()
        yield Path(file.name)


def _search_path() -> str:
    path = os.environ.get("PATH", os.defpath)
    return f"{VENV_BIN}:{path}:/usr/local/sbin:/usr/sbin:/sbin"


def _run_group(argv: list[str], *, timeout_s: float) -> int:
    """Run a program and what it starts; end all of them when time is up or we are interrupted."""
    process = subprocess.Popen(
        argv,
        env={**os.environ, "PATH": _search_path()},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        print(f"lab: not done in {timeout_s:g} s", file=sys.stderr)
        return TIMED_OUT
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--memory", type=int, default=6144, metavar="MIB")
    parser.add_argument("--icount", type=int, metavar="SHIFT", help="count instructions as time")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS")
    parser.add_argument("--verbose", action="store_true", help="show the kernel's messages")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    asked = parser.parse_args()
    lab = Lab(
        cpus=asked.cpus,
        memory_mib=asked.memory,
        icount_shift=asked.icount,
        verbose=asked.verbose,
    )
    try:
        return lab.run(asked.command, timeout_s=asked.timeout)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 125


if __name__ == "__main__":
    sys.exit(main())
