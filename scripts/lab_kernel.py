"""The lab's kernel: Debian's ordinary one, unpacked below ``build/lab``, never installed.

Not the cloud kernel that guests run, which lacks modules that virtme-ng needs (9p). Called by
set-up and by ``scripts/lab.py``. Standard library only.
"""

import lzma
import re
import shutil
import struct
import subprocess
from pathlib import Path

from setup_steps import BUILD, SetupError, run

LAB = BUILD / "lab"
TREE = LAB / "kernel"
META_PACKAGE = "linux-image-amd64"

# The boot protocol's header (Documentation/arch/x86/boot.rst).
_SETUP_SECTORS_AT = 0x1F1
_MAGIC_AT = 0x202
_PAYLOAD_AT = 0x248
_SECTOR = 512
_ELF = b"\x7fELF"


def find_kernel() -> Path:
    """Return the kernel to boot.

    Raises:
        SetupError: set-up has not made it.
    """
    found = sorted((TREE / "boot").glob("vmlinux-*"))
    if not found:
        raise SetupError(f"no kernel below {TREE}: run make setup")
    return found[-1]


def unpack_lab_kernel() -> None:
    """Fetch Debian's kernel and unpack image and modules, ready to boot.

    Raises:
        SetupError: this is not Debian, or the package can't be had or is not as expected.
    """
    if shutil.which("apt-get") is None:
        raise SetupError(f"needs Debian's package {META_PACKAGE} (apt-get download)")
    shutil.rmtree(TREE, ignore_errors=True)
    packages = LAB / "packages"
    shutil.rmtree(packages, ignore_errors=True)
    packages.mkdir(parents=True)
    try:
        run(["apt-get", "-q", "download", _package()], log="lab-kernel", cwd=packages)
    except SetupError:
        run(["apt-get", "-q", "update"], log="apt-update")
        run(["apt-get", "-q", "download", _package()], log="lab-kernel", cwd=packages)
    for archive in packages.glob("*.deb"):
        run(["dpkg-deb", "-x", archive, TREE], log="lab-kernel")
    shutil.rmtree(packages)
    images = sorted((TREE / "boot").glob("vmlinuz-*"))
    if len(images) != 1:
        raise SetupError(f"expected one kernel in {META_PACKAGE}, found {len(images)}")
    version = images[0].name.removeprefix("vmlinuz-")
    # The package's own script would do this on installation.
    run(["depmod", "-b", TREE, version], log="lab-kernel")
    (TREE / "boot" / f"vmlinux-{version}").write_bytes(extract_elf(images[0].read_bytes()))


def extract_elf(image: bytes) -> bytes:
    """Return the ELF kernel in a bzImage: the emulator would need seconds to decompress it.

    Raises:
        SetupError: the image is not a bzImage with an XZ payload, as Debian's is.
    """
    if image[_MAGIC_AT : _MAGIC_AT + 4] != b"HdrS":
        raise SetupError("the lab's kernel is not a bzImage")
    offset, length = struct.unpack_from("<II", image, _PAYLOAD_AT)
    start = (image[_SETUP_SECTORS_AT] + 1) * _SECTOR + offset
    try:
        # Some bytes after the stream are the kernel's own, so not lzma.decompress.
        kernel = lzma.LZMADecompressor().decompress(image[start : start + length])
    except lzma.LZMAError as error:
        raise SetupError(f"the lab's kernel can't be decompressed: {error}") from error
    if not kernel.startswith(_ELF):
        raise SetupError("the lab's kernel is not an ELF file after decompression")
    return kernel


def _package() -> str:
    """Return the package that the meta package stands for now."""
    asked = ["apt-cache", "depends", META_PACKAGE]
    told = subprocess.run(asked, capture_output=True, text=True, check=False)
    found = re.search(r"Depends: (linux-image-\S+)", told.stdout)
    if found is None:
        raise SetupError(f"apt-cache knows no {META_PACKAGE}; it said: {told.stderr.strip()}")
    return found.group(1)
