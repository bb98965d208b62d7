"""Connections of the host's go on in the guest, for which an agent at a Unix socket stands."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from harness.deadline import wait_until
from harness.leaks import count_descriptors
from harness.loop import on_loop
from kata_hybrid._native import events as native_events
from kata_hybrid._native import vsock
from kata_hybrid.agent.forward import PortForward
from kata_hybrid.aio.events import NativeEvents
from kata_hybrid.aio.supervisor import Supervisor

_TIMEOUT_S = 20.0


class Guest:
    """An agent that answers as a test says, and then echoes."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.asked: list[bytes] = []
        self.tasks: set[asyncio.Task[None] | None] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.add(asyncio.current_task())
        self.asked.append(await reader.readline())
        writer.write(self.answer)
        if self.answer.startswith(b"OK\n"):
            while data := await reader.read(1 << 16):
                writer.write(data.upper())
                await writer.drain()
        await closed(writer)


async def closed(writer: asyncio.StreamWriter) -> None:
    """Close a connection; one that was reset is closed too."""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@contextlib.asynccontextmanager
async def forwarded(folder: Path, guest: Guest) -> AsyncIterator[int]:
    """Serve a port of this host, and give its number."""
    path = folder / "guest.sock"
    server = await asyncio.start_unix_server(guest.serve, path)
    events = NativeEvents(native_events.EventPort())
    io = vsock.IoThread(events.port)
    forward = PortForward(io, events, address=f"unix://{path}", port=1027)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)  # noqa: FBT003 - the standard library's signature
        try:
            async with asyncio.timeout(_TIMEOUT_S), Supervisor("test") as tasks:
                tasks.start(forward.serve(listener), name="forward")
                yield listener.getsockname()[1]
        finally:
            io.close()
            events.close()
            server.close()
            await asyncio.gather(*filter(None, guest.tasks))


@on_loop
async def test_bytes_pass_and_each_direction_ends_by_itself(tmp_path: Path) -> None:
    guest = Guest(b"OK\n")
    async with forwarded(tmp_path, guest) as port:
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"abc" * 100_000)
            writer.write_eof()
            assert await reader.read() == b"ABC" * 100_000
            await closed(writer)
    assert guest.asked == [b"%d\n" % port] * 3


@on_loop
async def test_what_follows_the_answer_is_the_connections(tmp_path: Path) -> None:
    async with forwarded(tmp_path, Guest(b"OK\nwelcome\n")) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.readline() == b"welcome\n"
        await closed(writer)


@pytest.mark.parametrize("answer", [b"connection refused\n", b"", b"OK", b"x" * 300, b"\n"])
@on_loop
async def test_a_port_where_nobody_listens_resets(tmp_path: Path, answer: bytes) -> None:
    async with forwarded(tmp_path, Guest(answer)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        await closed(writer)


@on_loop
async def test_nothing_is_left_of_connections(tmp_path: Path) -> None:
    async with forwarded(tmp_path, Guest(b"OK\n")) as port:
        before = count_descriptors(os.getpid())
        writers = []
        for _ in range(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"a")
            assert await reader.read(1) == b"A"
            writers.append(writer)
        assert count_descriptors(os.getpid()) > before
        for writer in writers:
            await closed(writer)

        def is_as_before() -> bool:
            return count_descriptors(os.getpid()) <= before

        await asyncio.to_thread(wait_until, is_as_before, what="the end", timeout_s=_TIMEOUT_S)
