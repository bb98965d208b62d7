"""Runs a test that mounts in a mount namespace of its own, where nothing can leak from.

The namespace belongs to a thread made for the test and vanishes with it; the rest of the process
stays where it was. ``/proc/self`` is the main thread's: read :func:`mount_points` instead.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec

import pytest

from kata_hybrid._native import host

_P = ParamSpec("_P")


def in_own_mounts(test: Callable[_P, None]) -> Callable[_P, None]:
    """Run ``test`` in a thread with a private mount namespace; skip where that takes root."""

    @functools.wraps(test)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        if os.geteuid() != 0:
            pytest.skip("mounting needs root")

        def work() -> None:
            host.enter_private_mount_namespace()
            test(*args, **kwargs)

        with ThreadPoolExecutor(max_workers=1) as thread:
            thread.submit(work).result()

    return run


def mount_points(below: Path) -> list[Path]:
    """Return what is mounted at or below a folder, as the calling thread sees it."""
    lines = Path("/proc/thread-self/mountinfo").read_text(encoding="utf-8").splitlines()
    points = [Path(line.split()[4].replace("\\040", " ")) for line in lines]
    return [point for point in points if point.is_relative_to(below)]


def make_tmpfs(folder: Path, *, size: str = "16m") -> Path:
    """Make ``folder`` and mount a tmpfs on it."""
    folder.mkdir()
    host.mount("tmpfs", os.fspath(folder), "tmpfs", [f"size={size}"])
    return folder
