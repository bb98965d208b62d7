//! One area of a ring in guest memory, touched word by word.
//!
//! The driver writes these words at the same time, so each is loaded or stored exactly once, by
//! an atomic access: the compiler may neither split it nor do it again, and what is checked is
//! what is used. All accesses are bounds-checked here, which leaves `ring.rs` without unsafe
//! code. Made and used by a ring, which keeps the memory mapped; on the ring's thread.

#![expect(unsafe_code, reason = "loads and stores in the guest's memory")]

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::host_range::HostRange;
use crate::ram::GuestRam;

/// Bytes of a descriptor (virtio 1.2, 2.7.5).
pub(crate) const DESCRIPTOR_SIZE: usize = 16;

/// A descriptor, as the driver had written it when it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// A range of guest memory in one mapping, which whoever holds the area keeps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Area(HostRange);

impl Area {
    /// `len` bytes at guest `address`, if one mapping holds them.
    pub(crate) fn find(ram: &GuestRam, address: u64, len: usize) -> Option<Self> {
        ram.contiguous(address, len).map(Self)
    }

    /// The guest's alignment holds in this process too: mappings start at page boundaries on both
    /// sides, unless whoever made them saw to it that they don't.
    pub(crate) fn is_aligned(&self, alignment: usize) -> bool {
        self.0.base.addr().is_multiple_of(alignment)
    }

    /// Where a word of `size` bytes is.
    ///
    /// # Panics
    /// It is not inside of the area, or not aligned to its size: a mistake of the ring.
    #[inline]
    fn word(&self, offset: usize, size: usize) -> *mut u8 {
        let end = offset.checked_add(size);
        assert!(end.is_some_and(|end| end <= self.0.len), "word in the area");
        let at = self.0.base.wrapping_add(offset);
        assert!(at.addr().is_multiple_of(size), "aligned word");
        at
    }

    #[inline]
    fn u16_at(&self, offset: usize) -> &AtomicU16 {
        let at = self.word(offset, 2);
        // SAFETY: `word` made sure that the two bytes lie in the area, whose mapping lives as long
        // as the area's holder, and are aligned. Any bytes are a valid number. This process only
        // accesses them atomically; the driver's accesses are as those of another processor.
        unsafe { AtomicU16::from_ptr(at.cast()) }
    }

    /// Load the little-endian 16-bit word at `offset`.
    #[inline]
    pub(crate) fn load(&self, offset: usize, ordering: Ordering) -> u16 {
        u16::from_le(self.u16_at(offset).load(ordering))
    }

    /// Store a little-endian 16-bit word at `offset`.
    #[inline]
    pub(crate) fn store(&self, offset: usize, value: u16, ordering: Ordering) {
        self.u16_at(offset).store(value.to_le(), ordering);
    }

    /// Store a little-endian 32-bit word at `offset`, in no particular order.
    #[inline]
    pub(crate) fn store_u32(&self, offset: usize, value: u32) {
        let at = self.word(offset, 4);
        // SAFETY: as in `u16_at`.
        let word = unsafe { AtomicU32::from_ptr(at.cast()) };
        word.store(value.to_le(), Ordering::Relaxed);
    }

    /// Copy descriptor `index` of a table out, once.
    #[inline]
    pub(crate) fn descriptor(&self, index: u16) -> Descriptor {
        let offset = usize::from(index) * DESCRIPTOR_SIZE;
        let [address, rest] = if self.is_aligned(align_of::<AtomicU64>()) {
            [self.load_u64(offset), self.load_u64(offset + 8)]
        } else {
            self.copy_words(offset)
        };
        #[expect(clippy::cast_possible_truncation, reason = "fields of the word")]
        Descriptor {
            address,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }

    #[inline]
    fn load_u64(&self, offset: usize) -> u64 {
        let at = self.word(offset, 8);
        // SAFETY: as in `u16_at`.
        let word = unsafe { AtomicU64::from_ptr(at.cast()) };
        u64::from_le(word.load(Ordering::Relaxed))
    }

    /// For indirect tables, which the specification lets be anywhere.
    #[cold]
    fn copy_words(&self, offset: usize) -> [u64; 2] {
        let part = self.0.part(offset, DESCRIPTOR_SIZE);
        let part = part.filter(|part| part.len == DESCRIPTOR_SIZE);
        let part = part.expect("word in the area");
        let mut bytes = [0; DESCRIPTOR_SIZE];
        // SAFETY: the area's holder keeps the memory, and the target is a local of this length.
        unsafe { part.copy_to(bytes.as_mut_ptr()) };
        let word = u128::from_le_bytes(bytes);
        #[expect(clippy::cast_possible_truncation, reason = "halves of the word")]
        [word as u64, (word >> 64) as u64]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::{MockDriver, mock_ram};

    const EXPECTED: Descriptor = Descriptor {
        address: 0x0102_0304_0506_0708,
        len: 0x1112_1314,
        flags: 0x2122,
        next: 0x3132,
    };

    #[test]
    fn a_descriptor_reads_the_same_at_any_alignment() {
        let ram = mock_ram(0x1000);
        let driver = MockDriver::new(&ram, 0, 1);
        for offset in 0..16 {
            let address = 0x100 + offset;
            let Descriptor {
                len, flags, next, ..
            } = EXPECTED;
            let mut bytes = EXPECTED.address.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            driver.write(address, &bytes);
            let area = Area::find(&ram, address - 16, 32).unwrap();
            assert_eq!(area.descriptor(1), EXPECTED, "{offset}");
        }
    }

    #[test]
    #[should_panic(expected = "word in the area")]
    fn a_descriptor_past_the_table_is_never_read() {
        let ram = mock_ram(0x1000);
        Area::find(&ram, 0, 32).unwrap().descriptor(2);
    }

    #[test]
    #[should_panic(expected = "word in the area")]
    fn nor_one_that_is_half_in_an_unaligned_table() {
        let ram = mock_ram(0x1000);
        Area::find(&ram, 1, 31).unwrap().descriptor(1);
    }

    #[test]
    #[should_panic(expected = "aligned word")]
    fn a_word_across_words_is_never_written() {
        let ram = mock_ram(0x1000);
        Area::find(&ram, 0, 32).unwrap().store_u32(2, 0);
    }
}
