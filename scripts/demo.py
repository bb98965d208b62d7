"""``make demo``: a container, started by a real containerd, in a real virtual machine.

Starts a containerd of its own in a private directory, runs one container, shows what happened and
how long each stage took, stops everything, and checks that nothing is left. Exit status 0 only if
all of that is so. ``--json`` prints one document instead.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [os.fspath(ROOT / "tests")]

from busybox_image import IMAGE_NAME  # noqa: E402
from harness.containers import KATA_RUNTIME, Containers  # noqa: E402 -- the path above comes first
from harness.daemon import Containerd, ContainerdInstall, DaemonError, containerd_installs  # noqa: E402
from harness.deadline import DeadlineError  # noqa: E402
from harness.events import EventWatcher  # noqa: E402
from harness.leaks import assert_nothing_left, find_processes, mount_points, take_census  # noqa: E402

BUILD = ROOT / "build"
CONFIGURATION = BUILD / "guest" / "configuration.toml"
BIN = BUILD / "installed" / "bin"
INSTALLS = containerd_installs(BUILD)
EXPECTED_STATUS = 3
SCRIPT = f'echo "Hello from $(hostname), process $$ of kernel $(uname -r)"; exit {EXPECTED_STATUS}'
_BOOT_TIMEOUT_S = 120.0


@dataclass(kw_only=True)
class Report:
    """Everything the demo shows."""

    host_kernel: str = ""
    guest_kernel: str = ""
    containerd: str = ""
    hypervisor: str = ""
    reason: str = ""
    output: str = ""
    exit_status: int = -1
    stages: list[tuple[str, float]] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage."""
        began = time.monotonic()
        yield
        self.stages.append((name, time.monotonic() - began))


class Screen:
    """Plain lines; colour on a terminal only; silent when a document was asked for."""

    def __init__(self, *, is_silent: bool) -> None:
        self._is_silent = is_silent
        self._is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def line(self, text: str = "") -> None:
        """Print a line at once."""
        if not self._is_silent:
            print(text, flush=True)

    def fact(self, name: str, value: str) -> None:
        """Print a named value."""
        self.line(f"{name:<14}  {self.strong(value)}")

    def strong(self, text: str) -> str:
        """Emphasise."""
        return f"\033[1m{text}\033[0m" if self._is_coloured else text

    def verdict(self, text: str, *, is_good: bool) -> str:
        """Colour by outcome."""
        return f"\033[{32 if is_good else 31}m{text}\033[0m" if self._is_coloured else text


