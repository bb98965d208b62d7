"""``make bench``: measure every promise of ``figures.py``, print one table, write the list.

    parts  actions     bench_actions.py            pytest-benchmark
           containers  bench_containers.py         pytest-benchmark, on a containerd of its own
           pods        bench_pods.py               pytest-benchmark, by way of the CRI
           vsock_io    native/vsock_io/benches/    criterion, plain copies as the reference
           packets     native/*/benches/           criterion for Rust, pytest-benchmark for Cython
           machine     lab/                        our machine monitor and QEMU, both in the lab
           counted     lab/                        a boot, where time is the count of instructions
           folder      lab/                        a shared folder, counted like that

Every figure is a ratio of two sides taken here and now; nothing is compared with another machine
or another day. A part that fails leaves its figures unmeasured, and an unmeasured figure does not
hold. Progress goes to standard error, the table (``--json``: the list) to standard output, and the
list also to ``build/bench.json``. The exit status is 1 unless everything holds. Standard library
only; the parts run in the environment that ``make setup`` made.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import criterion
import figures
from recorded import BUILD, LOG, RECORDS, ROOT, Keep, PartError, Record, run_recorded

RESULT = BUILD / "bench.json"
_LAB = ROOT / "benchmarks" / "lab"
_CRITERION_HOME = BUILD / "criterion"
_PYTEST_TIMEOUT_S = 300.0
_IMAGES_TIMEOUT_S = 1200.0
_LAB_TIMEOUT_S = 1200.0
_COUNTED_TIMEOUT_S = 1800.0
_LAB_END_S = 60.0
_COUNTED = ("--icount", "1")
_FOLDER_TIMEOUT_S = 150.0
"""One figure takes 50 s, unless a guest hangs, as in this mode about every second time while two
are up: it waits, in an interrupt, for that interrupt's lock, which nobody else can have."""
_FOLDER_TRIES = 8
_FOLDER_FIGURES = ("vmm_fs", "vmm_fs_walk")
_STDOUT_MIB = 32
"""What ``benches/stdout_pump.rs`` copies in one iteration."""
_PACKET_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A group of figures measured together."""

    name: str
    title: str
    figures: tuple[str, ...]
    measure: Callable[[Keep], None]


def parts() -> list[Part]:
    """Return every part, in order."""
    return [
        Part(
            name="actions",
            title="start and delete, against a bare interpreter",
            figures=("start_action", "delete_action", "delete_action_after_crash"),
            measure=lambda keep: run_pytest("bench_actions.py", keep),
        ),
        Part(
            name="containers",
            title="containers on a private containerd, against runc",
            figures=("create_to_first_byte", "idle_shim_pss"),
            measure=lambda keep: run_pytest("bench_containers.py", keep),
        ),
        Part(
            name="pods",
            title="pods by way of the CRI, against runc's",
            figures=("pod_start", "added_container", "added_container_pss", "pod_network"),
            measure=lambda keep: run_pytest("bench_pods.py", keep),
        ),
        Part(
            name="vsock_io",
            title="agent calls and output copies, against bare sockets",
            figures=("agent_round_trip", "stdout_pump"),
            measure=measure_vsock_io,
        ),
        Part(
            name="packets",
            title="vsock packets and virtqueues, Rust against Cython",
            figures=("vsock_packet_parse", "virtqueue_walk"),
            measure=measure_packets,
        ),
        Part(
            name="machine",
            title="the machine monitor in the lab, against QEMU",
            figures=(
                *("vmm_boot", "vmm_boot_tuned", "vmm_memory", "vmm_start", "vmm_restore"),
                *("vmm_block_random", "vmm_block_sequential"),
                *("vmm_vsock_throughput", "vmm_vsock_round_trip"),
            ),
            measure=measure_machine,
        ),
        Part(
            name="counted",
            title="the machine monitor's boot by the count of instructions, against QEMU",
            figures=("vmm_boot_icount", "vmm_boot_repeats"),
            measure=measure_counted,
        ),
        Part(
            name="folder",
            title="a shared folder by the count of instructions, against QEMU with virtiofsd",
            figures=_FOLDER_FIGURES,
            measure=measure_folder,
        ),
    ]


def run_pytest(file: str, keep: Keep) -> None:
    """Run one of the pytest-benchmark files, keeping each record as it comes.

    Raises:
        PartError: a measurement failed.
    """
    command = [
        *(_python(), "-m", "pytest", "--benchmark-enable", "--benchmark-disable-gc"),
        *("-o", "python_files=bench_*.py", "-o", "pythonpath=tests scripts benchmarks"),
        *("-o", "addopts=--import-mode=importlib", "-o", "filterwarnings=default"),
        *("-p", "no:cacheprovider", "--color=no", "--records", os.fspath(RECORDS)),
        f"--confcutdir={ROOT / 'benchmarks'}",
        *("--benchmark-json", os.fspath(BUILD / f"{Path(file).stem}.json")),
        os.fspath(ROOT / "benchmarks" / file),
    ]
    run_recorded(command, keep, timeout_s=_PYTEST_TIMEOUT_S)


def measure_machine(keep: Keep) -> None:
    """Measure our machine monitor against QEMU, in the lab.

    Raises:
        PartError: something could not be built, or a measurement failed.
    """
    _build_images(keep)
    _run_lab((), (), keep, timeout_s=_LAB_TIMEOUT_S)


def measure_counted(keep: Keep) -> None:
    """Measure the boot in a lab whose time is the count of instructions.

    Raises:
        PartError: something could not be built, or a measurement failed.
    """
    _build_images(keep)
    _run_lab(_COUNTED, ("--only", "vmm_boot_icount"), keep, timeout_s=_COUNTED_TIMEOUT_S)


def measure_folder(keep: Keep) -> None:
    """Measure a shared folder in such a lab, each figure in one of its own.

    Raises:
        PartError: something could not be built, or a measurement failed.
    """
    _build_images(keep)
    for name in _FOLDER_FIGURES:
        arguments = ("--only", name)
        _run_lab(_COUNTED, arguments, keep, timeout_s=_FOLDER_TIMEOUT_S, tries=_FOLDER_TRIES)


def _lab_path() -> str:
    folders = (_LAB, ROOT / "benchmarks", ROOT / "tests")
    return f"PYTHONPATH={os.pathsep.join(map(os.fspath, folders))}"


def _build_images(keep: Keep) -> None:
    """Build what the lab's benchmarks run."""
    _say("    building …")
    images = ["env", _lab_path(), _python(), os.fspath(_LAB / "images.py")]
    run_recorded(images, keep, timeout_s=_IMAGES_TIMEOUT_S)


