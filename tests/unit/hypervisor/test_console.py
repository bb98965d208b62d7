import asyncio
import os
from collections.abc import Awaitable, Callable

from hypothesis import given
from hypothesis import strategies as st

from kata_hybrid.hypervisor.console import OutputReader

DEADLINE_S = 10.0


def read_all(data: bytes, *, tail_bytes: int = 65536) -> tuple[str, list[str]]:
    """Send data through a pipe into a reader; return its tail and its lines."""
    lines: list[str] = []

    async def run() -> str:
        read_end, write_end = os.pipe()
        reader = OutputReader(read_end, sink=lines.append, tail_bytes=tail_bytes)
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.to_thread(write_and_close, write_end, data)
            await reader.ended()
        reader.close()
        return reader.tail()

    return asyncio.run(run()), lines


def write_and_close(fd: int, data: bytes) -> None:
    with os.fdopen(fd, "wb") as file:
        file.write(data)


def test_lines_arrive_whole_and_the_last_without_its_end() -> None:
    assert read_all(b"one\r\ntwo\n\nlast")[1] == ["one", "two", "last"]


def test_the_tail_is_bounded_and_is_the_end() -> None:
    tail, _lines = read_all(b"x" * 5000 + b"\nthe end\n", tail_bytes=100)
    assert len(tail) <= 100
    assert tail.endswith("the end")


def test_terminal_escapes_are_made_harmless() -> None:
    _tail, lines = read_all(b"\x1b[2Jcleared\x07\n")
    assert lines == ["\ufffd[2Jcleared\ufffd"]


def test_a_line_without_end_is_cut() -> None:
    _tail, lines = read_all(b"y" * 300_000 + b"\nnext\n")
    assert [len(line) for line in lines] == [1024, 4]


def test_a_flood_is_counted_not_logged() -> None:
    _tail, lines = read_all(b"".join(b"line %d\n" % index for index in range(50_000)))
    assert len(lines) < 5000
    assert any("lines dropped" in line for line in lines)


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_any_bytes_become_printable_lines(chunks: list[bytes]) -> None:
    tail, lines = read_all(b"\n".join(chunks))
    assert all(line.isprintable() for line in lines)
    assert all(char.isprintable() or char == "\n" for char in tail)


def with_reader(use: Callable[[OutputReader, int], Awaitable[None]]) -> None:
    async def run() -> None:
        read_end, write_end = os.pipe()
        reader = OutputReader(read_end, sink=None)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await use(reader, write_end)
        finally:
            os.close(write_end)
            reader.close()

    asyncio.run(run())


def test_close_takes_what_is_there_and_releases_the_descriptor() -> None:
    async def use(reader: OutputReader, write_end: int) -> None:
        os.write(write_end, b"unread")
        reader.close()
        assert reader.tail() == "unread"
        await reader.ended()

    with_reader(use)


def test_close_may_be_repeated() -> None:
    async def use(reader: OutputReader, _write_end: int) -> None:
        reader.close()
        reader.close()
        assert reader.tail() == ""

    with_reader(use)
