"""A folder mounted below the shared one while the guest runs is seen by the guest."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.vm

HERE = Path(__file__).parent


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to build the guest program with")
    program = tmp_path / "reader"
    source = HERE / "share_reader.c"
    subprocess.run(["cc", "-O1", "-static", "-o", program, source], check=True, timeout=60)
    return program


def test_a_late_mount_reaches_the_guest(
    reader: Path,
    make_guest: Callable[[Path, Path], Path],
    run_dir: Path,
    qemu: Path,
    virtiofsd: Path,
) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    guest = make_guest(reader, reader)
    scenario: list[str | Path] = [
        sys.executable,
        HERE / "share_scenario.py",
        guest,
        run_dir,
        qemu,
        virtiofsd,
    ]
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "shared", "--", *scenario],
        capture_output=True,
        text=True,
        timeout=58,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "found: mounted late" in done.stdout
    assert "written: guest" in done.stdout
    assert "guest-shutdown" in done.stdout
    assert "module " not in done.stdout
