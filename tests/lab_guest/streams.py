"""Checksummed streams between host and guest; the guest's end is ``program.c``.

Whoever dials sends its bytes and half-closes; the other side sends them back as they come, and at
the end their CRC-32 as text. So bytes, their order, both directions and both half-closes are
checked by each stream.
"""

import asyncio
import os
import random
import socket
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self

TRAILER_BYTES = 9
BACKLOG = 2048


class StreamError(Exception):
    """What came back is not what it should be."""


def trailer(data: bytes) -> bytes:
    """What follows ``data`` that came back."""
    return b"%08x\n" % zlib.crc32(data)


def random_bytes(size: int, *, seed: int) -> bytes:
    """The same bytes each time."""
    return random.Random(seed).randbytes(size)  # noqa: S311 - test data


class HostStream:
    """A stream that the host dials, through the machine's socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Use a connection that the guest has accepted."""
        self._reader = reader
        self._writer = writer

    @classmethod
    async def dial(cls, path: Path, port: int) -> Self:
        """Connect to a port of the guest.

        Raises:
            StreamError: nobody accepts.
        """
        reader, writer = await asyncio.open_unix_connection(os.fspath(path))
        writer.write(b"CONNECT %d\n" % port)
        answer = await reader.readline()
        if not answer.startswith(b"OK "):
            writer.close()
            message = f"port {port} of the guest: {answer!r}"
            raise StreamError(message)
        return cls(reader, writer)

    async def send(self, data: bytes) -> None:
        """Send some, as fast as the guest takes it."""
        self._writer.write(data)
        await self._writer.drain()

    async def receive(self, size: int) -> bytes:
        """Receive exactly so much."""
        return await self._reader.readexactly(size)

    async def exchange(self, data: bytes) -> None:
        """Send all of ``data``, half-close, and check what comes back until the guest closes.

        Raises:
            StreamError: it is not the same.
        """
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(self._reader.read(-1))
            await self.send(data)
            self._writer.write_eof()
        received = reading.result()
        self._writer.close()
        await self._writer.wait_closed()
        if received != data + trailer(data):
            message = f"{len(data)} bytes sent, {len(received)} came back, or not the same"
            raise StreamError(message)

    def close(self) -> None:
        """Give up."""
        self._writer.close()


class GuestStreams:
    """The host's end of streams that the guest dials to ``port``: what "echo" is in the guest."""

    def __init__(self, path: Path, port: int) -> None:
        """Say where: beside the machine's socket, as the hybrid protocol has it."""
        self._path = Path(f"{path}_{port}")
        self._open = 0
        self.most_open = 0
        self.served = 0

    async def __aenter__(self) -> Self:
        self._server = await listen(self._path, self._serve)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        await self._server.wait_closed()
        self._path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        self.most_open = max(self.most_open, self._open)
        try:
            crc = 0
            while data := await reader.read(65536):
                crc = zlib.crc32(data, crc)
                writer.write(data)
                await writer.drain()
            writer.write(b"%08x\n" % crc)
            await writer.drain()
            self.served += 1
        finally:
            self._open -= 1
            writer.close()


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def listen(path: Path, serve: Serve) -> asyncio.Server:
    """Listen with room for many that come at once; asyncio's own way has room for 100."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener.bind(os.fspath(path))
    return await asyncio.start_unix_server(serve, sock=listener, backlog=BACKLOG)