def _run_lab(
    lab: tuple[str, ...],
    arguments: tuple[str, ...],
    keep: Keep,
    *,
    timeout_s: float,
    tries: int = 1,
) -> None:
    """Run the lab's benchmarks; again, up to ``tries`` times, where they are not done in time."""
    _say("    in the lab …")
    command = [
        *(_python(), os.fspath(ROOT / "scripts" / "lab.py"), "--timeout", f"{timeout_s:g}"),
        *("--tries", str(tries), *lab),
        *("--", "env", _lab_path(), _python(), os.fspath(_LAB / "measure.py")),
        *(os.fspath(RECORDS), *arguments),
    ]
    run_recorded(command, keep, timeout_s=tries * (timeout_s + _LAB_END_S))


def measure_vsock_io(keep: Keep) -> None:
    """Measure what the agent client and the output copies cost.

    Raises:
        PartError: a benchmark failed.
    """
    programs = _build_criterion(("agent_round_trip", "stdout_pump"))

    _say(f"    agent_round_trip, {criterion.ROUNDS} rounds …")
    ours, reference = "agent_round_trip/client", "agent_round_trip/raw"
    seconds = _run_criterion(programs["agent_round_trip"], (ours, reference), samples=500)
    keep(
        {
            "name": "agent_round_trip",
            "ours": [sample * 1e6 for sample in seconds[ours]],
            "reference": [sample * 1e6 for sample in seconds[reference]],
        }
    )

    _say(f"    stdout_pump, {criterion.ROUNDS} rounds …")
    ours, reference = "stdout_pump/pump", "stdout_pump/copy"
    seconds = _run_criterion(programs["stdout_pump"], (ours, reference), samples=20)
    keep(
        {
            "name": "stdout_pump",
            "ours": [_STDOUT_MIB / sample for sample in seconds[ours]],
            "reference": [_STDOUT_MIB / sample for sample in seconds[reference]],
        }
    )


