//! The receive ring against the mock driver.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::mock::{MockBuffer, MockDriver, UsedElement, mock_ram};

const QUEUE_SIZE: u16 = 16;
const RING: u64 = 0x1000;
const DATA: u64 = 0x1_0000;
const MEMORY_SIZE: usize = 0x10_0000;

struct Receiver {
    driver: MockDriver,
    ring: Ring,
    pool: ChainPool,
}

impl Receiver {
    fn new() -> Self {
        let ram = mock_ram(MEMORY_SIZE);
        let driver = MockDriver::new(&ram, RING, QUEUE_SIZE);
        let ring = driver.ring(false).unwrap();
        Self {
            driver,
            ring,
            pool: ChainPool::default(),
        }
    }

    /// One writable chain per entry: `(address, len)` lists.
    fn post(&mut self, chains: &[&[(u64, u32)]]) {
        for chain in chains {
            let buffers: Vec<MockBuffer> = chain
                .iter()
                .map(|(address, len)| MockBuffer::writable(*address, *len))
                .collect();
            self.driver.add(&buffers);
        }
    }

    fn turn(&mut self, budget: usize) -> RxRing<'_> {
        RxRing::new(&mut self.ring, &mut self.pool, budget)
    }

    /// Put an empty packet.
    fn put(&mut self) -> bool {
        self.turn(10).put(&PacketHeader::default()).unwrap()
    }

    fn used(&mut self) -> Vec<(u32, u32)> {
        let pair = |element: UsedElement| (element.head, element.len);
        self.driver.take_used().into_iter().map(pair).collect()
    }
}

fn sized(len: u32) -> PacketHeader {
    PacketHeader {
        len,
        ..Default::default()
    }
}

#[test]
fn a_packet_goes_into_a_chain_split_anywhere() {
    let mut receiver = Receiver::new();
    receiver.post(&[&[(DATA, 10), (DATA + 100, 20), (DATA + 200, 14)]]);
    let header = PacketHeader {
        src_cid: 2,
        dst_port: 77,
        op: 3,
        ..Default::default()
    };
    assert!(receiver.turn(10).put(&header).unwrap());
    assert_eq!(receiver.used(), [(0, 44)]);
    let parts = [(DATA, 10), (DATA + 100, 20), (DATA + 200, 14)];
    let bytes: Vec<u8> = parts
        .into_iter()
        .flat_map(|(address, len)| receiver.driver.read(address, len))
        .collect();
    assert_eq!(PacketHeader::parse_prefix(&bytes), Ok(header));
}

#[test]
fn useless_chains_are_given_back_empty() {
    let mut receiver = Receiver::new();
    // Too short; outside of memory; with a part to read; good.
    receiver.post(&[&[(DATA, 43)], &[(u64::MAX - 8, 100)]]);
    receiver.driver.add(&[
        MockBuffer::readable(DATA, 100),
        MockBuffer::writable(DATA + 100, 100),
    ]);
    receiver.post(&[&[(DATA, 100)]]);
    assert!(receiver.put());
    assert_eq!(receiver.used(), [(0, 0), (1, 0), (2, 0), (4, 44)]);
}

#[test]
fn a_flood_of_useless_chains_ends_the_turn() {
    let mut receiver = Receiver::new();
    receiver.post(&[[(DATA, 1)].as_slice(); 8]);
    let mut ring = receiver.turn(3);
    assert!(!ring.put(&PacketHeader::default()).unwrap());
    assert!(ring.is_done());
    assert!(!ring.is_exhausted());
    assert_eq!(receiver.used().len(), 3);
}

#[test]
fn a_batch_is_split_into_packets_and_the_rest_goes_back() {
    let mut receiver = Receiver::new();
    receiver.post(&[
        &[(DATA, 44), (DATA + 0x100, 10)],
        &[(DATA + 0x200, 54)],
        &[(DATA + 0x300, 54)],
        &[(DATA, 20)],
    ]);
    let mut ring = receiver.turn(10);
    let reservation = ring.reserve(100, 8).unwrap();
    assert_eq!(reservation.payload.len(), 30);
    reservation.payload.copy_from(0, b"abcdefghijklm");
    ring.commit(reservation, 13, sized);
    assert_eq!(receiver.used(), [(0, 54), (2, 47)]);
    assert_eq!(receiver.driver.read(DATA + 0x200 + 44, 3), b"klm");
    let lens = [DATA, DATA + 0x200].map(|at| receiver.driver.read(at + 24, 4));
    assert_eq!(lens, [[10, 0, 0, 0], [3, 0, 0, 0]]);
    // The third chain and the short one after it are still there, in order.
    assert!(receiver.put());
    assert!(!receiver.put());
    assert_eq!(receiver.used(), [(3, 44), (4, 0)]);
}

#[test]
fn a_chain_that_breaks_a_rule_does_not_come_between_those_held() {
    let mut receiver = Receiver::new();
    receiver.post(&[&[(DATA, 54)], &[(u64::MAX - 8, 100)], &[(DATA + 0x100, 54)]]);
    let mut ring = receiver.turn(10);
    let reservation = ring.reserve(100, 8).unwrap();
    assert_eq!(reservation.payload.len(), 10);
    // Nothing came: all of it goes back, and is taken again in order.
    ring.commit(reservation, 0, |_| unreachable!());
    assert_eq!(receiver.used(), []);
    assert!(receiver.put());
    assert!(receiver.put());
    assert!(!receiver.put());
    assert_eq!(receiver.used(), [(0, 44), (1, 0), (2, 44)]);
}

