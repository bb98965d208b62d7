"""The gate of ``make bench``: a promise that is broken, or was not measured, fails the run."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from module_file import loaded_module

_PATH = Path(__file__).resolve().parents[3] / "benchmarks" / "figures.py"


@pytest.fixture(scope="module")
def figures() -> Iterator[ModuleType]:
    with loaded_module("bench_figures", _PATH) as module:
        yield module


@pytest.fixture
def records(figures: ModuleType) -> list[dict[str, Any]]:
    """A run in which every promise is just kept."""
    return [
        {"name": promise.name, "ours": [100.0 * (promise.limit or 9)], "reference": [100.0]}
        for promise in figures.PROMISES
    ]


def _set(records: list[dict[str, Any]], name: str, *, ratio: float) -> None:
    record = next(record for record in records if record["name"] == name)
    record["ours"] = [100.0 * ratio]


def test_ratios_at_their_limits_pass(figures: ModuleType, records: list[dict[str, Any]]) -> None:
    assert figures.exit_status(figures.evaluate(records)) == 0


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("start_action", 1.51),
        ("delete_action", 1.51),
        ("idle_shim_pss", 30.1),
        ("agent_round_trip", 2.01),
        ("stdout_pump", 0.49),
        ("vsock_packet_parse", 1.01),
        ("virtqueue_walk", 1.01),
        ("vmm_boot", 0.61),
        ("vmm_boot_tuned", 0.91),
        ("vmm_start", 0.61),
        ("vmm_boot_icount", 0.61),
        ("vmm_boot_repeats", 1.011),
        ("vmm_restore", 0.21),
        ("vmm_memory", 5.1),
        ("vmm_block_random", 0.99),
        ("vmm_block_sequential", 0.99),
        ("vmm_vsock_throughput", 0.99),
        ("vmm_fs", 0.99),
        ("vmm_fs_walk", 1.06),
    ],
)
def test_a_ratio_beyond_its_limit_fails(
    figures: ModuleType, records: list[dict[str, Any]], name: str, ratio: float
) -> None:
    _set(records, name, ratio=ratio)
    measured = figures.evaluate(records)
    assert [figure.promise.name for figure in measured if not figure.holds] == [name]
    assert figures.exit_status(measured) == 1


def test_a_reported_figure_has_no_limit(figures: ModuleType, records: list[dict[str, Any]]) -> None:
    _set(records, "create_to_first_byte", ratio=10_000.0)
    assert figures.exit_status(figures.evaluate(records)) == 0


def test_a_figure_nobody_measured_fails(figures: ModuleType, records: list[dict[str, Any]]) -> None:
    without = [record for record in records if record["name"] != "create_to_first_byte"]
    measured = figures.evaluate(without, reasons={"create_to_first_byte": "no containerd"})
    (absent,) = [figure for figure in measured if not figure.holds]
    assert absent.note == "no containerd"
    assert figures.exit_status(measured) == 1


def test_a_reference_of_zero_fails(figures: ModuleType, records: list[dict[str, Any]]) -> None:
    records[0]["reference"] = [0.0]
    assert figures.exit_status(figures.evaluate(records)) == 1


def test_a_record_without_a_promise_is_refused(
    figures: ModuleType, records: list[dict[str, Any]]
) -> None:
    records.append({"name": "start_acton", "ours": [1.0], "reference": [1.0]})
    with pytest.raises(ValueError, match="start_acton"):
        figures.evaluate(records)


def test_one_slow_sample_does_not_decide(
    figures: ModuleType, records: list[dict[str, Any]]
) -> None:
    records[0]["ours"] = [100.0, 110.0, 9000.0]
    (first, *_) = figures.evaluate(records)
    assert first.ratio == pytest.approx(1.1)


def test_the_list_is_json_with_the_agreed_keys(
    figures: ModuleType, records: list[dict[str, Any]]
) -> None:
    listed = [figure.to_json() for figure in figures.evaluate(records[1:])]
    for entry in json.loads(json.dumps(listed, allow_nan=False)):
        assert entry.keys() >= {"name", "ratio", "limit", "better", "holds"}
        assert entry["better"] in {"lower", "higher"}
    assert listed[0]["ratio"] is None
    assert listed[0]["holds"] is False


def test_the_table_is_plain_off_a_terminal(
    figures: ModuleType, records: list[dict[str, Any]]
) -> None:
    measured = figures.evaluate(records)
    assert "\x1b" not in figures.table(measured, is_coloured=False)
    assert "\x1b[32m" in figures.table(measured, is_coloured=True)
