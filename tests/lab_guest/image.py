"""Kernel and initrd of the test guest, made by the package's own code and kept below ``build/``.

Made on the host before the lab starts (unpacking a kernel package in an emulated machine takes
minutes), found again in the lab; a machine that needs no lab makes them when the tests first ask.

    python -m lab_guest.image     (tests/ and python/ on PYTHONPATH)
"""

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.errors import KataError
from kata_hybrid.guest.initrd import make_initrd
from kata_hybrid.guest.kernel import kernel_from_debian
from kata_hybrid.guest.modules import Module, scan_tree, select_modules
from kata_hybrid.guest.tool import Toolbox
from kata_hybrid.persist import atomic

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
IMAGE = REPOSITORY / "build/lab/guest"
CACHE = Path(os.environ.get("KATA_HYBRID_GUEST_CACHE", REPOSITORY / "build/cache/kernel"))
BUSYBOX = Path("/bin/busybox")
MODULES = (
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtiofs",
    "vmw_vsock_virtio_transport",
    "virtio_balloon",
    "virtio_rng",
)
_SOURCES = tuple(HERE / name for name in ("image.py", "init.sh", "program.c"))


class ImageError(Exception):
    """The guest cannot be made here; the text says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestImage:
    """What a machine boots."""

    kernel: Path
    initrd: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel out of a package."""

    version: str
    vmlinux: bytes
    modules: Sequence[Module]
    """In the order in which they can be loaded."""


def guest_image(folder: Path = IMAGE) -> GuestImage:
    """Give the guest in ``folder``, made now if it is not there or its sources changed.

    Raises:
        ImageError: something that it is made of is missing.
    """
    image = GuestImage(kernel=folder / "vmlinux", initrd=folder / "initrd.img")
    stamp = folder / "stamp"
    digest = _digest()
    if not (stamp.is_file() and stamp.read_text() == digest):
        CACHE.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            asyncio.run(_make(image))
        except (KataError, OSError, subprocess.SubprocessError) as error:
            message = f"the test guest cannot be made: {error}"
            raise ImageError(message) from error
        atomic.replace(stamp, digest.encode(), mode=0o644)
    return image


def _digest() -> str:
    state = hashlib.sha256()
    for path in _SOURCES:
        state.update(path.read_bytes())
    for package in sorted(CACHE.glob("*.deb")):
        state.update(package.name.encode())
    return state.hexdigest()


async def _make(image: GuestImage) -> None:
    for program in ("cc", os.fspath(BUSYBOX)):
        if shutil.which(program) is None:
            message = f"{program} is not installed"
            raise ImageError(message)
    kernel = await debian_kernel(MODULES)
    initrd = await _initrd(kernel)
    atomic.replace(image.kernel, kernel.vmlinux, mode=0o644)
    atomic.replace(image.initrd, initrd, mode=0o644)


async def debian_kernel(modules: Sequence[str]) -> Kernel:
    """Unpack Debian's kernel, with these modules and what they need.

    Raises:
        ImageError: it has none.
        KataError: the package cannot be had or unpacked.
    """
    reaper = ProcessReaper()
    try:
        with tempfile.TemporaryDirectory(dir=CACHE, prefix=".unpack-") as scratch:
            tools = Toolbox(reaper)
            source = await kernel_from_debian(
                CACHE, scratch=Path(scratch), progress=_say, tools=tools
            )
            if source.modules is None:
                message = f"{source.source} has no modules"
                raise ImageError(message)
            selected = await select_modules(scan_tree(source.modules), wanted=modules, tools=tools)
    finally:
        reaper.close()
    return Kernel(version=source.version, vmlinux=source.vmlinux, modules=selected)


async def _initrd(kernel: Kernel) -> bytes:
    files = (HERE / "init.sh", BUSYBOX)
    init, busybox = [await asyncio.to_thread(path.read_bytes) for path in files]
    program = await asyncio.to_thread(_compile)
    return make_initrd(
        init=init,
        agent=program,
        kernel_version=kernel.version,
        modules=kernel.modules,
        extra_programs=(("bin/busybox", busybox),),
    )


def _compile() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program"
        flags = ("-O2", "-Wall", "-Wextra", "-Werror", "-static")
        argv = ("cc", *flags, "-o", program, HERE / "program.c")
        subprocess.run(argv, check=True, timeout=120)
        return program.read_bytes()


def _say(step: str) -> None:
    sys.stderr.write(f"test guest: {step}\n")


if __name__ == "__main__":
    guest_image()
