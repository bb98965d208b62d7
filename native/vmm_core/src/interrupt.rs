//! A device's interrupt line: the status register its driver reads, and the irqfd behind it.
//!
//! The status bit is set before the irqfd is written, or the driver's handler would find nothing
//! to do and the interrupt be lost (virtio 1.2, 4.2.2.5). Lock-free: signalled by the I/O thread,
//! acknowledged by vCPUs, which wait for nobody; the guest reads the status in the device's
//! [`RegisterPage`].
//!
//! An acknowledgement of "a queue was used" alone may be left to the kernel, which does nothing
//! ([`ACKNOWLEDGED_USED`]): the bit then stays set, and all it says is to look at the queues,
//! which is what the interrupt itself means. Nothing is lost by that, and no exit is needed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::register_page::RegisterPage;

/// `VIRTIO_MMIO_INT_VRING`: a queue was used.
const USED: u32 = 1;
/// `VIRTIO_MMIO_INT_CONFIG`: the configuration space changed.
const CONFIG: u32 = 2;
/// What the driver writes to acknowledge nothing but that.
pub(crate) const ACKNOWLEDGED_USED: u32 = USED;
/// `InterruptStatus` and `ConfigGeneration`.
const STATUS_REGISTER: usize = 0x060;
const GENERATION_REGISTER: usize = 0x0fc;

/// One line.
#[derive(Debug)]
pub struct Interrupt {
    page: Arc<RegisterPage>,
    irqfd: OwnedFd,
    /// GSI it is routed to.
    gsi: u32,
    raised: AtomicU64,
}

impl Interrupt {
    /// A line with an eventfd, to be registered as irqfd of `gsi`, and the registers of its device.
    ///
    /// # Errors
    /// As eventfd(2) and mmap(2).
    pub fn new(gsi: u32) -> Result<Self, Errno> {
        Ok(Self {
            page: Arc::new(RegisterPage::new()?),
            irqfd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            gsi,
            raised: AtomicU64::new(0),
        })
    }

    /// Where the guest reads the device's registers.
    pub(crate) fn page(&self) -> &Arc<RegisterPage> {
        &self.page
    }

    fn status_register(&self) -> &AtomicU32 {
        self.page.register(STATUS_REGISTER)
    }

    fn generation_register(&self) -> &AtomicU32 {
        self.page.register(GENERATION_REGISTER)
    }

    /// Tell the driver that a queue was used.
    pub fn signal_used(&self) {
        self.raise(USED);
    }

    /// Tell the driver that the configuration space changed.
    pub fn signal_config(&self) {
        self.generation_register().fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIG);
    }

    fn raise(&self, bit: u32) {
        self.status_register().fetch_or(bit, Ordering::SeqCst);
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
        self.status_register().load(Ordering::SeqCst)
    }

    /// The configuration generation register: another number after each change.
    pub fn config_generation(&self) -> u32 {
        self.generation_register().load(Ordering::SeqCst)
    }

    /// Set the generation, on restore.
    pub fn set_config_generation(&self, generation: u32) {
        self.generation_register()
            .store(generation, Ordering::SeqCst);
    }

    /// The driver acknowledges some bits.
    pub fn acknowledge(&self, bits: u32) {
        self.status_register().fetch_and(!bits, Ordering::SeqCst);
    }

    /// Set the register, on reset and restore; no interrupt is raised.
    pub fn set_status(&self, status: u32) {
        self.status_register().store(status, Ordering::SeqCst);
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
