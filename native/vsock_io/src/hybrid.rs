//! The handshake of hybrid vsock: `CONNECT <port>\n`, answered by one line `OK <host port>\n`.
//!
//! The bytes after the line belong to the connection, and the guest may speak first, so the
//! caller peeks at the socket and consumes what [`Handshake::offer`] says, never more. Pure:
//! [`crate::dial`] does the reading, on the I/O thread.

/// Bytes of the answer, its newline included; the longest correct one has 14.
pub const MAX_LINE: usize = 64;

/// Why the answer is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HybridError {
    /// No newline within the limit.
    #[error("the answer to CONNECT is longer than {MAX_LINE} bytes")]
    LineTooLong,
    /// A line of another form.
    #[error("the answer to CONNECT is {0:?}, not \"OK <port>\"")]
    UnexpectedLine(String),
}

/// What an offered chunk led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// How many of the offered bytes belong to the handshake; consume exactly these.
    pub consumed: usize,
    /// Whether the line is complete and says OK.
    pub is_done: bool,
}

/// One handshake, from its request to the end of the answer's line.
#[derive(Clone, Debug, Default)]
pub struct Handshake {
    line: Vec<u8>,
}

impl Handshake {
    /// The bytes that ask for a connection to `port`.
    #[must_use]
    pub fn request(port: u32) -> String {
        format!("CONNECT {port}\n")
    }

    /// How many more bytes the answer may have: peek at no more than these.
    #[must_use]
    pub fn room(&self) -> usize {
        MAX_LINE.saturating_sub(self.line.len())
    }

    /// Look at bytes that wait in the socket.
    ///
    /// # Errors
    /// The answer is longer than allowed or not an OK.
    pub fn offer(&mut self, peeked: &[u8]) -> Result<Progress, HybridError> {
        let usable = peeked
            .get(..self.room().min(peeked.len()))
            .unwrap_or_default();
        let newline = usable.iter().position(|byte| *byte == b'\n');
        let consumed = newline.map_or(usable.len(), |position| position + 1);
        self.line
            .extend_from_slice(usable.get(..consumed).unwrap_or_default());
        if newline.is_some() {
            self.check_line()?;
        } else if self.room() == 0 {
            return Err(HybridError::LineTooLong);
        }
        Ok(Progress {
            consumed,
            is_done: newline.is_some(),
        })
    }

    fn check_line(&self) -> Result<(), HybridError> {
        if is_ok(&self.line) {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&self.line);
        let text = text.strip_suffix('\n').unwrap_or(&text);
        Err(HybridError::UnexpectedLine(text.to_owned()))
    }
}

/// Whether the line is `OK <host port>\n`, to the letter. The port may be absent: nobody needs it.
fn is_ok(line: &[u8]) -> bool {
    let rest = line
        .strip_prefix(b"OK")
        .and_then(|rest| rest.strip_suffix(b"\n"));
    match rest {
        Some([]) => true,
        // Digits only: `parse` would take a sign too.
        Some([b' ', port @ ..]) if port.iter().all(u8::is_ascii_digit) => {
            std::str::from_utf8(port).is_ok_and(|port| port.parse::<u32>().is_ok())
        }
        Some(_) | None => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bytes_after_the_line_are_left() {
        let mut handshake = Handshake::default();
        let progress = handshake.offer(b"OK 1073741824\nhello").unwrap();
        assert_eq!(
            progress,
            Progress {
                consumed: 14,
                is_done: true
            }
        );
    }

    #[test]
    fn other_lines_are_refused() {
        for line in [
            "\n",
            "NO\n",
            "OKAY 1\n",
            "OK x\n",
            "OK 1 2\n",
            "OK -1\n",
            "OK \u{e4}\n",
            // Found by fuzzing: white space, and what only Rust takes for a number.
            "  OK  \n",
            " OK 1\n",
            "OK  1\n",
            "OK\t1\n",
            "OK 1 \n",
            "OK 1\r\n",
            "OK \n",
            "OK +1\n",
            "OK 4294967296\n",
        ] {
            let refused = Handshake::default().offer(line.as_bytes());
            assert!(
                matches!(refused, Err(HybridError::UnexpectedLine(_))),
                "{line:?}"
            );
        }
        let refused = Handshake::default().offer(b"OK \xff\n");
        assert!(matches!(refused, Err(HybridError::UnexpectedLine(_))));
    }

    #[test]
    fn the_port_may_be_absent() {
        let progress = Handshake::default().offer(b"OK\n").unwrap();
        assert!(progress.is_done);
    }

    #[test]
    fn a_line_without_end_is_refused_at_the_limit() {
        let mut handshake = Handshake::default();
        assert_eq!(
            handshake.offer(&[b'O'; MAX_LINE - 1]).unwrap().consumed,
            MAX_LINE - 1
        );
        assert_eq!(handshake.offer(b"KK"), Err(HybridError::LineTooLong));
    }

    #[test]
    fn a_refusal_quotes_the_line() {
        let refused = Handshake::default().offer(b"OK 1 \r\n").unwrap_err();
        assert!(refused.to_string().contains(r#""OK 1 \r""#), "{refused}");
    }

    proptest! {
        #[test]
        fn any_split_consumes_exactly_the_line(
            port in any::<u32>(),
            after in proptest::collection::vec(any::<u8>(), 0..40),
            step in 1_usize..80,
        ) {
            let line = format!("OK {port}\n");
            let stream: Vec<u8> = line.bytes().chain(after).collect();
            let mut handshake = Handshake::default();
            let mut position = 0;
            loop {
                let end = (position + step).min(stream.len());
                let progress = handshake.offer(&stream[position..end]).unwrap();
                position += progress.consumed;
                if progress.is_done {
                    break;
                }
                prop_assert!(progress.consumed > 0);
            }
            prop_assert_eq!(position, line.len());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut handshake = Handshake::default();
            if let Ok(progress) = handshake.offer(&bytes) {
                prop_assert!(progress.consumed <= bytes.len().min(MAX_LINE));
            }
        }
    }
}
