//! The six messages the I/O thread codes itself: ttRPC Request and Response, and the stdio
//! requests and replies of the agent. By hand, because here payloads must not be copied:
//! decoding yields slices of the receive buffer, encoding writes around bytes already in place.
//! Everything decoded comes from the guest; any bytes yield a value or a [`MessageError`].

use super::frame::{FrameHeader, HEADER_LEN, MAX_PAYLOAD, TYPE_REQUEST};
use crate::status::Code;

const VARINT: u32 = 0;
const FIXED64: u32 = 1;
const BYTES: u32 = 2;
const FIXED32: u32 = 5;

/// Why bytes are no message, or a message no frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Not protobuf, or a field of another type.
    #[error("malformed protobuf in a reply")]
    Malformed,
    /// The request exceeds a frame.
    #[error("a request of {0} bytes exceeds the limit of {MAX_PAYLOAD}")]
    TooLarge(usize),
}

/// A reply taken apart; slices of the receive buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response<'a> {
    /// The status' code; absent means OK.
    pub code: Code,
    /// The status' text, not yet known to be UTF-8.
    pub message: &'a [u8],
    /// The reply itself.
    pub payload: &'a [u8],
}

impl<'a> Response<'a> {
    /// Decode a Response.
    ///
    /// # Errors
    /// [`MessageError::Malformed`].
    pub fn decode(bytes: &'a [u8]) -> Result<Self, MessageError> {
        let mut response = Self {
            code: Code::OK,
            message: &[],
            payload: &[],
        };
        let mut fields = Fields(bytes);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (1, Field::Bytes(status)) => response.decode_status(status)?,
                (2, Field::Bytes(payload)) => response.payload = payload,
                (1 | 2, Field::Number(_)) => return Err(MessageError::Malformed),
                _ => {}
            }
        }
        Ok(response)
    }

    fn decode_status(&mut self, bytes: &'a [u8]) -> Result<(), MessageError> {
        let mut fields = Fields(bytes);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                // An int32 travels as the low half of its 64-bit sign extension.
                #[expect(clippy::cast_possible_truncation, reason = "protobuf int32")]
                (1, Field::Number(code)) => self.code = Code(code as i32),
                (2, Field::Bytes(message)) => self.message = message,
                (1 | 2, _) => return Err(MessageError::Malformed),
                _ => {}
            }
        }
        Ok(())
    }
}

/// The `data` of a `ReadStreamResponse`, in place.
///
/// # Errors
/// [`MessageError::Malformed`].
pub fn decode_read_stream_response(bytes: &[u8]) -> Result<&[u8], MessageError> {
    let mut data: &[u8] = &[];
    let mut fields = Fields(bytes);
    while let Some((number, value)) = fields.next()? {
        match (number, value) {
            (1, Field::Bytes(bytes)) => data = bytes,
            (1, Field::Number(_)) => return Err(MessageError::Malformed),
            _ => {}
        }
    }
    Ok(data)
}

/// The `len` of a `WriteStreamResponse`.
///
/// # Errors
/// [`MessageError::Malformed`].
pub fn decode_write_stream_response(bytes: &[u8]) -> Result<u32, MessageError> {
    let mut len = 0;
    let mut fields = Fields(bytes);
    while let Some((number, value)) = fields.next()? {
        match (number, value) {
            #[expect(clippy::cast_possible_truncation, reason = "protobuf uint32")]
            (1, Field::Number(number)) => len = number as u32,
            (1, Field::Bytes(_)) => return Err(MessageError::Malformed),
            _ => {}
        }
    }
    Ok(len)
}

/// A `ReadStreamRequest`.
#[must_use]
pub fn encode_read_stream_request(container_id: &str, exec_id: &str, len: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(container_id.len() + exec_id.len() + 16);
    put_bytes(&mut out, 1, container_id.as_bytes());
    put_bytes(&mut out, 2, exec_id.as_bytes());
    put_number(&mut out, 3, len.into());
    out
}

/// What precedes `data` of the given length in a `WriteStreamRequest`. The message is these
/// bytes followed by the data.
#[must_use]
pub fn encode_write_stream_head(container_id: &str, exec_id: &str, data_len: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(container_id.len() + exec_id.len() + 16);
    put_bytes(&mut out, 1, container_id.as_bytes());
    put_bytes(&mut out, 2, exec_id.as_bytes());
    put_bytes_head(&mut out, 3, data_len);
    out
}

