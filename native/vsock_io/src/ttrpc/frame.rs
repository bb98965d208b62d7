//! ttRPC frames: a 10-byte header and at most 4 MiB of payload.
//!
//! [`FrameDecoder`] owns the receive buffer: the connection reads straight into it and payloads
//! are handed out as slices of it, so a byte is copied once, by the kernel. The header's length
//! is checked before memory is reserved; a frame that is too large is passed over as it arrives
//! and reported by its header alone. Called on the I/O thread.

/// Bytes of a frame header.
pub const HEADER_LEN: usize = 10;
/// Bytes of payload that a frame may have in either direction (4 MiB, ttrpc `messageLengthMax`).
pub const MAX_PAYLOAD: usize = 4 << 20;
/// Frame type of a request.
pub const TYPE_REQUEST: u8 = 1;
/// Frame type of a response.
pub const TYPE_RESPONSE: u8 = 2;

/// The receive buffer without large frames in it.
const BUFFER_LEN: usize = 1 << 20;
/// With less room than this behind the unread bytes they are moved to the front.
const MIN_SPARE: usize = 256 << 10;

/// A frame's first ten bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Payload bytes that follow.
    pub length: u32,
    /// Which request this belongs to; odd, chosen by the client.
    pub stream_id: u32,
    /// Request, response, data, or something later than us.
    pub kind: u8,
    /// Of streaming calls; 0 in unary ones.
    pub flags: u8,
}

impl FrameHeader {
    /// Take a header apart.
    #[must_use]
    pub fn from_bytes(bytes: [u8; HEADER_LEN]) -> Self {
        let [l0, l1, l2, l3, s0, s1, s2, s3, kind, flags] = bytes;
        Self {
            length: u32::from_be_bytes([l0, l1, l2, l3]),
            stream_id: u32::from_be_bytes([s0, s1, s2, s3]),
            kind,
            flags,
        }
    }

    /// Put a header together.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let [l0, l1, l2, l3] = self.length.to_be_bytes();
        let [s0, s1, s2, s3] = self.stream_id.to_be_bytes();
        [l0, l1, l2, l3, s0, s1, s2, s3, self.kind, self.flags]
    }
}

/// What came out of the decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A frame with its whole payload.
    Whole(FrameHeader, &'a [u8]),
    /// A frame longer than [`MAX_PAYLOAD`]; its payload is discarded as it arrives.
    Oversized(FrameHeader),
}

/// Cuts a byte stream into frames.
#[derive(Debug)]
pub struct FrameDecoder {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Bytes of an oversized payload that have yet to arrive.
    discard: usize,
}

impl Default for FrameDecoder {
    fn default() -> Self {
        Self {
            buffer: vec![0; BUFFER_LEN],
            start: 0,
            end: 0,
            discard: 0,
        }
    }
}

impl FrameDecoder {
    /// A decoder that holds no memory until it is used.
    pub fn empty() -> Self {
        Self {
            buffer: Vec::new(),
            start: 0,
            end: 0,
            discard: 0,
        }
    }

