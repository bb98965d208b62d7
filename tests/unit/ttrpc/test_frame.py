from collections.abc import Iterable

import pytest

from kata_hybrid.protos import task_pb2, ttrpc_pb2
from kata_hybrid.ttrpc.frame import (
    MAX_PAYLOAD_BYTES,
    Frame,
    FrameDecoder,
    FrameType,
    encode_frame,
)

CONNECT = bytes.fromhex(
    "00000055000000010100"
    "0a17636f6e7461696e6572642e7461736b2e76322e5461736b1207436f6e6e656374"
    "1a040a0263312080a8d6b907"
    "2a250a1a636f6e7461696e6572642d6e616d6573706163652d7474727063120764656661756c74"
)


def decode(*pieces: bytes) -> list[Frame]:
    decoder = FrameDecoder()
    return [frame for piece in pieces for frame in decoder.feed(piece)]


def bytewise(data: bytes) -> Iterable[bytes]:
    return (bytes([byte]) for byte in data)


def test_request_of_containerd_is_decoded() -> None:
    (frame,) = decode(CONNECT)
    request = ttrpc_pb2.Request.FromString(frame.payload)
    assert (frame.stream_id, frame.type, frame.flags) == (1, FrameType.REQUEST, 0)
    assert (request.service, request.method) == ("containerd.task.v2.Task", "Connect")
    assert request.timeout_nano == 2_000_000_000
    assert request.metadata[0].value == "default"
    assert task_pb2.ConnectRequest.FromString(request.payload).id == "c1"


def test_request_is_encoded_as_containerd_does() -> None:
    request = ttrpc_pb2.Request(
        service="containerd.task.v2.Task",
        method="Connect",
        payload=task_pb2.ConnectRequest(id="c1").SerializeToString(),
        timeout_nano=2_000_000_000,
        metadata=[ttrpc_pb2.KeyValue(key="containerd-namespace-ttrpc", value="default")],
    )
    encoded = encode_frame(1, frame_type=FrameType.REQUEST, payload=request.SerializeToString())
    assert encoded == CONNECT


def test_response_is_encoded_as_containerd_expects() -> None:
    reply = task_pb2.ConnectResponse(shim_pid=100, task_pid=200).SerializeToString()
    payload = ttrpc_pb2.Response(payload=reply).SerializeToString()
    assert encode_frame(1, frame_type=FrameType.RESPONSE, payload=payload) == bytes.fromhex(
        "000000070000000102001205086410c801"
    )


def test_status_is_encoded_as_containerd_expects() -> None:
    status = ttrpc_pb2.Status(code=5, message="container not found")
    payload = ttrpc_pb2.Response(status=status).SerializeToString()
    assert encode_frame(1, frame_type=FrameType.RESPONSE, payload=payload) == bytes.fromhex(
        "000000190000000102000a1708051213636f6e7461696e6572206e6f7420666f756e64"
    )


def test_byte_by_byte_is_the_same() -> None:
    assert decode(*bytewise(CONNECT)) == decode(CONNECT)


def test_oversized_payload_is_skipped_and_the_next_frame_read() -> None:
    big = (MAX_PAYLOAD_BYTES + 1).to_bytes(4, "big") + b"\0\0\0\x03\x01\0"
    chunk = bytes(1 << 20)
    pieces = [big, *[chunk] * 4, b"\0" + CONNECT]
    first, second = decode(*pieces)
    assert (first.stream_id, first.is_oversized, first.payload) == (3, True, b"")
    assert (second.stream_id, second.is_oversized) == (1, False)


def test_oversized_payload_is_not_stored() -> None:
    decoder = FrameDecoder()
    list(decoder.feed(b"\xff\xff\xff\xff\0\0\0\x01\x01\0"))
    list(decoder.feed(bytes(1 << 20)))
    assert decoder.buffered_bytes == 0


def test_largest_payload_passes() -> None:
    payload = bytes(MAX_PAYLOAD_BYTES)
    (frame,) = decode(encode_frame(1, frame_type=FrameType.DATA, payload=payload))
    assert (len(frame.payload), frame.is_oversized) == (MAX_PAYLOAD_BYTES, False)


def test_too_long_a_payload_is_not_sent() -> None:
    with pytest.raises(ValueError, match="exceeds"):
        encode_frame(1, frame_type=FrameType.REQUEST, payload=bytes(MAX_PAYLOAD_BYTES + 1))
