"""The ttRPC server: any number of connections, each request its own task.

    bytes ─▶ FrameDecoder ─▶ Request ─▶ task: decode ─▶ handler ─▶ encode ─▶ Response frame

A request never waits for another, so ``Wait`` may stay open while ``Kill`` comes on the same
connection. When a connection ends, calls marked as waiting are cancelled; the others finish, since
what they changed half-way nobody else would complete. A client that does not read its responses is
not read from, and past a limit it is dropped. Event loop thread only.
"""

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError, EncodeError, Message

from kata_hybrid.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnimplementedError,
)
from kata_hybrid.protos import ttrpc_pb2
from kata_hybrid.ttrpc.frame import (
    MAX_PAYLOAD_BYTES,
    Frame,
    FrameDecoder,
    FrameFlags,
    FrameType,
    encode_frame,
)
from kata_hybrid.ttrpc.status import status_of

_LOG = logging.getLogger(__name__)

MAX_REQUESTS_IN_FLIGHT: Final = 4096
"""Per connection; one more is refused, since a queue would hold back a Kill."""
MAX_UNREAD_BYTES: Final = 32 << 20
"""Responses a client may leave unread before it is dropped."""
_HIGH_WATER_BYTES: Final = 1 << 20
_UCRED: Final = struct.Struct("3i")
_NS: Final = 1_000_000_000
_CANCEL_S: Final = 5.0
_MAX_TIMEOUT_S: Final = 10 * 365 * 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method of a service: what it takes, who handles it."""

    request_type: type[Message]
    handler: Callable[[Any], Awaitable[Message]]
    ends_with_client: bool = False
    """Cancelled when its client is gone: it only waits, or undoes itself when cancelled."""


Services = Mapping[str, Mapping[str, Method]]
"""Methods by full service name and bare method name."""


class Server:
    """Serves a fixed set of services on a listening socket."""

    def __init__(self, services: Services) -> None:
        """Serve ``services`` once :meth:`start` is called."""
        self._services = services
        self._listener: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def connection_count(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    @property
    def request_count(self) -> int:
        """How many requests are being handled."""
        return len(self._tasks)

    async def start(self, listener: socket.socket) -> None:
        """Accept connections on ``listener``, which is taken over.

        Raises:
            OSError: it is not a listening Unix stream socket.
        """
        listener.setblocking(False)  # noqa: FBT003 - positional only
        self._listener = await asyncio.get_running_loop().create_unix_server(
            lambda: _Connection(self), sock=listener, backlog=256
        )

    async def close(self, *, timeout_s: float) -> None:
        """Stop accepting, let requests that change something finish, disconnect everybody.

        After ``timeout_s`` they are cancelled. Idempotent.
        """
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for connection in tuple(self._connections):
            connection.refuse_requests()
            connection.cancel_waiting()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            _, stuck = await asyncio.wait(self._tasks, timeout=_CANCEL_S)
            for task in stuck:
                _LOG.error("a call does not end", extra={"task": task.get_name()})
        for connection in tuple(self._connections):
            await connection.close(timeout_s=1.0)

    def _find(self, request: ttrpc_pb2.Request) -> Method:
        methods = self._services.get(request.service)
        if methods is None:
            message = f"service {request.service}"
            raise UnimplementedError(message)
        method = methods.get(request.method)
        if method is None:
            message = f"method {request.method}"
            raise UnimplementedError(message)
        return method


class _Connection(asyncio.Protocol):
    """One client. Its requests are tasks of the server, which outlives it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._decoder = FrameDecoder()
        self._last_stream_id = 0
        self._in_flight = 0
        self._waiting: set[asyncio.Task[None]] = set()
        self._is_refusing = False
        self._gone = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):  # pragma: no cover - asyncio's promise
            transport.close()
            return
        if self._server._listener is None:  # noqa: SLF001 - accepted as the server closed
            transport.abort()
            return
        if (uid := _peer_uid(transport)) != os.geteuid():
            _LOG.warning("refused a connection", extra={"peer_uid": uid})
            transport.abort()
            return
        transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
        self._transport = transport
        self._server._connections.add(self)  # noqa: SLF001 - the two are one unit

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            _LOG.debug("connection lost", extra={"reason": exc})
        self._transport = None
        self._server._connections.discard(self)  # noqa: SLF001
        self.cancel_waiting()
        if not self._gone.done():
            self._gone.set_result(None)

    def data_received(self, data: bytes) -> None:
        for frame in self._decoder.feed(data):
            if frame.type == FrameType.REQUEST:
                self._receive(frame)

    def pause_writing(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None and not self._is_refusing:
            self._transport.resume_reading()

    def refuse_requests(self) -> None:
        """Read nothing more: the server is closing."""
        self._is_refusing = True
        if self._transport is not None:
            self._transport.pause_reading()

    def cancel_waiting(self) -> None:
        """End the calls that only wait."""
        for task in self._waiting:
            task.cancel()

    async def close(self, *, timeout_s: float) -> None:
        """Disconnect once what is buffered has been sent, or after the time."""
        transport = self._transport
        if transport is None:
            return
        transport.close()
        try:
            async with asyncio.timeout(timeout_s):
                await self._gone
        except TimeoutError:
            transport.abort()

    def _receive(self, frame: Frame) -> None:
        """Start the call of one request frame, or answer it at once."""
        try:
            request, method = self._parse(frame)
        except Exception as error:  # noqa: BLE001 - becomes the answer
            self._answer_error(frame.stream_id, error)
            return
        server = self._server
        task = asyncio.get_running_loop().create_task(
            self._run(frame.stream_id, request, method), name=f"ttrpc {request.method}"
        )
        self._in_flight += 1
        server._tasks.add(task)  # noqa: SLF001
        task.add_done_callback(server._tasks.discard)  # noqa: SLF001
        task.add_done_callback(self._finish)
        if method.ends_with_client:
            self._waiting.add(task)

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._in_flight -= 1
        self._waiting.discard(task)

    def _parse(self, frame: Frame) -> tuple[ttrpc_pb2.Request, Method]:
        is_new = frame.stream_id > self._last_stream_id
        self._last_stream_id = max(self._last_stream_id, frame.stream_id)
        if frame.is_oversized:
            message = f"message is longer than {MAX_PAYLOAD_BYTES} bytes"
            raise ResourceExhaustedError(message)
        if frame.stream_id % 2 == 0:
            message = "StreamID must be odd for client initiated streams"
            raise InvalidArgumentError(message)
        if not is_new:
            message = "StreamID cannot be re-used and must increment"
            raise InvalidArgumentError(message)
        if self._in_flight >= MAX_REQUESTS_IN_FLIGHT:
            message = f"{self._in_flight} requests are in flight on this connection"
            raise ResourceExhaustedError(message)
        try:
            request = ttrpc_pb2.Request.FromString(frame.payload)
        except DecodeError as exc:
            message = "malformed request"
            raise InvalidArgumentError(message) from exc
        method = self._server._find(request)  # noqa: SLF001
        if frame.flags & FrameFlags.REMOTE_OPEN:
            message = f"method {request.method} takes no stream"
            raise UnimplementedError(message)
        return request, method

    async def _run(self, stream_id: int, request: ttrpc_pb2.Request, method: Method) -> None:
        try:
            payload = await _call(request, method)
        except asyncio.CancelledError as error:
            self._answer_error(stream_id, error)
            raise
        except Exception as error:  # noqa: BLE001 - becomes the answer
            self._answer_error(stream_id, error)
            return
        # An encoded Response needs at most 1 + 5 bytes around the payload.
        if len(payload) > MAX_PAYLOAD_BYTES - 8:
            message = f"response of {len(payload)} bytes is too long"
            self._answer_error(stream_id, ResourceExhaustedError(message))
            return
        self._send(stream_id, ttrpc_pb2.Response(payload=payload))

    def _answer_error(self, stream_id: int, error: BaseException) -> None:
        code, message = status_of(error)
        _LOG.debug("call failed", extra={"code": code, "reason": message})
        text = _valid_text(message)
        self._send(stream_id, ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=code, message=text)))

    def _send(self, stream_id: int, response: ttrpc_pb2.Response) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        payload = response.SerializeToString()
        transport.write(encode_frame(stream_id, frame_type=FrameType.RESPONSE, payload=payload))
        if transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            _LOG.warning("dropped a client that does not read")
            transport.abort()


