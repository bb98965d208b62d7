"""Settings for every suite: what a test lacked may be a skip for a person, never for CI.

``KATA_HYBRID_REQUIRE=integration,vm`` turns a skip of a test with one of these markers into a
failure, so a machine that silently lost its containerd or its guest can't pass. Tests marked
``lab`` run where ``scripts/lab.py`` says so and ``/dev/kvm`` opens, and are skipped elsewhere.
"""

import os
from collections.abc import Generator

import pytest

from harness.containers import KATA_RUNTIME


def pytest_addoption(parser: pytest.Parser) -> None:
    # Here, not in tests/integration: pytest wants options before it looks into directories.
    group = parser.getgroup("integration")
    group.addoption("--runtime", default=KATA_RUNTIME, help="runtime to test (%(default)s)")
    group.addoption(
        "--containerd", choices=["1", "2"], action="append", help="major version(s) to use (all)"
    )
    group.addoption("--critest-focus", default=".", help="which of critest's (expression; all)")


def missing_for_lab() -> str:
    """Say what a test marked ``lab`` lacks here, or return an empty string."""
    if os.environ.get("KATA_HYBRID_LAB") != "1":
        return "needs the lab: make lab"
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"the lab has no usable KVM: {error}"
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("lab") is not None and (missing := missing_for_lab()):
        pytest.skip(missing)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    required = set(filter(None, os.environ.get("KATA_HYBRID_REQUIRE", "").split(",")))
    marks = required & {mark.name for mark in item.iter_markers()}
    if report.skipped and marks and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped, but {', '.join(sorted(marks))} must run here: {reason}"
    return report