    /// Room for more bytes of the stream; never empty. Call [`next`](Self::next) until it
    /// returns `None` first, or the buffer grows without need.
    pub fn spare(&mut self) -> &mut [u8] {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
            if self.buffer.len() > BUFFER_LEN {
                self.buffer.truncate(BUFFER_LEN);
                self.buffer.shrink_to_fit();
            }
        }
        let missing = self.missing();
        if self.buffer.len() - self.end < missing.max(MIN_SPARE) {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            if self.buffer.len() - self.end < missing.max(1) {
                self.buffer.resize(self.end + missing.max(1), 0);
            }
        }
        self.buffer.get_mut(self.end..).unwrap_or_default()
    }

    /// Say how many bytes were put at the beginning of [`spare`](Self::spare).
    pub fn commit(&mut self, count: usize) {
        self.end = self.buffer.len().min(self.end + count);
    }

    /// The next frame that is complete, or too large to be wanted.
    #[expect(
        clippy::should_implement_trait,
        reason = "the frame borrows from the decoder"
    )]
    pub fn next(&mut self) -> Option<Frame<'_>> {
        let dropped = self.discard.min(self.end - self.start);
        self.discard -= dropped;
        self.start += dropped;
        let header = self.header()?;
        let length = usize::try_from(header.length).unwrap_or(usize::MAX);
        if length > MAX_PAYLOAD {
            self.start += HEADER_LEN;
            self.discard = length;
            return Some(Frame::Oversized(header));
        }
        let body = self.start + HEADER_LEN;
        if self.end - body < length {
            return None;
        }
        self.start = body + length;
        self.buffer
            .get(body..body + length)
            .map(|payload| Frame::Whole(header, payload))
    }

    /// Whether the stream stops here without cutting a frame.
    pub fn is_at_boundary(&self) -> bool {
        self.start == self.end && self.discard == 0
    }

    fn header(&self) -> Option<FrameHeader> {
        let bytes = self
            .buffer
            .get(self.start..self.end)?
            .first_chunk::<HEADER_LEN>()?;
        Some(FrameHeader::from_bytes(*bytes))
    }

    /// Bytes that the frame at the front still needs; its length is within the limit, or the
    /// header is not there yet.
    fn missing(&self) -> usize {
        let Some(header) = self.header() else {
            return HEADER_LEN;
        };
        let length = usize::try_from(header.length)
            .unwrap_or(usize::MAX)
            .min(MAX_PAYLOAD);
        (HEADER_LEN + length).saturating_sub(self.end - self.start)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn feed(decoder: &mut FrameDecoder, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let spare = decoder.spare();
            let count = spare.len().min(bytes.len());
            spare[..count].copy_from_slice(&bytes[..count]);
            decoder.commit(count);
            bytes = &bytes[count..];
        }
    }

    fn header(length: usize, stream_id: u32) -> FrameHeader {
        FrameHeader {
            length: length.try_into().unwrap(),
            stream_id,
            kind: TYPE_RESPONSE,
            flags: 0,
        }
    }

    #[test]
    fn header_bytes_match_the_documented_example() {
        let header = FrameHeader {
            length: 0x55,
            stream_id: 1,
            kind: TYPE_REQUEST,
            flags: 0,
        };
        assert_eq!(header.to_bytes(), [0, 0, 0, 0x55, 0, 0, 0, 1, 1, 0]);
        assert_eq!(FrameHeader::from_bytes(header.to_bytes()), header);
    }

    #[test]
    fn the_largest_payload_passes_and_one_more_byte_is_discarded() {
        let mut decoder = FrameDecoder::default();
        let largest = vec![7; MAX_PAYLOAD];
        feed(&mut decoder, &header(MAX_PAYLOAD, 1).to_bytes());
        feed(&mut decoder, &largest);
        assert_eq!(
            decoder.next(),
            Some(Frame::Whole(header(MAX_PAYLOAD, 1), &largest))
        );
        feed(&mut decoder, &header(MAX_PAYLOAD + 1, 3).to_bytes());
        assert_eq!(
            decoder.next(),
            Some(Frame::Oversized(header(MAX_PAYLOAD + 1, 3)))
        );
    }

    #[test]
    fn a_frame_after_an_oversized_one_is_found() {
        let mut decoder = FrameDecoder::default();
        feed(&mut decoder, &header(MAX_PAYLOAD + 5, 3).to_bytes());
        assert!(matches!(decoder.next(), Some(Frame::Oversized(_))));
        for _ in 0..MAX_PAYLOAD / 4096 {
            feed(&mut decoder, &[1; 4096]);
            assert_eq!(decoder.next(), None);
        }
        let tail: Vec<u8> = [1; 5]
            .into_iter()
            .chain(header(2, 5).to_bytes())
            .chain(*b"ok")
            .collect();
        feed(&mut decoder, &tail);
        assert_eq!(decoder.next(), Some(Frame::Whole(header(2, 5), b"ok")));
        assert!(decoder.is_at_boundary());
    }

    #[test]
    fn an_announced_length_alone_reserves_nothing_past_the_limit() {
        let mut decoder = FrameDecoder::default();
        feed(&mut decoder, &header(MAX_PAYLOAD, 1).to_bytes());
        assert_eq!(decoder.next(), None);
        assert!(decoder.spare().len() >= MIN_SPARE);
        assert!(decoder.buffer.len() <= MAX_PAYLOAD + HEADER_LEN);
    }

    #[test]
    fn a_cut_frame_is_no_boundary() {
        let mut decoder = FrameDecoder::default();
        feed(&mut decoder, &[0, 0, 0, 1]);
        assert_eq!(decoder.next(), None);
        assert!(!decoder.is_at_boundary());
    }

    proptest! {
        #[test]
        fn any_split_yields_the_same_frames(
            payloads in proptest::collection::vec(
                proptest::collection::vec(any::<u8>(), 0..300), 1..20),
            steps in proptest::collection::vec(1_usize..400, 1..50),
        ) {
            let mut stream = Vec::new();
            for (index, payload) in payloads.iter().enumerate() {
                stream.extend(header(payload.len(), u32::try_from(index).unwrap()).to_bytes());
                stream.extend(payload);
            }
            let mut decoder = FrameDecoder::default();
            let mut seen = Vec::new();
            let mut rest = &stream[..];
            for step in steps.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at((*step).min(rest.len()));
                feed(&mut decoder, now);
                rest = later;
                while let Some(Frame::Whole(_, payload)) = decoder.next() {
                    seen.push(payload.to_vec());
                }
            }
            prop_assert_eq!(seen, payloads);
            prop_assert!(decoder.is_at_boundary());
        }

        #[test]
        fn arbitrary_bytes_never_panic_nor_buffer_past_the_limit(
            bytes in proptest::collection::vec(any::<u8>(), 0..5000),
            step in 1_usize..700,
        ) {
            let mut decoder = FrameDecoder::default();
            for chunk in bytes.chunks(step) {
                feed(&mut decoder, chunk);
                while decoder.next().is_some() {}
            }
            prop_assert!(decoder.buffer.len() <= MAX_PAYLOAD + HEADER_LEN);
        }
    }
}
