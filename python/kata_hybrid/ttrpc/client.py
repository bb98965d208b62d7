"""A small ttRPC client: many calls in flight on one Unix socket connection.

Used to forward events to containerd and by tests. The guest's agent is talked to by the native
client instead. Event loop thread only.
"""

import asyncio
import logging
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self, TypeVar

from google.protobuf.message import DecodeError, Message

from kata_hybrid.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    UnavailableError,
    error_from_code,
)
from kata_hybrid.protos import ttrpc_pb2
from kata_hybrid.ttrpc.frame import (
    MAX_PAYLOAD_BYTES,
    FrameDecoder,
    FrameType,
    encode_frame,
)

_LOG = logging.getLogger(__name__)
_NS: Final = 1_000_000_000
_MAX_STREAM_ID: Final = 0xFFFF_FFFF
_CLOSED: Final = "ttrpc: closed"

_Reply = TypeVar("_Reply", bound=Message)


class Client:
    """One connection to a ttRPC server."""

    def __init__(self, protocol: "_ClientProtocol") -> None:
        """Use an established connection; callers use :meth:`connect`."""
        self._protocol = protocol

    @classmethod
    async def connect(cls, path: str | os.PathLike[str], *, timeout_s: float) -> Self:
        """Connect to the Unix socket at ``path``.

        Raises:
            UnavailableError: nobody listens there.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                _, protocol = await loop.create_unix_connection(_ClientProtocol, os.fspath(path))
        except (OSError, TimeoutError) as exc:
            message = f"connect to {os.fspath(path)}"
            raise UnavailableError(message) from exc
        return cls(protocol)

    @property
    def is_closed(self) -> bool:
        """The connection has ended: every further call fails."""
        return self._protocol.transport is None

    async def __aenter__(self) -> Self:
        """Enter; leaving closes."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self.close()

    async def call(
        self,
        service: str,
        *,
        method: str,
        request: Message,
        reply_type: type[_Reply],
        timeout_s: float | None,
        metadata: Mapping[str, str] | None = None,
    ) -> _Reply:
        """Send a request and wait for its reply.

        The deadline is sent along and kept here too; ``None`` waits for ever.

        Raises:
            UnavailableError: the connection is or gets closed.
            DeadlineExceededError: no reply in time.
            KataError: the subclass of the status code the server answered.
        """
        pairs = (metadata or {}).items()
        payload = ttrpc_pb2.Request(
            service=service,
            method=method,
            payload=request.SerializeToString(),
            timeout_nano=0 if timeout_s is None else int(timeout_s * _NS),
            metadata=[ttrpc_pb2.KeyValue(key=key, value=value) for key, value in pairs],
        ).SerializeToString()
        stream_id, future = self._protocol.send(payload)
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                response = await future
        except TimeoutError as exc:
            if not deadline.expired():
                raise
            message = f"no reply to {method} within {timeout_s:g} s"
            raise DeadlineExceededError(message) from exc
        finally:
            self._protocol.forget(stream_id)
        if response.status.code != 0:
            raise error_from_code(response.status.code, response.status.message)
        try:
            return reply_type.FromString(response.payload)
        except DecodeError as exc:
            message = f"reply to {method} is no {reply_type.DESCRIPTOR.name}"
            raise InternalError(message) from exc

    def close(self) -> None:
        """Disconnect; calls in flight raise UnavailableError. Idempotent."""
        if self._protocol.transport is not None:
            self._protocol.transport.close()

    async def closed(self) -> None:
        """Wait until the connection has ended."""
        await asyncio.shield(self._protocol.gone)


class _ClientProtocol(asyncio.Protocol):
    """Matches responses to calls."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._decoder = FrameDecoder()
        self._next_stream_id = 1
        self._calls: dict[int, asyncio.Future[ttrpc_pb2.Response]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        for future in self._calls.values():
            if not future.done():
                error = UnavailableError(_CLOSED)
                error.__cause__ = exc
                future.set_exception(error)
        self._calls.clear()
        if not self.gone.done():
            self.gone.set_result(None)

    def data_received(self, data: bytes) -> None:
        for frame in self._decoder.feed(data):
            future = self._calls.get(frame.stream_id)
            if frame.type != FrameType.RESPONSE or future is None or future.done():
                continue
            try:
                if frame.is_oversized:
                    message = f"response is longer than {MAX_PAYLOAD_BYTES} bytes"
                    future.set_exception(InternalError(message))
                else:
                    future.set_result(ttrpc_pb2.Response.FromString(frame.payload))
            except DecodeError as exc:
                error = InternalError("malformed response")
                error.__cause__ = exc
                future.set_exception(error)

    def send(self, payload: bytes) -> tuple[int, asyncio.Future[ttrpc_pb2.Response]]:
        """Write a request frame; the future gets its response."""
        if self.transport is None or self.transport.is_closing():
            raise UnavailableError(_CLOSED)
        if self._next_stream_id > _MAX_STREAM_ID:
            message = "all stream ids of this connection are used"
            raise UnavailableError(message)
        if len(payload) > MAX_PAYLOAD_BYTES:
            message = f"request of {len(payload)} bytes is longer than {MAX_PAYLOAD_BYTES}"
            raise InvalidArgumentError(message)
        stream_id = self._next_stream_id
        self._next_stream_id += 2
        future: asyncio.Future[ttrpc_pb2.Response] = asyncio.get_running_loop().create_future()
        self._calls[stream_id] = future
        self.transport.write(encode_frame(stream_id, frame_type=FrameType.REQUEST, payload=payload))
        return stream_id, future

    def forget(self, stream_id: int) -> None:
        """Drop a call; a late response is ignored."""
        future = self._calls.pop(stream_id, None)
        if future is not None:
            future.cancel()
