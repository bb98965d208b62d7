//! The driver's side of a ring, for tests and fuzz targets of devices (feature `mock`).
//!
//! [`MockDriver`] lays a ring out in guest memory and adds chains to it as a driver would, or as
//! none should: every field can also be written raw. It publishes indices and asks to be told as
//! Linux's driver does, fences included, so it may run on another thread than the device.
//! [`mock_ram`] makes memory to put it in.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::index;
use crate::ram::GuestRam;
use crate::ring::{Ring, RingError, RingState};

/// A buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MockBuffer {
    /// Guest address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// The device writes it.
    pub is_writable: bool,
}

impl MockBuffer {
    /// Bytes that the device reads.
    pub fn readable(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            is_writable: false,
        }
    }

    /// Room that the device writes.
    pub fn writable(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            is_writable: true,
        }
    }
}

/// Guest memory of `size` bytes from address 0.
///
/// # Panics
/// The host has no memory for it.
pub fn mock_ram(size: usize) -> Arc<GuestRam> {
    let ranges = [(GuestAddress(0), size)];
    GuestRam::new(GuestMemoryMmap::from_ranges(&ranges).expect("memory for a test"))
}

/// What the device gave back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedElement {
    /// Head of the chain.
    pub head: u32,
    /// Bytes the device says it wrote.
    pub len: u32,
}

/// A driver with one ring.
#[derive(Debug)]
pub struct MockDriver {
    ram: Arc<GuestRam>,
    state: RingState,
    next_descriptor: u16,
    available_index: u16,
    /// `available_index` when it was last asked whether to kick.
    kicked_index: u16,
    last_used: u16,
}

impl MockDriver {
    /// Lay out a ring of `size` entries at `base` (aligned to 16), all zeros.
    ///
    /// # Panics
    /// It does not fit into the memory.
    pub fn new(ram: &Arc<GuestRam>, base: u64, size: u16) -> Self {
        let entries = u64::from(size);
        let available = base + entries * 16;
        // The used ring is aligned to 4.
        let used = (available + 4 + entries * 2 + 2).next_multiple_of(4);
        let end = used + 4 + entries * 8 + 2;
        let zeros = vec![0; usize::try_from(end - base).expect("a ring's size")];
        let driver = Self {
            ram: Arc::clone(ram),
            state: RingState {
                size,
                descriptors: base,
                available,
                used,
                ..RingState::default()
            },
            next_descriptor: 0,
            available_index: 0,
            kicked_index: 0,
            last_used: 0,
        };
        driver.write(base, &zeros);
        driver
    }

    /// Begin at another index than 0, as if so many chains had come and gone: before the device's
    /// side is made.
    pub fn start_at(&mut self, index: u16) {
        self.kicked_index = index;
        self.last_used = index;
        self.state.next_available = index;
        self.state.next_used = index;
        self.set_available_index(index);
        self.put_u16(self.state.used + 2, index);
        self.set_used_event(index);
        self.put_u16(self.available_event_address(), index);
    }

    /// What the device is told of the ring.
    pub fn state(&self) -> RingState {
        self.state
    }

    /// The device's side.
    ///
    /// # Errors
    /// As [`Ring::new`].
    pub fn ring(&self, has_event_idx: bool) -> Result<Ring, RingError> {
        let state = RingState {
            has_event_idx,
            ..self.state
        };
        Ring::new(Arc::clone(&self.ram), state)
    }

