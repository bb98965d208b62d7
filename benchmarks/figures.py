"""What ``make bench`` promises: each figure's name, unit and limit, and whether a run held it.

A figure is a ratio of two medians taken in the same run on the same machine, ours over a
reference, so it means the same on a laptop and on a loaded build machine. Limits stand here and
nowhere else. Called by ``run.py``; standard library only, so the gate can be tested by itself.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Better = Literal["lower", "higher"]
_GREEN, _RED, _RESET = "\x1b[32m", "\x1b[31m", "\x1b[0m"


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """A figure as it is promised, before anybody measured it."""

    name: str
    unit: str
    limit: float | None
    """``None``: reported, not gated."""
    better: Better
    about: str
    """Ours against the reference, in a few words."""


PROMISES = (
    Promise(
        name="start_action",
        unit="ms",
        limit=1.5,
        better="lower",
        about="the whole `start` action / `python3 -c pass`",
    ),
    Promise(
        name="delete_action",
        unit="ms",
        limit=1.5,
        better="lower",
        about="`delete` after an orderly exit / `python3 -c pass`",
    ),
    Promise(
        name="delete_action_after_crash",
        unit="ms",
        limit=None,
        better="lower",
        about="`delete` after SIGKILL of the shim / `python3 -c pass`",
    ),
    Promise(
        name="create_to_first_byte",
        unit="ms",
        limit=None,
        better="lower",
        about="first byte of `ctr run … echo`, a virtual machine / runc",
    ),
    Promise(
        name="idle_shim_pss",
        unit="MiB",
        limit=30.0,
        better="lower",
        about="memory of a shim with one idle container, guest memory apart / 1 MiB",
    ),
    Promise(
        name="pod_start",
        unit="ms",
        limit=None,
        better="lower",
        about="a pod's sandbox and one container by the CRI, a virtual machine / runc",
    ),
    Promise(
        name="added_container",
        unit="ms",
        limit=6.0,
        better="lower",
        about="one more container in a pod that runs / the same of runc's",
    ),
    Promise(
        name="added_container_pss",
        unit="KiB",
        limit=256.0,
        better="lower",
        about="memory of the shim for each container that is added / 1 KiB",
    ),
    Promise(
        name="pod_network",
        unit="MiB/s",
        limit=None,
        better="higher",
        about="a stream from pod to pod over the node's bridge / of runc's pods",
    ),
    Promise(
        name="agent_round_trip",
        unit="us",
        limit=2.0,
        better="lower",
        about="one agent call / the same bytes to and fro on a bare socket",
    ),
    Promise(
        name="stdout_pump",
        unit="MiB/s",
        limit=0.5,
        better="higher",
        about="output copied from the agent to a FIFO / a plain copy loop",
    ),
    Promise(
        name="vsock_packet_parse",
        unit="ns",
        limit=1.0,
        better="lower",
        about="one vsock header checked, Rust / Cython",
    ),
    Promise(
        name="virtqueue_walk",
        unit="ns",
        limit=1.0,
        better="lower",
        about="one descriptor chain walked, Rust over regions / Cython over a flat buffer",
    ),
    Promise(
        name="vmm_boot",
        unit="ms",
        limit=0.6,
        better="lower",
        about="exec to the guest's /init, the bare runner / QEMU microvm as it is with KVM",
    ),
    Promise(
        name="vmm_boot_tuned",
        unit="ms",
        limit=0.9,
        better="lower",
        about="the same / QEMU microvm with a clock chip, without which the kernel waits for one",
    ),
    Promise(
        name="vmm_start",
        unit="ms",
        limit=0.6,
        better="lower",
        about="exec to the first word of a kernel of 45 MiB that does nothing else, as vmm_boot",
    ),
    Promise(
        name="vmm_boot_icount",
        unit="ms",
        limit=0.6,
        better="lower",
        about="the same where time is the count of instructions",
    ),
    Promise(
        name="vmm_boot_repeats",
        unit="boots",
        limit=1.01,
        better="lower",
        about="vmm_boot_icount of one series of boots / of another: how far counting repeats",
    ),
    Promise(
        name="vmm_restore",
        unit="ms",
        limit=0.2,
        better="lower",
        about="exec to a byte sent back by the guest, from a snapshot / from a cold boot",
    ),
    Promise(
        name="vmm_memory",
        unit="MiB",
        limit=5.0,
        better="lower",
        about="memory of the bare runner with a guest, guest memory apart / 1 MiB",
    ),
    Promise(
        name="vmm_block_random",
        unit="MiB/s",
        limit=1.0,
        better="higher",
        about="fio in the guest, 4 KiB reads anywhere / QEMU's virtio-blk over the same file",
    ),
    Promise(
        name="vmm_block_sequential",
        unit="MiB/s",
        limit=1.0,
        better="higher",
        about="fio in the guest, 1 MiB reads in order / QEMU's virtio-blk over the same file",
    ),
    Promise(
        name="vmm_vsock_throughput",
        unit="MiB/s",
        limit=1.0,
        better="higher",
        about="a stream to the guest and one back, hybrid vsock / QEMU with vhost-vsock",
    ),
    Promise(
        name="vmm_vsock_round_trip",
        unit="us",
        limit=None,
        better="lower",
        about="64 bytes to the guest and back, hybrid vsock / QEMU with vhost-vsock",
    ),
    Promise(
        name="vmm_fs",
        unit="MiB/s",
        limit=1.0,
        better="higher",
        about="fio reads a file of a shared folder / QEMU with virtiofsd; counted",
    ),
    Promise(
        name="vmm_fs_walk",
        unit="ms",
        limit=1.05,
        better="lower",
        about="`ls -lR` of a shared tree of 1000 files / QEMU with virtiofsd; counted",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A promise with what was measured."""

    promise: Promise
    ours: float
    reference: float
    spread: float
    """Interquartile range over the median, of the side where it is larger."""
    note: str = ""
    """What else is worth knowing; of a figure that is missing, why."""

    @property
    def ratio(self) -> float:
        """Ours over the reference; not a number when there is nothing to divide."""
        return self.ours / self.reference if self.reference else math.nan

    @property
    def is_measured(self) -> bool:
        """Whether there is a ratio at all."""
        return math.isfinite(self.ratio)

    @property
    def holds(self) -> bool:
        """Whether the promise is kept; a figure that is missing never is."""
        if not self.is_measured:
            return False
        if self.promise.limit is None:
            return True
        if self.promise.better == "lower":
            return self.ratio <= self.promise.limit
        return self.ratio >= self.promise.limit

    def to_json(self) -> dict[str, Any]:
        """Return the figure as it stands in ``build/bench.json``."""
        return {
            "name": self.promise.name,
            "ratio": _finite(self.ratio),
            "limit": self.promise.limit,
            "better": self.promise.better,
            "holds": self.holds,
            "ours": _finite(self.ours),
            "reference": _finite(self.reference),
            "unit": self.promise.unit,
            "spread": _finite(self.spread),
            "about": self.promise.about,
            "note": self.note,
        }