def measure_packets(keep: Keep) -> None:
    """Measure what the vsock device does per packet, in Rust and in Cython, in turn.

    Raises:
        PartError: a benchmark failed.
    """
    sources = {
        # Figure, crate, benchmark, function.
        "vsock_packet_parse": ("virtio_core", "vsock_packet", "vsock_packet/parse"),
        "virtqueue_walk": ("virtio_core", "ring", "virtqueue/walk"),
    }
    rust: dict[str, list[float]] = {name: [] for name in sources}
    cython: dict[str, list[float]] = {name: [] for name in sources}
    programs = {
        name: _build_criterion((bench,), package=package)[bench]
        for name, (package, bench, _) in sources.items()
    }
    for number in range(1, _PACKET_ROUNDS + 1):
        _say(f"    round {number} of {_PACKET_ROUNDS} …")
        run_pytest("bench_packet_reference.py", keep)
        items = {}
        for benchmark in _read_json(BUILD / "bench_packet_reference.json")["benchmarks"]:
            name = benchmark["name"].removeprefix("test_")
            items[name] = benchmark["extra_info"]["items"]
            cython[name] += [sample / items[name] for sample in benchmark["stats"]["data"]]
        for name, (_, _, function) in sources.items():
            seconds = _run_criterion(programs[name], (function,), samples=1000, rounds=1)
            rust[name] += [sample / items[name] for sample in seconds[function]]
    for name in sources:
        keep(
            {
                "name": name,
                "ours": [sample * 1e9 for sample in rust[name]],
                "reference": [sample * 1e9 for sample in cython[name]],
            }
        )


def _build_criterion(
    names: tuple[str, ...], *, package: str = "vsock_io"
) -> dict[str, criterion.Program]:
    """Build these benchmarks of a crate."""
    _say("    building …")
    try:
        return criterion.build(package, benches=names, log=LOG)
    except criterion.CriterionError as exc:
        raise PartError(str(exc)) from exc


def _run_criterion(
    program: criterion.Program,
    functions: tuple[str, ...],
    *,
    samples: int,
    rounds: int = criterion.ROUNDS,
) -> dict[str, list[float]]:
    """Run functions of a benchmark; return the seconds of an iteration in each sample."""
    try:
        return criterion.run(
            program,
            functions=functions,
            samples=samples,
            home=_CRITERION_HOME,
            log=LOG,
            rounds=rounds,
        )
    except criterion.CriterionError as exc:
        raise PartError(str(exc)) from exc


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def measure(chosen: list[Part]) -> list[figures.Figure]:
    """Measure the chosen parts and return all figures."""
    records: list[Record] = []
    reasons: dict[str, str] = {}

    def keep(record: Record) -> None:
        records.append(record)
        _say(f"    {record['name']}: done")

    for number, part in enumerate(chosen, start=1):
        began = time.monotonic()
        _say(f"[{number}/{len(chosen)}] {part.title} …")
        try:
            part.measure(keep)
        except (PartError, OSError, LookupError, ValueError, subprocess.SubprocessError) as exc:
            # Whatever went wrong, the other parts' figures are worth having.
            reasons |= dict.fromkeys(part.figures, str(exc))
            _say(f"    failed: {exc}; all of it: {LOG}")
        _say(f"[{number}/{len(chosen)}] {part.title} … {time.monotonic() - began:.0f} s")
    return figures.evaluate(records, reasons=reasons)


def write_result(measured: list[figures.Figure]) -> str:
    """Write ``build/bench.json`` and return its text."""
    text = json.dumps([figure.to_json() for figure in measured], indent=2) + "\n"
    temporary = RESULT.with_suffix(".part")
    temporary.write_text(text)
    temporary.replace(RESULT)
    return text


def main() -> int:
    """Measure and report; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the list, not the table")
    parser.add_argument(
        "--only",
        choices=[part.name for part in parts()],
        action="append",
        help="measure these parts only; the others' figures are missing",
    )
    options = parser.parse_args()
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.write_text("")
    chosen = [part for part in parts() if options.only is None or part.name in options.only]
    measured = measure(chosen)
    text = write_result(measured)
    if options.json:
        sys.stdout.write(text)
    else:
        is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(f"\n{_machine()}\n\n{figures.table(measured, is_coloured=is_coloured)}")
    return figures.exit_status(measured)


def _python() -> str:
    """Return the interpreter that has pytest: the project's own environment, else this one."""
    own = ROOT / ".venv" / "bin" / "python"
    return os.fspath(own) if own.exists() else sys.executable


def _machine() -> str:
    """Name the machine that the figures are of."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return (
        f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
