"""The frame decoder: whatever the sizes of the pieces, the frames are the same."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kata_hybrid.ttrpc.frame import HEADER, Frame, FrameDecoder, FrameType, encode_frame

LIMIT = 64

frames = st.tuples(
    st.integers(0, 0xFFFF_FFFF), st.sampled_from(FrameType), st.binary(max_size=2 * LIMIT)
)


def split(data: bytes, *, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@given(st.lists(frames, max_size=8), st.lists(st.integers(0, 10_000), max_size=12))
def test_frames_do_not_depend_on_how_the_bytes_arrive(
    sent: list[tuple[int, FrameType, bytes]], cuts: list[int]
) -> None:
    data = b"".join(
        encode_frame(stream_id, frame_type=kind, payload=payload)
        for stream_id, kind, payload in sent
    )
    decoder = FrameDecoder(max_payload_bytes=LIMIT)
    received = [frame for piece in split(data, cuts=cuts) for frame in decoder.feed(piece)]
    assert received == [
        Frame(
            stream_id=stream_id,
            type=kind,
            flags=0,
            payload=b"" if len(payload) > LIMIT else payload,
            is_oversized=len(payload) > LIMIT,
        )
        for stream_id, kind, payload in sent
    ]
    assert decoder.buffered_bytes == 0


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_garbage_never_fails_and_never_piles_up(pieces: list[bytes]) -> None:
    decoder = FrameDecoder(max_payload_bytes=LIMIT)
    for piece in pieces:
        for frame in decoder.feed(piece):
            assert len(frame.payload) <= LIMIT
        assert decoder.buffered_bytes < HEADER.size + LIMIT