    /// Write guest memory.
    ///
    /// # Panics
    /// It is outside.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        let mappings = self.ram.mappings();
        mappings
            .write_slice(bytes, GuestAddress(address))
            .expect("inside of the test's memory");
    }

    /// Read guest memory.
    ///
    /// # Panics
    /// It is outside.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mappings = self.ram.mappings();
        mappings
            .read_slice(&mut bytes, GuestAddress(address))
            .expect("inside of the test's memory");
        bytes
    }

    /// Write one descriptor, whatever it says.
    pub fn put_descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = self.state.descriptors + u64::from(index) * 16;
        self.write(at, &descriptor_bytes(address, len, flags, next));
    }

    /// The head that the next chain added will have.
    pub fn next_head(&self) -> u16 {
        self.next_descriptor
    }

    /// Add a chain and make it available; gives its head. Descriptors are taken in turn, so a
    /// ring's worth of them may be under way.
    pub fn add(&mut self, buffers: &[MockBuffer]) -> u16 {
        let head = self.next_descriptor;
        let mask = self.state.size - 1;
        for (position, buffer) in buffers.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) & mask;
            let is_last = position + 1 == buffers.len();
            let flags = u16::from(!is_last) | u16::from(buffer.is_writable) << 1;
            self.put_descriptor(
                index,
                buffer.address,
                buffer.len,
                flags,
                self.next_descriptor,
            );
        }
        self.make_available(head);
        head
    }

    /// Add a chain by way of an indirect table written at `table`; gives its head.
    pub fn add_indirect(&mut self, table: u64, buffers: &[MockBuffer]) -> u16 {
        let mut bytes = Vec::new();
        for (position, buffer) in (1u16..).zip(buffers) {
            let is_last = usize::from(position) == buffers.len();
            let flags = u16::from(!is_last) | u16::from(buffer.is_writable) << 1;
            bytes.extend(descriptor_bytes(
                buffer.address,
                buffer.len,
                flags,
                position,
            ));
        }
        self.write(table, &bytes);
        let head = self.next_descriptor;
        self.next_descriptor = (head + 1) & (self.state.size - 1);
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.put_descriptor(head, table, len, 4, 0);
        self.make_available(head);
        head
    }

    /// Put a head into the available ring, whatever it is.
    pub fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.available_index & (self.state.size - 1));
        self.write(self.state.available + 4 + slot * 2, &head.to_le_bytes());
        self.set_available_index(self.available_index.wrapping_add(1));
    }

    /// Write the available index, whatever it is.
    pub fn set_available_index(&mut self, index: u16) {
        self.available_index = index;
        self.put_u16(self.state.available + 2, index);
    }

    /// Whether the device has to be kicked for the chains that were made available since the last
    /// time this was asked (Linux: `virtqueue_kick_prepare`).
    pub fn needs_kick(&mut self, has_event_idx: bool) -> bool {
        let new = self.available_index;
        let old = mem::replace(&mut self.kicked_index, new);
        // The index has to be visible before the device's wish is read.
        fence(Ordering::SeqCst);
        if has_event_idx {
            index::has_passed(self.available_event(), new, old)
        } else {
            new != old && !self.is_kick_unwanted()
        }
    }

    /// Ask to be interrupted when the next chain is given back. True: some were meanwhile, look
    /// again (Linux: `virtqueue_enable_cb`).
    pub fn enable_interrupts(&mut self, has_event_idx: bool) -> bool {
        if has_event_idx {
            self.set_used_event(self.last_used);
        } else {
            self.set_no_interrupt(false);
        }
        // The wish has to be visible before the device's index is read.
        fence(Ordering::SeqCst);
        self.u16_at(self.state.used + 2) != self.last_used
    }

    /// Ask for no interrupts, without event indices.
    pub fn set_no_interrupt(&self, is_set: bool) {
        self.put_u16(self.state.available, u16::from(is_set));
    }

    /// Ask for an interrupt when the used index passes `event`.
    pub fn set_used_event(&self, event: u16) {
        let at = self.state.available + 4 + u64::from(self.state.size) * 2;
        self.put_u16(at, event);
    }

    /// The device's wish: a kick when the available index passes this.
    pub fn available_event(&self) -> u16 {
        self.u16_at(self.available_event_address())
    }

    fn available_event_address(&self) -> u64 {
        self.state.used + 4 + u64::from(self.state.size) * 8
    }

    /// The device's wish, without event indices: no kicks.
    pub fn is_kick_unwanted(&self) -> bool {
        self.u16_at(self.state.used) & 1 != 0
    }

    /// What the device has given back since the last time.
    pub fn take_used(&mut self) -> Vec<UsedElement> {
        let index = self.u16_at(self.state.used + 2);
        let mut elements = Vec::new();
        while self.last_used != index {
            let slot = u64::from(self.last_used & (self.state.size - 1));
            let bytes = self.read(self.state.used + 4 + slot * 8, 8);
            let word = |at: usize| {
                let field = bytes.get(at..at + 4).and_then(|part| part.try_into().ok());
                u32::from_le_bytes(field.unwrap_or_default())
            };
            elements.push(UsedElement {
                head: word(0),
                len: word(4),
            });
            self.last_used = self.last_used.wrapping_add(1);
        }
        elements
    }

    fn u16_at(&self, address: u64) -> u16 {
        let mappings = self.ram.mappings();
        let word = mappings.load(GuestAddress(address), Ordering::Acquire);
        u16::from_le(word.expect("inside of the test's memory"))
    }

    fn put_u16(&self, address: u64, value: u16) {
        let mappings = self.ram.mappings();
        mappings
            .store(value.to_le(), GuestAddress(address), Ordering::Release)
            .expect("inside of the test's memory");
    }
}

/// A descriptor as it lies in memory.
pub fn descriptor_bytes(address: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let word = u128::from(address)
        | u128::from(len) << 64
        | u128::from(flags) << 96
        | u128::from(next) << 112;
    word.to_le_bytes()
}