async def _call(request: ttrpc_pb2.Request, method: Method) -> bytes:
    """Run the handler within the request's deadline and return the encoded reply."""
    try:
        message = method.request_type.FromString(request.payload)
    except DecodeError as exc:
        text = f"malformed {method.request_type.DESCRIPTOR.name}"
        raise InvalidArgumentError(text) from exc
    limit_s = min(request.timeout_nano / _NS, _MAX_TIMEOUT_S) if request.timeout_nano > 0 else None
    try:
        async with asyncio.timeout(limit_s) as deadline:
            reply = await method.handler(message)
    except TimeoutError as exc:
        if not deadline.expired():
            raise
        text = f"{request.method} did not finish within {limit_s:g} s"
        raise DeadlineExceededError(text) from exc
    try:
        return reply.SerializeToString()
    except (AttributeError, EncodeError) as exc:
        text = f"{request.method} returned no valid reply"
        raise InternalError(text) from exc


def _peer_uid(transport: asyncio.Transport) -> int:
    peer = transport.get_extra_info("socket")
    _, uid, _ = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)


def _valid_text(text: str) -> str:
    """Return ``text`` as protobuf can carry it: no lone surrogates, and not endless."""
    return text.encode("utf-8", "replace")[:65536].decode("utf-8", "ignore")
