import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.shim import Shim


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: a socket's address has 106 bytes."""
    path = Path(tempfile.mkdtemp(prefix="kh-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def shim(folder: Path) -> Iterator[Shim]:
    shim = Shim(folder)
    yield shim
    shim.close()


@pytest.fixture
def listener(folder: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "listener"))
        listener.listen()
        yield listener
