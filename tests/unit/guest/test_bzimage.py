import asyncio
import gzip
import lzma
import shutil
import struct
import subprocess

import pytest

from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.errors import FailedPreconditionError, InvalidArgumentError
from kata_hybrid.guest import tool
from kata_hybrid.guest.bzimage import (
    BzImage,
    PayloadFormat,
    extract_vmlinux,
    parse_bzimage,
    vmlinux_version,
)
from kata_hybrid.guest.tool import Toolbox

KERNEL = b"\x7fELF" + b"Linux version 6.1.0-test (builder) #1" + bytes(5000)
TRAILER = struct.pack("<I", len(KERNEL))


def make_bzimage(payload: bytes, *, length: int | None = None, protocol: int = 0x20F) -> bytes:
    image = bytearray(2 * 512)
    image[0x1F1] = 1
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, protocol)
    struct.pack_into("<H", image, 0x20E, 0x100)
    image[0x300:0x320] = b"6.1.0-test (builder) #1".ljust(32, b"\0")
    struct.pack_into("<II", image, 0x248, 16, len(payload) if length is None else length)
    return bytes(image) + bytes(16) + payload


def extract(bzimage: BzImage) -> bytes:
    async def run() -> bytes:
        reaper = ProcessReaper()
        try:
            return await extract_vmlinux(bzimage, name="k", tools=Toolbox(reaper))
        finally:
            reaper.close()

    return asyncio.run(run())


def test_version_is_read_from_the_header() -> None:
    assert parse_bzimage(make_bzimage(gzip.compress(KERNEL)), name="k").version == "6.1.0-test"


def test_gzip_payload() -> None:
    assert extract(parse_bzimage(make_bzimage(gzip.compress(KERNEL)), name="k")) == KERNEL


def test_xz_payload_with_its_size_trailer() -> None:
    image = make_bzimage(lzma.compress(KERNEL) + TRAILER)
    assert extract(parse_bzimage(image, name="k")) == KERNEL


@pytest.mark.parametrize(
    ("program", "options"), [("lz4", ["-l", "-q", "-c"]), ("zstd", ["-q", "-c"])]
)
def test_payload_that_needs_a_tool(program: str, options: list[str]) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    packed = subprocess.run(
        [program, *options], input=KERNEL, check=True, capture_output=True
    ).stdout
    assert extract(parse_bzimage(make_bzimage(packed + TRAILER), name="k")) == KERNEL


def test_a_tool_that_is_not_installed_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tool, "find_tool", lambda _tool: None)
    image = BzImage(
        version="6", payload=b"\x02\x21\x4c\x18" + TRAILER, payload_format=PayloadFormat.LZ4_LEGACY
    )
    with pytest.raises(FailedPreconditionError, match="apt-get install lz4"):
        extract(image)


def test_damaged_payload_is_refused() -> None:
    packed = lzma.compress(KERNEL)
    image = make_bzimage(packed[:40] + bytes(40) + packed[80:] + TRAILER)
    with pytest.raises(InvalidArgumentError, match="decompress"):
        extract(parse_bzimage(image, name="k"))


def test_payload_without_an_elf_file_is_refused() -> None:
    image = make_bzimage(gzip.compress(b"hello" * 100))
    with pytest.raises(InvalidArgumentError, match="no ELF"):
        extract(parse_bzimage(image, name="k"))


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (b"", "too short"),
        (bytes(4096), "neither an ELF kernel nor"),
        (make_bzimage(b"\x1f\x8b" + bytes(50), length=100000), "outside the file"),
        (make_bzimage(b"\x1f\x8b", length=2), "outside the file"),
        (make_bzimage(b"??" + bytes(50)), "unknown compression"),
        (make_bzimage(gzip.compress(KERNEL), protocol=0x204), "older than 2.08"),
    ],
)
def test_what_is_no_kernel_is_refused_with_the_reason(image: bytes, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        parse_bzimage(image, name="k")


def test_version_of_an_elf_kernel() -> None:
    assert vmlinux_version(KERNEL, name="k") == "6.1.0-test"


def test_an_elf_file_that_is_no_kernel_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="no Linux version"):
        vmlinux_version(b"\x7fELF" + bytes(100), name="k")
