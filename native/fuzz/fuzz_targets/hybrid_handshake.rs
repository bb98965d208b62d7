//! The answer to CONNECT in arbitrary pieces: exactly the line is consumed, and the outcome is that
//! of a checker that sees all of it at once, however the bytes were cut.

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

/// The same, the simple way.
fn reference(stream: &[u8]) -> (usize, Option<bool>) {
    let limited = &stream[..stream.len().min(MAX_LINE)];
    match limited.iter().position(|byte| *byte == b'\n') {
        Some(position) if is_answer(&stream[..position]) => (position + 1, Some(true)),
        Some(_) => (0, Some(false)),
        None if stream.len() >= MAX_LINE => (0, Some(false)),
        None => (stream.len(), None),
    }
}

/// `OK`, alone or with one space and a decimal number of 32 bits.
fn is_answer(line: &[u8]) -> bool {
    if line == b"OK" {
        return true;
    }
    let Some(digits) = line.strip_prefix(b"OK ") else {
        return false;
    };
    let number = digits.iter().try_fold(0_u64, |number, byte| match byte {
        b'0'..=b'9' => Some(number * 10 + u64::from(byte - b'0'))
            .filter(|number| *number <= u64::from(u32::MAX)),
        _ => None,
    });
    !digits.is_empty() && number.is_some()
}

fuzz_target!(|input: &[u8]| {
    let Some((&step, stream)) = input.split_first() else {
        return;
    };
    let expected = reference(stream);
    assert_eq!(run(stream, usize::from(step) + 1), expected);
    assert_eq!(run(stream, stream.len().max(1)), expected);
});
