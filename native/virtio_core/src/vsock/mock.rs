//! A guest's socket driver by hand, for tests of the device (feature `mock`).
//!
//! [`MockGuest`] has a receive and a transmit ring with a buffer for each entry, and exchanges
//! whole packets, whatever their headers say. It keeps no connections.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::mock::{MockBuffer, MockDriver};
use crate::ram::GuestRam;

use super::packet::{HEADER_SIZE, HOST_CID, Operation, PacketHeader, TYPE_STREAM};

/// Guest memory that one ring and its buffers may take, each of the two.
const RING_AREA: u64 = 0x10_0000;
/// Where the buffers of a ring begin.
const BUFFERS: u64 = 0x1_0000;
/// One buffer: a header and some payload.
const BUFFER_SIZE: u32 = 0x1000;
/// Payload bytes of the largest packet this guest sends and takes.
pub const MAX_MOCK_PAYLOAD: usize = 0x1000 - HEADER_SIZE;

/// A packet and its payload.
pub type MockPacket = (PacketHeader, Vec<u8>);

/// A driver with a receive and a transmit ring.
#[derive(Debug)]
pub struct MockGuest {
    /// The guest's context id.
    pub cid: u64,
    /// The receive ring.
    pub rx: MockDriver,
    /// The transmit ring.
    pub tx: MockDriver,
    rx_base: u64,
    tx_base: u64,
    rx_free: u16,
    tx_free: u16,
}

impl MockGuest {
    /// Guest memory this takes from `base` on.
    pub const MEMORY_SIZE: u64 = 2 * RING_AREA;

    /// Lay out rings of `size` (up to 128) entries and their buffers at `base`; none is available
    /// to the device yet.
    ///
    /// # Panics
    /// They do not fit into the memory.
    pub fn new(ram: &Arc<GuestRam>, base: u64, size: u16, cid: u64) -> Self {
        let (rx_base, tx_base) = (base, base + RING_AREA);
        assert!(BUFFERS + u64::from(size) * u64::from(BUFFER_SIZE) <= RING_AREA);
        Self {
            cid,
            rx: MockDriver::new(ram, rx_base, size),
            tx: MockDriver::new(ram, tx_base, size),
            rx_base,
            tx_base,
            rx_free: size,
            tx_free: size,
        }
    }

    /// Receive buffers that are not available to the device.
    pub fn rx_free(&self) -> u16 {
        self.rx_free
    }

    /// Make `count` more receive buffers available.
    ///
    /// # Panics
    /// There are not so many.
    pub fn post(&mut self, count: u16) {
        self.rx_free = self.rx_free.checked_sub(count).expect("so many buffers");
        for _ in 0..count {
            let at = buffer_at(self.rx_base, self.rx.next_head().into());
            let buffer = MockBuffer::writable(at, BUFFER_SIZE);
            self.rx.add(&[buffer]);
        }
    }

    /// What the device put into receive buffers since the last time, in order.
    ///
    /// # Panics
    /// A packet's length is not that of its payload.
    pub fn take(&mut self) -> VecDeque<MockPacket> {
        let mut packets = VecDeque::new();
        for used in self.rx.take_used() {
            self.rx_free += 1;
            let at = buffer_at(self.rx_base, used.head);
            let mut bytes = self.rx.read(at, used.len as usize);
            let header = PacketHeader::parse_prefix(&bytes).expect("a packet has a header");
            let payload = bytes.split_off(HEADER_SIZE);
            assert_eq!(header.len as usize, payload.len());
            packets.push_back((header, payload));
        }
        packets
    }

    /// Transmit buffers that the device does not have.
    pub fn tx_free(&mut self) -> u16 {
        // At most the ring's size.
        self.tx_free += u16::try_from(self.tx.take_used().len()).unwrap_or(0);
        self.tx_free
    }

    /// Send a packet.
    ///
    /// # Panics
    /// No buffer is free, or the payload is larger than one.
    pub fn send(&mut self, header: &PacketHeader, payload: &[u8]) {
        assert!(self.tx_free() > 0 && payload.len() <= MAX_MOCK_PAYLOAD);
        self.tx_free -= 1;
        let at = buffer_at(self.tx_base, self.tx.next_head().into());
        self.tx.write(at, &header.to_bytes());
        self.tx.write(at + HEADER_SIZE as u64, payload);
        // At most a buffer's size.
        let len = u32::try_from(HEADER_SIZE + payload.len()).unwrap_or(0);
        self.tx.add(&[MockBuffer::readable(at, len)]);
    }

    /// A header from this guest to the host, with credit for 64 KiB.
    pub fn header(&self, guest_port: u32, host_port: u32, operation: Operation) -> PacketHeader {
        PacketHeader {
            src_cid: self.cid,
            dst_cid: HOST_CID,
            src_port: guest_port,
            dst_port: host_port,
            socket_type: TYPE_STREAM,
            op: operation as u16,
            buf_alloc: 64 * 1024,
            ..PacketHeader::default()
        }
    }

    /// Answer a packet of the host on the same connection.
    ///
    /// # Panics
    /// As [`MockGuest::send`].
    pub fn answer(&mut self, packet: &PacketHeader, operation: Operation, payload: &[u8]) {
        let header = PacketHeader {
            // At most a buffer's size.
            len: u32::try_from(payload.len()).unwrap_or(0),
            ..self.header(packet.dst_port, packet.src_port, operation)
        };
        self.send(&header, payload);
    }
}

fn buffer_at(base: u64, head: u32) -> u64 {
    base + BUFFERS + u64::from(head) * u64::from(BUFFER_SIZE)
}
