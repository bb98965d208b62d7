"""The vsock device's reading of packets and rings against a second implementation of the text.

The Rust side answers through the example program ``packet_oracle``; the other side is the Cython
module of ``benchmarks/cython_reference``, written from the specification alone. Rings are drawn
mostly well-formed, with faults mixed in, so that the walk gets past the first check.
"""

import importlib.util
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from module_file import load_module

_ROOT = Path(__file__).resolve().parents[2]
_BUILD_TIMEOUT_S = 600
_CID = 3
_QUEUE_SIZE = 8
_TABLE, _AVAILABLE, _USED, _DATA, _MEMORY_SIZE = 0x0, 0x100, 0x200, 0x400, 0x1000
_HEADER = struct.Struct("<QQIIIHHIII")

pytestmark = pytest.mark.timeout(2 * _BUILD_TIMEOUT_S)
_SETTINGS = settings(
    deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

Chain = tuple[int, bool | None, list[tuple[int, int, bool]]]


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    if importlib.util.find_spec("Cython") is None:
        pytest.skip("Cython is not installed")
    recipe = load_module(
        "cython_reference_build", _ROOT / "benchmarks" / "cython_reference" / "build.py"
    )
    return load_module("vsock_reference", recipe.build())


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle:
    """The Rust side: one line in, one line out."""

    process: subprocess.Popen[str]

    def ask(self, question: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the oracle ended with {self.process.poll()} on: {question}"
        return answer.strip()


@pytest.fixture(scope="session")
def oracle() -> Iterator[Oracle]:
    cargo = shutil.which("cargo")
    if cargo is None:
        pytest.skip("cargo is not installed")
    command = [cargo, "build", "--quiet", "--message-format=json", "-p", "virtio_core"]
    built = subprocess.run(
        [*command, "--example", "packet_oracle"],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=_BUILD_TIMEOUT_S,
    )
    messages = [json.loads(line) for line in built.stdout.splitlines()]
    (executable,) = [
        message["executable"]
        for message in messages
        if message.get("executable") and message["target"]["name"] == "packet_oracle"
    ]
    with subprocess.Popen(
        [os.fspath(executable)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Oracle(process=process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=10) == 0


_FIELDS = st.tuples(
    st.one_of(st.just(_CID), st.integers(0, 2**64 - 1)),
    st.one_of(st.just(2), st.integers(0, 2**64 - 1)),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.one_of(st.just(0), st.integers(65530, 65540), st.integers(0, 2**32 - 1)),
    st.one_of(st.just(1), st.integers(0, 2**16 - 1)),
    st.one_of(st.integers(0, 9), st.integers(0, 2**16 - 1)),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
)


@_SETTINGS
@given(fields=_FIELDS)
def test_both_read_write_and_judge_a_header_alike(
    reference: ModuleType, oracle: Oracle, fields: tuple[int, ...]
) -> None:
    data = _HEADER.pack(*fields)
    assert reference.parse_header(data) == fields
    assert reference.serialise_header(fields) == data
    *numbers, encoded, verdict = oracle.ask(f"header {_CID} {data.hex()}").split()
    assert tuple(map(int, numbers)) == fields
    assert bytes.fromhex(encoded) == data
    assert (verdict == "accepted") == reference.accepts(data, _CID)


@_SETTINGS
@given(data=st.binary(max_size=60))
def test_both_refuse_the_same_short_headers(
    reference: ModuleType, oracle: Oracle, data: bytes
) -> None:
    if len(data) >= _HEADER.size:
        fields = oracle.ask(f"header {_CID} {data.hex()}").split()[:-2]
        assert tuple(map(int, fields)) == reference.parse_header(data)
        return
    assert oracle.ask(f"header {_CID} {data.hex()}") == "truncated"
    with pytest.raises(ValueError, match="no header"):
        reference.parse_header(data)


@st.composite
def _descriptor(draw: st.DrawFn) -> bytes:
    flags = draw(st.sampled_from([0, 1, 1, 1, 2, 3, 4, 5, 6]))
    is_indirect = flags & 4
    # Never in the used ring: the device writes there while it walks.
    address = draw(
        st.one_of(
            st.integers(_DATA, _MEMORY_SIZE - 1),
            st.sampled_from([_MEMORY_SIZE - 1, _MEMORY_SIZE, 2**63, 2**64 - 1, 2**64 - 16]),
        )
    )
    if is_indirect:
        address = draw(
            st.sampled_from([_DATA, _DATA + 8, _MEMORY_SIZE - 32, _MEMORY_SIZE, address])
        )
        len_strategy = st.sampled_from(
            [16, 32, 48, 64, 0, 8, 17, 16 * 65535, 16 * 65536, 2**32 - 16]
        )
    else:
        len_strategy = st.one_of(
            st.integers(0, 200), st.sampled_from([_MEMORY_SIZE, 2**31, 2**32 - 1])
        )
    following = draw(st.one_of(st.integers(0, _QUEUE_SIZE), st.integers(0, 2**16 - 1)))
    return struct.pack("<QIHH", address, draw(len_strategy), flags, following)


@st.composite
def _guest_memory(draw: st.DrawFn) -> bytes:
    memory = bytearray(_MEMORY_SIZE)
    table = b"".join(draw(st.lists(_descriptor(), min_size=_QUEUE_SIZE, max_size=_QUEUE_SIZE)))
    memory[_TABLE : _TABLE + len(table)] = table
    indirect = b"".join(draw(st.lists(_descriptor(), min_size=6, max_size=6)))
    memory[_DATA : _DATA + len(indirect)] = indirect
    memory[-32:] = b"".join(draw(st.lists(_descriptor(), min_size=2, max_size=2)))
    count = draw(st.one_of(st.integers(0, _QUEUE_SIZE), st.sampled_from([_QUEUE_SIZE + 1, 65535])))
    heads = draw(
        st.lists(
            st.one_of(
                st.integers(0, _QUEUE_SIZE - 1),
                st.integers(0, _QUEUE_SIZE - 1),
                st.sampled_from([_QUEUE_SIZE, 65535]),
            ),
            min_size=_QUEUE_SIZE,
            max_size=_QUEUE_SIZE,
        )
    )
    struct.pack_into(f"<HH{_QUEUE_SIZE}H", memory, _AVAILABLE, 0, count, *heads)
    return bytes(memory)


def _read_chains(answer: str) -> list[Chain] | None:
    if answer == "ring":
        return None
    word, *parts = answer.split(" ")
    assert word == "chains", answer
    verdicts = {"sound": True, "broken": False, "invalid": None}
    chains: list[Chain] = []
    for part in parts:
        head, verdict, text = part.split(":")
        descriptors = []
        for item in filter(None, text.split(";")):
            address, length, direction = item.split(",")
            descriptors.append((int(address), int(length), direction == "w"))
        chains.append((int(head), verdicts[verdict], descriptors))
    return chains


@_SETTINGS
@given(memory=_guest_memory())
def test_both_walk_a_ring_alike(reference: ModuleType, oracle: Oracle, memory: bytes) -> None:
    question = f"walk {_QUEUE_SIZE} {_TABLE} {_AVAILABLE} {_USED} {memory.hex()}"
    expected = reference.walk_ring(memory, _QUEUE_SIZE, _TABLE, _AVAILABLE, _USED)
    assert _read_chains(oracle.ask(question)) == expected
