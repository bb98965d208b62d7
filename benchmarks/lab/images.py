"""What the lab's benchmarks run, built outside of the lab into ``build/lab/bench``.

    hello           a kernel that says a word and halts, as large as a real one
    boot            the example ``boot`` of ``vmm_core``, the bare runner: a release build
    boot.img        ``boot_init.c`` and nothing else
    echo.img        the same with the modules of a vsock device, so that it answers
    root.img        fio and busybox: the root of the guests that are measured at work
    test guest      kernel and initrd of the lab's tests (``tests/lab_guest``)

``prepare`` builds, ``find`` says where things are; the lab shares ``build/`` and the checkout. The
root is a disk and not the host's own files, since not every machine here has a shared folder.

    python images.py     (tests/ and python/ on PYTHONPATH)
"""

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kata_hybrid.guest.initrd import make_initrd
from lab_guest.image import BUSYBOX, GuestImage, debian_kernel, guest_image
from tiny_kernel import End, tiny_kernel

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "lab" / "bench"
_SOURCE = Path(__file__).with_name("boot_init.c")
_BUILD_TIMEOUT_S = 900.0
_ECHO_MODULES = ("virtio_mmio", "vmw_vsock_virtio_transport")
_ROOT_FOLDERS = ("bin", "dev", "lib64", "mnt", "proc", "run", "sys", "tmp", "usr/bin")
_APPLETS = ("cat", "grep", "ls", "mkdir", "mount", "sh")
_ROOT_MIB = 160
_HELLO_BYTES = 45 << 20
MARK = b"init: here"
"""What the guests that are timed print first."""


class ImagesError(Exception):
    """Something could not be built; the text says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Paths of everything."""

    runner: Path
    hello: Path
    boot_initrd: Path
    echo_initrd: Path
    root: Path
    guest: GuestImage


def find() -> Images:
    """Say where things are once they are built."""
    return Images(
        runner=FOLDER / "boot",
        hello=FOLDER / "hello",
        boot_initrd=FOLDER / "boot.img",
        echo_initrd=FOLDER / "echo.img",
        root=FOLDER / "root.img",
        guest=guest_image(),
    )


def prepare() -> None:
    """Build everything anew. Outside of the lab.

    Raises:
        ImagesError: a build failed.
    """
    images = find()
    FOLDER.mkdir(parents=True, exist_ok=True)
    images.runner.unlink(missing_ok=True)
    # A copy, since cargo may have its folder anywhere; a link would do on one file system only.
    shutil.copy(_build_runner(), images.runner)
    images.hello.write_bytes(tiny_kernel(MARK, end=End.HALT, pvh_size=_HELLO_BYTES))
    with tempfile.TemporaryDirectory() as scratch:
        init = Path(scratch) / "init"
        _run(["cc", "-O2", "-Wall", "-static", "-o", os.fspath(init), os.fspath(_SOURCE)])
        content = make_initrd(init=init.read_bytes(), agent=b"", kernel_version="none", modules=())
        images.boot_initrd.write_bytes(content)
        images.echo_initrd.write_bytes(_echo_initrd(init.read_bytes()))
        _make_root(images.root, Path(scratch) / "root")


def _build_runner() -> Path:
    done = _run(
        [
            *("cargo", "build", "--release", "--locked", "--message-format=json"),
            *("-p", "vmm_core", "--example", "boot"),
        ]
    )
    for line in done.stdout.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["target"]["name"] == "boot":
            return Path(message["executable"])
    raise ImagesError("cargo built no example named boot")


def _echo_initrd(init: bytes) -> bytes:
    kernel = asyncio.run(debian_kernel(_ECHO_MODULES))
    return make_initrd(init=init, agent=b"", kernel_version=kernel.version, modules=kernel.modules)


def _make_root(image: Path, tree: Path) -> None:
    """Make a disk of fio, the libraries it is linked to, and a shell."""
    for name in _ROOT_FOLDERS:
        (tree / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, tree / "bin" / "busybox")
    for name in _APPLETS:
        (tree / "bin" / name).symlink_to("busybox")
    fio = shutil.which("fio")
    if fio is None:
        raise ImagesError("fio is not installed: run make setup")
    shutil.copy(fio, tree / "usr" / "bin" / "fio")
    for line in _run(["ldd", fio]).stdout.decode().splitlines():
        # "NAME => PATH (ADDRESS)", and the loader as a path alone.
        paths = [Path(word) for word in line.split() if word.startswith("/")]
        for path in paths[-1:]:
            place = tree / path.relative_to("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    image.unlink(missing_ok=True)
    size = f"{_ROOT_MIB}M"
    _run(["/sbin/mke2fs", "-q", "-t", "ext4", "-d", os.fspath(tree), os.fspath(image), size])


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, timeout=_BUILD_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        end = done.stderr.decode(errors="replace").strip()[-500:]
        raise ImagesError(f"{' '.join(command)}: status {done.returncode}: {end}")
    return done


if __name__ == "__main__":
    prepare()
