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
//!    └─ none left ─► enable_kicks: true ─► pop again
//!                                └─ false ─► wait for a kick ─► disable_kicks ─► pop
//! ```
//!
//! Both sides sleep on a promise of the other. Each therefore first publishes (the index, or its
//! wish to be told), then fences, then reads what the other published: whichever comes second
//! sees the first, so one of the two always acts. Used by one thread at a time.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::area::{Area, DESCRIPTOR_SIZE, Descriptor};
use crate::chain::{Chain, ChainError};
use crate::index;
use crate::ram::GuestRam;

/// `VIRTQ_DESC_F_NEXT`, `_WRITE`, `_INDIRECT` (virtio 1.2, 2.7.5).
const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITE: u16 = 2;
const DESCRIPTOR_INDIRECT: u16 = 4;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`, `VIRTQ_USED_F_NO_NOTIFY`.
const NO_SIGNAL: u16 = 1;
const AVAILABLE_ENTRY_SIZE: usize = 2;
const USED_ENTRY_SIZE: usize = 8;
/// `flags` and `idx` of either ring.
const FLAGS_OFFSET: usize = 0;
const INDEX_OFFSET: usize = 2;
/// `flags` and `idx` before the entries, the event index after them.
const RING_HEADER_SIZE: usize = 4;
const EVENT_SIZE: usize = 2;
/// The largest ring (virtio 1.2, 2.7).
pub const MAX_SIZE: u16 = 1 << 15;
/// Entries of the largest indirect table that is looked at: what `next` can name.
const MAX_INDIRECT_LEN: u32 = 1 << 16;
/// Descriptors of an indirect table that are followed in a smaller ring. No chain may be longer
/// than the ring (2.7.5.3.1), but drivers that count on QEMU's limit, which this is, are.
const MIN_CHAIN_LIMIT: u32 = 1024;
/// Malformed chains in a row that a driver is forgiven.
const MALFORMED_LIMIT: u16 = 256;

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
        alignment: u16,
    },
    /// an area is not inside of the guest's memory
    #[error("{area} at {address:#x} is not inside of guest memory")]
    NotMemory {
        /// Which area.
        area: &'static str,
        /// Its guest address.
        address: u64,
    },
    /// the driver's index jumped: it makes more available than it has back and there is
    #[error(
        "available index went from {from} to {to} in a ring of {size}, {in_flight} of it in flight"
    )]
    AvailableIndex {
        /// The entry the device would take next.
        from: u16,
        /// What the driver wrote.
        to: u16,
        /// Entries.
        size: u16,
        /// Chains that were taken and not given back.
        in_flight: u16,
    },
    /// a head that is no descriptor
    #[error("available ring names descriptor {head} of {size}")]
    Head {
        /// The index.
        head: u16,
        /// Entries.
        size: u16,
    },
    /// chain after chain that breaks a rule; the driver could keep its device busy with nothing
    #[error("more than {MALFORMED_LIMIT} malformed chains in a row")]
    Malformed {
        /// What the last one broke.
        #[source]
        source: ChainError,
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

/// Where the event index follows the entries: the driver's wish in the available ring, the
/// device's in the used ring (2.7.6, 2.7.8).
fn event_offset(size: u16, entry_size: usize) -> usize {
    RING_HEADER_SIZE + usize::from(size) * entry_size
}

/// A ring in use.
#[derive(Debug)]
pub struct Ring {
    ram: Arc<GuestRam>,
    state: RingState,
    descriptors: Area,
    available: Area,
    used: Area,
    /// Completed since the driver was last told, or found not to want to know.
    unsignalled: u32,
    malformed_chains: u64,
    /// Malformed chains since the last sound one.
    malformed_run: u16,
    last_malformed: Option<ChainError>,
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
        let find = |area: &'static str, address: u64, alignment: u16, len: usize| {
            let found = Area::find(&ram, address, len);
            let found = found.ok_or(RingError::NotMemory { area, address })?;
            let is_aligned = address.is_multiple_of(u64::from(alignment));
            if is_aligned && found.is_aligned(usize::from(alignment)) {
                return Ok(found);
            }
            Err(RingError::Alignment {
                area,
                address,
                alignment,
            })
        };
        let table_len = usize::from(state.size) * DESCRIPTOR_SIZE;
        let available_len = event_offset(state.size, AVAILABLE_ENTRY_SIZE) + EVENT_SIZE;
        let used_len = event_offset(state.size, USED_ENTRY_SIZE) + EVENT_SIZE;
        let is_fresh = state.next_available == 0 && state.next_used == 0;
        let descriptors = find("descriptor table", state.descriptors, 16, table_len)?;
        let available = find("available ring", state.available, 2, available_len)?;
        let used = find("used ring", state.used, 4, used_len)?;
        Ok(Self {
            ram,
            state,
            descriptors,
            available,
            used,
            // A ring that was worked on before may have been taken over between completing and
            // telling: tell once too often rather than never.
            unsignalled: if is_fresh { 0 } else { u32::MAX },
            malformed_chains: 0,
            malformed_run: 0,
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
        let made = Self::new(ram, self.state)?;
        self.ram = made.ram;
        self.descriptors = made.descriptors;
        self.available = made.available;
        self.used = made.used;
        Ok(())
    }

    /// Chains given back unused because they broke a rule, and what the last one broke.
    pub fn malformed(&self) -> (u64, Option<ChainError>) {
        (self.malformed_chains, self.last_malformed)
    }

    // --- taking requests -----------------------------------------------------------------------

    /// Acquire: the entries and descriptors before the index are seen with it.
    #[inline]
    fn available_index(&self) -> u16 {
        self.available.load(INDEX_OFFSET, Ordering::Acquire)
    }

    /// The head of the next chain, if there is one.
    #[inline]
    fn next_head(&mut self) -> Result<Option<u16>, RingError> {
        let RingState {
            size,
            next_available: from,
            next_used,
            ..
        } = self.state;
        let to = self.available_index();
        let in_flight = index::in_flight(from, next_used, size);
        let count = index::pending(to, from, size - in_flight);
        let jumped = RingError::AvailableIndex {
            from,
            to,
            size,
            in_flight,
        };
        if count.ok_or(jumped)? == 0 {
            return Ok(None);
        }
        let slot = usize::from(index::slot(from, size));
        let entry = RING_HEADER_SIZE + slot * AVAILABLE_ENTRY_SIZE;
        let head = self.available.load(entry, Ordering::Relaxed);
        if head >= size {
            return Err(RingError::Head { head, size });
        }
        self.state.next_available = from.wrapping_add(1);
        Ok(Some(head))
    }

    /// Take the next request into `chain`. False: there is none for now, and `chain` is as it was.
    ///
    /// Chains that break a rule are given back at once, with length 0, and counted.
    ///
    /// # Errors
    /// The driver's indices make no sense, or it sends nothing but malformed chains: give the
    /// ring up.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        while let Some(head) = self.next_head()? {
            chain.reset(&self.ram, head);
            match self.gather(head, chain) {
                Ok(()) => {
                    self.malformed_run = 0;
                    return Ok(true);
                }
                Err(error) => self.refuse(head, error)?,
            }
        }
        Ok(false)
    }

    /// Give a malformed chain back. Bounded, or a driver could hold the device's thread here by
    /// adding them as fast as they are refused.
    #[cold]
    fn refuse(&mut self, head: u16, source: ChainError) -> Result<(), RingError> {
        self.malformed_chains = self.malformed_chains.saturating_add(1);
        self.last_malformed = Some(source);
        self.complete(head, 0);
        if self.malformed_run == MALFORMED_LIMIT {
            return Err(RingError::Malformed { source });
        }
        self.malformed_run += 1;
        Ok(())
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

    /// Follow a chain from its head, copying and checking each descriptor once.
    #[inline]
    fn gather(&self, head: u16, chain: &mut Chain) -> Result<(), ChainError> {
        let mut table = self.descriptors;
        let mut table_len = u32::from(self.state.size);
        let mut limit = table_len;
        let mut count = 0;
        let mut is_indirect = false;
        let mut index = head;
        loop {
            if u32::from(index) >= table_len {
                return Err(ChainError::Index { index, table_len });
            }
            if count == limit {
                return Err(ChainError::TooLong { limit });
            }
            count += 1;
            let descriptor = table.descriptor(index);
            let has_next = descriptor.flags & DESCRIPTOR_NEXT != 0;
            if descriptor.flags & DESCRIPTOR_INDIRECT != 0 {
                // 2.7.5.3.1; whether it says WRITE is to be ignored (2.7.5.3.2).
                if is_indirect || has_next {
                    return Err(ChainError::Nested);
                }
                (table, table_len) = self.indirect_table(&descriptor)?;
                limit = table_len.min(u32::from(self.state.size).max(MIN_CHAIN_LIMIT));
                (is_indirect, index, count) = (true, 0, 0);
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

    fn indirect_table(&self, descriptor: &Descriptor) -> Result<(Area, u32), ChainError> {
        let Descriptor { address, len, .. } = *descriptor;
        let bytes = len as usize;
        let entries = len / 16;
        if entries == 0 || !bytes.is_multiple_of(DESCRIPTOR_SIZE) || entries > MAX_INDIRECT_LEN {
            return Err(ChainError::TableSize { len });
        }
        let table = Area::find(&self.ram, address, bytes);
        let table = table.ok_or(ChainError::NotMemory { address, len })?;
        Ok((table, entries))
    }

    /// Put back the last `count` requests taken, as if never taken; they must not have been
    /// completed. Those after the first were taken by [`Ring::pop_another`]: had `pop` refused a
    /// chain between two, it would come back twice, and another not at all.
    ///
    /// A request put back is one that [`Ring::enable_kicks`] sees: it says true until all are
    /// taken again.
    pub fn unpop(&mut self, count: u16) {
        debug_assert!(count <= self.state.size, "no more than can be taken");
        self.state.next_available = self.state.next_available.wrapping_sub(count);
    }

    // --- giving them back ----------------------------------------------------------------------

    /// Give a request back with `len` bytes written. The driver sees it at once; whether it has
    /// to be told is asked once per batch, by [`Ring::needs_signal`].
    #[inline]
    pub fn complete(&mut self, head: u16, len: u32) {
        self.put_used(head, len);
        self.publish_used();
    }

    /// Give several requests back at once: the driver sees all of them or none, as it has to where
    /// the first says how many belong together.
    pub fn complete_all(&mut self, requests: impl IntoIterator<Item = (u16, u32)>) {
        for (head, len) in requests {
            self.put_used(head, len);
        }
        self.publish_used();
    }

    #[inline]
    fn put_used(&mut self, head: u16, len: u32) {
        let slot = usize::from(index::slot(self.state.next_used, self.state.size));
        let entry = RING_HEADER_SIZE + slot * USED_ENTRY_SIZE;
        self.used.store_u32(entry, u32::from(head));
        self.used.store_u32(entry + 4, len);
        self.state.next_used = self.state.next_used.wrapping_add(1);
        self.unsignalled = self.unsignalled.saturating_add(1);
    }

    #[inline]
    fn publish_used(&mut self) {
        // Release: the driver that sees the index sees the entry, and the data before it.
        self.used
            .store(INDEX_OFFSET, self.state.next_used, Ordering::Release);
    }

    /// Whether the driver wants to hear of what was completed since the last time this was asked.
    pub fn needs_signal(&mut self) -> bool {
        let count = mem::take(&mut self.unsignalled);
        if count == 0 {
            return false;
        }
        // Our index has to be visible before the driver's wish is read, or both sides wait.
        fence(Ordering::SeqCst);
        if !self.state.has_event_idx {
            let flags = self.available.load(FLAGS_OFFSET, Ordering::Relaxed);
            return flags & NO_SIGNAL == 0;
        }
        // More than an index can count have passed any event.
        u16::try_from(count).map_or(true, |count| {
            let offset = event_offset(self.state.size, AVAILABLE_ENTRY_SIZE);
            let event = self.available.load(offset, Ordering::Relaxed);
            let new = self.state.next_used;
            index::has_passed(event, new, new.wrapping_sub(count))
        })
    }

    /// Ask for no kicks: we look anyway. A kick may still come.
    pub fn disable_kicks(&mut self) {
        // With event indices the wish stays at an index that is passed already: the next kick is
        // 65536 requests away, and the flag has to stay 0 (2.7.10).
        if !self.state.has_event_idx {
            self.used.store(FLAGS_OFFSET, NO_SIGNAL, Ordering::Relaxed);
        }
    }

    /// Ask for a kick with the next request. True: some came meanwhile, look again.
    pub fn enable_kicks(&mut self) -> bool {
        if self.state.has_event_idx {
            let offset = event_offset(self.state.size, USED_ENTRY_SIZE);
            self.used
                .store(offset, self.state.next_available, Ordering::Relaxed);
        } else {
            self.used.store(FLAGS_OFFSET, 0, Ordering::Relaxed);
        }
        // The wish has to be visible before the index is read, or a request goes unseen.
        fence(Ordering::SeqCst);
        self.available_index() != self.state.next_available
    }
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "ring_model_tests.rs"]
mod model_tests;

#[cfg(test)]
#[path = "ring_race_tests.rs"]
mod race_tests;
