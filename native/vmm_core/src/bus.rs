//! What answers a vCPU's accesses to I/O ports and to addresses that are no memory.
//!
//! A [`Bus`] is filled while the machine is built and never changes afterwards, so vCPUs look
//! devices up without a lock; one machine has one for ports and one for memory-mapped registers.
//! Accesses come from every vCPU's thread at once: a [`BusDevice`] locks what it has to, for as
//! long as a copy takes.
//!
//! Where no device is, reads give zeros and writes go nowhere, on both buses alike; both are
//! counted. Zeros, though an empty bus of a PC reads as ones: older kernels spin for as long as
//! the clock chip's busy bit is set, and a probe for hardware takes either for "not there".

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

/// What an access asks of the machine. A vCPU acts on it before it enters the guest again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// Nothing.
    Continue,
    /// Power off.
    Shutdown,
    /// Start again.
    Reset,
}

/// A device behind ports or registers.
pub trait BusDevice: Send + Sync {
    /// Fill `data`, which arrives zeroed, with what is `offset` bytes into the device.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Take `data`, written `offset` bytes into the device.
    fn write(&self, offset: u64, data: &[u8]) -> Outcome;
}

/// Why a device cannot be where it was to be.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// no address at all, or some past the last
    #[error("{len} bytes at {base:#x} are no range of addresses")]
    Range {
        /// First address.
        base: u64,
        /// Addresses.
        len: u64,
    },
    /// another device is there
    #[error("{len} bytes at {base:#x} overlap the device at {other_base:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Addresses.
        len: u64,
        /// First address of the device that is there.
        other_base: u64,
    },
}

struct Slot {
    base: u64,
    /// The address after the last.
    end: u64,
    device: Arc<dyn BusDevice>,
}

/// Devices by address.
#[derive(Default)]
pub struct Bus {
    /// Sorted; no two overlap.
    slots: Vec<Slot>,
    unclaimed_reads: AtomicU64,
    unclaimed_writes: AtomicU64,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ranges = self.slots.iter().map(|slot| slot.base..slot.end);
        formatter.debug_list().entries(ranges).finish()
    }
}

impl Bus {
    /// Without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Put a device at `len` addresses from `base`.
    ///
    /// # Errors
    /// These are no addresses, or another device has some of them.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let end = base.checked_add(len).filter(|end| *end > base);
        let end = end.ok_or(BusError::Range { base, len })?;
        // The slots before it begin at or below `base`; the first after it, above.
        let position = self.slots.partition_point(|slot| slot.base <= base);
        let before = position.checked_sub(1).and_then(|at| self.slots.get(at));
        let before = before.filter(|slot| slot.end > base);
        let after = self.slots.get(position).filter(|slot| slot.base < end);
        if let Some(other) = before.or(after) {
            return Err(BusError::Overlap {
                base,
                len,
                other_base: other.base,
            });
        }
        self.slots.insert(position, Slot { base, end, device });
        Ok(())
    }

    /// The device that has all of an access, and how far into it the access is.
    fn find(&self, address: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let position = self.slots.partition_point(|slot| slot.base <= address);
        let slot = self.slots.get(position.checked_sub(1)?)?;
        let end = address.checked_add(len as u64)?;
        (end <= slot.end).then(|| (slot.device.as_ref(), address - slot.base))
    }

    /// A vCPU reads.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0);
        match self.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => {
                self.unclaimed_reads.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// A vCPU writes.
    pub fn write(&self, address: u64, data: &[u8]) -> Outcome {
        if let Some((device, offset)) = self.find(address, data.len()) {
            return device.write(offset, data);
        }
        self.unclaimed_writes.fetch_add(1, Ordering::Relaxed);
        Outcome::Continue
    }

    /// Reads that no device answered.
    pub fn unclaimed_reads(&self) -> u64 {
        self.unclaimed_reads.load(Ordering::Relaxed)
    }

    /// Writes that no device took.
    pub fn unclaimed_writes(&self) -> u64 {
        self.unclaimed_writes.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads as its number, then the offset; asks for a reset when written 9.
    struct Numbered(u8);

    impl BusDevice for Numbered {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data[0] = self.0;
            if let Some(second) = data.get_mut(1) {
                *second = u8::try_from(offset).unwrap();
            }
        }

        fn write(&self, _offset: u64, data: &[u8]) -> Outcome {
            match data {
                [9] => Outcome::Reset,
                _ => Outcome::Continue,
            }
        }
    }

    fn bus(ranges: &[(u64, u64)]) -> Bus {
        let mut bus = Bus::new();
        for (number, (base, len)) in (1..).zip(ranges) {
            bus.insert(*base, *len, Arc::new(Numbered(number))).unwrap();
        }
        bus
    }

    fn read(bus: &Bus, address: u64) -> [u8; 2] {
        let mut data = [0xaa; 2];
        bus.read(address, &mut data);
        data
    }

    #[test]
    fn an_access_reaches_the_device_that_has_it() {
        let bus = bus(&[(0x3f8, 8), (0x60, 5), (0x600, 3), (u64::MAX - 8, 8)]);
        assert_eq!(read(&bus, 0x3f8), [1, 0]);
        assert_eq!(read(&bus, 0x3fe), [1, 6]);
        assert_eq!(read(&bus, 0x60), [2, 0]);
        assert_eq!(read(&bus, 0x601), [3, 1]);
        assert_eq!(read(&bus, u64::MAX - 3), [4, 5]);
        assert_eq!(bus.write(0x3f8, &[9]), Outcome::Reset);
        assert_eq!(bus.write(0x3f8, &[8]), Outcome::Continue);
        assert_eq!((bus.unclaimed_reads(), bus.unclaimed_writes()), (0, 0));
    }

    #[test]
    fn what_nobody_has_reads_as_zeros_and_is_counted() {
        let bus = bus(&[(0x3f8, 8), (0x600, 3)]);
        // Before all, between two, past the end of one, past all, past the last address.
        for address in [0, 0x3f7, 0x3ff, 0x400, 0x602, 0x700, u64::MAX] {
            assert_eq!(read(&bus, address), [0, 0], "{address:#x}");
        }
        assert_eq!(bus.unclaimed_reads(), 7);
        assert_eq!(bus.write(0x700, &[9]), Outcome::Continue);
        assert_eq!(bus.unclaimed_writes(), 1);
        assert_eq!(read(&Bus::new(), 0), [0, 0]);
    }

    #[test]
    fn no_two_devices_have_one_address() {
        let mut bus = bus(&[(0x100, 0x10), (0x200, 0x10)]);
        let mut insert = |base, len| bus.insert(base, len, Arc::new(Numbered(9)));
        for (base, len, other_base) in [
            (0x100, 0x10, 0x100),
            (0x10f, 1, 0x100),
            (0xf0, 0x11, 0x100),
            (0x110, 0xf1, 0x200),
            (0x80, 0x400, 0x100),
        ] {
            let expected = BusError::Overlap {
                base,
                len,
                other_base,
            };
            assert_eq!(insert(base, len), Err(expected));
        }
        insert(0x110, 0xf0).unwrap();
        insert(0xf0, 0x10).unwrap();
    }

    #[test]
    fn ranges_that_are_none_are_refused() {
        let mut bus = Bus::new();
        for (base, len) in [(5, 0), (u64::MAX, 2), (1, u64::MAX)] {
            let inserted = bus.insert(base, len, Arc::new(Numbered(1)));
            assert_eq!(inserted, Err(BusError::Range { base, len }));
        }
    }
}
