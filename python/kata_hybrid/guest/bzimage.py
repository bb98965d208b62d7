"""The ELF kernel inside a bzImage, and the version either of them carries.

QEMU boots an ELF ``vmlinux`` with a PVH note directly: no firmware, no decompression in the guest.
The offsets are those of the x86 boot protocol (``Documentation/arch/x86/boot.rst``). LZ4 and zstd,
which Python's library lacks, go through their command line tools; :mod:`.build` calls this while
building, never a running shim.
"""

import bz2
import gzip
import lzma
import re
import struct
import zlib
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from kata_hybrid.errors import InternalError, InvalidArgumentError
from kata_hybrid.guest.tool import Tool, Toolbox

ELF_MAGIC = b"\x7fELF"
_BOOT_FLAG_OFFSET = 0x1FE
_BOOT_FLAG = 0xAA55
_HEADER_MAGIC_OFFSET = 0x202
_HEADER_MAGIC = b"HdrS"
_PROTOCOL_WITH_PAYLOAD = 0x208
_SECTOR_BYTES = 512
_SIZE_TRAILER_BYTES = 4
"""Every payload but gzip's has its uncompressed size appended (scripts/Makefile.lib)."""
_MAX_VMLINUX_BYTES = 512 << 20
_BANNER = re.compile(rb"Linux version (\S+)")
_KERNEL_NOTE_SCAN_BYTES = 64 << 20


class PayloadFormat(Enum):
    """How a bzImage's payload is compressed, by its first bytes."""

    GZIP = b"\x1f\x8b"
    XZ = b"\xfd7zXZ\x00"
    ZSTD = b"\x28\xb5\x2f\xfd"
    LZ4_LEGACY = b"\x02\x21\x4c\x18"
    BZIP2 = b"BZh"
    NONE = ELF_MAGIC


@dataclass(frozen=True, slots=True, kw_only=True)
class BzImage:
    """What the header of a bzImage says."""

    version: str
    payload: bytes
    payload_format: PayloadFormat


def parse_bzimage(image: bytes, *, name: str) -> BzImage:
    """Find the compressed kernel in a bzImage.

    Raises:
        InvalidArgumentError: not a bzImage, or one whose header points outside it.
    """
    if len(image) < _HEADER_MAGIC_OFFSET + 0x4E:
        msg = f"{name}: too short for a Linux kernel ({len(image)} bytes)"
        raise InvalidArgumentError(msg)
    (boot_flag,) = struct.unpack_from("<H", image, _BOOT_FLAG_OFFSET)
    magic = image[_HEADER_MAGIC_OFFSET : _HEADER_MAGIC_OFFSET + 4]
    if boot_flag != _BOOT_FLAG or magic != _HEADER_MAGIC:
        msg = f"{name}: neither an ELF kernel nor an x86 bzImage"
        raise InvalidArgumentError(msg)
    protocol, version_pointer = struct.unpack_from("<H6xH", image, 0x206)
    if protocol < _PROTOCOL_WITH_PAYLOAD:
        msg = f"{name}: boot protocol {protocol:#x} is older than 2.08"
        raise InvalidArgumentError(msg)
    setup_sectors = image[0x1F1] or 4
    payload_offset, payload_length = struct.unpack_from("<II", image, 0x248)
    begin = (setup_sectors + 1) * _SECTOR_BYTES + payload_offset
    payload = image[begin : begin + payload_length]
    if len(payload) != payload_length or payload_length <= _SIZE_TRAILER_BYTES:
        msg = f"{name}: the kernel payload lies outside the file"
        raise InvalidArgumentError(msg)
    return BzImage(
        version=_version_string(image, version_pointer),
        payload=payload,
        payload_format=_payload_format(payload, name=name),
    )


def _version_string(image: bytes, pointer: int) -> str:
    begin = pointer + _SECTOR_BYTES
    end = image.find(b"\0", begin, begin + 256)
    words = image[begin:end].decode("ascii", "replace").split() if pointer and end > 0 else []
    return words[0] if words else ""


def _payload_format(payload: bytes, *, name: str) -> PayloadFormat:
    for candidate in PayloadFormat:
        if payload.startswith(candidate.value):
            return candidate
    msg = f"{name}: unknown compression of the kernel payload (it begins with {payload[:6].hex()})"
    raise InvalidArgumentError(msg)


async def extract_vmlinux(bzimage: BzImage, *, name: str, tools: Toolbox) -> bytes:
    """Decompress the ELF kernel.

    Raises:
        InvalidArgumentError: the payload is damaged or holds no ELF file.
        FailedPreconditionError: the tool for this compression is not installed.
    """
    stream = bzimage.payload
    (declared_size,) = struct.unpack_from("<I", stream, len(stream) - _SIZE_TRAILER_BYTES)
    if declared_size > _MAX_VMLINUX_BYTES:
        msg = f"{name}: the payload declares {declared_size} bytes"
        raise InvalidArgumentError(msg)
    if bzimage.payload_format not in {PayloadFormat.GZIP, PayloadFormat.NONE}:
        stream = stream[:-_SIZE_TRAILER_BYTES]
    try:
        vmlinux = await _decompress(stream, bzimage.payload_format, tools=tools)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, InternalError) as error:
        msg = f"{name}: decompress the kernel payload"
        raise InvalidArgumentError(msg) from error
    if not vmlinux.startswith(ELF_MAGIC):
        msg = f"{name}: the kernel payload holds no ELF file"
        raise InvalidArgumentError(msg)
    return vmlinux


async def _decompress(stream: bytes, payload_format: PayloadFormat, *, tools: Toolbox) -> bytes:
    match payload_format:
        case PayloadFormat.GZIP:
            return gzip.decompress(stream)
        case PayloadFormat.XZ:
            return lzma.decompress(stream)
        case PayloadFormat.BZIP2:
            return bz2.decompress(stream)
        case PayloadFormat.ZSTD:
            return await tools.run(Tool.ZSTD, ("-d", "-q", "-c"), data=stream)
        case PayloadFormat.LZ4_LEGACY:
            return await tools.run(Tool.LZ4, ("-d", "-q", "-c"), data=stream)
        case PayloadFormat.NONE:
            return stream


def vmlinux_version(vmlinux: bytes, *, name: str) -> str:
    """Read the version from the banner every kernel carries (``Linux version X``).

    Raises:
        InvalidArgumentError: the file has none.
    """
    found = _BANNER.search(vmlinux[:_KERNEL_NOTE_SCAN_BYTES])
    if found is None:
        msg = f"{name}: no Linux version in this file"
        raise InvalidArgumentError(msg)
    return found.group(1).decode("ascii", "replace")


def is_elf(path: Path) -> bool:
    """Say whether a file begins like an ELF file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(len(ELF_MAGIC)) == ELF_MAGIC
