//! A byte stream in arbitrary pieces: the decoder must find the same frames as a parser that sees
//! all of it at once, and the messages in them must decode or fail, never panic.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vsock_io::ttrpc::frame::{Frame, FrameDecoder, FrameHeader, HEADER_LEN, MAX_PAYLOAD};
use vsock_io::ttrpc::message::{
    Response, decode_read_stream_response, decode_write_stream_response,
};

/// A frame, its payload unless it is oversized.
type Found = (FrameHeader, Option<Vec<u8>>);

/// The frames of `stream`, found the simple way.
fn reference(mut stream: &[u8]) -> Vec<Found> {
    let mut found = Vec::new();
    while let Some((header, rest)) = stream.split_first_chunk::<HEADER_LEN>() {
        let header = FrameHeader::from_bytes(*header);
        let length = header.length as usize;
        if length > MAX_PAYLOAD {
            found.push((header, None));
            stream = rest.get(length..).unwrap_or_default();
        } else if let Some((payload, rest)) = rest.split_at_checked(length) {
            found.push((header, Some(payload.to_vec())));
            stream = rest;
        } else {
            break;
        }
    }
    found
}

fuzz_target!(|input: &[u8]| {
    let Some((&step, stream)) = input.split_first() else {
        return;
    };
    let mut decoder = FrameDecoder::default();
    let mut found: Vec<Found> = Vec::new();
    for piece in stream.chunks(usize::from(step) + 1) {
        let spare = decoder.spare();
        spare[..piece.len()].copy_from_slice(piece);
        decoder.commit(piece.len());
        while let Some(frame) = decoder.next() {
            match frame {
                Frame::Whole(header, payload) => {
                    if let Ok(response) = Response::decode(payload) {
                        let _ = decode_read_stream_response(response.payload);
                        let _ = decode_write_stream_response(response.payload);
                    }
                    found.push((header, Some(payload.to_vec())));
                }
                Frame::Oversized(header) => found.push((header, None)),
            }
        }
    }
    assert_eq!(found, reference(stream));
});
