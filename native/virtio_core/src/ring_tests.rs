//! Every rule of a ring, one by one. How the two sides work together is `ring_model_tests.rs`,
//! how they race `ring_race_tests.rs`.

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::mock::{MockBuffer, MockDriver, UsedElement, descriptor_bytes, mock_ram};

const NEXT: u16 = DESCRIPTOR_NEXT;
const WRITE: u16 = DESCRIPTOR_WRITE;
const INDIRECT: u16 = DESCRIPTOR_INDIRECT;
const MEMORY: u64 = 0x10_0000;
/// Where tests put indirect tables.
const TABLE: u64 = 0x8_0000;

struct Fixture {
    driver: MockDriver,
    ring: Ring,
    chain: Chain,
}

fn fixture(size: u16, has_event_idx: bool) -> Fixture {
    let ram = mock_ram(usize::try_from(MEMORY).unwrap());
    let driver = MockDriver::new(&ram, 0, size);
    let ring = driver.ring(has_event_idx).unwrap();
    let chain = Chain::new(&ram);
    Fixture {
        driver,
        ring,
        chain,
    }
}

impl Fixture {
    fn pop(&mut self) -> bool {
        self.ring.pop(&mut self.chain).unwrap()
    }

    /// What breaks the only chain there is; it has to come back unused.
    fn refused(&mut self) -> ChainError {
        let (before, _) = self.ring.malformed();
        let head = self.driver.add_head(0);
        assert!(!self.pop());
        let (count, error) = self.ring.malformed();
        assert_eq!(count, before + 1);
        assert_eq!(self.driver.take_used(), [UsedElement { head, len: 0 }]);
        error.unwrap()
    }

    fn put(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.driver.put_descriptor(index, address, len, flags, next);
    }

    /// Write an indirect table, and descriptor 0 that names it.
    fn put_table(&self, descriptors: &[(u64, u32, u16, u16)]) {
        let mut bytes = Vec::new();
        for &(address, len, flags, next) in descriptors {
            bytes.extend(descriptor_bytes(address, len, flags, next));
        }
        self.driver.write(TABLE, &bytes);
        self.put(0, TABLE, u32::try_from(bytes.len()).unwrap(), INDIRECT, 0);
    }
}

impl MockDriver {
    fn add_head(&mut self, head: u16) -> u32 {
        self.make_available(head);
        u32::from(head)
    }
}

// --- where a ring may be ------------------------------------------------------------------------

#[test]
fn sizes_are_powers_of_two_up_to_the_largest() {
    let ram = mock_ram(0x20_0000);
    for size in [0, 3, 100, 32_769, u16::MAX] {
        let state = RingState {
            size,
            available: 0x10_0000,
            used: 0x12_0000,
            ..RingState::default()
        };
        let made = Ring::new(Arc::clone(&ram), state);
        assert_eq!(made.unwrap_err(), RingError::Size(size));
    }
    for bits in 0..=15 {
        let driver = MockDriver::new(&ram, 0, 1 << bits);
        assert_eq!(driver.ring(false).unwrap().size(), 1 << bits);
    }
}

#[test]
fn areas_are_aligned() {
    let ram = mock_ram(0x1_0000);
    let good = MockDriver::new(&ram, 0, 4).state();
    let misaligned = |change: fn(&mut RingState), expected: &str, bound: u16| {
        let mut state = good;
        change(&mut state);
        match Ring::new(Arc::clone(&ram), state) {
            Err(RingError::Alignment {
                area, alignment, ..
            }) => {
                assert_eq!((area, alignment), (expected, bound));
            }
            other => panic!("{expected}: {other:?}"),
        }
    };
    misaligned(|state| state.descriptors += 8, "descriptor table", 16);
    misaligned(|state| state.available += 1, "available ring", 2);
    misaligned(|state| state.used += 2, "used ring", 4);
}

