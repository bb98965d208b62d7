"""Speaks ttRPC to a shim's socket, byte by byte, with nothing of the product's own code.

A second opinion on the wire format: frames and the few protobuf fields are coded by hand from the
published layout, and malformed ones can be sent. Blocking, one thread, every read has a deadline.
"""

import json
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

REQUEST, RESPONSE = 1, 2
MAX_PAYLOAD = 4 << 20
TASK_V2, TASK_V3 = "containerd.task.v2.Task", "containerd.task.v3.Task"

INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS = 3, 5, 6
RESOURCE_EXHAUSTED, FAILED_PRECONDITION, UNIMPLEMENTED = 8, 9, 12

_HEADER = struct.Struct(">IIBB")
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class WireError(AssertionError):
    """The peer broke the protocol, or closed the connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A response: its status and its undecoded message."""

    stream: int
    code: int
    message: str
    payload: bytes


def encode_varint(value: int) -> bytes:
    """Encode an unsigned integer (negative ones as 64 bit two's complement)."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_uint(number: int, value: int) -> bytes:
    """Encode an integer field."""
    return encode_varint(number << 3 | _VARINT) + encode_varint(value)


def encode_bytes(number: int, value: bytes) -> bytes:
    """Encode a bytes or message field."""
    return encode_varint(number << 3 | _LENGTH) + encode_varint(len(value)) + value


def encode_string(number: int, value: str) -> bytes:
    """Encode a string field."""
    return encode_bytes(number, value.encode())


def encode_any(type_url: str, value: bytes) -> bytes:
    """Encode a ``google.protobuf.Any``."""
    return encode_string(1, type_url) + encode_bytes(2, value)


def decode(message: bytes) -> dict[int, list[int | bytes]]:
    """Decode a message to its fields, by number.

    Raises:
        WireError: it is not protobuf.
    """
    fields: dict[int, list[int | bytes]] = {}
    position = 0
    while position < len(message):
        tag, position = _decode_varint(message, position)
        value: int | bytes
        match tag & 7:
            case 0:
                value, position = _decode_varint(message, position)
            case 1 | 5 as kind:
                size = 8 if kind == _FIXED64 else 4
                value, position = message[position : position + size], position + size
            case 2:
                size, position = _decode_varint(message, position)
                value, position = message[position : position + size], position + size
            case kind:
                raise WireError(f"wire type {kind} at {position} of {message!r}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def encode_frame(*, stream: int, kind: int, payload: bytes, length: int | None = None) -> bytes:
    """Encode a frame, with a false length if one is given."""
    announced = len(payload) if length is None else length
    return _HEADER.pack(announced, stream, kind, 0) + payload


def encode_request(service: str, method: str, payload: bytes, *, timeout_s: float = 20) -> bytes:
    """Encode a ``ttrpc.Request``."""
    return (
        encode_string(1, service)
        + encode_string(2, method)
        + encode_bytes(3, payload)
        + encode_uint(4, int(timeout_s * 1e9))
    )


class ShimConnection:
    """One connection to a shim."""

    def __init__(self, bundle: Path, *, service: str = TASK_V2, timeout_s: float = 20) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        self._socket.connect(os.fspath(socket_path(bundle)))
        self._stream = 1
        self.service = service

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._socket.sendall(data)

    def next_stream(self) -> int:
        """Return a stream id for a new request."""
        self._stream += 2
        return self._stream - 2

    def call(self, method: str, payload: bytes = b"", *, service: str | None = None) -> Reply:
        """Call a method and wait for its response.

        Raises:
            WireError: the connection ended, or the response is malformed.
            TimeoutError: there is none.
        """
        stream = self.next_stream()
        request = encode_request(service or self.service, method, payload)
        self.send(encode_frame(stream=stream, kind=REQUEST, payload=request))
        return self.receive(stream)

    def receive(self, stream: int) -> Reply:
        """Wait for the response on a stream.

        Raises:
            WireError: the connection ended, or another stream was answered.
            TimeoutError: there is none.
        """
        reply = self.receive_any()
        if reply.stream != stream:
            raise WireError(f"expected a response on {stream}, got one on {reply.stream}")
        return reply

    def receive_any(self) -> Reply:
        """Wait for the next response, on whatever stream.

        Raises:
            WireError: the connection ended, or something else than a response came.
            TimeoutError: there is none.
        """
        length, stream, kind, _ = _HEADER.unpack(self._read(_HEADER.size))
        body = self._read(length)
        if kind != RESPONSE:
            raise WireError(f"expected a response, got a frame of type {kind} on {stream}")
        fields = decode(body)
        status = decode(_bytes(fields, 1))
        code = status.get(1, [0])[0]
        assert isinstance(code, int)
        return Reply(
            stream=stream,
            code=code,
            message=_bytes(status, 2).decode(),
            payload=_bytes(fields, 2),
        )

    def is_closed_by_peer(self) -> bool:
        """Wait for the other side to close the connection; False if it sends something."""
        try:
            return self._socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self._socket.recv(size - len(data))
            if not chunk:
                raise WireError(f"connection closed after {len(data)} of {size} bytes")
            data += chunk
        return data


def socket_path(bundle: Path) -> Path:
    """Return the shim's socket: from ``address``, or what containerd 2.x noted down itself."""
    address = bundle / "address"
    if address.exists():
        text = address.read_text().strip()
    else:
        text = json.loads((bundle / "bootstrap.json").read_text())["address"]
    return Path(text.removeprefix("unix://"))


def _bytes(fields: dict[int, list[int | bytes]], number: int) -> bytes:
    value = fields.get(number, [b""])[-1]
    if not isinstance(value, bytes):
        raise WireError(f"field {number} is an integer")
    return value


def _decode_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(message):
            raise WireError(f"truncated message {message!r}")
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if not byte & 0x80:
            return value, position
