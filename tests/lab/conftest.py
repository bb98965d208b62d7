"""What tests with a real machine of ours need: a KVM that runs Linux, root, the test guest.

``make lab`` runs them in a machine that has all of it (``scripts/lab.py``); elsewhere they are
skipped with what is missing. Booting takes seconds there, so most tests share one machine, which
has a device of each kind.
"""

import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from kata_hybrid._native import vmm
from lab_guest.ext4 import mounted_ext4
from lab_guest.image import GuestImage, ImageError, guest_image
from lab_guest.machine import Machine
from lab_guest.network import CARD, JUMBO_MTU, MAC, bridged_tap
from lab_guest.restored import CHECKS, describe

CACHES: tuple[Literal["never", "auto", "always"], ...] = ("never", "auto", "always")
DISK_MIB = 64
_EXT4_FILES = 200_000
_MOST_DESCRIPTORS = 200_000
_TEST_TIMEOUT_S = 300


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.lab)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(_TEST_TIMEOUT_S))


@pytest.fixture(scope="session")
def image() -> Iterator[GuestImage]:
    """The test guest, where a machine can run it."""
    probe = vmm.probe_kvm()
    if not probe.is_usable:
        pytest.skip(f"{probe.reason} (make lab has a KVM that runs guests)")
    if os.geteuid() != 0:
        pytest.skip("the guest's root is the host's: only root may share it")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        image = guest_image()
    except ImageError as error:
        pytest.skip(str(error))
    # A hundred thousand files are as many descriptors here, and root may have them.
    most = max(limits[1], _MOST_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MOST_DESCRIPTORS, most))
    yield image
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture(scope="session")
def run_dir() -> Iterator[Path]:
    """A folder with a short path: a socket's holds 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="kh-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def ext4(run_dir: Path, image: GuestImage) -> Iterator[Path]:
    """A file system with extended attributes and direct I/O."""
    del image
    with mounted_ext4(run_dir, files=_EXT4_FILES) as folder:
        yield folder


@pytest.fixture(scope="session")
def disks(ext4: Path) -> dict[str, Path]:
    """Images of the shared machine's disks, by their names, in their order."""
    images = {name: ext4 / f"{name}.img" for name in ("io_uring", "sync", "read-only")}
    for path in images.values():
        with path.open("wb") as file:
            file.truncate(DISK_MIB << 20)
    images["read-only"].write_bytes(b"only to be read\n".ljust(1 << 20, b"."))
    return images


@pytest.fixture(scope="session")
def folder(ext4: Path) -> Path:
    """What the shared machine sees in ``/run/never``, ``/run/auto`` and ``/run/always``."""
    path = ext4 / "folder"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def tap(image: GuestImage) -> Iterator[str]:
    """The other end of the shared machine's network card."""
    del image
    with bridged_tap() as name:
        yield name


class SharedMachine:
    """A machine that tests use one after another; one that a test broke is replaced."""

    _up: ClassVar[set["SharedMachine"]] = set()

    def __init__(self, make: Callable[[], Machine], *, folders: Sequence[str]) -> None:
        self._make = make
        self._folders = folders
        self._machine: Machine | None = None

    def get(self) -> Machine:
        """Give the machine, its folders mounted."""
        machine = self._machine
        if machine is not None and (machine.is_in_doubt or not machine.is_running):
            # Whoever broke it may still hold parts of it.
            machine.close(is_checked=False)
            machine = None
        if machine is None:
            machine = self._machine = self._make()
            self._up.add(self)
            machine.start()
            machine.mount(*self._folders)
        return machine

    def close(self) -> None:
        """End it, if there is one, and check that nothing is left.

        While another one is up only that one's check counts, which comes last: what it opens for
        its guest is a descriptor of this process too.
        """
        machine, self._machine = self._machine, None
        self._up.discard(self)
        if machine is not None:
            machine.close(is_checked=not self._up)


@pytest.fixture(scope="session")
def _shared_machine(
    image: GuestImage, run_dir: Path, disks: dict[str, Path], folder: Path, tap: str
) -> Iterator[SharedMachine]:
    def make() -> Machine:
        machine = Machine(image, run_dir)
        machine.vm.add_disk(id="uring-disk", path=disks["io_uring"], engine="io_uring")
        machine.vm.add_disk(id="sync-disk", path=disks["sync"], engine="sync")
        machine.vm.add_disk(id="read-only", path=disks["read-only"], is_read_only=True)
        machine.vm.add_net(id=CARD, tap=tap, mac=MAC, mtu=JUMBO_MTU)
        machine.balloon = machine.vm.add_balloon()
        for cache in CACHES:
            machine.vm.add_folder(tag=cache, folder=folder, cache=cache)
        machine.vm.add_folder(tag="checks", folder=CHECKS, is_read_only=True)
        return machine

    shared = SharedMachine(make, folders=(*CACHES, "checks"))
    yield shared
    shared.close()


@pytest.fixture(scope="session")
def smp_disk(ext4: Path) -> Path:
    """Image of the disk of the machine with four processors."""
    path = ext4 / "smp.img"
    with path.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    return path


@pytest.fixture(scope="session")
def smp_folder(ext4: Path) -> Path:
    """Folder of the machine with four processors."""
    path = ext4 / "smp"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def _shared_smp(
    image: GuestImage, run_dir: Path, smp_disk: Path, smp_folder: Path
) -> Iterator[SharedMachine]:
    place = run_dir / "smp"
    place.mkdir()
    shared = SharedMachine(
        lambda: describe(image, place, disk=smp_disk, folder=smp_folder),
        folders=("shared", "checks"),
    )
    yield shared
    shared.close()


@pytest.fixture
def smp(_shared_smp: SharedMachine) -> Machine:
    """A shared machine with four processors, its folders mounted below ``/run``."""
    return _shared_smp.get()


@pytest.fixture
def guest(_shared_machine: SharedMachine) -> Machine:
    """The shared machine, its folders mounted below ``/run``."""
    return _shared_machine.get()
