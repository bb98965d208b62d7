"""The Cython side of two benchmarks in Rust: the same items, the same sizes.

- ``vsock_packet_parse``, of ``native/virtio_core/benches/vsock_packet.rs``: one item is one 44-byte
  header, decoded from a contiguous buffer and judged by the device's rules (addresses, type,
  operation, length). 256 headers a call.
- ``virtqueue_walk``, of ``native/virtio_core/benches/ring.rs``: one item is one chain of two
  descriptors (44 + 4096 bytes) taken from the available ring, both descriptors read and checked
  against guest memory, the header copied out and decoded, and the chain put into the used ring.
  128 chains a call.

Each call works on a whole batch inside of Cython, so the interpreter's share of an item is well
below a nanosecond. Divide a call's time by :data:`HEADERS` or :data:`CHAINS`, and criterion's time
of an iteration by the same number: the ratio of the two is Rust against Cython. The reference
trusts nothing it reads either, but it indexes one flat buffer, where the device goes through a
map of memory regions; that difference is part of the figure.
"""

import struct
from pathlib import Path
from types import ModuleType

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from module_file import load_module

HEADERS = 256
"""Headers in a call of ``vsock_packet_parse``."""
CHAINS = 128
"""Chains in a call of ``virtqueue_walk``."""
_GUEST_CID = 3
_QUEUE_SIZE = 256
_TABLE, _AVAILABLE, _USED, _DATA = 0x1000, 0x2000, 0x3000, 0x10000
_MEMORY_SIZE = 0x200000
_HEADER = struct.Struct("<QQIIIHHIII")
_DESCRIPTOR = struct.Struct("<QIHH")


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """Build the Cython module if need be, and load it."""
    recipe = load_module(
        "cython_reference_build", Path(__file__).parent / "cython_reference" / "build.py"
    )
    return load_module("vsock_reference", recipe.build())


def _header(index: int) -> bytes:
    return _HEADER.pack(_GUEST_CID, 2, 1000 + index, 2000 + index, 4096, 1, 5, 0, 65536, index)


def _guest_memory() -> bytearray:
    memory = bytearray(_MEMORY_SIZE)
    for chain in range(CHAINS):
        head, address = chain * 2, _DATA + chain * 0x2000
        at = _TABLE + head * _DESCRIPTOR.size
        _DESCRIPTOR.pack_into(memory, at, address, 44, 1, head + 1)
        _DESCRIPTOR.pack_into(memory, at + _DESCRIPTOR.size, address + 0x1000, 4096, 0, 0)
        memory[address : address + _HEADER.size] = _header(chain)
        struct.pack_into("<H", memory, _AVAILABLE + 4 + chain * 2, head)
    struct.pack_into("<H", memory, _AVAILABLE + 2, CHAINS)
    return memory


def test_vsock_packet_parse(benchmark: BenchmarkFixture, reference: ModuleType) -> None:
    data = b"".join(_header(index) for index in range(HEADERS))
    benchmark.extra_info["items"] = HEADERS
    total = benchmark(reference.parse_batch, data, _GUEST_CID)
    assert total == sum(1000 + index + 4096 for index in range(HEADERS))


def test_virtqueue_walk(benchmark: BenchmarkFixture, reference: ModuleType) -> None:
    memory = _guest_memory()
    benchmark.extra_info["items"] = CHAINS
    arguments = (memory, _QUEUE_SIZE, _TABLE, _AVAILABLE, _USED)
    total = benchmark(reference.walk_batch, *arguments)
    assert total == sum(1000 + chain + 44 + 4096 for chain in range(CHAINS))
    assert struct.unpack_from("<H", memory, _USED + 2) == (CHAINS,)
