//! A device's interrupt line: the status register its driver reads, and the irqfd behind it.
//!
//! The status bit is set before the irqfd is written, or the driver's handler would find nothing
//! to do and the interrupt be lost (virtio 1.2, 4.2.2.5). Lock-free: signalled by the I/O thread,
//! read and acknowledged by vCPUs, which wait for nobody.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

/// `VIRTIO_MMIO_INT_VRING`: a queue was used.
const USED: u32 = 1;
/// `VIRTIO_MMIO_INT_CONFIG`: the configuration space changed.
const CONFIG: u32 = 2;

/// One line.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    irqfd: OwnedFd,
    /// GSI it is routed to.
    gsi: u32,
    raised: AtomicU64,
    config_generation: AtomicU32,
}

impl Interrupt {
    /// A line with an eventfd, to be registered as irqfd of `gsi`.
    ///
    /// # Errors
    /// As eventfd(2).
    pub fn new(gsi: u32) -> Result<Self, Errno> {
        Ok(Self {
            status: AtomicU32::new(0),
            irqfd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            gsi,
            raised: AtomicU64::new(0),
            config_generation: AtomicU32::new(0),
        })
    }

    /// Tell the driver that a queue was used.
    pub fn signal_used(&self) {
        self.raise(USED);
    }

    /// Tell the driver that the configuration space changed.
    pub fn signal_config(&self) {
        self.config_generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIG);
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.raised.fetch_add(1, Ordering::Relaxed);
        // EAGAIN would be a counter at its maximum: an interrupt pending anyway.
        while rustix::io::write(&self.irqfd, &1u64.to_ne_bytes()) == Err(Errno::INTR) {}
    }

    /// Interrupts raised so far.
    pub fn raised(&self) -> u64 {
        self.raised.load(Ordering::Relaxed)
    }

    /// The line's GSI.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// The interrupt status register.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The configuration generation register: another number after each change.
    pub fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::SeqCst)
    }

    /// Set the generation, on restore.
    pub fn set_config_generation(&self, generation: u32) {
        self.config_generation.store(generation, Ordering::SeqCst);
    }

    /// The driver acknowledges some bits.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Set the register, on reset and restore; no interrupt is raised.
    pub fn set_status(&self, status: u32) {
        self.status.store(status, Ordering::SeqCst);
    }
}

impl AsFd for Interrupt {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.irqfd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_stay_until_each_is_acknowledged() {
        let interrupt = Interrupt::new(5).unwrap();
        interrupt.signal_used();
        interrupt.signal_config();
        assert_eq!(interrupt.status(), 3);
        interrupt.acknowledge(1);
        assert_eq!(interrupt.status(), 2);
        let mut counter = [0; 8];
        rustix::io::read(&interrupt, &mut counter).unwrap();
        assert_eq!(u64::from_ne_bytes(counter), 2);
    }
}
