//! Turns of the rings, with a muxer whose guest reaches nobody.

use std::io;
use std::os::unix::net::UnixStream;

use rustix::event::epoll;

use super::*;
use crate::mock::{MockBuffer, mock_ram};
use crate::vsock::mock::MockGuest;
use crate::vsock::muxer::{Dialer, MAX_RESETS};
use crate::vsock::packet::Operation;

const CID: u64 = 3;
const QUEUE_SIZE: u16 = 64;
/// Beyond rings and buffers of the guest.
const DATA: u64 = MockGuest::MEMORY_SIZE;

struct NobodyListens;

impl Dialer for NobodyListens {
    fn dial(&mut self, _port: u32) -> io::Result<UnixStream> {
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

struct Device {
    guest: MockGuest,
    rx: Ring,
    tx: Ring,
    muxer: Muxer,
    exchange: Exchange,
}

impl Device {
    fn new() -> Self {
        let ram = mock_ram(usize::try_from(MockGuest::MEMORY_SIZE).unwrap() + 0x1_0000);
        let guest = MockGuest::new(&ram, 0, QUEUE_SIZE, CID);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        Self {
            rx: guest.rx.ring(false).unwrap(),
            tx: guest.tx.ring(false).unwrap(),
            guest,
            muxer: Muxer::new(CID, Box::new(NobodyListens), Arc::new(epoll)),
            exchange: Exchange::default(),
        }
    }

    fn drain(&mut self) -> bool {
        self.exchange
            .drain_tx(&mut self.muxer, &mut self.tx)
            .unwrap()
    }

    fn fill(&mut self) -> bool {
        self.exchange
            .fill_rx(&mut self.muxer, &mut self.rx)
            .unwrap()
    }

    fn send(&mut self, operation: Operation) {
        let header = self.guest.header(50, 2000, operation);
        self.guest.send(&header, b"");
    }
}

#[test]
fn a_request_is_taken_from_a_chain_split_anywhere_and_answered() {
    let mut device = Device::new();
    let header = device.guest.header(50, 2000, Operation::Request);
    device.guest.tx.write(DATA, &header.to_bytes());
    device.guest.tx.add(&[
        MockBuffer::readable(DATA, 1),
        MockBuffer::readable(DATA + 1, 40),
        MockBuffer::readable(DATA + 41, 3),
    ]);
    assert!(!device.drain());
    device.guest.post(1);
    assert!(!device.fill());
    let (answer, _) = device.guest.take().pop_front().unwrap();
    assert_eq!((answer.op, answer.src_port, answer.dst_port), (3, 2000, 50));
    assert_eq!(device.guest.tx.take_used().len(), 1);
}

#[test]
fn chains_that_are_no_packets_are_given_back_and_counted() {
    let mut device = Device::new();
    let header = device.guest.header(50, 2000, Operation::Request);
    let tx = &mut device.guest.tx;
    tx.write(DATA, &header.to_bytes());
    tx.add(&[MockBuffer::readable(DATA, 43)]);
    tx.add(&[
        MockBuffer::readable(DATA, 44),
        MockBuffer::writable(DATA + 44, 8),
    ]);
    // This one breaks a rule of the ring: it never becomes a packet.
    tx.add(&[MockBuffer::readable(u64::MAX - 8, 44)]);
    assert!(!device.drain());
    let used = device.guest.tx.take_used();
    assert_eq!(used.len(), 3);
    assert!(used.iter().all(|element| element.len == 0));
    let counters = device.muxer.counters();
    assert_eq!(
        (counters.invalid_packets, counters.packets_from_guest),
        (2, 2)
    );
    assert_eq!(device.tx.malformed().0, 1);
    assert!(!device.muxer.has_pending());
}

#[test]
fn kicks_are_asked_for_once_the_ring_is_empty() {
    let mut device = Device::new();
    device.send(Operation::Reset);
    assert!(device.guest.tx.needs_kick(false));
    assert!(!device.drain());
    device.send(Operation::Reset);
    assert!(device.guest.tx.needs_kick(false));
}

#[test]
fn packets_stay_on_the_ring_while_replies_pile_up() {
    let mut device = Device::new();
    for _ in 0..MAX_RESETS / usize::from(QUEUE_SIZE) {
        for _ in 0..QUEUE_SIZE {
            device.send(Operation::Request);
        }
        device.drain();
    }
    assert!(device.muxer.is_reply_queue_full());
    device.send(Operation::Request);
    assert!(device.drain());
    assert_eq!(device.guest.tx_free(), QUEUE_SIZE - 1);
    // No kick is wanted: only room for replies lets this go on.
    assert!(!device.guest.tx.needs_kick(false));

    device.guest.post(1);
    assert!(!device.fill());
    // There are no more buffers: the guest is asked to tell of new ones.
    device.guest.rx.needs_kick(false);
    device.guest.post(1);
    assert!(device.guest.rx.needs_kick(false));
    device.drain();
    assert_eq!(device.guest.tx_free(), QUEUE_SIZE);
}

#[test]
fn receive_buffers_are_no_news_while_nothing_waits() {
    let mut device = Device::new();
    assert!(!device.fill());
    device.guest.post(QUEUE_SIZE);
    assert!(!device.guest.rx.needs_kick(false));
    device.send(Operation::Request);
    device.drain();
    assert!(!device.fill());
    assert_eq!(device.guest.take().len(), 1);
}

#[test]
fn a_flood_of_broken_chains_ends_the_turn() {
    let mut device = Device::new();
    for _ in 0..QUEUE_SIZE {
        let broken = MockBuffer::readable(u64::MAX - 8, 44);
        device.guest.tx.add(&[broken]);
    }
    assert!(!device.drain());
    assert_eq!(device.tx.malformed().0, u64::from(QUEUE_SIZE));
}

#[test]
fn a_broken_ring_is_an_error() {
    let mut device = Device::new();
    device.guest.tx.set_available_index(QUEUE_SIZE + 1);
    let result = device.exchange.drain_tx(&mut device.muxer, &mut device.tx);
    assert!(matches!(result, Err(RingError::AvailableIndex { .. })));
}

#[test]
fn forgetting_lets_go_of_the_memory() {
    let mut device = Device::new();
    device.send(Operation::Request);
    device.drain();
    device.guest.post(1);
    device.fill();
    device.exchange.forget();
    let ram = Arc::clone(device.rx.ram());
    let Device {
        guest,
        rx,
        tx,
        muxer: _,
        exchange: _exchange,
    } = device;
    drop((guest, rx, tx));
    assert_eq!(Arc::strong_count(&ram), 1);
}
