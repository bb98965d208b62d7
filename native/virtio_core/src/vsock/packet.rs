//! The virtio-vsock packet header: 44 packed little-endian bytes before each payload.
//!
//! A header is copied out of guest memory once, decoded here, and used only from the copy, so the
//! guest cannot change it between check and use. Nothing here touches memory or sockets; the
//! muxer calls it on the I/O thread. Layout and numbers: virtio 1.2, section 5.10.6.

use thiserror::Error;

/// Bytes of a packet header on the ring.
pub const HEADER_SIZE: usize = 44;

/// Most payload bytes in one packet, in either direction.
pub const MAX_PAYLOAD_SIZE: u32 = 64 * 1024;

/// The host's context id (virtio 1.2, 5.10.4).
pub const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`: the only socket type this device offers.
pub const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;

/// Both directions are closed.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// Why a header is refused.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum PacketError {
    /// fewer bytes than a header
    #[error("packet of {0} bytes is shorter than its header")]
    Truncated(usize),
    /// not a known operation
    #[error("unknown operation {0}")]
    UnknownOperation(u16),
    /// not a stream packet
    #[error("unsupported socket type {0}")]
    UnsupportedType(u16),
    /// the sender is not the guest this device serves
    #[error("source cid {0} is not the guest's")]
    ForeignSource(u64),
    /// the receiver is not the host
    #[error("destination cid {0} is not the host's")]
    ForeignDestination(u64),
    /// payload longer than a packet may carry
    #[error("payload of {0} bytes is over the limit")]
    OversizedPayload(u32),
    /// payload on an operation that has none
    #[error("control packet claims {0} payload bytes")]
    UnexpectedPayload(u32),
}

/// `op` of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    /// Ask for a connection.
    Request = 1,
    /// Accept a connection.
    Response = 2,
    /// Refuse or end a connection at once.
    Reset = 3,
    /// Close one or both directions.
    Shutdown = 4,
    /// Carry stream bytes.
    ReadWrite = 5,
    /// Tell how much was consumed.
    CreditUpdate = 6,
    /// Ask for a credit update.
    CreditRequest = 7,
}

impl TryFrom<u16> for Operation {
    type Error = PacketError;

    #[inline]
    fn try_from(value: u16) -> Result<Self, PacketError> {
        Ok(match value {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => return Err(PacketError::UnknownOperation(other)),
        })
    }
}

/// A decoded packet header. Every bit pattern decodes; [`PacketHeader::check`] judges it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketHeader {
    /// Sender's context id.
    pub src_cid: u64,
    /// Receiver's context id.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Payload bytes after the header.
    pub len: u32,
    /// Socket type, see [`TYPE_STREAM`].
    pub socket_type: u16,
    /// Operation number, see [`Operation`].
    pub op: u16,
    /// Operation flags (shutdown directions).
    pub flags: u32,
    /// The sender's receive buffer space for this connection.
    pub buf_alloc: u32,
    /// Bytes of this connection that the sender has consumed, modulo 2^32.
    pub fwd_cnt: u32,
}

/// Copy `N` bytes at `offset` out of the header; both are constants within bounds.
fn field<const N: usize>(bytes: &[u8; HEADER_SIZE], offset: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[offset..offset + N]);
    out
}

impl PacketHeader {
    /// Decode a header.
    #[inline]
    pub fn parse(bytes: &[u8; HEADER_SIZE]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            socket_type: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// Decode the start of `bytes`.
    ///
    /// # Errors
    /// [`PacketError::Truncated`] when there are fewer than [`HEADER_SIZE`] bytes.
    #[inline]
    pub fn parse_prefix(bytes: &[u8]) -> Result<Self, PacketError> {
        bytes
            .first_chunk()
            .map(Self::parse)
            .ok_or(PacketError::Truncated(bytes.len()))
    }

    /// Encode the header.
    #[inline]
    pub fn to_bytes(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// Judge a header sent by the guest with context id `guest_cid`.
    ///
    /// # Errors
    /// The first rule the header breaks.
    #[inline]
    pub fn check(&self, guest_cid: u64) -> Result<Operation, PacketError> {
        if self.src_cid != guest_cid {
            return Err(PacketError::ForeignSource(self.src_cid));
        }
        if self.dst_cid != HOST_CID {
            return Err(PacketError::ForeignDestination(self.dst_cid));
        }
        if self.socket_type != TYPE_STREAM {
            return Err(PacketError::UnsupportedType(self.socket_type));
        }
        let operation = Operation::try_from(self.op)?;
        if self.len > MAX_PAYLOAD_SIZE {
            return Err(PacketError::OversizedPayload(self.len));
        }
        if self.len != 0 && operation != Operation::ReadWrite {
            return Err(PacketError::UnexpectedPayload(self.len));
        }
        Ok(operation)
    }

    /// The reset that answers this packet: addresses swapped, same socket type.
    #[must_use]
    pub fn reset_reply(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            socket_type: self.socket_type,
            op: Operation::Reset as u16,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_header() -> impl Strategy<Value = PacketHeader> {
        (
            any::<(u64, u64, u32, u32, u32)>(),
            any::<(u16, u16, u32, u32, u32)>(),
        )
            .prop_map(|(a, b)| PacketHeader {
                src_cid: a.0,
                dst_cid: a.1,
                src_port: a.2,
                dst_port: a.3,
                len: a.4,
                socket_type: b.0,
                op: b.1,
                flags: b.2,
                buf_alloc: b.3,
                fwd_cnt: b.4,
            })
    }

    proptest! {
        #[test]
        fn parsing_what_was_encoded_gives_the_header(header in any_header()) {
            prop_assert_eq!(PacketHeader::parse(&header.to_bytes()), header);
        }

        #[test]
        fn encoding_what_was_parsed_gives_the_bytes(bytes in any::<[u8; 32]>(), tail in any::<[u8; 12]>()) {
            let mut all = [0; HEADER_SIZE];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&tail);
            prop_assert_eq!(PacketHeader::parse(&all).to_bytes(), all);
        }

        #[test]
        fn a_header_passes_only_within_all_limits(header in any_header(), cid in 3u64..5) {
            let header = PacketHeader { src_cid: 3, dst_cid: HOST_CID, socket_type: header.socket_type % 3, op: header.op % 10, len: header.len % 70_000, ..header };
            let is_valid = cid == 3
                && header.socket_type == TYPE_STREAM
                && (1..=7).contains(&header.op)
                && header.len <= MAX_PAYLOAD_SIZE
                && (header.len == 0 || header.op == 5);
            prop_assert_eq!(header.check(cid).is_ok(), is_valid);
        }

        #[test]
        fn a_short_buffer_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..HEADER_SIZE)) {
            prop_assert_eq!(PacketHeader::parse_prefix(&bytes), Err(PacketError::Truncated(bytes.len())));
        }
    }

    #[test]
    fn fields_sit_at_the_offsets_of_the_specification() {
        let header = PacketHeader {
            src_cid: 0x0807_0605_0403_0201,
            dst_cid: 0x100f_0e0d_0c0b_0a09,
            src_port: 0x1413_1211,
            dst_port: 0x1817_1615,
            len: 0x1c1b_1a19,
            socket_type: 0x1e1d,
            op: 0x201f,
            flags: 0x2423_2221,
            buf_alloc: 0x2827_2625,
            fwd_cnt: 0x2c2b_2a29,
        };
        let expected: Vec<u8> = (1..=44).collect();
        assert_eq!(header.to_bytes().as_slice(), expected);
    }

    #[test]
    fn a_reset_goes_back_where_the_packet_came_from() {
        let header = PacketHeader {
            src_cid: 3,
            dst_cid: 2,
            src_port: 7,
            dst_port: 9,
            socket_type: 2,
            op: 1,
            ..Default::default()
        };
        let reply = header.reset_reply();
        assert_eq!(
            (reply.src_cid, reply.dst_cid, reply.src_port, reply.dst_port),
            (2, 3, 9, 7)
        );
        assert_eq!((reply.socket_type, reply.op), (2, 3));
    }
}
