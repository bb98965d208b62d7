//! The guest's memory as devices see it.
//!
//! [`GuestRam`] owns the mappings and a flat table of them, so that translating an address is a
//! comparison or two. It is shared by every ring and buffer of a machine (`Arc`), which is what
//! keeps the host addresses they hold valid. Memory added later makes a new `GuestRam` that
//! shares the old mappings; rings are given it by `Ring::set_memory`.

#![expect(unsafe_code, reason = "guest memory is copied out")]

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use vm_memory::{Address, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use crate::discard::{Backing, DiscardError, PAGE_SIZE};
use crate::host_range::HostRange;

#[derive(Clone, Debug)]
struct Region {
    start: u64,
    range: HostRange,
    backing: Backing,
}

/// The guest's memory: mappings, and where they are.
pub struct GuestRam {
    mappings: GuestMemoryMmap,
    regions: Box<[Region]>,
    /// What unmaps the memory, where vm-memory does not. Dropped last.
    _owner: Option<Box<dyn Any + Send + Sync>>,
}

impl fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestRam")
            .field("regions", &self.regions)
            .finish_non_exhaustive()
    }
}

impl GuestRam {
    /// Take over mappings that unmap themselves. Those that this process may not both read and
    /// write are kept, but are no memory to devices: an access to them would be a fault.
    pub fn new(mappings: GuestMemoryMmap) -> Arc<Self> {
        Self::make(mappings, None)
    }

    /// Take over mappings of memory that `owner` unmaps when it is dropped.
    pub fn with_owner(mappings: GuestMemoryMmap, owner: Box<dyn Any + Send + Sync>) -> Arc<Self> {
        Self::make(mappings, Some(owner))
    }

    fn make(mappings: GuestMemoryMmap, owner: Option<Box<dyn Any + Send + Sync>>) -> Arc<Self> {
        const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;
        let regions = mappings
            .iter()
            .filter(|region| region.prot() & PROTECTION == PROTECTION)
            .map(|region| Region {
                start: region.start_addr().raw_value(),
                range: HostRange {
                    base: region.as_ptr(),
                    // The length of a mapping in this process.
                    len: usize::try_from(region.len()).unwrap_or(0),
                },
                backing: Backing::of(region),
            })
            .collect();
        Arc::new(Self {
            mappings,
            regions,
            _owner: owner,
        })
    }

    /// The mappings, for code that wants vm-memory's interface.
    pub fn mappings(&self) -> &GuestMemoryMmap {
        &self.mappings
    }

    /// Bytes that devices can reach.
    pub fn size(&self) -> u64 {
        self.regions
            .iter()
            .map(|region| region.range.len as u64)
            .sum()
    }

