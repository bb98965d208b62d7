//! One split virtqueue, device side (virtio 1.2, section 2.7).
//!
//! The three areas are found in the guest's memory once, when the ring is made; from then on an
//! access is a load or a store. The driver writes the areas at any time and is not trusted: a
//! bad chain costs the driver that chain (it is given back with length 0 and counted), a bad
//! available index or head is a [`RingError`] and the end of the ring, since nothing the driver
//! says of it can be believed any more.
//!
//! ```text
//!   pop ─► Chain ─► (device works) ─► complete ─► … ─► needs_signal? ─► interrupt, once per batch
//! ```
//!
//! Used by one thread at a time; the device that owns it decides which.

#![expect(unsafe_code, reason = "loads and stores in the guest's memory")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::chain::{Chain, ChainError};
use crate::index;
use crate::ram::{GuestRam, HostRange};

/// `VIRTQ_DESC_F_NEXT`, `_WRITE`, `_INDIRECT` (virtio 1.2, 2.7.5).
const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITE: u16 = 2;
const DESCRIPTOR_INDIRECT: u16 = 4;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`, `VIRTQ_USED_F_NO_NOTIFY`.
const NO_SIGNAL: u16 = 1;
const DESCRIPTOR_SIZE: usize = 16;
const USED_ELEMENT_SIZE: usize = 8;
/// `flags` and `idx` before the entries, the event index after them.
const RING_HEADER_SIZE: usize = 4;
const EVENT_SIZE: usize = 2;
/// The largest ring (virtio 1.2, 2.7).
pub const MAX_SIZE: u16 = 1 << 15;
/// Entries of the largest indirect table that is looked at.
const MAX_INDIRECT_LEN: u32 = 1 << 16;

/// Why a ring cannot be used, or not any more.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RingError {
    /// a size that is none
    #[error("ring of {0} entries: not a power of two up to {MAX_SIZE}")]
    Size(u16),
    /// an area is not aligned as the specification wants
    #[error("{area} at {address:#x} is not aligned to {alignment}")]
    Alignment {
        /// Which area.
        area: &'static str,
        /// Its guest address.
        address: u64,
        /// What it has to be a multiple of.
        alignment: u64,
    },
    /// an area is not inside of the guest's memory
    #[error("{area} at {address:#x} is not inside of guest memory")]
    NotMemory {
        /// Which area.
        area: &'static str,
        /// Its guest address.
        address: u64,
    },
    /// the driver's index jumped
    #[error("available index went from {from} to {to} in a ring of {size}")]
    AvailableIndex {
        /// The entry the device would take next.
        from: u16,
        /// What the driver wrote.
        to: u16,
        /// Entries.
        size: u16,
    },
    /// a head that is no descriptor
    #[error("available ring names descriptor {head} of {size}")]
    Head {
        /// The index.
        head: u16,
        /// Entries.
        size: u16,
    },
}

/// What the driver said of a ring, and how far it was worked through: enough to make it again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingState {
    /// Entries.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring, the driver's.
    pub available: u64,
    /// Guest address of the used ring, the device's.
    pub used: u64,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub has_event_idx: bool,
    /// The entry of the available ring to take next.
    pub next_available: u16,
    /// The entry of the used ring to write next.
    pub next_used: u16,
}

/// A ring in use.
#[derive(Debug)]
pub struct Ring {
    ram: Arc<GuestRam>,
    state: RingState,
    descriptors: HostRange,
    available: HostRange,
    used: HostRange,
    /// `next_used` when the driver was last told, or found not to want to know.
    signalled_used: u16,
    malformed_chains: u64,
    last_malformed: Option<ChainError>,
}

/// A descriptor, as the driver had written it when it was read.
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Ring {
    /// Find the areas in memory, and go on where `state` says.
    ///
    /// # Errors
    /// The size is none, or an area is misaligned or not memory.
    pub fn new(ram: Arc<GuestRam>, state: RingState) -> Result<Self, RingError> {
        if !state.size.is_power_of_two() || state.size > MAX_SIZE {
            return Err(RingError::Size(state.size));
        }
        let size = usize::from(state.size);
        let find = |area: &'static str, address: u64, alignment: u64, len: usize| {
            if !address.is_multiple_of(alignment) {
                return Err(RingError::Alignment {
                    area,
                    address,
                    alignment,
                });
            }
            ram.contiguous(address, len)
                .ok_or(RingError::NotMemory { area, address })
        };
        let table_len = size * DESCRIPTOR_SIZE;
        let available_len = RING_HEADER_SIZE + size * 2 + EVENT_SIZE;
        let used_len = RING_HEADER_SIZE + size * USED_ELEMENT_SIZE + EVENT_SIZE;
        let descriptors = find("descriptor table", state.descriptors, 16, table_len)?;
        let available = find("available ring", state.available, 2, available_len)?;
        let used = find("used ring", state.used, 4, used_len)?;
        Ok(Self {
            ram,
            state,
            descriptors,
            available,
            used,
            signalled_used: state.next_used,
            malformed_chains: 0,
            last_malformed: None,
        })
    }

    /// Where the ring is and how far it was worked through.
    pub fn state(&self) -> RingState {
        self.state
    }

    /// Entries: the longest chain allowed.
    pub fn size(&self) -> u16 {
        self.state.size
    }

    /// The memory its descriptors name.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Go on with memory that grew. The areas stay where they are: `ram` holds the old mappings.
    ///
    /// # Errors
    /// It does not, so the areas are lost; the ring is as it was.
    pub fn set_memory(&mut self, ram: Arc<GuestRam>) -> Result<(), RingError> {
        let signalled_used = self.signalled_used;
        let made = Self::new(ram, self.state)?;
        *self = Self {
            signalled_used,
            malformed_chains: self.malformed_chains,
            last_malformed: self.last_malformed,
            ..made
        };
        Ok(())
    }

    /// Chains given back unused because they broke a rule, and what the last one broke.
    pub fn malformed(&self) -> (u64, Option<ChainError>) {
        (self.malformed_chains, self.last_malformed)
    }

    // --- loads and stores ----------------------------------------------------------------------

    /// A 16-bit field of the available or used ring.
    fn field(area: &HostRange, offset: usize) -> &AtomicU16 {
        debug_assert!(
            offset + 2 <= area.len && offset.is_multiple_of(2),
            "in the area"
        );
        // SAFETY: every caller's offset is even and at least two bytes before the end of the area
        // (sizes are set in `new`), areas start at even addresses (guest alignment was checked,
        // mappings are page-aligned), and the mapping lives as long as the ring. The driver's
        // accesses are as another processor's; ours are all atomic.
        unsafe { AtomicU16::from_ptr(area.base.wrapping_add(offset).cast()) }
    }

    fn available_index(&self) -> u16 {
        u16::from_le(Self::field(&self.available, 2).load(Ordering::Acquire))
    }

    fn descriptor(table: &HostRange, index: usize) -> Descriptor {
        debug_assert!((index + 1) * DESCRIPTOR_SIZE <= table.len, "in the table");
        let at = table.base.wrapping_add(index * DESCRIPTOR_SIZE);
        // SAFETY: every caller's index is inside of the table, whose mapping lives as long as the
        // ring. Any bytes are a valid array; an unaligned read asks for no alignment, and a
        // volatile one is done exactly once, so later code sees one copy.
        let bytes: [u8; DESCRIPTOR_SIZE] =
            unsafe { at.cast::<[u8; DESCRIPTOR_SIZE]>().read_volatile() };
        let word = u128::from_le_bytes(bytes);
        #[expect(clippy::cast_possible_truncation, reason = "fields of the word")]
        Descriptor {
            address: word as u64,
            len: (word >> 64) as u32,
            flags: (word >> 96) as u16,
            next: (word >> 112) as u16,
        }
    }

    // --- taking requests -----------------------------------------------------------------------

    /// Take the next request into `chain`. False: there is none for now.
    ///
    /// Chains that break a rule are given back at once, with length 0, and counted; after a ring's
    /// worth of them this gives up for now, and [`Ring::enable_kicks`] tells whether more came.
    ///
    /// # Errors
    /// The driver's indices make no sense: give the ring up.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        for _ in 0..self.state.size {
            let Some(head) = self.next_head()? else {
                return Ok(false);
            };
            chain.reset(&self.ram, head);
            match self.gather(head, chain) {
                Ok(()) => return Ok(true),
                Err(error) => {
                    self.malformed_chains += 1;
                    self.last_malformed = Some(error);
                    self.complete(head, 0);
                }
            }
        }
        Ok(false)
    }

    /// As [`Ring::pop`], while requests are held that may yet go back by [`Ring::unpop`]. False
    /// also if the next chain breaks a rule: it waits for a `pop`, since those held have to stay
    /// the last ones taken.
    ///
    /// # Errors
    /// As [`Ring::pop`].
    pub fn pop_another(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        let Some(head) = self.next_head()? else {
            return Ok(false);
        };
        chain.reset(&self.ram, head);
        let is_sound = self.gather(head, chain).is_ok();
        if !is_sound {
            self.unpop(1);
        }
        Ok(is_sound)
    }

    /// Take an entry off the available ring.
    fn next_head(&mut self) -> Result<Option<u16>, RingError> {
        let next = self.state.next_available;
        let to = self.available_index();
        let size = self.state.size;
        match index::pending(to, next, size) {
            Some(0) => return Ok(None),
            Some(_) => {}
            None => {
                return Err(RingError::AvailableIndex {
                    from: next,
                    to,
                    size,
                });
            }
        }
        let slot = usize::from(index::slot(next, size));
        let entry = Self::field(&self.available, RING_HEADER_SIZE + slot * 2);
        let head = u16::from_le(entry.load(Ordering::Relaxed));
        if head >= size {
            return Err(RingError::Head { head, size });
        }
        self.state.next_available = next.wrapping_add(1);
        Ok(Some(head))
    }

    /// Follow a chain from its head, copying and checking each descriptor once.
    fn gather(&self, head: u16, chain: &mut Chain) -> Result<(), ChainError> {
        let mut table = self.descriptors;
        let mut table_len = u32::from(self.state.size);
        let mut is_indirect = false;
        let mut index = head;
        let mut left = table_len;
        loop {
            if u32::from(index) >= table_len {
                return Err(ChainError::Index { index, table_len });
            }
            if left == 0 {
                return Err(ChainError::TooLong { limit: table_len });
            }
            left -= 1;
            let descriptor = Self::descriptor(&table, usize::from(index));
            let has_next = descriptor.flags & DESCRIPTOR_NEXT != 0;
            if descriptor.flags & DESCRIPTOR_INDIRECT != 0 {
                if is_indirect || has_next {
                    return Err(ChainError::Nested);
                }
                (table, table_len) = self.indirect_table(&descriptor)?;
                (is_indirect, index, left) = (true, 0, table_len);
                continue;
            }
            let is_writable = descriptor.flags & DESCRIPTOR_WRITE != 0;
            chain.push(descriptor.address, descriptor.len, is_writable)?;
            if !has_next {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    fn indirect_table(&self, descriptor: &Descriptor) -> Result<(HostRange, u32), ChainError> {
        let Descriptor { address, len, .. } = *descriptor;
        let entries = len / 16;
        if entries == 0 || !len.is_multiple_of(16) || entries > MAX_INDIRECT_LEN {
            return Err(ChainError::TableSize { len });
        }
        let table = self
            .ram
            .contiguous(address, len as usize)
            .ok_or(ChainError::NotMemory { address, len })?;
        Ok((table, entries))
    }

    /// Put back the last `count` requests taken, as if never taken.
    pub fn unpop(&mut self, count: u16) {
        self.state.next_available = self.state.next_available.wrapping_sub(count);
    }

    // --- giving them back ----------------------------------------------------------------------

    /// Give a request back with `len` bytes written. The driver sees it at once; whether it has
    /// to be told is asked once per batch, by [`Ring::needs_signal`].
    pub fn complete(&mut self, head: u16, len: u32) {
        let slot = usize::from(index::slot(self.state.next_used, self.state.size));
        let at = self
            .used
            .base
            .wrapping_add(RING_HEADER_SIZE + slot * USED_ELEMENT_SIZE);
        let element = (u64::from(head) | u64::from(len) << 32).to_le_bytes();
        // SAFETY: the slot is less than the ring's size, so the element lies in the used area,
        // whose mapping lives as long as the ring; an array asks for no alignment.
        unsafe { at.cast::<[u8; USED_ELEMENT_SIZE]>().write_volatile(element) };
        self.state.next_used = self.state.next_used.wrapping_add(1);
        // Release: the driver that sees the index sees the element, and the data before it.
        Self::field(&self.used, 2).store(self.state.next_used.to_le(), Ordering::Release);
    }

    /// Whether the driver wants to hear of what was completed since the last time this was asked.
    pub fn needs_signal(&mut self) -> bool {
        let (new, old) = (self.state.next_used, self.signalled_used);
        if new == old {
            return false;
        }
        self.signalled_used = new;
        // Our index has to be visible before the driver's wish is read, or both sides wait.
        fence(Ordering::SeqCst);
        if self.state.has_event_idx {
            let offset = RING_HEADER_SIZE + usize::from(self.state.size) * 2;
            let event = u16::from_le(Self::field(&self.available, offset).load(Ordering::Relaxed));
            index::has_passed(event, new, old)
        } else {
            let flags = u16::from_le(Self::field(&self.available, 0).load(Ordering::Relaxed));
            flags & NO_SIGNAL == 0
        }
    }

    /// Ask for no kicks: we look anyway.
    pub fn disable_kicks(&mut self) {
        // With event indices the wish stays at an index that is passed already.
        if !self.state.has_event_idx {
            Self::field(&self.used, 0).store(NO_SIGNAL.to_le(), Ordering::Relaxed);
        }
    }

    /// Ask for a kick with the next request. True: some came meanwhile, look again.
    pub fn enable_kicks(&mut self) -> bool {
        if self.state.has_event_idx {
            let offset = RING_HEADER_SIZE + usize::from(self.state.size) * USED_ELEMENT_SIZE;
            let event = self.state.next_available.to_le();
            Self::field(&self.used, offset).store(event, Ordering::Relaxed);
        } else {
            Self::field(&self.used, 0).store(0, Ordering::Relaxed);
        }
        // The wish has to be visible before the index is read, or a request goes unseen.
        fence(Ordering::SeqCst);
        self.available_index() != self.state.next_available
    }
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