#[test]
fn a_reservation_is_no_larger_than_wanted() {
    let mut receiver = Receiver::new();
    receiver.post(&[&[(DATA, 0x8000)], &[(DATA, 0x8000)]]);
    let mut ring = receiver.turn(10);
    let reservation = ring.reserve(5, 8).unwrap();
    assert_eq!(reservation.payload.len(), 5);
    ring.commit(reservation, 0, |_| unreachable!());
    assert_eq!(receiver.used(), []);
    assert!(receiver.put());
}

#[test]
fn a_huge_chain_carries_no_more_than_a_packet_may() {
    let mut receiver = Receiver::new();
    receiver.post(&[&[(DATA, 0x2_0000)]]);
    let mut ring = receiver.turn(10);
    let reservation = ring.reserve(0x2_0000, 1).unwrap();
    assert_eq!(reservation.payload.len(), MAX_PAYLOAD);
    ring.commit(reservation, MAX_PAYLOAD, sized);
    assert_eq!(receiver.used(), [(0, MAX_PAYLOAD_SIZE + 44)]);
}

#[test]
fn without_chains_a_reservation_is_empty_and_the_ring_exhausted() {
    let mut receiver = Receiver::new();
    let mut ring = receiver.turn(10);
    let reservation = ring.reserve(5, 8).unwrap();
    assert!(reservation.payload.is_empty());
    ring.commit(reservation, 0, |_| unreachable!());
    assert!(ring.is_exhausted());
}

#[test]
fn other_memory_lets_go_of_the_old() {
    let mut receiver = Receiver::new();
    receiver.post(&[&[(DATA, 100)]]);
    assert!(receiver.put());
    let ram = mock_ram(MEMORY_SIZE);
    let mut driver = MockDriver::new(&ram, RING, QUEUE_SIZE);
    driver.add(&[MockBuffer::writable(DATA, 100)]);
    let old = std::mem::replace(&mut receiver.driver, driver);
    let old_ram = Arc::clone(receiver.ring.ram());
    receiver.ring = receiver.driver.ring(false).unwrap();
    drop(old);
    let mut ring = receiver.turn(10);
    let reservation = ring.reserve(5, 8).unwrap();
    reservation.payload.copy_from(0, b"hello");
    ring.commit(reservation, 5, sized);
    assert_eq!(receiver.driver.read(DATA + 44, 5), b"hello");
    assert_eq!(Arc::strong_count(&old_ram), 1);
}

#[test]
fn a_broken_ring_is_an_error() {
    let mut receiver = Receiver::new();
    receiver.driver.set_available_index(QUEUE_SIZE + 1);
    let result = receiver.turn(10).put(&PacketHeader::default());
    assert!(matches!(result, Err(RingError::AvailableIndex { .. })));

    let mut receiver = Receiver::new();
    receiver.driver.make_available(QUEUE_SIZE);
    let result = receiver.turn(10).reserve(1, 1);
    assert!(matches!(
        result,
        Err(RingError::Head {
            head: QUEUE_SIZE,
            ..
        })
    ));
}

#[test]
fn a_chain_that_loops_ends() {
    let mut receiver = Receiver::new();
    receiver.driver.put_descriptor(0, DATA, 1, 3, 0);
    receiver.driver.make_available(0);
    assert!(!receiver.put());
    assert_eq!(receiver.used(), [(0, 0)]);
}

proptest! {
    /// Whatever chains there are and however little comes, every chain is given back exactly once
    /// and the bytes arrive in order.
    #[test]
    fn batches_neither_lose_nor_repeat_a_chain(
        rooms in proptest::collection::vec(0u32..60, 1..usize::from(QUEUE_SIZE)),
        batches in proptest::collection::vec((1usize..200, 1usize..8, 0usize..200), 0..20),
    ) {
        let mut receiver = Receiver::new();
        for (index, room) in (0u64..).zip(&rooms) {
            // Some are too short for a header, some no memory.
            let address = if room % 7 == 3 { u64::MAX - 8 } else { DATA + index * 0x1000 };
            receiver.post(&[&[(address, 30 + room)]]);
        }
        let mut sent = 0u8;
        let mut expected = Vec::new();
        for (wanted, max_chains, filled) in batches {
            let mut ring = receiver.turn(100);
            let reservation = ring.reserve(wanted, max_chains).unwrap();
            let filled = filled.min(reservation.payload.len());
            let bytes: Vec<u8> = (0..filled).map(|_| { sent = sent.wrapping_add(1); sent }).collect();
            reservation.payload.copy_from(0, &bytes);
            expected.extend(bytes);
            ring.commit(reservation, filled, sized);
        }
        while receiver.put() {}
        let used = receiver.used();
        let heads: Vec<u32> = used.iter().map(|element| element.0).collect();
        let all: Vec<u32> = (0..).take(rooms.len()).collect();
        prop_assert_eq!(heads, all);
        let mut received = Vec::new();
        for (head, len) in used {
            if len > 44 {
                let at = DATA + u64::from(head) * 0x1000;
                received.extend(receiver.driver.read(at + 44, len as usize - 44));
            }
        }
        prop_assert_eq!(received, expected);
    }
}