    /// Guest address and bytes of each range of memory, in order.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.regions
            .iter()
            .map(|region| (region.start, region.range.len as u64))
    }

    /// Where guest `address` is in this process: a number, for the kernel.
    pub fn host_address(&self, address: u64) -> Option<usize> {
        self.prefix(address, 1).map(|range| range.base.addr())
    }

    /// Copy bytes from guest `address` on, up to the end of its range; gives how many.
    pub fn copy_out(&self, address: u64, target: &mut [u8]) -> usize {
        let Some(range) = self.prefix(address, target.len()) else {
            return 0;
        };
        // SAFETY: `self` is the memory the range came from, and the target is a Rust slice, which
        // no guest memory is, of at least this length.
        unsafe { range.copy_to(target.as_mut_ptr()) };
        range.len
    }

    /// The region that has `address`, and how far into it that is.
    #[inline]
    fn find(&self, address: u64) -> Option<(&Region, usize)> {
        self.regions.iter().find_map(|region| {
            // Below the region this wraps to more than any mapping's length.
            let offset = usize::try_from(address.wrapping_sub(region.start)).ok()?;
            (offset < region.range.len).then_some((region, offset))
        })
    }

    /// The host's range for as much of `len` bytes at guest `address` as one mapping holds: at
    /// least one byte if `len` is not 0, `None` if no mapping has `address`.
    #[inline]
    pub(crate) fn prefix(&self, address: u64, len: usize) -> Option<HostRange> {
        let (region, offset) = self.find(address)?;
        region.range.part(offset, len)
    }

    /// The host's range for exactly `len` bytes at guest `address`, if one mapping holds them.
    #[inline]
    pub(crate) fn contiguous(&self, address: u64, len: usize) -> Option<HostRange> {
        self.prefix(address, len).filter(|range| range.len == len)
    }

    /// Give whole pages back to the host. The guest finds zeros there, or what a file under a
    /// private mapping has.
    ///
    /// # Errors
    /// These are no whole pages of memory, or the host refused some of them; others may be gone.
    pub fn discard(&self, address: u64, len: u64) -> Result<(), DiscardError> {
        if !(address | len).is_multiple_of(PAGE_SIZE) {
            return Err(DiscardError::Alignment { address, len });
        }
        let not_memory = || DiscardError::NotMemory { address, len };
        let mut done = 0;
        while done < len {
            let at = address.checked_add(done).ok_or_else(not_memory)?;
            let (region, offset) = self.find(at).ok_or_else(not_memory)?;
            let rest = usize::try_from(len - done).unwrap_or(usize::MAX);
            let range = region.range.part(offset, rest).ok_or_else(not_memory)?;
            let discarded = region.backing.discard(range, offset as u64);
            discarded.map_err(|source| DiscardError::System {
                address: at,
                len: range.len as u64,
                source,
            })?;
            done += range.len as u64;
        }
        Ok(())
    }

    /// The guest's address of a range that was made from this memory.
    pub(crate) fn guest_address(&self, range: &HostRange) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = range.base.addr().checked_sub(region.range.base.addr())?;
            (offset < region.range.len).then_some(region.start + offset as u64)
        })
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{GuestAddress, GuestRegionMmap};

    use super::*;

    fn ram() -> Arc<GuestRam> {
        let ranges = [
            (GuestAddress(0), 0x2000),
            (GuestAddress(0x2000), 0x1000),
            (GuestAddress(0x1_0000_0000), 0x1000),
        ];
        GuestRam::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
    }

    #[test]
    fn a_prefix_ends_with_its_mapping() {
        let ram = ram();
        assert_eq!(ram.prefix(0x1ff0, 0x20).unwrap().len, 0x10);
        assert_eq!(ram.prefix(0x2000, 0x20).unwrap().len, 0x20);
        assert_eq!(ram.size(), 0x4000);
    }

    #[test]
    fn what_no_mapping_holds_is_refused() {
        let ram = ram();
        for address in [0x3000, 0xffff_ffff, 0x1_0000_1000, u64::MAX] {
            assert!(ram.prefix(address, 1).is_none(), "{address:#x}");
        }
        assert!(ram.contiguous(0x1fff, 2).is_none());
        assert!(ram.contiguous(0x1_0000_0fff, 1).is_some());
    }

    #[test]
    fn what_are_no_whole_pages_of_memory_is_not_discarded() {
        let ram = ram();
        for (address, len) in [(1, PAGE_SIZE), (0, 1), (0x800, 0x800)] {
            let error = ram.discard(address, len).unwrap_err();
            assert!(matches!(error, DiscardError::Alignment { .. }), "{error}");
        }
        let last = u64::MAX - 0xfff;
        for (address, len) in [
            (0x3000, PAGE_SIZE),
            (0x2000, 2 * PAGE_SIZE),
            (last, PAGE_SIZE),
            (last, 2 * PAGE_SIZE),
            (0x1_0000_0000, last),
        ] {
            let error = ram.discard(address, len).unwrap_err();
            assert!(matches!(error, DiscardError::NotMemory { .. }), "{error}");
        }
        // Over the seam of two mappings, and nothing at all.
        ram.discard(0x1000, 2 * PAGE_SIZE).unwrap();
        ram.discard(0x9000, 0).unwrap();
    }

    #[test]
    fn what_may_not_be_written_is_no_memory_to_devices() {
        let mapping = MmapRegionBuilder::new(0x1000)
            .with_mmap_prot(libc::PROT_READ)
            .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE);
        let region = GuestRegionMmap::new(mapping.build().unwrap(), GuestAddress(0)).unwrap();
        let ram = GuestRam::new(GuestMemoryMmap::from_regions(vec![region]).unwrap());
        assert!(ram.prefix(0, 1).is_none());
        assert_eq!((ram.size(), ram.mappings().num_regions()), (0, 1));
    }
}