#[test]
fn areas_lie_in_memory_to_their_last_byte() {
    // 4 entries: 64, 14 and 38 bytes.
    let ram = mock_ram(0x1000);
    let good = RingState {
        size: 4,
        descriptors: 0x1000 - 64,
        available: 0x1000 - 14,
        used: 0x1000 - 40,
        ..RingState::default()
    };
    assert!(Ring::new(Arc::clone(&ram), good).is_ok());
    let outside = |change: fn(&mut RingState), expected: &str| {
        let mut state = good;
        change(&mut state);
        match Ring::new(Arc::clone(&ram), state) {
            Err(RingError::NotMemory { area, .. }) => assert_eq!(area, expected),
            other => panic!("{expected}: {other:?}"),
        }
    };
    outside(|state| state.descriptors += 16, "descriptor table");
    outside(|state| state.available += 2, "available ring");
    outside(|state| state.used += 4, "used ring");
    outside(|state| state.used = u64::MAX - 3, "used ring");
}

#[test]
fn memory_that_grew_is_used_and_memory_that_shrank_refused() {
    let small = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let ram = GuestRam::new(small.clone());
    let mut driver = MockDriver::new(&ram, 0, 4);
    let mut ring = driver.ring(false).unwrap();
    let mut chain = Chain::new(&ram);
    driver.add(&[MockBuffer::readable(0x1_0000, 4)]);
    assert!(!ring.pop(&mut chain).unwrap());
    driver.add(&[MockBuffer::readable(0, 4)]);
    assert!(ring.pop(&mut chain).unwrap());

    let more = vm_memory::GuestRegionMmap::from_range(GuestAddress(0x1_0000), 0x1000, None);
    let grown = small.insert_region(Arc::new(more.unwrap())).unwrap();
    ring.set_memory(GuestRam::new(grown)).unwrap();
    driver.add(&[MockBuffer::readable(0x1_0000, 4)]);
    assert!(ring.pop(&mut chain).unwrap());
    assert_eq!(chain.readable.len(), 4);
    assert_eq!(ring.malformed().0, 1);
    assert!(
        ring.needs_signal(),
        "what was completed before is not forgotten"
    );

    let state = ring.state();
    let elsewhere = GuestMemoryMmap::from_ranges(&[(GuestAddress(0x10_0000), 0x1000)]).unwrap();
    assert!(ring.set_memory(GuestRam::new(elsewhere)).is_err());
    assert_eq!(ring.state(), state);
    driver.add(&[MockBuffer::readable(0x1_0000, 4)]);
    assert!(ring.pop(&mut chain).unwrap(), "the ring is as it was");
}

// --- chains -------------------------------------------------------------------------------------

#[test]
fn a_chain_has_its_buffers_in_order() {
    let mut it = fixture(8, false);
    it.driver.write(0x1000, b"hello, device");
    let head = it.driver.add(&[
        MockBuffer::readable(0x1000, 5),
        MockBuffer::readable(0x1005, 8),
        MockBuffer::writable(0x2000, 3),
        MockBuffer::writable(0x3000, 10),
    ]);
    assert!(it.pop());
    assert_eq!(it.chain.head, head);
    assert_eq!(it.chain.readable.read_array(0), Some(*b"hello, device"));
    assert_eq!(it.chain.writable.len(), 13);
    assert_eq!(it.chain.writable.copy_from(0, b"abcdefg"), 7);
    it.ring.complete(head, 7);
    let used = UsedElement {
        head: u32::from(head),
        len: 7,
    };
    assert_eq!(it.driver.take_used(), [used]);
    assert_eq!(it.driver.read(0x2000, 3), b"abc");
    assert_eq!(it.driver.read(0x3000, 4), b"defg");
    assert!(!it.pop());
}

#[test]
fn buffers_of_no_bytes_add_nothing_wherever_they_are() {
    let mut it = fixture(8, false);
    it.driver.add(&[
        MockBuffer::readable(u64::MAX, 0),
        MockBuffer::readable(0x1000, 4),
        MockBuffer::writable(0, 0),
        MockBuffer::writable(MEMORY, 0),
    ]);
    assert!(it.pop());
    assert_eq!(it.chain.readable.len(), 4);
    assert_eq!(it.chain.readable.range_count(), 1);
    assert!(it.chain.writable.is_empty());
}

#[test]
fn a_readable_buffer_may_not_follow_a_writable_one_even_of_no_bytes() {
    let mut it = fixture(8, false);
    for len in [0, 4] {
        it.put(0, 0x1000, len, NEXT | WRITE, 1);
        it.put(1, 0x2000, 4, 0, 0);
        assert_eq!(it.refused(), ChainError::Order { address: 0x2000 });
    }
    // The rule is one of a chain, not of a ring.
    it.driver.make_available(1);
    assert!(it.pop());
}

