"""The ttRPC frame: a 10-byte header and a protobuf payload of at most 4 MiB.

    0        4           8      9       10
    | length | stream id | type | flags | payload … |      integers are big endian

:class:`FrameDecoder` takes bytes as they come and yields whole frames. It holds at most one frame:
the payload of one that is announced too large is skipped as it arrives, not stored, and reported
so that its stream can be answered. Pure: no I/O, any thread.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

MAX_PAYLOAD_BYTES: Final = 4 << 20
HEADER: Final = Struct(">IIBB")


class FrameType(IntEnum):
    """What a frame carries. Unknown types are ignored by the receiver."""

    REQUEST = 1
    RESPONSE = 2
    DATA = 3


class FrameFlags(IntFlag):
    """Flags of streaming calls; plain calls have none."""

    NONE = 0
    REMOTE_CLOSED = 1
    REMOTE_OPEN = 2
    NO_DATA = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame as received. ``type`` and ``flags`` are unchecked bytes of the peer's."""

    stream_id: int
    type: int
    flags: int
    payload: bytes
    is_oversized: bool = False
    """The payload was longer than allowed and has been (or is being) skipped."""


def encode_frame(stream_id: int, *, frame_type: FrameType, payload: bytes, flags: int = 0) -> bytes:
    """Return the bytes of one frame.

    Raises:
        ValueError: the payload is too long.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        msg = f"frame payload of {len(payload)} bytes exceeds {MAX_PAYLOAD_BYTES}"
        raise ValueError(msg)
    return HEADER.pack(len(payload), stream_id, frame_type, flags) + payload


class FrameDecoder:
    """Splits a byte stream into frames, whatever the sizes of the pieces."""

    __slots__ = ("_buffer", "_max_payload_bytes", "_skip_bytes")

    def __init__(self, *, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> None:
        """Start at the beginning of a frame."""
        self._buffer = bytearray()
        self._skip_bytes = 0
        self._max_payload_bytes = max_payload_bytes

    @property
    def buffered_bytes(self) -> int:
        """How much of an incomplete frame is held."""
        return len(self._buffer)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take the next bytes and yield the frames they complete, in order.

        The iterator must be exhausted before the next call.
        """
        position = min(self._skip_bytes, len(data))
        self._skip_bytes -= position
        self._buffer += data[position:] if position else data
        start = 0
        try:
            while len(self._buffer) - start >= HEADER.size:
                length, stream_id, frame_type, flags = HEADER.unpack_from(self._buffer, start)
                body = start + HEADER.size
                if length > self._max_payload_bytes:
                    start = min(body + length, len(self._buffer))
                    self._skip_bytes = length - (start - body)
                    yield Frame(
                        stream_id=stream_id,
                        type=frame_type,
                        flags=flags,
                        payload=b"",
                        is_oversized=True,
                    )
                    continue
                if len(self._buffer) - body < length:
                    break
                start = body + length
                yield Frame(
                    stream_id=stream_id,
                    type=frame_type,
                    flags=flags,
                    payload=bytes(self._buffer[body:start]),
                )
        finally:
            del self._buffer[:start]
