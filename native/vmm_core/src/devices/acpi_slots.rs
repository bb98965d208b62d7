//! Which devices of the machine the guest is to know of: ACPI hot-plug of virtio-mmio devices.
//!
//! ```text
//!   show ─▶ bit set ─▶ interrupt ─▶ guest: _EVT ─▶ Notify(slots, bus check) ─▶ _STA reads the bit
//! ```
//!
//! A machine has all its devices from the start; one that is hidden costs its guest nothing until
//! it is shown, and then stays: Linux does not give a platform device up. The register is four
//! byte-wide ports, a bit for each device, in the order of the machine's devices; the AML beside
//! it is written by `arch`. Bits are set by whoever shows a device and read by vCPUs, without a
//! lock. Generic event device: ACPI 6.5, 5.6.9.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::bus::{BusDevice, Outcome};

/// Ports it takes.
pub const PORT_COUNT: u64 = 4;

/// The register, and the interrupt of its changes.
#[derive(Debug)]
pub struct AcpiSlots {
    shown: AtomicU32,
    irqfd: Arc<OwnedFd>,
}

impl AcpiSlots {
    /// With the devices of these bits shown.
    pub fn new(shown: u32, irqfd: Arc<OwnedFd>) -> Self {
        Self {
            shown: AtomicU32::new(shown),
            irqfd,
        }
    }

    /// The bits of the devices shown.
    pub fn shown(&self) -> u32 {
        self.shown.load(Ordering::SeqCst)
    }

    /// Let the guest know of device `number`; again: nothing.
    pub fn show(&self, number: u32) {
        let Some(bit) = 1u32.checked_shl(number) else {
            return;
        };
        if self.shown.fetch_or(bit, Ordering::SeqCst) & bit == 0 {
            // After the bit: the guest looks when it is interrupted. A full counter is one already.
            let _written = rustix::io::write(&*self.irqfd, &1u64.to_ne_bytes());
        }
    }
}

impl BusDevice for AcpiSlots {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.shown().to_le_bytes();
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let there = bytes.get(offset..).unwrap_or(&[]);
        for (target, source) in data.iter_mut().zip(there) {
            *target = *source;
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> Outcome {
        Outcome::Continue
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn a_device_is_shown_once_and_told_of_once() {
        let irqfd = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let slots = AcpiSlots::new(0b11, Arc::clone(&irqfd));
        slots.show(17);
        slots.show(17);
        slots.show(0);
        slots.show(32);
        let mut count = [0; 8];
        rustix::io::read(&*irqfd, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1);
        let mut bytes = [0; 4];
        slots.read(0, &mut bytes);
        assert_eq!(bytes, [3, 0, 2, 0]);
        let mut byte = [0];
        slots.read(2, &mut byte);
        assert_eq!(byte, [2]);
        assert_eq!(slots.write(0, &[0; 4]), Outcome::Continue);
        assert_eq!(slots.shown(), 1 << 17 | 0b11);
    }
}