#[test]
fn a_buffer_that_is_not_all_memory_is_refused() {
    let mut it = fixture(8, false);
    for (address, len) in [
        (MEMORY, 1),
        (MEMORY - 1, 2),
        (u64::MAX, 1),
        (u64::MAX, 2),
        (0, u32::MAX),
    ] {
        for flags in [0, WRITE] {
            it.put(0, address, len, flags, 0);
            assert_eq!(it.refused(), ChainError::NotMemory { address, len });
        }
    }
}

#[test]
fn next_names_a_descriptor_of_the_table() {
    let mut it = fixture(8, false);
    it.put(0, 0x1000, 4, NEXT, 8);
    assert_eq!(
        it.refused(),
        ChainError::Index {
            index: 8,
            table_len: 8
        }
    );
    // Without the flag it means nothing.
    it.put(0, 0x1000, 4, 0, 8);
    it.driver.make_available(0);
    assert!(it.pop());
}

#[test]
fn a_loop_is_noticed_and_a_chain_as_long_as_the_ring_is_none() {
    let mut it = fixture(8, false);
    for index in 0..8 {
        it.put(index, 0x1000, 1, NEXT, (index + 1) % 8);
    }
    assert_eq!(it.refused(), ChainError::TooLong { limit: 8 });
    it.put(7, 0x1000, 1, 0, 0);
    it.driver.make_available(0);
    assert!(it.pop());
    assert_eq!(it.chain.readable.len(), 8);
    it.put(0, 0x1000, 1, NEXT, 0);
    assert_eq!(it.refused(), ChainError::TooLong { limit: 8 });
}

#[test]
fn a_chain_has_less_than_4_gib() {
    // One gigabyte of address space, four times over; nobody touches it.
    let ranges = [
        (GuestAddress(0), 0x1000),
        (GuestAddress(0x4000_0000), 0x4000_0000),
    ];
    let ram = GuestRam::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    let mut driver = MockDriver::new(&ram, 0, 8);
    let mut ring = driver.ring(false).unwrap();
    let mut chain = Chain::new(&ram);
    let gib = MockBuffer::readable(0x4000_0000, 0x4000_0000);
    let rest = MockBuffer::writable(0x4000_0000, 0x3fff_ffff);
    driver.add(&[gib, gib, gib, rest]);
    assert!(ring.pop(&mut chain).unwrap());
    assert_eq!(chain.readable.len() + chain.writable.len(), 0xffff_ffff);
    let one = MockBuffer::writable(0x4000_0000, 1);
    driver.add(&[gib, gib, gib, rest, one]);
    assert!(!ring.pop(&mut chain).unwrap());
    assert_eq!(ring.malformed(), (1, Some(ChainError::TooLarge)));
}

// --- indirect descriptors (2.7.5.3) ---------------------------------------------------------------

#[test]
fn an_indirect_table_is_followed_from_its_first_entry_by_its_own_indices() {
    let mut it = fixture(2, false);
    // More entries than the ring has, not in order, and the last two in no chain.
    it.put_table(&[
        (0x1000, 1, NEXT, 3),
        (0x2000, 2, NEXT | WRITE, 4),
        (0x3000, 0xffff, 0, 0),
        (0x4000, 4, NEXT, 1),
        (0x5000, 8, WRITE, 77),
        (0x6000, 0xffff, INDIRECT, 0),
    ]);
    it.driver.make_available(0);
    assert!(it.pop());
    assert_eq!((it.chain.head, it.chain.readable.len()), (0, 5));
    assert_eq!(it.chain.writable.len(), 10);
}

#[test]
fn whether_the_table_itself_is_writable_means_nothing() {
    let mut it = fixture(2, false);
    it.put_table(&[(0x1000, 3, 0, 0)]);
    it.put(0, TABLE, 16, INDIRECT | WRITE, 0);
    it.driver.make_available(0);
    assert!(it.pop());
    assert_eq!((it.chain.readable.len(), it.chain.writable.len()), (3, 0));
}

