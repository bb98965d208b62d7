//! A ring anywhere in guest memory, with anything in it, taken and given back in any order while
//! the driver goes on writing.
//!
//! Checked beside panics and sanitizer findings: what a chain names is what a second, plainer
//! reading of the memory says, all of it is guest memory, what is given back is in the used ring,
//! and every call ends.

#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use virtio_core::buffers::GuestBuffers;
use virtio_core::chain::Chain;
use virtio_core::mock::descriptor_bytes;
use virtio_core::ram::GuestRam;
use virtio_core::ring::{Ring, RingState};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

/// Two mappings side by side and one apart, as guest address and length.
const MAPPINGS: [(u64, u64); 3] = [(0, 0x2000), (0x2000, 0x2000), (0x1_0000, 0x1000)];
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Of an indirect table in a ring that has fewer entries.
const CHAIN_LIMIT: usize = 1024;

/// An address: mostly in memory or near an end of it.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Address {
    Low(u16),
    Apart(u8),
    BeforeBorder(u8),
    BeforeEnd(u8),
    Any(u64),
}

impl Address {
    fn get(self) -> u64 {
        match self {
            Self::Low(address) => u64::from(address) % 0x4000,
            Self::Apart(offset) => 0x1_0000 + u64::from(offset) * 16,
            Self::BeforeBorder(distance) => 0x2000 - u64::from(distance),
            Self::BeforeEnd(distance) => 0x4000 - u64::from(distance),
            Self::Any(address) => address,
        }
    }
}

/// A descriptor: mostly a short one.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Link {
    address: Address,
    len: Len,
    flags: u8,
    next: u8,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Len {
    Short(u8),
    Entries(u8),
    Any(u32),
}

impl Link {
    fn bytes(self) -> [u8; 16] {
        let len = match self.len {
            Len::Short(len) => u32::from(len),
            Len::Entries(count) => u32::from(count) * 16,
            Len::Any(len) => len,
        };
        // Indirect is one in eight: most chains should get somewhere.
        let flags = match self.flags % 8 {
            flags @ 0..4 => u16::from(flags),
            4 => INDIRECT,
            5 => NEXT,
            6 => NEXT | WRITE,
            _ => u16::from(self.flags),
        };
        descriptor_bytes(self.address.get(), len, flags, u16::from(self.next))
    }
}

#[derive(Arbitrary, Debug)]
enum Step {
    Pop,
    Complete { which: u8, len: u32 },
    Unpop(u8),
    Signal,
    DisableKicks,
    EnableKicks,
    /// Stop, and go on from what was noted down.
    Resume,
    /// The driver: another descriptor, an entry of a table, a head, an index, anything.
    Descriptor { index: u8, link: Link },
    Publish { head: u8 },
    Index(u16),
    Write { at: Address, bytes: [u8; 8] },
    Table { at: Address, links: Vec<Link> },
}

#[derive(Arbitrary, Debug)]
struct Input {
    size_bits: u8,
    descriptors: Address,
    available: Address,
    used: Address,
    has_event_idx: bool,
    next_available: u16,
    held: u16,
    links: Vec<Link>,
    heads: Vec<u8>,
    steps: Vec<Step>,
}

/// What the driver's next entry is.
#[derive(Debug, PartialEq)]
enum Expected {
    Nothing,
    Broken,
    Malformed,
    /// Head, then guest address and length of what is readable and what is writable.
    Sound(u16, Vec<(u64, u32)>, Vec<(u64, u32)>),
}

struct Driver {
    ram: Arc<GuestRam>,
    state: RingState,
    index: u16,
}

impl Driver {
    fn write(&self, address: u64, bytes: &[u8]) {
        // What does not fit is not written.
        let _ = self.ram.mappings().write_slice(bytes, GuestAddress(address));
    }

    fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let mappings = self.ram.mappings();
        mappings
            .read_slice(&mut bytes, GuestAddress(address))
            .expect("the ring is in memory");
        bytes
    }

    fn read_u16(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.read(address))
    }

    fn publish(&mut self, head: u16) {
        let slot = u64::from(self.index % self.state.size);
        self.write(self.state.available + 4 + slot * 2, &head.to_le_bytes());
        self.set_index(self.index.wrapping_add(1));
    }

    fn set_index(&mut self, index: u16) {
        self.index = index;
        self.write(self.state.available + 2, &index.to_le_bytes());
    }

    /// Whether one mapping has all of it.
    fn is_contiguous(address: u64, len: u64) -> bool {
        MAPPINGS.iter().any(|&(start, size)| {
            address >= start && address - start < size && len <= size - (address - start)
        })
    }

    /// Whether mappings side by side have all of it.
    fn is_memory(address: u64, len: u32) -> bool {
        let low = 0x4000;
        let len = u64::from(len);
        len == 0
            || (address < low && len <= low - address)
            || Self::is_contiguous(address, len)
    }

    fn expect(&self, state: RingState) -> Expected {
        let RingState {
            size,
            available,
            next_available: next,
            next_used,
            ..
        } = state;
        // More than the descriptors that the device does not have.
        let held = Some(next.wrapping_sub(next_used)).filter(|&held| held <= size);
        match self.read_u16(available + 2).wrapping_sub(next) {
            0 => return Expected::Nothing,
            count if count > size - held.unwrap_or(0) => return Expected::Broken,
            _ => {}
        }
        let head = self.read_u16(available + 4 + u64::from(next % size) * 2);
        if head >= size {
            return Expected::Broken;
        }
        match self.follow(head) {
            Some((readable, writable)) => Expected::Sound(head, readable, writable),
            None => Expected::Malformed,
        }
    }

    #[expect(clippy::type_complexity, reason = "two lists")]
    fn follow(&self, head: u16) -> Option<(Vec<(u64, u32)>, Vec<(u64, u32)>)> {
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let mut table = self.state.descriptors;
        let mut entries = u64::from(self.state.size);
        let mut limit = usize::from(self.state.size);
        let (mut index, mut steps, mut total) = (u64::from(head), 0, 0u64);
        let (mut is_indirect, mut has_writable) = (false, false);
        loop {
            if index >= entries || steps == limit {
                return None;
            }
            steps += 1;
            let at = table + index * 16;
            let address = u64::from_le_bytes(self.read(at));
            let len = u32::from_le_bytes(self.read(at + 8));
            let flags = self.read_u16(at + 12);
            if flags & INDIRECT != 0 {
                let is_fit = len >= 16 && len % 16 == 0 && len <= 0x10_0000;
                if is_indirect || flags & NEXT != 0 || !is_fit {
                    return None;
                }
                if !Self::is_contiguous(address, u64::from(len)) {
                    return None;
                }
                (table, entries, index) = (address, u64::from(len / 16), 0);
                let entry_limit = usize::from(self.state.size).max(CHAIN_LIMIT);
                limit = usize::try_from(entries).ok()?.min(entry_limit);
                (is_indirect, steps) = (true, 0);
                continue;
            }
            let is_writable = flags & WRITE != 0;
            if (has_writable && !is_writable) || !Self::is_memory(address, len) {
                return None;
            }
            has_writable |= is_writable;
            total += u64::from(len);
            if total > u64::from(u32::MAX) {
                return None;
            }
            if len > 0 && is_writable {
                writable.push((address, len));
            } else if len > 0 {
                readable.push((address, len));
            }
            if flags & NEXT == 0 {
                return Some((readable, writable));
            }
            index = u64::from(self.read_u16(at + 14));
        }
    }
}

/// The guest addresses that buffers name, mappings side by side taken as one.
fn addresses(buffers: &GuestBuffers, ram: &GuestRam) -> Vec<(u64, u64)> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    let mut offset = 0;
    while offset < buffers.len() {
        let iovecs = buffers.iovecs(offset, usize::MAX);
        for entry in iovecs.as_slice() {
            let at = entry.iov_base as u64;
            let len = entry.iov_len as u64;
            let region = ram.mappings().iter().find(|region| {
                let base = region.as_ptr() as u64;
                base <= at && at + len <= base + region.len()
            });
            let region = region.expect("inside of one mapping");
            let address = region.start_addr().0 + (at - region.as_ptr() as u64);
            found.push((address, len));
        }
        offset += iovecs.len;
    }
    assert_eq!(offset, buffers.len());
    found
}

/// The same bytes, whatever pieces they come in.
fn bytes_of(pieces: impl IntoIterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (address, len) in pieces {
        match merged.last_mut() {
            Some((start, size)) if *start + *size == address => *size += len,
            _ => merged.push((address, len)),
        }
    }
    merged
}

fn assert_same(buffers: &GuestBuffers, expected: &[(u64, u32)], ram: &GuestRam) {
    let expected = expected.iter().map(|&(at, len)| (at, u64::from(len)));
    assert_eq!(bytes_of(addresses(buffers, ram)), bytes_of(expected));
}