def from_samples(
    promise: Promise, *, ours: Sequence[float], reference: Sequence[float], note: str = ""
) -> Figure:
    """Reduce two sides' samples to a figure."""
    return Figure(
        promise=promise,
        ours=statistics.median(ours),
        reference=statistics.median(reference),
        spread=max(_relative_spread(ours), _relative_spread(reference)),
        note=note,
    )


def missing(promise: Promise, *, reason: str) -> Figure:
    """Return the figure of a promise that nobody measured: it does not hold."""
    nothing = math.nan
    return Figure(promise=promise, ours=nothing, reference=nothing, spread=nothing, note=reason)


def evaluate(
    records: Iterable[Mapping[str, Any]], *, reasons: Mapping[str, str] | None = None
) -> list[Figure]:
    """Match what was measured with what is promised, in the order of the promises.

    A record has ``name``, ``ours`` and ``reference`` (lists of samples) and perhaps ``note``.
    A promise without a record is missing, and so does not hold; ``reasons`` says by name why.

    Raises:
        ValueError: a record is of no promise, or of one that has a record already.
    """
    by_name: dict[str, Mapping[str, Any]] = {}
    known = {promise.name for promise in PROMISES}
    for record in records:
        name = record["name"]
        if name not in known or name in by_name:
            raise ValueError(f"record {name!r}: {'twice' if name in by_name else 'no such figure'}")
        by_name[name] = record
    return [
        from_samples(
            promise,
            ours=by_name[promise.name]["ours"],
            reference=by_name[promise.name]["reference"],
            note=by_name[promise.name].get("note", ""),
        )
        if promise.name in by_name
        else missing(promise, reason=(reasons or {}).get(promise.name, "not measured"))
        for promise in PROMISES
    ]


def exit_status(figures: Iterable[Figure]) -> int:
    """Return 0 if every figure holds, else 1."""
    return 0 if all(figure.holds for figure in figures) else 1


def table(figures: Sequence[Figure], *, is_coloured: bool) -> str:
    """Return the figures as aligned text, with what each means below."""
    head = ("name", "ours", "reference", "ratio", "spread", "limit", "better", "holds")
    rows = [head, *(_row(figure) for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row, figure in zip(rows, (None, *figures), strict=True):
        cells = [
            cell.rjust(width) if 0 < column < 6 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        if is_coloured and figure is not None:
            cells[-1] = f"{_GREEN if figure.holds else _RED}{cells[-1]}{_RESET}"
        lines.append("  ".join(cells).rstrip())
    lines.append("")
    for figure in figures:
        note = f" ({figure.note})" if figure.note else ""
        lines.append(f"{figure.promise.name}: {figure.promise.about}{note}")
    return "\n".join(lines)


def _row(figure: Figure) -> tuple[str, ...]:
    promise = figure.promise
    return (
        promise.name,
        _amount(figure.ours, promise.unit),
        _amount(figure.reference, promise.unit),
        f"{figure.ratio:.2f}" if figure.is_measured else "-",
        f"{figure.spread:.0%}" if math.isfinite(figure.spread) else "-",
        "-" if promise.limit is None else f"{promise.limit:g}",
        promise.better,
        ("yes" if promise.limit is not None else "reported") if figure.holds else "NO",
    )


def _amount(value: float, unit: str) -> str:
    return f"{value:.4g} {unit}" if math.isfinite(value) else "-"


def _relative_spread(samples: Sequence[float]) -> float:
    if len(samples) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