#[test]
fn a_table_may_end_a_chain_of_direct_descriptors() {
    let mut it = fixture(4, false);
    it.put_table(&[(0x2000, 2, NEXT, 1), (0x3000, 4, WRITE, 0)]);
    it.put(1, 0x1000, 1, NEXT, 0);
    it.driver.make_available(1);
    assert!(it.pop());
    assert_eq!((it.chain.head, it.chain.readable.len()), (1, 3));
    // The order of buffers goes across.
    it.put(0, TABLE, 32, INDIRECT, 0);
    it.put(1, 0x1000, 1, NEXT | WRITE, 0);
    it.driver.make_available(1);
    assert!(!it.pop());
    let expected = ChainError::Order { address: 0x2000 };
    assert_eq!(it.ring.malformed().1, Some(expected));
}

#[test]
fn tables_are_not_nested_and_end_their_chain() {
    let mut it = fixture(4, false);
    it.put_table(&[(0x1000, 1, NEXT, 1), (TABLE, 16, INDIRECT, 0)]);
    assert_eq!(it.refused(), ChainError::Nested);
    it.put_table(&[(0x1000, 1, 0, 0)]);
    it.put(0, TABLE, 16, INDIRECT | NEXT, 1);
    assert_eq!(it.refused(), ChainError::Nested);
}

#[test]
fn a_table_is_a_whole_number_of_descriptors_in_memory() {
    let mut it = fixture(4, false);
    for len in [0, 1, 15, 17, 0x10_0010, u32::MAX, u32::MAX - 15] {
        it.put(0, TABLE, len, INDIRECT, 0);
        assert_eq!(it.refused(), ChainError::TableSize { len });
    }
    for (address, len) in [(MEMORY, 16), (MEMORY - 16, 32), (u64::MAX - 15, 32)] {
        it.put(0, address, len, INDIRECT, 0);
        assert_eq!(it.refused(), ChainError::NotMemory { address, len });
    }
}

#[test]
fn an_entry_past_the_table_is_refused() {
    let mut it = fixture(4, false);
    it.put_table(&[(0x1000, 1, NEXT, 2), (0x1000, 1, 0, 0)]);
    assert_eq!(
        it.refused(),
        ChainError::Index {
            index: 2,
            table_len: 2
        }
    );
}

#[test]
fn a_loop_in_a_table_is_noticed() {
    let mut it = fixture(4, false);
    it.put_table(&[(0x1000, 1, NEXT, 1), (0x1000, 1, NEXT, 0)]);
    assert_eq!(it.refused(), ChainError::TooLong { limit: 2 });
}

#[test]
fn a_small_ring_follows_long_tables_but_not_without_end() {
    let mut it = fixture(2, false);
    let chain = |len: u16| -> Vec<_> {
        (0..len)
            .map(|index| {
                let flags = if index + 1 == len { 0 } else { NEXT };
                (0x1000, 1, flags, index + 1)
            })
            .collect()
    };
    it.put_table(&chain(1024));
    it.driver.make_available(0);
    assert!(it.pop());
    assert_eq!(it.chain.readable.len(), 1024);
    it.put_table(&chain(1025));
    assert_eq!(it.refused(), ChainError::TooLong { limit: 1024 });
}

#[test]
fn a_large_ring_follows_tables_as_long_as_itself() {
    let mut it = fixture(2048, false);
    let chain: Vec<_> = (0..2048)
        .map(|index| {
            let flags = if index + 1 == 2048 { 0 } else { NEXT };
            (0x1000, 1, flags, index + 1)
        })
        .collect();
    it.put_table(&chain);
    it.driver.make_available(0);
    assert!(it.pop());
    assert_eq!(it.chain.readable.len(), 2048);
}

#[test]
fn tables_and_buffers_need_no_alignment() {
    let mut it = fixture(2, false);
    let buffers = [
        MockBuffer::readable(0x1001, 7),
        MockBuffer::writable(0x2003, 5),
    ];
    for offset in 0..16 {
        it.driver.add_indirect(TABLE + offset, &buffers);
        assert!(it.pop());
        assert_eq!((it.chain.readable.len(), it.chain.writable.len()), (7, 5));
        it.ring.complete(it.chain.head, 0);
    }
}

// --- the available ring ---------------------------------------------------------------------------

