//! What the driver reads about the disk before it uses it: features and configuration space
//! (virtio 1.2, sections 5.2.3 and 5.2.4).
//!
//! Pure functions of a [`Disk`], computed once. Not offered: `SIZE_MAX` (segments may be of any
//! size), `GEOMETRY` (nobody asks any more), `CONFIG_WCE` (the cache is always write-back, and
//! durable by flushes), `MQ` (one queue is worked by one thread), `SECURE_ERASE`.

use super::SECTOR_SIZE;
use super::device::QUEUE_SIZE;
use super::disk::Disk;
use super::request::{MAX_SEGMENT_SECTORS, MAX_SEGMENTS};

/// `VIRTIO_BLK_F_*`.
const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_BLOCK_SIZE: u64 = 1 << 6;
pub(super) const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_TOPOLOGY: u64 = 1 << 10;
pub(super) const FEATURE_DISCARD: u64 = 1 << 13;
pub(super) const FEATURE_WRITE_ZEROES: u64 = 1 << 14;

/// `struct virtio_blk_config` up to the fields of write zeroes.
pub(super) type ConfigSpace = [u8; 60];
/// Where the capacity ends, which is the first field.
pub(super) const CAPACITY_END: usize = 8;
/// Blocks of a slot's disks, whatever the disk: the driver asks once, in bytes.
const SLOT_LOGICAL: u32 = 512;
const SLOT_PHYSICAL: u32 = 4096;

/// What is offered besides what every ring has.
pub(super) fn features(is_read_only: bool) -> u64 {
    let always = FEATURE_SEG_MAX | FEATURE_BLOCK_SIZE | FEATURE_FLUSH | FEATURE_TOPOLOGY;
    if is_read_only {
        always | FEATURE_READ_ONLY
    } else {
        always | FEATURE_DISCARD | FEATURE_WRITE_ZEROES
    }
}

/// The whole space of a disk.
pub(super) fn of(disk: &Disk) -> ConfigSpace {
    let (logical, physical) = (disk.logical_block_size(), disk.physical_block_size());
    space(
        disk.capacity_sectors(),
        logical,
        physical,
        disk.is_read_only(),
    )
}

/// The whole space of a slot.
pub(super) fn of_slot(capacity_sectors: u64) -> ConfigSpace {
    space(capacity_sectors, SLOT_LOGICAL, SLOT_PHYSICAL, false)
}

fn space(capacity_sectors: u64, logical: u32, physical: u32, is_read_only: bool) -> ConfigSpace {
    let blocks_per_physical = physical / logical;
    let min_io_blocks = u16::try_from(blocks_per_physical).unwrap_or(1);
    let physical_exponent = u8::try_from(blocks_per_physical.ilog2()).unwrap_or(0);
    // What is not aligned to a physical block frees no room.
    let sectors_per_physical = u64::from(physical) / SECTOR_SIZE;
    let discard_alignment = u32::try_from(sectors_per_physical).unwrap_or(1);
    let max_segments = u32::try_from(MAX_SEGMENTS).unwrap_or(1);

    let mut space = [0; 60];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(field) = space.get_mut(at..at + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    };
    put(0, &capacity_sectors.to_le_bytes());
    // A request's header and status have a descriptor each.
    put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
    put(20, &logical.to_le_bytes());
    put(24, &[physical_exponent]);
    put(26, &min_io_blocks.to_le_bytes());
    if !is_read_only {
        put(36, &MAX_SEGMENT_SECTORS.to_le_bytes());
        put(40, &max_segments.to_le_bytes());
        put(44, &discard_alignment.to_le_bytes());
        put(48, &MAX_SEGMENT_SECTORS.to_le_bytes());
        put(52, &max_segments.to_le_bytes());
        // Zeroing with the unmap flag gives room up.
        put(56, &[1]);
    }
    space
}

/// Copy what there is from `offset` on; the rest of `data` stays as it is.
pub(super) fn read(space: &ConfigSpace, offset: usize, data: &mut [u8]) {
    let there = space.get(offset..).unwrap_or(&[]);
    for (target, source) in data.iter_mut().zip(there) {
        *target = *source;
    }
}