fn pop(ring: &mut Ring, driver: &Driver) -> Option<Chain> {
    let expected = driver.expect(ring.state());
    let (malformed, _) = ring.malformed();
    let mut chain = Chain::new(&driver.ram);
    let popped = ring.pop(&mut chain);
    match &expected {
        Expected::Nothing => assert_eq!(popped, Ok(false)),
        Expected::Broken => assert!(popped.is_err()),
        Expected::Malformed => assert!(ring.malformed().0 > malformed),
        Expected::Sound(head, readable, writable) => {
            assert_eq!((popped, chain.head), (Ok(true), *head));
            assert_same(&chain.readable, readable, &driver.ram);
            assert_same(&chain.writable, writable, &driver.ram);
        }
    }
    popped.is_ok_and(|is_some| is_some).then_some(chain)
}

fn complete(ring: &mut Ring, driver: &Driver, head: u16, len: u32) {
    let RingState {
        size,
        used,
        next_used,
        ..
    } = ring.state();
    ring.complete(head, len);
    let entry = used + 4 + u64::from(next_used % size) * 8;
    assert_eq!(driver.read::<4>(entry), u32::from(head).to_le_bytes());
    assert_eq!(driver.read::<4>(entry + 4), len.to_le_bytes());
    assert_eq!(driver.read_u16(used + 2), next_used.wrapping_add(1));
}

fuzz_target!(|input: Input| {
    let ranges = MAPPINGS.map(|(start, len)| (GuestAddress(start), len as usize));
    let ram = GuestRam::new(GuestMemoryMmap::from_ranges(&ranges).expect("memory"));
    let state = RingState {
        size: 1 << (input.size_bits % 9),
        descriptors: input.descriptors.get() & !15,
        available: input.available.get() & !1,
        used: input.used.get() & !3,
        has_event_idx: input.has_event_idx,
        next_available: input.next_available,
        next_used: input.next_available.wrapping_sub(input.held % 4),
    };
    let Ok(mut ring) = Ring::new(Arc::clone(&ram), state) else {
        return;
    };
    let mut driver = Driver {
        ram: Arc::clone(&ram),
        state,
        index: state.next_available,
    };
    for (index, link) in (0u64..u64::from(state.size)).zip(&input.links) {
        driver.write(state.descriptors + index * 16, &link.bytes());
    }
    driver.set_index(state.next_available);
    for head in &input.heads {
        driver.publish(u16::from(*head));
    }

    let mut taken: Vec<Chain> = Vec::new();
    for step in input.steps.iter().take(200) {
        match step {
            Step::Pop => {
                if let Some(chain) = pop(&mut ring, &driver) {
                    // Touch all there is, as a device would; small, or the input says little.
                    let mut bytes = vec![0; chain.readable.len().min(4096)];
                    chain.readable.copy_to(0, &mut bytes);
                    chain.writable.copy_from(0, &bytes);
                    taken.push(chain);
                }
            }
            Step::Complete { which, len } => {
                if !taken.is_empty() {
                    let chain = taken.swap_remove(usize::from(*which) % taken.len());
                    complete(&mut ring, &driver, chain.head, *len);
                }
            }
            Step::Unpop(count) => {
                let count = usize::from(*count).min(taken.len()).min(usize::from(state.size));
                taken.truncate(taken.len() - count);
                ring.unpop(count as u16);
            }
            Step::Signal => {
                ring.needs_signal();
                assert!(!ring.needs_signal());
            }
            Step::DisableKicks => ring.disable_kicks(),
            Step::EnableKicks => {
                let has_more = ring.enable_kicks();
                let expected = driver.expect(ring.state());
                assert_eq!(has_more, expected != Expected::Nothing);
            }
            Step::Resume => {
                ring = Ring::new(Arc::clone(&ram), ring.state()).expect("as before");
            }
            Step::Descriptor { index, link } => {
                let index = u64::from(*index) % u64::from(state.size);
                driver.write(state.descriptors + index * 16, &link.bytes());
            }
            Step::Publish { head } => driver.publish(u16::from(*head)),
            Step::Index(index) => driver.set_index(*index),
            Step::Write { at, bytes } => driver.write(at.get(), bytes),
            Step::Table { at, links } => {
                for (index, link) in (0u64..64).zip(links) {
                    driver.write(at.get().wrapping_add(index * 16), &link.bytes());
                }
            }
        }
    }
});