#[test]
fn a_driver_has_no_more_chains_than_the_ring_has_descriptors() {
    let mut it = fixture(4, false);
    for _ in 0..4 {
        it.driver.add(&[MockBuffer::readable(0x6000, 1)]);
        assert!(it.pop());
    }
    // One that the device has still, once more.
    it.driver.set_available_index(5);
    let expected = RingError::AvailableIndex {
        from: 4,
        to: 5,
        size: 4,
        in_flight: 4,
    };
    assert_eq!(it.ring.pop(&mut it.chain), Err(expected));
    it.ring.complete(2, 0);
    assert!(it.pop(), "it may come again once it was given back");
}

#[test]
fn an_index_that_jumped_ends_the_ring() {
    let mut it = fixture(4, false);
    it.driver.set_available_index(5);
    let expected = RingError::AvailableIndex {
        from: 0,
        to: 5,
        size: 4,
        in_flight: 0,
    };
    assert_eq!(it.ring.pop(&mut it.chain), Err(expected));
    assert_eq!(
        it.ring.pop(&mut it.chain),
        Err(expected),
        "nothing was taken"
    );
    assert!(
        it.ring.enable_kicks(),
        "a device that asks looks again, and finds out"
    );
    it.driver.set_available_index(u16::MAX);
    assert!(it.ring.pop(&mut it.chain).is_err(), "nor may it go back");
}

#[test]
fn a_head_that_is_no_descriptor_ends_the_ring() {
    let mut it = fixture(4, false);
    it.driver.make_available(4);
    let expected = RingError::Head { head: 4, size: 4 };
    assert_eq!(it.ring.pop(&mut it.chain), Err(expected));
    assert_eq!(it.ring.state().next_available, 0, "nothing was taken");
    assert!(it.driver.take_used().is_empty());
}

#[test]
fn malformed_chains_between_sound_ones_cost_only_themselves() {
    let mut it = fixture(4, false);
    it.put(0, MEMORY, 1, 0, 0);
    it.put(1, 0x1000, 1, 0, 0);
    for _ in 0..20 {
        it.driver.make_available(0);
        it.driver.make_available(1);
        assert!(it.pop());
        it.ring.complete(1, 0);
        let heads: Vec<_> = it.driver.take_used().iter().map(|used| used.head).collect();
        assert_eq!(heads, [0, 1]);
    }
    assert_eq!(it.ring.malformed().0, 20);
}

#[test]
fn nothing_but_malformed_chains_ends_the_ring() {
    let mut it = fixture(4, false);
    it.put(0, MEMORY, 1, 0, 0);
    let mut taken = 0;
    let error = loop {
        it.driver.make_available(0);
        match it.ring.pop(&mut it.chain) {
            Ok(is_some) => assert!(!is_some),
            Err(error) => break error,
        }
        taken += 1;
        assert!(
            taken <= MALFORMED_LIMIT,
            "or a driver keeps the device busy for ever"
        );
    };
    let source = ChainError::NotMemory {
        address: MEMORY,
        len: 1,
    };
    assert_eq!(error, RingError::Malformed { source });
    assert_eq!(taken, MALFORMED_LIMIT);
    assert_eq!(it.ring.state().next_used, taken + 1, "all came back");
}

#[test]
fn requests_put_back_come_again() {
    let mut it = fixture(4, true);
    let heads = [0, 1, 2].map(|at| it.driver.add(&[MockBuffer::readable(0x1000 + at, 1)]));
    assert!(it.pop() && it.pop() && it.pop());
    it.ring.unpop(2);
    assert!(it.ring.enable_kicks(), "they are still there to be taken");
    for head in &heads[1..] {
        assert!(it.pop());
        assert_eq!(it.chain.head, *head);
    }
    assert!(!it.pop());
    assert!(!it.ring.enable_kicks());
}

#[test]
fn a_malformed_chain_waits_while_others_are_held() {
    let mut it = fixture(4, false);
    it.put(0, 0x1000, 1, 0, 0);
    it.put(1, MEMORY, 1, 0, 0);
    it.put(2, 0x1000, 1, 0, 0);
    for head in 0..3 {
        it.driver.make_available(head);
    }
    assert!(it.pop());
    for _ in 0..2 {
        assert_eq!(it.ring.pop_another(&mut it.chain), Ok(false));
        assert_eq!(
            (it.ring.malformed().0, it.ring.state().next_available),
            (0, 1)
        );
    }
    it.ring.unpop(1);
    assert!(it.pop());
    assert_eq!(it.chain.head, 0, "what was held is what came back");
    assert!(it.pop());
    assert_eq!((it.chain.head, it.ring.malformed().0), (2, 1));
    assert_eq!(it.driver.take_used(), [UsedElement { head: 1, len: 0 }]);
    assert_eq!(it.ring.pop_another(&mut it.chain), Ok(false));
    it.driver.set_available_index(100);
    assert!(it.ring.pop_another(&mut it.chain).is_err());
}

