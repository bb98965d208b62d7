"""What counts as left by a test."""

import os
from pathlib import Path

import pytest

from harness import leaks


def test_a_namespaces_own_cgroup_is_no_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = "kata-hybrid-demo"
    for path in (f"pids/{namespace}/c1", "pids/other/c2", "memory/kata-hybrid-1"):
        (tmp_path / path).mkdir(parents=True)
    monkeypatch.setattr(leaks, "_CGROUPS", tmp_path)
    found = {os.path.relpath(path, tmp_path) for path in leaks._cgroups(namespace)}
    assert found == {f"pids/{namespace}/c1", "memory/kata-hybrid-1"}
