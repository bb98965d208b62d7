//! Driver and device together, in any order of their steps: nothing is lost, nothing comes twice.
//!
//! Both sides sleep whenever the ring says they may, and wake only when told. At the end neither
//! does anything of itself any more; whatever is still under way then was lost. The second half
//! is rings of random bytes that change while they are read.

use std::collections::HashMap;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use super::*;
use crate::mock::{MockDriver, descriptor_bytes};

/// Two mappings side by side: buffers may lie across.
const BORDER: u64 = 0x8000;
const DATA: u64 = 0x6000;
const DATA_LEN: u64 = 0x4000;
const TABLES: u64 = 0x2000;
const TABLE_SIZE: u64 = 0x100;
const MAX_DESCRIPTORS: usize = 8;

/// Under miri a case takes a thousand times as long.
fn cases(count: u32) -> ProptestConfig {
    ProptestConfig {
        cases: if cfg!(miri) { 3 } else { count },
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn memory() -> Arc<GuestRam> {
    let ranges = [(GuestAddress(0), 0x8000), (GuestAddress(BORDER), 0x8000)];
    GuestRam::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

#[derive(Clone, Copy, Debug)]
struct Buffer {
    address: u64,
    len: u32,
    is_writable: bool,
}

/// A chain: its buffers, how many of them get descriptors of the ring, the rest going to a table.
#[derive(Clone, Debug)]
struct Shape {
    buffers: Vec<Buffer>,
    direct: Option<Index>,
}

#[derive(Clone, Debug)]
enum Step {
    /// The driver: add a chain; look whether to kick; take what came back; sleep if nothing did.
    Add(Shape),
    Kick,
    Reap,
    AwaitInterrupt,
    /// The device: take a chain; put some back; complete one of those it has, or all at once;
    /// interrupt if need be; sleep if there is nothing.
    Pop,
    PopAnother,
    Unpop(Index),
    Complete(Index, u32),
    CompleteAll,
    Signal,
    AwaitKick,
}

fn shape() -> impl Strategy<Value = Shape> {
    let range = (DATA..DATA + DATA_LEN - 300, 0u32..300);
    let readable = vec(range.clone(), 0..MAX_DESCRIPTORS / 2);
    let writable = vec(range, 0..MAX_DESCRIPTORS / 2);
    (readable, writable, any::<Option<Index>>()).prop_filter_map(
        "a chain has a descriptor",
        |(readable, writable, direct)| {
            let make = |is_writable| {
                move |(address, len)| Buffer {
                    address,
                    len,
                    is_writable,
                }
            };
            let mut buffers: Vec<_> = readable.into_iter().map(make(false)).collect();
            buffers.extend(writable.into_iter().map(make(true)));
            (!buffers.is_empty()).then_some(Shape { buffers, direct })
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => shape().prop_map(Step::Add),
        3 => Just(Step::Kick),
        3 => Just(Step::Reap),
        2 => Just(Step::AwaitInterrupt),
        3 => Just(Step::Pop),
        2 => Just(Step::PopAnother),
        1 => any::<Index>().prop_map(Step::Unpop),
        4 => any::<(Index, u32)>().prop_map(|(which, len)| Step::Complete(which, len)),
        1 => Just(Step::CompleteAll),
        3 => Just(Step::Signal),
        2 => Just(Step::AwaitKick),
    ]
}

/// What the driver has in the ring under one head.
#[derive(Debug)]
struct Sent {
    buffers: Vec<Buffer>,
    descriptors: Vec<u16>,
    /// Set when the device completes it.
    used_len: Option<u32>,
}

/// Both sides of a ring, and what each has been told.
#[expect(
    clippy::struct_excessive_bools,
    reason = "four are what they are about"
)]
struct Model {
    has_event_idx: bool,
    driver: MockDriver,
    free: Vec<u16>,
    sent: HashMap<u16, Sent>,
    has_interrupt: bool,
    is_driver_awake: bool,
    ring: Ring,
    /// Taken, in the order of taking.
    taken: Vec<Chain>,
    /// How many of the last ones may still be put back.
    fresh: usize,
    has_kick: bool,
    is_device_awake: bool,
}

impl Model {
    fn new(size: u16, start: u16, has_event_idx: bool) -> Self {
        let ram = memory();
        let mut driver = MockDriver::new(&ram, 0, size);
        driver.start_at(start);
        let pattern: Vec<u8> = (0..DATA_LEN).map(|at| at.to_le_bytes()[0] ^ 0x5a).collect();
        driver.write(DATA, &pattern);
        Self {
            has_event_idx,
            ring: driver.ring(has_event_idx).unwrap(),
            driver,
            free: (0..size).collect(),
            sent: HashMap::new(),
            has_interrupt: false,
            is_driver_awake: true,
            taken: Vec::new(),
            fresh: 0,
            has_kick: false,
            is_device_awake: false,
        }
    }

    fn step(&mut self, step: Step) {
        self.deliver();
        match step {
            Step::Add(shape) => self.add(&shape),
            Step::Kick => self.kick(),
            Step::Reap if self.is_driver_awake => self.reap(),
            Step::AwaitInterrupt if self.is_driver_awake => self.await_interrupt(),
            Step::Pop if self.is_device_awake => {
                self.pop(Ring::pop);
            }
            Step::PopAnother if self.is_device_awake => {
                self.pop(Ring::pop_another);
            }
            Step::Unpop(which) => self.unpop(which.index(self.fresh + 1)),
            Step::Complete(which, len) if !self.taken.is_empty() => {
                self.complete(which.index(self.taken.len()), len);
            }
            Step::CompleteAll => self.complete_all(),
            Step::Signal => self.signal(),
            Step::AwaitKick if self.is_device_awake => self.await_kick(),
            // Asleep, or nothing to do it with.
            _ => {}
        }
    }

    fn deliver(&mut self) {
        if mem::take(&mut self.has_kick) {
            self.is_device_awake = true;
            self.ring.disable_kicks();
        }
        if mem::take(&mut self.has_interrupt) {
            self.is_driver_awake = true;
            if !self.has_event_idx {
                self.driver.set_no_interrupt(true);
            }
        }
    }

    // --- the driver ---

    fn add(&mut self, shape: &Shape) {
        let count = shape.buffers.len();
        let direct = shape.direct.map_or(count, |at| at.index(count));
        let is_indirect = direct < count;
        let needed = direct + usize::from(is_indirect);
        let Some(rest) = self.free.len().checked_sub(needed) else {
            return;
        };
        let descriptors = self.free.split_off(rest);
        let table = TABLES + u64::from(descriptors[0]) * TABLE_SIZE;
        let mut links = Vec::new();
        for (position, buffer) in shape.buffers[..direct].iter().enumerate() {
            let flags = u16::from(position + 1 < needed) | u16::from(buffer.is_writable) << 1;
            links.push((buffer.address, buffer.len, flags));
        }
        if is_indirect {
            let mut bytes = Vec::new();
            let indirect = &shape.buffers[direct..];
            for (position, buffer) in (1u16..).zip(indirect) {
                let has_next = usize::from(position) < indirect.len();
                let flags = u16::from(has_next) | u16::from(buffer.is_writable) << 1;
                bytes.extend(descriptor_bytes(
                    buffer.address,
                    buffer.len,
                    flags,
                    position,
                ));
            }
            self.driver.write(table, &bytes);
            links.push((table, u32::try_from(bytes.len()).unwrap(), 4));
        }
        for (position, (address, len, flags)) in links.into_iter().enumerate() {
            let next = descriptors.get(position + 1).copied().unwrap_or(0xffff);
            let index = descriptors[position];
            self.driver.put_descriptor(index, address, len, flags, next);
        }
        let head = descriptors[0];
        let sent = Sent {
            buffers: shape.buffers.clone(),
            descriptors,
            used_len: None,
        };
        assert!(self.sent.insert(head, sent).is_none());
        self.driver.make_available(head);
    }

    fn kick(&mut self) {
        self.has_kick |= self.driver.needs_kick(self.has_event_idx);
    }

    fn reap(&mut self) {
        for used in self.driver.take_used() {
            let head = u16::try_from(used.head).unwrap();
            let sent = self.sent.remove(&head).expect("comes back once");
            assert_eq!(sent.used_len, Some(used.len), "as the device said");
            self.free.extend(sent.descriptors);
        }
    }

    fn await_interrupt(&mut self) {
        // Who sleeps has kicked before.
        self.kick();
        if self.driver.enable_interrupts(self.has_event_idx) {
            if !self.has_event_idx {
                self.driver.set_no_interrupt(true);
            }
        } else {
            self.is_driver_awake = false;
        }
    }

    // --- the device ---

    fn pop(&mut self, take: fn(&mut Ring, &mut Chain) -> Result<bool, RingError>) -> bool {
        let mut chain = Chain::new(self.ring.ram());
        if !take(&mut self.ring, &mut chain).unwrap() {
            return false;
        }
        let sent = self.sent.get(&chain.head).expect("is what was sent");
        assert_eq!(sent.used_len, None, "is taken once");
        for (buffers, is_writable) in [(&chain.readable, false), (&chain.writable, true)] {
            let mut expected = Vec::new();
            for buffer in &sent.buffers {
                if buffer.is_writable == is_writable {
                    expected.extend(self.driver.read(buffer.address, buffer.len as usize));
                }
            }
            let mut bytes = vec![0; expected.len() + 1];
            assert_eq!(buffers.copy_to(0, &mut bytes), expected.len());
            assert_eq!(buffers.len(), expected.len());
            assert_eq!(bytes[..expected.len()], expected);
        }
        self.taken.push(chain);
        self.fresh += 1;
        true
    }

    fn unpop(&mut self, count: usize) {
        self.ring.unpop(u16::try_from(count).unwrap());
        self.taken.truncate(self.taken.len() - count);
        self.fresh -= count;
        // It is for the device to remember these.
        self.is_device_awake |= count > 0;
    }

    fn complete(&mut self, at: usize, len: u32) {
        let chain = self.taken.remove(at);
        // What was taken after may still be put back, if nothing before it was.
        self.fresh = self.fresh.min(self.taken.len() - at);
        self.sent.get_mut(&chain.head).unwrap().used_len = Some(len);
        self.ring.complete(chain.head, len);
    }

    fn complete_all(&mut self) {
        let taken = mem::take(&mut self.taken);
        self.fresh = 0;
        for chain in &taken {
            self.sent.get_mut(&chain.head).unwrap().used_len = Some(5);
        }
        self.ring
            .complete_all(taken.iter().map(|chain| (chain.head, 5)));
    }

    fn signal(&mut self) {
        self.has_interrupt |= self.ring.needs_signal();
    }

    fn await_kick(&mut self) {
        if self.ring.enable_kicks() {
            self.ring.disable_kicks();
        } else {
            self.is_device_awake = false;
        }
    }

    /// Each side finishes what it began; from then on it acts only when told.
    fn settle(&mut self) {
        self.kick();
        while let Some(at) = self.taken.len().checked_sub(1) {
            self.complete(at, 7);
        }
        self.signal();
        for _ in 0..100 {
            self.deliver();
            if self.is_device_awake {
                while self.pop(Ring::pop) {
                    self.complete(0, 9);
                }
                self.signal();
                self.await_kick();
            }
            if self.is_driver_awake {
                self.reap();
                self.await_interrupt();
            }
            let is_told = self.has_kick || self.has_interrupt;
            if !self.is_device_awake && !self.is_driver_awake && !is_told {
                break;
            }
        }
        assert!(
            !self.is_device_awake && !self.is_driver_awake,
            "both come to rest"
        );
        assert!(self.sent.is_empty(), "nothing is under way when both sleep");
        assert_eq!(self.free.len(), usize::from(self.ring.size()));
        assert_eq!(self.ring.malformed().0, 0);
    }
}

proptest! {
    #![proptest_config(cases(150))]

    #[test]
    fn no_order_of_steps_loses_a_chain_or_a_notification(
        steps in vec(step(), 1..120),
        bits in 0u32..5,
        start in prop_oneof![Just(0), 65_500u16..=65_535, any::<u16>()],
        has_event_idx: bool,
    ) {
        let mut model = Model::new(1 << bits, start, has_event_idx);
        for step in steps {
            model.step(step);
        }
        model.settle();
    }
}

// --- rings of random bytes ------------------------------------------------------------------------

/// Small, so that whatever the bytes say is often inside.
const SMALL: u64 = 0x400;

/// Mostly small bytes, which as flags, lengths and indices mean something. By hand, since drawing
/// so many one by one takes most of the test's time.
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut byte = || match next() {
        [0..=127, ..] => 0,
        [128..=210, byte, ..] => byte % 8,
        [_, byte, ..] => byte,
    };
    (0..2 * SMALL).map(|_| byte()).collect()
}

/// All of a chain's memory is the guest's.
fn assert_inside(chain: &Chain, ram: &GuestRam) {
    for buffers in [&chain.readable, &chain.writable] {
        let mut offset = 0;
        while offset < buffers.len() {
            let iovecs = buffers.iovecs(offset, usize::MAX);
            for entry in iovecs.as_slice() {
                let start = entry.iov_base.addr();
                let is_inside = ram.mappings().iter().any(|region| {
                    let base = region.as_ptr().addr();
                    let end = base + usize::try_from(region.len()).unwrap();
                    base <= start && start + entry.iov_len <= end
                });
                assert!(is_inside && entry.iov_len > 0);
            }
            offset += iovecs.len;
        }
    }
}

proptest! {
    #![proptest_config(cases(1000))]

    #[test]
    fn random_rings_never_panic_never_leave_memory_and_always_end(
        seed: u64,
        changes in vec((0..SMALL * 2, any::<u8>()), 0..40),
        bits in 0u32..6,
        areas in (0..SMALL / 16, 0..SMALL / 2, 0..SMALL / 4),
        index: u16,
        held in 0u16..3,
        count in 0u16..9,
        has_event_idx: bool,
    ) {
        let ranges = [(GuestAddress(0), 0x400), (GuestAddress(SMALL), 0x400)];
        let ram = GuestRam::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        ram.mappings().write_slice(&noise(seed), GuestAddress(0)).unwrap();
        let state = RingState {
            size: 1 << bits,
            descriptors: areas.0 * 16,
            available: areas.1 * 2 + SMALL,
            used: areas.2 * 4,
            has_event_idx,
            next_available: index,
            next_used: index.wrapping_sub(held),
        };
        let Ok(mut ring) = Ring::new(Arc::clone(&ram), state) else {
            return Ok(());
        };
        // Mostly an index that could be, so that there is something to take.
        let published = index.wrapping_add(count);
        ram.mappings().write_slice(&published.to_le_bytes(), GuestAddress(state.available + 2)).unwrap();

        let mut chain = Chain::new(&ram);
        let mut changes = changes.into_iter();
        let mut taken = 0;
        while matches!(ring.pop(&mut chain), Ok(true)) {
            assert_inside(&chain, &ram);
            let limit = usize::from(state.size).max(1024);
            prop_assert!(chain.readable.range_count() + chain.writable.range_count() <= limit * 4);
            prop_assert!(chain.head < state.size);
            chain.writable.fill_zero(0, 16);
            ring.complete(chain.head, u32::try_from(chain.writable.len()).unwrap());
            ring.needs_signal();
            for (at, byte) in changes.by_ref().take(3) {
                ram.mappings().write_slice(&[byte], GuestAddress(at)).unwrap();
            }
            // The used ring may lie in the available ring, so the device itself adds more.
            taken += 1;
            if taken > 200 {
                break;
            }
        }
        ring.disable_kicks();
        ring.enable_kicks();
    }
}
