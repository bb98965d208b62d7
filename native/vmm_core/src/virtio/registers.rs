//! The registers of a virtio-mmio device as values: what the driver wrote, and what it reads in
//! return (virtio 1.2, 4.2.2).
//!
//! Plain data that the transport (`mmio.rs`) keeps under its lock, and that a snapshot keeps as it
//! is. Nothing here acts on what was written.

use serde::{Deserialize, Serialize};

pub(super) const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// Nobody's: drivers don't look.
const VENDOR: u32 = 0x4b48_5942;

/// Device status bits (virtio 1.2, section 2.1).
pub(super) mod status {
    pub(crate) const ACKNOWLEDGE: u32 = 1;
    pub(crate) const DRIVER: u32 = 2;
    pub(crate) const DRIVER_OK: u32 = 4;
    pub(crate) const FEATURES_OK: u32 = 8;
    pub(crate) const NEEDS_RESET: u32 = 0x40;
    pub(crate) const FAILED: u32 = 0x80;
}

/// What the driver wrote of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueRegisters {
    pub(super) size: u16,
    pub(super) is_ready: bool,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// What the driver wrote of the device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    pub(super) status: u32,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u32,
    pub(super) queues: Vec<QueueRegisters>,
}

/// Registers that never change: offsets and values.
pub(super) fn constants(kind: u32) -> [(usize, u32); 8] {
    [
        (0x000, MAGIC),
        (0x004, VERSION),
        (0x008, kind),
        (0x00c, VENDOR),
        // No shared memory regions: their length and place read as all ones.
        (0x0b0, u32::MAX),
        (0x0b4, u32::MAX),
        (0x0b8, u32::MAX),
        (0x0bc, u32::MAX),
    ]
}

impl Registers {
    /// Registers that depend on what the driver wrote, of a device that offers `features` and has
    /// queues of `sizes`: offsets and values.
    pub(super) fn readable(&self, features: u64, sizes: &[u16]) -> [(usize, u32); 4] {
        let index = self.queue_select as usize;
        let size = sizes.get(index).copied().unwrap_or(0);
        let queue = self.queues.get(index);
        [
            (0x010, half(features, self.device_features_select)),
            (0x034, size.into()),
            (0x044, queue.map_or(0, |queue| u32::from(queue.is_ready))),
            (0x070, self.status),
        ]
    }
}

impl QueueRegisters {
    /// The driver writes one of the registers of the queue.
    pub(super) fn write(&mut self, offset: u64, value: u32, max_size: u16) {
        match offset {
            0x038 => {
                // Anything else is found out when the ring is made.
                if let Ok(size) = u16::try_from(value)
                    && size <= max_size
                {
                    self.size = size;
                }
            }
            0x044 => self.is_ready = value == 1,
            0x080 => set_low(&mut self.descriptors, value),
            0x084 => set_high(&mut self.descriptors, value),
            0x090 => set_low(&mut self.available, value),
            0x094 => set_high(&mut self.available, value),
            0x0a0 => set_low(&mut self.used, value),
            0x0a4 => set_high(&mut self.used, value),
            _ => {}
        }
    }
}

/// Queues before the driver touched them.
pub(super) fn initial_queues(sizes: &[u16]) -> Vec<QueueRegisters> {
    sizes
        .iter()
        .map(|size| QueueRegisters {
            size: *size,
            ..QueueRegisters::default()
        })
        .collect()
}

/// Half of a 64-bit register, as the select register says; zero past its end.
#[expect(clippy::cast_possible_truncation, reason = "halves of the word")]
pub(super) fn half(word: u64, select: u32) -> u32 {
    match select {
        0 => word as u32,
        1 => (word >> 32) as u32,
        _ => 0,
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & u64::from(u32::MAX) | u64::from(value) << 32;
}
