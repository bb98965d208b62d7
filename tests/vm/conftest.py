"""What tests with a real machine need: QEMU, virtiofsd, a guest kernel, a short run directory."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guest_program import Ending, say
from kata_hybrid.config.model import QemuConfig
from kata_hybrid.errors import FailedPreconditionError, InternalError
from kata_hybrid.guest.build import build_guest
from kata_hybrid.hypervisor.probe import find_qemu, find_virtiofsd

REPOSITORY = Path(__file__).parents[2]
CACHE = Path(os.environ.get("KATA_HYBRID_GUEST_CACHE", REPOSITORY / "build/cache/kernel"))


@pytest.fixture(scope="session")
def qemu() -> Path:
    path = find_qemu(QemuConfig())
    if path is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    return path


@pytest.fixture(scope="session")
def virtiofsd() -> Path:
    path = find_virtiofsd(QemuConfig())
    if path is None:
        pytest.skip("virtiofsd is not installed")
    return path


GuestMaker = Callable[[Path, Path], Path]


@pytest.fixture(scope="session")
def make_guest(tmp_path_factory: pytest.TempPathFactory) -> GuestMaker:
    """Build a guest of Debian's kernel with the given init and agent."""

    def make(init: Path, agent: Path) -> Path:
        folder = tmp_path_factory.mktemp("guest")
        try:
            asyncio.run(
                build_guest(
                    folder,
                    agent=agent,
                    init=init,
                    cache_dir=CACHE,
                    progress=lambda _step: None,
                )
            )
        except (FailedPreconditionError, InternalError) as error:
            pytest.skip(f"no guest kernel: {error}")
        return folder

    return make


@pytest.fixture(scope="session")
def guest_dir(make_guest: GuestMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guest of Debian's kernel whose init does nothing."""
    program = tmp_path_factory.mktemp("program") / "init"
    program.write_bytes(say(b"unused\n", ending=Ending.PAUSE))
    return make_guest(program, program)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A folder with a short path (a socket's holds 107 bytes), and a comma in it for QEMU."""
    folder = Path(tempfile.mkdtemp(prefix="kh,"))
    yield folder
    shutil.rmtree(folder)
