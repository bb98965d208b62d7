//! The guest's memory map, from what it really has: the same ranges for both boot protocols.

use vm_memory::{GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use super::KernelError;
use crate::arch::layout;

/// Entries that fit into `boot_params` (`E820_MAX_ENTRIES_ZEROPAGE`), and into PVH's page.
pub(super) const MAX_ENTRIES: usize = 128;

/// What a range is (ACPI 6.5, table 15.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RangeKind {
    /// Free memory.
    Ram = 1,
    /// Not to be used by the kernel.
    Reserved = 2,
}

/// One range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MapEntry {
    pub(super) start: u64,
    pub(super) size: u64,
    pub(super) kind: RangeKind,
}

/// All ranges, in order. What the table below 1 MiB can't say is memory, is reserved.
pub(super) fn memory_map(memory: &GuestMemoryMmap) -> Result<Vec<MapEntry>, KernelError> {
    let mut map = Vec::new();
    for region in memory.iter() {
        let (start, end) = (region.start_addr().0, region.start_addr().0 + region.len());
        let parts = [
            (0, layout::LOW_MEMORY_END, RangeKind::Ram),
            (
                layout::LOW_MEMORY_END,
                layout::HIGH_MEMORY_START,
                RangeKind::Reserved,
            ),
            (layout::HIGH_MEMORY_START, u64::MAX, RangeKind::Ram),
        ];
        for (part_start, part_end, kind) in parts {
            let (start, end) = (start.max(part_start), end.min(part_end));
            if start < end {
                let size = end - start;
                map.push(MapEntry { start, size, kind });
            }
        }
    }
    if map.len() > MAX_ENTRIES {
        return Err(KernelError::TooManyRanges { limit: MAX_ENTRIES });
    }
    Ok(map)
}
