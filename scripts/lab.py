"""Run one command in the lab: Debian's kernel in QEMU, with a KVM in it that runs real guests.

For hosts whose own KVM can't, or that have none. QEMU emulates a processor with nested SVM;
virtme-ng boots the kernel that set-up unpacked over the live root file system; kvm-amd works in it.

    python scripts/lab.py -- .venv/bin/python -m pytest -m lab tests/lab
    python scripts/lab.py --shell

The command runs as root in the checkout. What it writes is gone afterwards, but for ``build/``.
The exit status is the command's; 124 if it was not done in time or the lab died, 125 if the lab
could not start.
The emulator dies now and then: a lab without a pulse is ended. What died, or was not done in time,
is done again if --tries allow.
Standard library only, and virtme-ng as a program. One process group, one thread for each stream.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lab_kernel import LAB, find_kernel
from setup_steps import BUILD, ROOT, SetupError

VENV_BIN = ROOT / ".venv" / "bin"
TIMED_OUT = 124
FAILED = 125
_NO_STATUS = 255
"""virtme-ng's, where the machine ended before the command did."""
_INSIDE = Path(__file__).with_name("lab_inside.sh")
# Not virtme-ng's own 9p: it caches nothing, and each import of a module would ask the host again.
_VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
_PROGRAMS = (
    ("qemu-system-x86_64", "Debian's qemu-system-x86"),
    (os.fspath(_VIRTIOFSD), "Debian's qemu-system-common"),
    ("modprobe", "Debian's kmod"),
    ("strings", "Debian's binutils"),
    ("vng", "virtme-ng from PyPI"),
)
# SVM makes kvm-amd work. Five-level page tables would only make each walk of the emulator longer.
# Without erms and fsrm nobody copies by `rep movsb`, which is emulated a byte at a time: a guest's
# kernel is loaded in a third of the time.
_CPU = "max,svm=on,la57=off,erms=off,fsrm=off"
# Addresses that are the same each time let the emulator use its translations again: without
# norandmaps, starting a program costs twice as much. The emulated clock is good; asking a slower
# one, as the kernel would, costs a system call and an exit each time.
_KERNEL_ARGUMENTS = "mitigations=off nokaslr norandmaps tsc=reliable audit=0"
_TRANSLATIONS_MIB = 1024
_PULSE_LOST_S = 180.0
# More than one spin on each other's locks, each turn a round through the emulator's own lock.
_CPUS = 1
_MEMORY_MIB = 6144
_QMP_REGISTERS = (
    b'{"execute": "qmp_capabilities"}'
    b'{"execute": "human-monitor-command", "arguments": {"command-line": "info registers -a"}}\n'
)
_ENVIRONMENT_PASSED = ("KATA_HYBRID_", "KATA_CONF_FILE", "PYTEST_", "RUST_", "CI")