def main() -> int:
    """Run the demo; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--containerd", choices=sorted(INSTALLS), default="2", help="major version")
    arguments = parser.parse_args()
    screen = Screen(is_silent=arguments.json)
    report = Report()
    if os.geteuid() != 0:
        print("the demo starts a containerd of its own, which needs root", file=sys.stderr)
        return 1
    try:
        demonstrate(report, screen, install=INSTALLS[arguments.containerd])
    except (DaemonError, DeadlineError, OSError, subprocess.SubprocessError) as error:
        report.problems.append(str(error))
    conclude(report, screen)
    if arguments.json:
        print(json.dumps(document(report), indent=2))
    return 1 if report.problems or report.leftovers else 0


def demonstrate(report: Report, screen: Screen, *, install: ContainerdInstall) -> None:
    """Run the container and fill the report.

    Raises:
        DaemonError: containerd or ``ctr`` failed.
        DeadlineError: something took too long, or was left behind.
    """
    report.host_kernel = platform.release()
    screen.fact("host kernel", report.host_kernel)
    choose_hypervisor(report)
    screen.fact("hypervisor", report.hypervisor)
    screen.line(f"{'':<14}  {report.reason}")

    home = Path(tempfile.mkdtemp(prefix="khd", dir="/tmp"))
    daemon = Containerd(
        install,
        home=home,
        namespace="kata-hybrid-demo",
        shim_dir=BIN,
    )
    try:
        with report.stage("start containerd"):
            daemon.start()
        report.containerd = daemon.ctr("version").text.split("Server:")[1].split()[1]
        screen.fact("containerd", f"{report.containerd} (its own, in {home})")
        with report.stage("import the image"):
            daemon.ctr("image", "import", os.fspath(BUILD / "images" / "busybox.tar"))
        run_container(report, screen, daemon)
    except (DaemonError, DeadlineError):
        screen.line(daemon.log_tail(lines=25))
        raise
    finally:
        with report.stage("stop and remove everything"):
            daemon.destroy()
        report.leftovers += [
            f"process {process.pid} {process.name}" for process in find_processes(daemon)
        ]
        report.leftovers += [
            f"mount {point}" for point in mount_points() if point.startswith(f"{home}/")
        ]
        if home.exists():
            report.leftovers.append(f"directory {home}")


def choose_hypervisor(report: Report) -> None:
    """Ask the installed command which hypervisor will be used, and why."""
    environment = {
        **os.environ,
        "KATA_CONF_FILE": os.fspath(CONFIGURATION),
        "PATH": f"{BIN}:{os.environ.get('PATH', os.defpath)}",
    }
    with report.stage("probe the host"):
        done = subprocess.run(
            [BIN / "kata-hybrid", "check", "--json"],
            env=environment,
            capture_output=True,
            check=False,
            timeout=60,
        )
    if not done.stdout:
        raise DaemonError(f"kata-hybrid check: {done.stderr.decode(errors='replace')}")
    told = json.loads(done.stdout)
    report.hypervisor = told["hypervisor"] or "none"
    report.reason = told["reason"]
    if not told["ready"]:
        missing = [
            f"{finding['name']} ({finding['remedy']})"
            for finding in told["findings"]
            if finding["state"] == "missing"
        ]
        raise DaemonError(f"this host can't run a sandbox; missing: {', '.join(missing)}")


def run_container(report: Report, screen: Screen, daemon: Containerd) -> None:
    """Run one container in the foreground, timing it by containerd's own events."""
    containers = Containers(
        daemon,
        runtime=KATA_RUNTIME,
        image=IMAGE_NAME,
        boot_timeout_s=_BOOT_TIMEOUT_S,
        configuration=CONFIGURATION,
    )
    before = take_census(daemon)
    with EventWatcher(daemon) as events:
        began = time.monotonic()
        with containers.foreground("sh", "-c", SCRIPT) as (name, process):
            first = b"" if process.stdout is None else process.stdout.readline()
            first_at = time.monotonic()
            output, error = process.communicate(timeout=_BOOT_TIMEOUT_S)
        ended = time.monotonic()
        report.output = (first + output).decode(errors="replace").strip()
        report.exit_status = process.returncode
        if process.returncode != EXPECTED_STATUS:
            report.problems.append(f"exit status {process.returncode}: {error.decode()}")
            raise DaemonError(f"the container did not run: {error.decode(errors='replace')}")
        created = events.wait("/tasks/create", name).seen_at
        exited = events.wait("/tasks/exit", name).seen_at
    report.guest_kernel = report.output.rpartition(" ")[2]
    report.stages += [
        ("boot the machine, create the container", created - began),
        ("start it, until its first output", max(0.0, first_at - created)),
        ("until its exit is known", max(0.0, exited - first_at)),
        ("delete it, stop the machine", max(0.0, ended - exited)),
    ]
    screen.fact("guest kernel", report.guest_kernel)
    screen.fact("its output", report.output)
    screen.fact("exit status", f"{report.exit_status} (the script says exit {EXPECTED_STATUS})")
    if report.guest_kernel == report.host_kernel:
        report.problems.append("guest and host have the same kernel")
    assert_nothing_left(daemon, before=before)


def conclude(report: Report, screen: Screen) -> None:
    """Print the table of stages and the verdict."""
    if report.stages:
        width = max(len(name) for name, _ in report.stages)
        screen.line()
        for name, seconds in report.stages:
            screen.line(f"  {name:<{width}}  {seconds:7.2f} s")
        screen.line(f"  {'total':<{width}}  {sum(seconds for _, seconds in report.stages):7.2f} s")
        screen.line()
    for problem in report.problems:
        screen.line(screen.verdict(f"failed: {problem}", is_good=False))
    for leftover in report.leftovers:
        screen.line(screen.verdict(f"left behind: {leftover}", is_good=False))
    if not report.problems and not report.leftovers:
        text = "Nothing is left: no process, no mount, no file."
        screen.line(screen.verdict(text, is_good=True))


def document(report: Report) -> dict[str, object]:
    """Return the report as it is printed with ``--json``."""
    stages = [{"name": name, "seconds": round(seconds, 3)} for name, seconds in report.stages]
    return {
        **asdict(report),
        "stages": stages,
        "is_clean": not report.leftovers,
        "succeeded": not report.problems and not report.leftovers,
    }


if __name__ == "__main__":
    sys.exit(main())
