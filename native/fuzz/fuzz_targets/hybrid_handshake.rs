//! The answer to CONNECT in arbitrary pieces: never more than the line is consumed, and the
//! outcome does not depend on how the bytes were cut.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vsock_io::hybrid::{Handshake, MAX_LINE};

/// How many bytes were consumed, and how it ended: done, refused, or waiting for more.
fn run(stream: &[u8], step: usize) -> (usize, Option<bool>) {
    let mut handshake = Handshake::default();
    let mut position = 0;
    while position < stream.len() {
        let end = stream.len().min(position + step);
        match handshake.offer(&stream[position..end]) {
            Ok(progress) => {
                position += progress.consumed;
                assert!(position <= stream.len().min(MAX_LINE));
                if progress.is_done {
                    return (position, Some(true));
                }
                assert!(progress.consumed > 0);
            }
            Err(_) => return (0, Some(false)),
        }
    }
    (position, None)
}

fuzz_target!(|input: &[u8]| {
    let Some((&step, stream)) = input.split_first() else { return };
    let outcome = run(stream, usize::from(step) + 1);
    assert_eq!(outcome, run(stream, stream.len().max(1)));
    if let (consumed, Some(true)) = outcome {
        assert_eq!(stream.iter().position(|byte| *byte == b'\n'), Some(consumed - 1));
        assert!(stream.starts_with(b"OK"));
    }
});
