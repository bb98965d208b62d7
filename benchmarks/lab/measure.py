"""The machine monitor's figures, measured inside the lab: ours against QEMU on the same KVM.

    scripts/lab.py -- .venv/bin/python benchmarks/lab/measure.py RECORDS [--only FIGURE]...

Appends a record to RECORDS for each figure (``recording.py``), a "failed" one where it could not be
measured; the exit status is 1 then. ``run.py`` builds what is needed (``images.py``) and starts
this. Measured only when asked for, since they are for a lab whose time is the count of instructions
(``scripts/lab.py --icount``): ``vmm_boot_icount``, ``vmm_fs`` and ``vmm_fs_walk``.
"""

import argparse
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import boots
import images
import transfers
from recording import Recorder

from lab_guest.ext4 import mounted_ext4

_COUNTED = frozenset({"vmm_boot_icount", *transfers.BESIDE_Q35})


class _Session:
    """What is asked for, and whether all of it went well."""

    def __init__(self, recorder: Recorder, asked: list[str] | None) -> None:
        self._recorder = recorder
        self._asked = asked
        self.is_good = True

    def is_asked(self, *names: str) -> bool:
        """Whether one of these figures is to be measured."""
        asked = self._asked
        if asked is None:
            return set(names).isdisjoint(_COUNTED)
        return not set(names).isdisjoint(asked)

    def attempt(self, name: str, measure: Callable[[], None]) -> None:
        """Measure; a failure is recorded and told, and does not stop the others."""
        print(f"{name} …", flush=True)
        try:
            measure()
        except Exception as error:  # noqa: BLE001 - told in the record, with the others going on
            traceback.print_exc()
            self._recorder.fail(name, reason=f"{type(error).__name__}: {error}")
            self.is_good = False


def main() -> int:
    """Measure what was asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("records", type=Path)
    parser.add_argument("--only", action="append", metavar="FIGURE")
    parser.add_argument("--log", type=Path, default=Path("build/logs/bench-lab.log"))
    options = parser.parse_args()
    recorder = Recorder(path=options.records)
    session = _Session(recorder, options.only)
    built = images.find()
    options.log.parent.mkdir(parents=True, exist_ok=True)
    # A file that a guest knows is a descriptor of its machine's; virtiofsd does this for itself.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if session.is_asked("vmm_boot_icount"):
        session.attempt("vmm_boot_icount", partial(boots.boot_counted, recorder, built))
    with tempfile.TemporaryDirectory(prefix="kh-") as name:
        run_dir = Path(name)
        if session.is_asked("vmm_boot", "vmm_boot_tuned", "vmm_memory"):
            session.attempt("vmm_boot", partial(boots.boot, recorder, built))
        if session.is_asked("vmm_start"):
            session.attempt("vmm_start", partial(boots.start, recorder, built))
        if session.is_asked("vmm_restore"):
            session.attempt("vmm_restore", partial(boots.restore, recorder, built, run_dir))
        if any(map(session.is_asked, transfers.MEASURES)):
            with mounted_ext4(run_dir) as data:
                place = transfers.Place(run_dir=run_dir, data=data, log=options.log)
                _transfer(session, recorder, built, place)
    return 0 if session.is_good else 1


def _transfer(
    session: _Session, recorder: Recorder, built: images.Images, place: transfers.Place
) -> None:
    """Measure what needs two machines that are up."""
    for names, pair in (
        (transfers.BESIDE_MICROVM, transfers.beside_microvm),
        (transfers.BESIDE_Q35, transfers.beside_q35),
    ):
        chosen = [name for name in names if session.is_asked(name)]

        def measure(chosen: list[str] = chosen, pair: Callable[..., transfers.Pair] = pair) -> None:
            with pair(built, place) as guests:
                for name in chosen:
                    work = partial(transfers.in_turn, recorder, name, guests)
                    session.attempt(name, work)

        if chosen:
            session.attempt(pair.__name__, measure)


if __name__ == "__main__":
    sys.exit(main())
