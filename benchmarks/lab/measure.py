"""The machine monitor's figures, measured inside the lab: ours against QEMU on the same KVM.

    scripts/lab.py -- .venv/bin/python benchmarks/lab/measure.py RECORDS [--only FIGURE]...

Appends a record to RECORDS for each figure (``recording.py``), a "failed" one where it could not be
measured; the exit status is 1 then. ``run.py`` builds what is needed (``images.py``) and starts
this. With ``--counted`` only the boot is measured, as ``vmm_boot_counted``: for a lab whose time is
the count of instructions.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import boots
import images
import transfers
from recording import Recorder

_EXT4_MIB = 1024


@contextlib.contextmanager
def ext4(run_dir: Path) -> Iterator[Path]:
    """A file system with direct I/O, which the lab's own have not."""
    disk, folder = run_dir / "ext4.img", run_dir / "ext4"
    folder.mkdir()
    with disk.open("wb") as file:
        file.truncate(_EXT4_MIB << 20)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True, timeout=60)
    # Where it is built in there is no such module.
    subprocess.run(["modprobe", "loop"], check=False, timeout=30)
    subprocess.run(["mount", "-o", "loop", disk, folder], check=True, timeout=30)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True, timeout=60)
        disk.unlink()


def attempt(recorder: Recorder, name: str, measure: Callable[[], None]) -> bool:
    """Measure; a failure is recorded and told, and does not stop the others."""
    print(f"{name} …", flush=True)
    try:
        measure()
    except Exception as error:  # noqa: BLE001 - told in the record, with the others going on
        traceback.print_exc()
        recorder.fail(name, reason=f"{type(error).__name__}: {error}")
        return False
    return True


def main() -> int:
    """Measure what was asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("records", type=Path)
    parser.add_argument("--only", action="append", metavar="FIGURE")
    parser.add_argument("--counted", action="store_true", help="the boot, in a lab with --icount")
    parser.add_argument("--log", type=Path, default=Path("build/logs/bench-lab.log"))
    options = parser.parse_args()
    recorder = Recorder(path=options.records)
    built = images.find()
    options.log.parent.mkdir(parents=True, exist_ok=True)

    def is_asked(name: str) -> bool:
        return options.only is None or name in options.only

    if options.counted:
        work = partial(boots.boot_counted, recorder, built)
        return 0 if attempt(recorder, "vmm_boot_counted", work) else 1
    good = True
    with tempfile.TemporaryDirectory(prefix="kh-") as name:
        run_dir = Path(name)
        if is_asked("vmm_boot"):
            work = partial(boots.boot, recorder, built)
            good &= attempt(recorder, "vmm_boot", work)
        if is_asked("vmm_restore"):
            work = partial(boots.restore, recorder, built, run_dir)
            good &= attempt(recorder, "vmm_restore", work)
        chosen = {name: work for name, work in transfers.MEASURES.items() if is_asked(name)}
        if chosen:
            good &= attempt(
                recorder,
                "transfers",
                partial(transfer, recorder, built, run_dir, chosen, options.log),
            )
    return 0 if good else 1


def transfer(
    recorder: Recorder,
    built: images.Images,
    run_dir: Path,
    chosen: dict[str, transfers.Measure],
    log: Path,
) -> None:
    """Measure what needs both machines up."""
    with ext4(run_dir) as host, transfers.both(built, run_dir, host, log) as guests:
        results = [
            attempt(recorder, name, partial(transfers.in_turn, recorder, name, guests, measure))
            for name, measure in chosen.items()
        ]
    if not all(results):
        raise RuntimeError(f"{results.count(False)} of {len(results)} were not measured")


if __name__ == "__main__":
    sys.exit(main())
