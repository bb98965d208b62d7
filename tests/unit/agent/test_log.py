import asyncio
import logging
import socket
from collections.abc import Iterable

import pytest

from harness.loop import on_loop
from kata_hybrid.agent.log import forward

LOGGER = "kata_hybrid.guest.agent"


async def logged(
    pieces: Iterable[bytes], caplog: pytest.LogCaptureFixture
) -> list[tuple[int, str]]:
    """Return level and message of what is logged when a guest sends ``pieces`` and leaves."""
    ours, guest = socket.socketpair()
    with caplog.at_level(logging.DEBUG, logger=LOGGER):
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            group.create_task(forward(ours))
            with guest:
                guest.setblocking(False)  # noqa: FBT003 - the standard library's signature
                for piece in pieces:
                    await asyncio.get_running_loop().sock_sendall(guest, piece)
    return [(record.levelno, record.getMessage()) for record in caplog.records]


@on_loop
async def test_levels_of_the_agent_are_translated(caplog: pytest.LogCaptureFixture) -> None:
    lines = [
        b'{"level":"ERRO","msg":"bad"}\n',
        b'{"level":"WARN","msg":"odd"}\n',
        b'{"level":"INFO","msg":"fine"}\n',
    ]
    assert await logged(lines, caplog) == [
        (logging.ERROR, "bad"),
        (logging.WARNING, "odd"),
        (logging.DEBUG, "fine"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"plain text\n", "plain text"),
        (b"[1, 2]\n", "[1, 2]"),
        (b'{"level": {"a": 1}, "msg": ["x"]}\n', "['x']"),
        (b'{"level":"ERRO"', '{"level":"ERRO"'),
        (b"\xff\xfe\n", "\ufffd\ufffd"),
        (b"%s %d %n\n", "%s %d %n"),
        (b"[" * 9000 + b"\n", "[" * 9000),
    ],
)
@on_loop
async def test_a_line_that_is_no_record_is_logged_as_it_is(
    line: bytes, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert await logged([line], caplog) == [(logging.DEBUG, message)]


@on_loop
async def test_a_line_in_pieces_is_one_record(caplog: pytest.LogCaptureFixture) -> None:
    assert await logged([b'{"msg"', b':"whole"}', b"\n"], caplog) == [(logging.DEBUG, "whole")]


@on_loop
async def test_an_endless_line_is_cut_and_the_next_is_read(
    caplog: pytest.LogCaptureFixture,
) -> None:
    records = await logged([b"x" * 100_000 + b"\n", b"after\n"], caplog)
    assert records[-1] == (logging.DEBUG, "after")
    assert sum(message.count("x") for _, message in records) == 100_000
    assert max(len(message) for _, message in records) == 16 << 10


@on_loop
async def test_a_flood_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    records = await logged([b"line\n" * 5000], caplog)
    # A second may begin while they arrive, so up to two seconds' worth.
    assert 200 <= len(records) <= 402


@on_loop
async def test_a_connection_without_a_line_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert await logged([], caplog) == []