#[test]
fn requests_given_back_together_are_seen_together() {
    let mut it = fixture(4, true);
    it.ring.complete_all([]);
    assert!(!it.ring.needs_signal());
    it.driver.set_used_event(1);
    it.ring.complete_all([(3, 30), (1, 10)]);
    assert!(it.ring.needs_signal(), "asked for in their middle");
    let expected = [(3, 30), (1, 10)].map(|(head, len)| UsedElement { head, len });
    assert_eq!(it.driver.take_used(), expected);
}

#[test]
fn putting_back_is_no_reason_to_signal_and_hides_none() {
    for has_event_idx in [false, true] {
        let mut it = fixture(4, has_event_idx);
        it.driver.add(&[MockBuffer::readable(0x1000, 1)]);
        it.driver.add(&[MockBuffer::readable(0x1000, 1)]);
        assert!(it.pop());
        it.ring.unpop(1);
        assert!(!it.ring.needs_signal());
        assert!(it.pop());
        it.ring.complete(it.chain.head, 0);
        assert!(it.pop());
        it.ring.unpop(1);
        assert!(it.ring.needs_signal());
        assert!(!it.ring.needs_signal(), "once");
    }
}

#[test]
fn indices_wrap_in_the_smallest_and_the_largest_ring() {
    for size in [1, 2, MAX_SIZE] {
        for has_event_idx in [false, true] {
            let ram = mock_ram(usize::try_from(MEMORY).unwrap());
            let mut driver = MockDriver::new(&ram, 0, size);
            driver.start_at(u16::MAX - 2);
            let mut ring = driver.ring(has_event_idx).unwrap();
            let mut chain = Chain::new(&ram);
            for turn in 0..6 {
                let head = driver.add(&[MockBuffer::writable(0xf_0000, 4)]);
                assert_eq!(
                    driver.needs_kick(has_event_idx),
                    turn == 0 || !has_event_idx
                );
                assert!(ring.pop(&mut chain).unwrap());
                assert_eq!(chain.head, head);
                ring.complete(head, turn);
                let len = turn;
                let head = u32::from(head);
                assert_eq!(driver.take_used(), [UsedElement { head, len }]);
                assert!(!ring.pop(&mut chain).unwrap());
            }
            let state = ring.state();
            assert_eq!((state.next_available, state.next_used), (3, 3));
        }
    }
}

#[test]
fn the_largest_ring_may_be_full_across_the_wrap() {
    let ram = mock_ram(usize::try_from(MEMORY).unwrap());
    let mut driver = MockDriver::new(&ram, 0, MAX_SIZE);
    driver.start_at(50_000);
    let mut ring = driver.ring(true).unwrap();
    let mut chain = Chain::new(&ram);
    driver.put_descriptor(7, 0xf_0000, 1, 0, 0);
    let heads = [7u8, 0].repeat(usize::from(MAX_SIZE));
    driver.write(driver.state().available + 4, &heads);
    driver.set_available_index(50_000u16.wrapping_add(MAX_SIZE));
    let mut count = 0;
    while ring.pop(&mut chain).unwrap() {
        ring.complete(chain.head, 0);
        count += 1;
    }
    assert_eq!(count, MAX_SIZE);
    assert_eq!(driver.take_used().len(), usize::from(MAX_SIZE));
    driver.set_available_index(ring.state().next_available.wrapping_add(MAX_SIZE + 1));
    assert!(ring.pop(&mut chain).is_err());
}

// --- telling each other ---------------------------------------------------------------------------