/// A request's frame around a payload of `payload_len` bytes: what goes before and after it.
///
/// # Errors
/// [`MessageError::TooLarge`].
pub fn encode_request_frame(
    stream_id: u32,
    service: &str,
    method: &str,
    payload_len: usize,
    timeout_nano: i64,
) -> Result<(Vec<u8>, Vec<u8>), MessageError> {
    let mut head = Vec::with_capacity(HEADER_LEN + service.len() + method.len() + 24);
    head.resize(HEADER_LEN, 0);
    put_bytes(&mut head, 1, service.as_bytes());
    put_bytes(&mut head, 2, method.as_bytes());
    put_bytes_head(&mut head, 3, payload_len);
    let mut tail = Vec::new();
    put_number(&mut tail, 4, timeout_nano.max(0).unsigned_abs());
    let total = (head.len() - HEADER_LEN)
        .saturating_add(payload_len)
        .saturating_add(tail.len());
    let length = match u32::try_from(total) {
        Ok(length) if total <= MAX_PAYLOAD => length,
        _ => return Err(MessageError::TooLarge(total)),
    };
    let header = FrameHeader {
        length,
        stream_id,
        kind: TYPE_REQUEST,
        flags: 0,
    };
    if let Some(place) = head.first_chunk_mut::<HEADER_LEN>() {
        *place = header.to_bytes();
    }
    Ok((head, tail))
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

fn put_number(out: &mut Vec<u8>, field: u32, value: u64) {
    if value != 0 {
        put_varint(out, u64::from(field << 3 | VARINT));
        put_varint(out, value);
    }
}

fn put_bytes_head(out: &mut Vec<u8>, field: u32, len: usize) {
    if len != 0 {
        put_varint(out, u64::from(field << 3 | BYTES));
        put_varint(out, u64::try_from(len).unwrap_or(u64::MAX));
    }
}

fn put_bytes(out: &mut Vec<u8>, field: u32, bytes: &[u8]) {
    put_bytes_head(out, field, bytes.len());
    out.extend_from_slice(bytes);
}

enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The fields of a message, in order. Fixed-width fields, which none of the messages here has,
/// are passed over; groups are malformed.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, MessageError> {
        while !self.0.is_empty() {
            let tag = self.varint()?;
            let number = tag >> 3;
            if number == 0 {
                return Err(MessageError::Malformed);
            }
            match u32::try_from(tag & 7) {
                Ok(VARINT) => return Ok(Some((number, Field::Number(self.varint()?)))),
                Ok(BYTES) => {
                    let len = usize::try_from(self.varint()?);
                    let bytes = self.take(len.map_err(|_| MessageError::Malformed)?)?;
                    return Ok(Some((number, Field::Bytes(bytes))));
                }
                Ok(FIXED64) => _ = self.take(8)?,
                Ok(FIXED32) => _ = self.take(4)?,
                _ => return Err(MessageError::Malformed),
            }
        }
        Ok(None)
    }

    fn varint(&mut self) -> Result<u64, MessageError> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let [byte] = *self.take(1)? else {
                return Err(MessageError::Malformed);
            };
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(MessageError::Malformed)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], MessageError> {
        let (taken, rest) = self
            .0
            .split_at_checked(len)
            .ok_or(MessageError::Malformed)?;
        self.0 = rest;
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn unhex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        let pair =
            |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        digits.chunks(2).map(pair).collect()
    }

    #[test]
    fn a_request_has_the_known_bytes() {
        // The documented frame carries metadata too, which this client never sends: its field 5
        // (39 bytes) is left off and the length is 0x55 - 39.
        let payload = unhex("0a026331");
        let (head, tail) =
            encode_request_frame(1, "containerd.task.v2.Task", "Connect", 4, 2_000_000_000)
                .unwrap();
        let frame = [head, payload, tail].concat();
        let expected = unhex(
            "0000002e 00000001 01 00 0a17636f6e7461696e6572642e7461736b2e76322e5461736b \
             1207436f6e6e656374 1a040a026331 2080a8d6b907",
        );
        assert_eq!(frame, expected);
    }

    #[test]
    fn known_responses_decode() {
        let connect = unhex("12050864 10c801");
        let response = Response::decode(&connect).unwrap();
        assert_eq!(
            (response.code, response.payload),
            (Code::OK, &unhex("086410c801")[..])
        );
        let missing = unhex("0a170805 1213 636f6e7461696e6572206e6f7420666f756e64");
        let response = Response::decode(&missing).unwrap();
        assert_eq!(response.code, Code::NOT_FOUND);
        assert_eq!(response.message, b"container not found");
    }

    #[test]
    fn stream_messages_have_the_known_bytes() {
        assert_eq!(
            encode_read_stream_request("c1", "e", 300),
            unhex("0a026331 120165 18ac02")
        );
        let head = encode_write_stream_head("c1", "", 3);
        assert_eq!([&head[..], b"abc"].concat(), unhex("0a026331 1a03616263"));
        assert_eq!(encode_write_stream_head("c1", "", 0), unhex("0a026331"));
        assert_eq!(
            decode_read_stream_response(&unhex("0a03616263")),
            Ok(&b"abc"[..])
        );
        assert_eq!(decode_read_stream_response(&[]), Ok(&[][..]));
        assert_eq!(decode_write_stream_response(&unhex("08ac02")), Ok(300));
    }

    #[test]
    fn unknown_fields_are_skipped_and_wrong_types_refused() {
        let unknown = unhex("7a0161 7801 7d01020304 790102030405060708 12017a");
        assert_eq!(Response::decode(&unknown).unwrap().payload, b"z");
        for malformed in [
            "0801", "1001", "0a020a01", "00", "12", "1205", "13", "0a0208",
        ] {
            let refused = Response::decode(&unhex(malformed)).map(|_| ());
            assert_eq!(refused, Err(MessageError::Malformed), "{malformed}");
        }
        assert_eq!(
            decode_write_stream_response(&[0xff; 11]),
            Err(MessageError::Malformed)
        );
    }

    #[test]
    fn negative_codes_survive() {
        let response = unhex("0a0b 08ffffffffffffffffff01");
        assert_eq!(Response::decode(&response).unwrap().code, Code(-1));
    }

    #[test]
    fn a_request_larger_than_a_frame_is_refused() {
        assert!(encode_request_frame(1, "s", "m", MAX_PAYLOAD - 20, 0).is_ok());
        for len in [MAX_PAYLOAD, usize::MAX] {
            let refused = encode_request_frame(1, "s", "m", len, 0);
            assert!(matches!(refused, Err(MessageError::TooLarge(_))));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Response::decode(&bytes);
            let _ = decode_read_stream_response(&bytes);
            let _ = decode_write_stream_response(&bytes);
        }
    }
}
