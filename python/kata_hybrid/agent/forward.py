"""Connections to the loopback of a pod go on in its guest, as ``kubectl port-forward`` wants them.

An extension of ours to the agent protocol (feature ``port-forward``): on a vsock port the agent
takes the number of a TCP port and a newline, answers with a line, ``OK`` or why not, and connects
the two. Bytes are copied by the native thread.
"""

import asyncio
import logging
import socket
import struct
from typing import Final

from kata_hybrid._native import vsock
from kata_hybrid.aio.events import NativeEvents
from kata_hybrid.aio.supervisor import Supervisor
from kata_hybrid.errors import AgentProtocolError, KataError, UnavailableError

_MAX_CONNECTIONS: Final = 256
_DIAL_MS: Final = 5000
_ANSWER_S: Final = 15.0
"""The agent allows itself five seconds for each of two addresses."""
_MAX_ANSWER_BYTES: Final = 256
_PAUSE_S: Final = 1.0

_log = logging.getLogger(__name__)


class PortForward:
    """Connects the guest's loopback to a listening socket of the host's."""

    def __init__(
        self, io: vsock.IoThread, events: NativeEvents, *, address: str, port: int
    ) -> None:
        """``address``: where vsock ports of the guest are reached; ``port``: the agent's."""
        self._io = io
        self._events = events
        self._address = address
        self._port = port

    async def serve(self, listener: socket.socket) -> None:
        """Take connections, each for the guest's port of its number, until cancelled."""
        loop = asyncio.get_running_loop()
        places = asyncio.Semaphore(_MAX_CONNECTIONS)
        async with Supervisor("port forward") as connections:
            while True:
                await places.acquire()
                try:
                    connection, _ = await loop.sock_accept(listener)
                except OSError as exc:
                    places.release()
                    _log.warning("accept", extra={"error": str(exc)})
                    await asyncio.sleep(_PAUSE_S)
                    continue
                task = connections.start(self._forward(connection), name="forwarded connection")
                task.add_done_callback(lambda _: places.release())

    async def _forward(self, connection: socket.socket) -> None:
        port = connection.getsockname()[1]
        with connection:
            try:
                guest = await self._dial(port)
            except (KataError, OSError, TimeoutError) as exc:
                _log.info("not forwarded", extra={"port": port, "error": str(exc)})
                # A reset, as from a port where nobody listens: not an answer without content.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with guest:
                try:
                    await self._events.call(
                        lambda token: self._io.relay(token, connection.detach(), guest.detach())
                    )
                except KataError as exc:
                    _log.debug("forwarded connection", extra={"port": port, "error": str(exc)})

    async def _dial(self, port: int) -> socket.socket:
        """Connect to a port of the guest's loopback.

        Raises:
            UnavailableError: nobody listens there.
            AgentProtocolError: the agent answers with something else.
            OSError: it does not answer at all, or in time.
        """
        fd = await self._events.call(
            lambda token: self._io.dial(token, self._address, self._port, timeout_ms=_DIAL_MS),
            on_abandoned=_close_descriptor,
        )
        if not isinstance(fd, int):
            message = f"dial returned {type(fd).__name__}, not a descriptor"
            raise AgentProtocolError(message)
        guest = socket.socket(fileno=fd)
        try:
            guest.setblocking(False)  # noqa: FBT003 - the standard library's signature
            async with asyncio.timeout(_ANSWER_S):
                await asyncio.get_running_loop().sock_sendall(guest, b"%d\n" % port)
                answer = await _line(guest)
        except BaseException:
            guest.close()
            raise
        if answer != b"OK":
            guest.close()
            message = f"port {port} of the guest: {answer.decode(errors='replace')}"
            raise UnavailableError(message)
        return guest


async def _line(guest: socket.socket) -> bytes:
    """Read a line, and no byte of what follows it.

    Raises:
        AgentProtocolError: there is none.
    """
    loop = asyncio.get_running_loop()
    line = b""
    while len(line) < _MAX_ANSWER_BYTES:
        byte = await loop.sock_recv(guest, 1)
        if byte == b"\n":
            return line
        if not byte:
            break
        line += byte
    message = f"the agent's answer is no line: {line!r}"
    raise AgentProtocolError(message)


def _close_descriptor(fd: object) -> None:
    if isinstance(fd, int):
        socket.close(fd)