#[test]
fn without_event_indices_a_flag_says_whether_to_signal() {
    let mut it = fixture(4, false);
    assert!(!it.ring.needs_signal(), "nothing was completed");
    it.ring.complete(0, 0);
    it.ring.complete(1, 0);
    assert!(it.ring.needs_signal());
    assert!(!it.ring.needs_signal(), "once per batch");
    it.driver.set_no_interrupt(true);
    it.ring.complete(2, 0);
    assert!(!it.ring.needs_signal());
    it.driver.set_no_interrupt(false);
    assert!(
        !it.ring.needs_signal(),
        "the driver looks after it changed its mind"
    );
}

#[test]
fn with_event_indices_the_driver_is_told_when_its_index_is_passed() {
    let mut it = fixture(4, true);
    // The flag means nothing now.
    it.driver.set_no_interrupt(true);
    it.driver.set_used_event(2);
    it.ring.complete(0, 0);
    it.ring.complete(1, 0);
    assert!(!it.ring.needs_signal(), "0 and 1 were asked for by nobody");
    it.ring.complete(2, 0);
    assert!(it.ring.needs_signal());
    it.ring.complete(3, 0);
    assert!(!it.ring.needs_signal(), "passed already");
    it.driver.set_used_event(6);
    for head in 0..4 {
        it.ring.complete(head, 0);
    }
    assert!(it.ring.needs_signal(), "in the middle of a batch");
}

#[test]
fn a_batch_of_more_than_an_index_can_count_is_told() {
    for batch in [65_535u32, 65_536, 65_537, 70_000] {
        let mut it = fixture(4, true);
        it.driver.set_used_event(3);
        for _ in 0..batch {
            it.ring.complete(0, 0);
        }
        assert!(it.ring.needs_signal(), "{batch}");
        assert!(!it.ring.needs_signal());
    }
}

#[test]
fn a_ring_taken_over_tells_once_too_often_rather_than_never() {
    let mut it = fixture(4, true);
    it.driver.add(&[MockBuffer::writable(0x1000, 1)]);
    assert!(it.pop());
    it.ring.complete(0, 1);
    // Somebody stopped here, before the driver was told.
    let mut resumed = Ring::new(Arc::clone(it.ring.ram()), it.ring.state()).unwrap();
    assert!(resumed.needs_signal());
    assert!(!resumed.needs_signal());
}

#[test]
fn without_event_indices_kicks_are_a_flag() {
    let mut it = fixture(4, false);
    it.ring.disable_kicks();
    assert!(it.driver.is_kick_unwanted());
    it.driver.add(&[MockBuffer::readable(0x1000, 1)]);
    assert!(!it.driver.needs_kick(false));
    assert!(it.ring.enable_kicks(), "it came unannounced");
    assert!(!it.driver.is_kick_unwanted());
    assert!(it.pop());
    assert!(!it.ring.enable_kicks());
    it.driver.add(&[MockBuffer::readable(0x1000, 1)]);
    assert!(it.driver.needs_kick(false));
}

#[test]
fn with_event_indices_kicks_are_the_next_index_and_the_flag_stays_clear() {
    let mut it = fixture(4, true);
    it.driver.add(&[MockBuffer::readable(0x1000, 1)]);
    assert!(it.driver.needs_kick(true), "a new ring wants the first");
    it.ring.disable_kicks();
    assert!(!it.driver.is_kick_unwanted());
    it.driver.add(&[MockBuffer::readable(0x1000, 1)]);
    assert!(!it.driver.needs_kick(true), "the device is looking");
    assert!(it.ring.enable_kicks());
    assert!(it.pop() && it.pop());
    assert!(!it.ring.enable_kicks());
    assert_eq!(it.driver.available_event(), 2);
    it.driver.add(&[MockBuffer::readable(0x1000, 1)]);
    it.driver.add(&[MockBuffer::readable(0x1000, 1)]);
    assert!(it.driver.needs_kick(true), "one for two");
    it.ring.disable_kicks();
    it.driver.add(&[MockBuffer::readable(0x1000, 1)]);
    assert!(!it.driver.needs_kick(true));
}

#[test]
fn a_popped_chain_outlives_its_ring_and_memory() {
    let mut it = fixture(4, false);
    it.driver.write(0x1000, b"kept");
    it.driver.add(&[MockBuffer::readable(0x1000, 4)]);
    assert!(it.pop());
    let Fixture {
        driver,
        ring,
        chain,
    } = it;
    drop((driver, ring));
    assert_eq!(chain.readable.read_array(0), Some(*b"kept"));
}
