//! The text a host process sends on the hybrid socket: `CONNECT <port>\n`.
//!
//! Decimal port, the word in any case, at most [`MAX_LINE_SIZE`] bytes with the newline. The
//! answer, `OK <host port>\n`, is written by the endpoint when the guest has accepted; a refusal
//! is a closed socket. Pure parsing, called on the I/O thread.

use thiserror::Error;

/// The longest line accepted, newline included.
pub const MAX_LINE_SIZE: usize = 32;

/// Why a handshake is refused.
#[derive(Debug, Error)]
pub enum HandshakeError {
    /// no newline within the limit
    #[error("no newline within {MAX_LINE_SIZE} bytes")]
    TooLong,
    /// the line is not a connect command
    #[error("line is not CONNECT and a port")]
    Malformed,
    /// the host closed the socket first
    #[error("closed before a port was named")]
    Closed,
    /// the socket failed
    #[error("read the handshake")]
    Socket(#[source] std::io::Error),
}

/// Find a command at the start of `bytes`: its port and its length with the newline. `None` if
/// there may be more to come.
///
/// # Errors
/// The bytes cannot become a command.
pub fn parse_connect(bytes: &[u8]) -> Result<Option<(u32, usize)>, HandshakeError> {
    let window = &bytes[..bytes.len().min(MAX_LINE_SIZE)];
    let Some(end) = window.iter().position(|byte| *byte == b'\n') else {
        return if window.len() == MAX_LINE_SIZE {
            Err(HandshakeError::TooLong)
        } else {
            Ok(None)
        };
    };
    let line = std::str::from_utf8(&window[..end]).map_err(|_| HandshakeError::Malformed)?;
    let mut words = line.split_ascii_whitespace();
    let (Some(word), Some(port), None) = (words.next(), words.next(), words.next()) else {
        return Err(HandshakeError::Malformed);
    };
    if !word.eq_ignore_ascii_case("connect") || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(HandshakeError::Malformed);
    }
    let port = port.parse().map_err(|_| HandshakeError::Malformed)?;
    Ok(Some((port, end + 1)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_word_is_case_insensitive_and_the_rest_is_stream_data() {
        assert_eq!(parse_connect(b"CONNECT 1024\n").unwrap(), Some((1024, 13)));
        assert_eq!(
            parse_connect(b"connect 1024\nCONNECT").unwrap(),
            Some((1024, 13))
        );
        assert_eq!(
            parse_connect(b"CoNnEcT 4294967295\n").unwrap(),
            Some((u32::MAX, 19))
        );
    }

    #[test]
    fn an_incomplete_line_waits() {
        assert_eq!(parse_connect(b"").unwrap(), None);
        assert_eq!(parse_connect(b"CONNECT 10").unwrap(), None);
        assert_eq!(parse_connect(&[b' '; 31]).unwrap(), None);
    }

    #[test]
    fn anything_else_is_refused() {
        for line in [
            &b"CONNECT\n"[..],
            b"CONNECT \n",
            b"\n",
            b"CONNECT 4294967296\n",
            b"CONNECT -1\n",
            b"CONNECT +1\n",
            b"CONNECT 0x10\n",
            b"CONNECT 1 2\n",
            b"LISTEN 1\n",
            b"CONNECT \xff\n",
            b"CONNECT1\n",
        ] {
            assert!(parse_connect(line).is_err(), "{line:?}");
        }
        assert!(matches!(
            parse_connect(&[b'C'; 32]),
            Err(HandshakeError::TooLong)
        ));
        assert!(matches!(
            parse_connect(b"CONNECT 000000000000000000000001\n"),
            Err(HandshakeError::TooLong)
        ));
    }

    proptest! {
        #[test]
        fn every_port_is_read_back(port in any::<u32>(), tail in proptest::collection::vec(any::<u8>(), 0..40)) {
            let line = format!("CONNECT {port}\n");
            let bytes: Vec<u8> = line.bytes().chain(tail).collect();
            prop_assert_eq!(parse_connect(&bytes).unwrap(), Some((port, line.len())));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _result = parse_connect(&bytes);
        }
    }
}
