"""What the lab's benchmarks run, built outside of the lab into ``build/lab/bench``.

    runner       the example ``boot`` of ``vmm_core``, a release build
    boot initrd  ``boot_init.c`` and nothing else
    test guest   kernel and initrd of the lab's tests (``tests/lab_guest``)

``prepare`` builds, ``find`` says where things are; the lab shares ``build/`` and the checkout.
"""

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kata_hybrid.guest.initrd import make_initrd
from lab_guest.image import GuestImage, guest_image

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "lab" / "bench"
_SOURCE = Path(__file__).with_name("boot_init.c")
_BUILD_TIMEOUT_S = 900.0


class ImagesError(Exception):
    """Something could not be built; the text says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Paths of everything."""

    runner: Path
    boot_initrd: Path
    guest: GuestImage


def find() -> Images:
    """Say where things are once they are built."""
    return Images(runner=FOLDER / "boot", boot_initrd=FOLDER / "initrd.img", guest=guest_image())


def prepare() -> None:
    """Build what is missing or old. Outside of the lab.

    Raises:
        ImagesError: a build failed.
    """
    images = find()
    FOLDER.mkdir(parents=True, exist_ok=True)
    images.runner.unlink(missing_ok=True)
    # A copy, since cargo may have its folder anywhere; a link would do on one file system only.
    images.runner.write_bytes(_build_runner().read_bytes())
    images.runner.chmod(0o755)
    with tempfile.TemporaryDirectory() as scratch:
        init = Path(scratch) / "init"
        _run(["cc", "-O2", "-static", "-o", os.fspath(init), os.fspath(_SOURCE)])
        content = make_initrd(init=init.read_bytes(), agent=b"", kernel_version="none", modules=())
    images.boot_initrd.write_bytes(content)


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
    message = "cargo built no example named boot"
    raise ImagesError(message)


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, timeout=_BUILD_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        end = done.stderr.decode(errors="replace").strip()[-500:]
        message = f"{' '.join(command)}: status {done.returncode}: {end}"
        raise ImagesError(message)
    return done


if __name__ == "__main__":
    prepare()