class LabError(Exception):
    """The lab can't be started; the text says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """What the machine is like."""

    cpus: int
    memory_mib: int
    icount_shift: int | None = None
    """Time in the lab is the count of instructions, 2**shift ns each: repeatable, one thread."""
    kept: tuple[Path, ...] = ()
    """Directories below /tmp to be seen in the lab, which has a /tmp of its own."""
    is_verbose: bool = False

    def run(self, command: list[str] | None, *, timeout_s: float | None, tries: int = 1) -> int:
        """Boot, run the command in the checkout, and return its exit status.

        ``None`` is a shell on our terminal.

        Raises:
            LabError: something that the lab is made of is missing.
        """
        try:
            kernel = find_kernel()
        except SetupError as error:
            raise LabError(str(error)) from error
        for program, source in _PROGRAMS:
            if shutil.which(program, path=_search_path()) is None:
                raise LabError(f"no {program} ({source}): run make setup")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        for left in reversed(range(tries)):
            status = self._try(kernel, command, timeout_s)
            if status is not None:
                return status
            if left:
                print("lab: once more", file=sys.stderr)
        return TIMED_OUT

    def _try(self, kernel: Path, command: list[str] | None, timeout_s: float | None) -> int | None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=LAB, prefix="run-")))
            shares = {"ROOTFS": Path("/"), "lab-build": BUILD}
            devices = [
                word
                for number, (tag, source) in enumerate(shares.items())
                for word in _share(stack, scratch / f"{number}.sock", tag=tag, source=source)
            ]
            script = scratch / "command.sh"
            pulse = scratch / "pulse"
            pulse.touch()
            script.write_text(self._script(command, pulse))
            script.chmod(0o755)
            monitor = scratch / "monitor.sock"
            devices += ["-qmp", f"unix:{monitor},server=on,wait=off"]
            argv = self._argv(kernel, script, devices, is_shell=command is None)
            if command is None:
                return subprocess.run(argv, env=_environment(), check=False).returncode
            return run_watched(argv, deadline=deadline, pulse=pulse, monitor=monitor)

    def _argv(self, kernel: Path, script: Path, devices: list[str], *, is_shell: bool) -> list[str]:
        accelerator = ["-accel", f"tcg,thread=multi,tb-size={_TRANSLATIONS_MIB}"]
        if self.icount_shift is not None:
            accelerator = ["-accel", "tcg,thread=single", "-icount", f"shift={self.icount_shift}"]
        memory = f"memory-backend-memfd,id=lab-memory,size={self.memory_mib}M,share=on"
        qemu = [
            *("-cpu", _CPU, *accelerator),
            # Its ports have 64 queues a device: that many descriptors for QEMU's loop to poll.
            *("-global", "virtio-serial-pci.ioeventfd=off"),
            *("-object", memory, "-machine", "memory-backend=lab-memory", *devices),
        ]
        path = os.fspath(script)
        return [
            *("vng", "--run", os.fspath(kernel)),
            # Our own share has the tag that virtme-ng's initramfs tries before its 9p.
            *("--disable-kvm", "--force-9p", "--disable-microvm"),
            *("--cpus", str(self.cpus), "--memory", f"{self.memory_mib}M"),
            *("--cwd", os.fspath(ROOT)),
            *(["--verbose"] if self.is_verbose else []),
            *("--append", _KERNEL_ARGUMENTS),
            f"--qemu-opts={shlex.join(qemu)}",
            *(("--shell", path) if is_shell else ("--exec", path)),
        ]

    def _script(self, command: list[str] | None, pulse: Path) -> str:
        """Return the command as a script: a kernel's command line would have no room for it."""
        environment = {
            **{key: value for key, value in os.environ.items() if _is_passed(key)},
            "KATA_HYBRID_LAB": "1",
            "LAB_PULSE": os.fspath(pulse),
            "HOME": os.environ.get("HOME", "/root"),
            "TERM": os.environ.get("TERM", "dumb"),
            "LANG": "C.UTF-8",
            "PATH": _search_path(),
            "PYTHONUNBUFFERED": "1",
        }
        if command is None:
            environment["LAB_CONSOLE"] = "1"
        lines = [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]
        # A link's target counts: a checkout may borrow its environment from another one.
        seen = {ROOT, VENV_BIN.resolve().parent, *(path.resolve() for path in self.kept)}
        kept = [os.fspath(path) for path in sorted(seen) if path.is_relative_to("/tmp")]  # noqa: S108
        words = [os.fspath(_INSIDE), os.fspath(ROOT), "\n".join(kept), *(command or ["bash"])]
        return "\n".join(["#!/bin/sh", *lines, f"exec sh {shlex.join(words)}", ""])


def _is_passed(name: str) -> bool:
    return name.startswith(_ENVIRONMENT_PASSED)


