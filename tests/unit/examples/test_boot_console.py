import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_kernel import End, tiny_kernel

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "boot_console.py"


@pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm cannot be opened here"
)
def test_the_example_prints_the_console_and_the_end(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(tiny_kernel(b"hello from the guest\n", end=End.POWER_OFF))
    done = subprocess.run(
        [sys.executable, EXAMPLE, kernel], capture_output=True, text=True, timeout=30, check=True
    )
    first, last = done.stdout.splitlines()
    assert first == "hello from the guest"
    assert last.startswith("<VmExit reason=guest-shutdown")