def _share(stack: contextlib.ExitStack, path: Path, *, tag: str, source: Path) -> list[str]:
    """Serve a directory to the lab until the stack unwinds; return QEMU's arguments for it."""
    with path.with_suffix(".log").open("wb") as log:
        daemon = subprocess.Popen(
            [
                *(os.fspath(_VIRTIOFSD), f"--socket-path={path}", "-o", f"source={source}"),
                # Nobody else changes these files while the lab runs.
                *("-o", "cache=always", "-o", "sandbox=chroot", "--thread-pool-size=0"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    stack.callback(daemon.wait)
    stack.callback(daemon.kill)
    give_up = time.monotonic() + 10
    while not path.exists():
        if daemon.poll() is not None or time.monotonic() > give_up:
            said = path.with_suffix(".log").read_text(errors="replace")
            raise LabError(f"virtiofsd does not serve {source}: {said.strip()}")
        time.sleep(0.02)
    name = f"lab-{path.stem}"
    return [
        *("-chardev", f"socket,id={name},path={path}"),
        *("-device", f"vhost-user-fs-pci,queue-size=1024,chardev={name},tag={tag}"),
    ]


def _search_path() -> str:
    path = os.environ.get("PATH", os.defpath)
    return f"{VENV_BIN}:{path}:/usr/local/sbin:/usr/sbin:/sbin"


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": _search_path()}


def run_watched(
    argv: list[str],
    *,
    deadline: float | None,
    pulse: Path,
    monitor: Path,
    pulse_lost_s: float = _PULSE_LOST_S,
) -> int | None:
    """Run the lab; end all of it when time is up, its pulse is lost or we are interrupted.

    ``pulse`` is a file that grows while the lab's kernel works, and with it the clocks that end a
    test. The streams are pipes of ours, always: QEMU opens what it is given a second time, which
    would begin again at the start of a file.

    Returns:
        The command's exit status; None if it was not done in time, or the lab died.
    """
    process = subprocess.Popen(
        argv,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with (
        _copying(process.stdout, sys.stdout.fileno()),
        _copying(process.stderr, sys.stderr.fileno()),
    ):
        beats, last = 0, time.monotonic()
        try:
            while process.poll() is None:
                now = time.monotonic()
                if (size := pulse.stat().st_size) != beats:
                    beats, last = size, now
                is_late = deadline is not None and now >= deadline
                if is_late or now - last > pulse_lost_s:
                    print(_processors(monitor), file=sys.stderr)
                    what = "not done in time" if is_late else f"no pulse for {pulse_lost_s:g} s"
                    print(f"lab: {what}; last one {now - last:.0f} s ago", file=sys.stderr)
                    return None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(1.0, pulse_lost_s))
            if process.returncode < 0 or process.returncode == _NO_STATUS:
                print(f"lab: the emulator ended ({process.returncode})", file=sys.stderr)
                return None
            return process.returncode
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _processors(monitor: Path) -> str:
    """Return what the emulator says about its processors: where a lab that hangs, hangs."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(os.fspath(monitor))
            client.sendall(_QMP_REGISTERS)
            with client.makefile("rb") as answers:
                for line in answers:
                    text = json.loads(line).get("return")
                    if isinstance(text, str):
                        return text
    except (OSError, ValueError) as error:
        return f"the emulator does not say where it is: {error}"
    return "the emulator does not say where it is"


@contextlib.contextmanager
def _copying(source: IO[bytes] | None, target: int) -> Iterator[None]:
    """Copy a stream to a descriptor as it comes, to its end."""
    if source is None:
        raise ValueError("not a pipe")

    def copy() -> None:
        while data := os.read(source.fileno(), 65536):
            while data:
                data = data[os.write(target, data) :]

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        source.close()


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpus", type=int, default=_CPUS)
    parser.add_argument("--memory", type=int, default=_MEMORY_MIB, metavar="MIB")
    parser.add_argument("--icount", type=int, metavar="SHIFT", help="time by count of instructions")
    parser.add_argument(
        "--keep",
        type=Path,
        action="append",
        default=[],
        metavar="DIRECTORY",
        help="a directory below /tmp that the command needs",
    )
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS")
    parser.add_argument("--tries", type=int, default=1, help="how often, each with its own timeout")
    parser.add_argument("--verbose", action="store_true", help="show the kernel's messages")
    parser.add_argument("--shell", action="store_true", help="a shell instead of a command")
    parser.add_argument("command", nargs="*", metavar="COMMAND")
    asked = parser.parse_args()
    if asked.tries < 1:
        parser.error("--tries: at least 1")
    if asked.shell == bool(asked.command):
        parser.error("either a command or --shell")
    lab = Lab(
        cpus=asked.cpus,
        memory_mib=asked.memory,
        icount_shift=asked.icount,
        kept=tuple(asked.keep),
        is_verbose=asked.verbose,
    )
    try:
        timeout_s = None if asked.shell else asked.timeout
        return lab.run(asked.command or None, timeout_s=timeout_s, tries=asked.tries)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
