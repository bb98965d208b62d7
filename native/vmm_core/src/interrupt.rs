//! A device's interrupt: the status register its driver reads, and the line behind it.
//!
//! The status bit is set before the line is raised, or the driver's handler would find nothing
//! to do and the interrupt be lost (virtio 1.2, 4.2.2.5). Signalled by the I/O thread, acknowledged
//! by vCPUs, which wait for nobody; the guest reads the status in the device's [`RegisterPage`].
//!
//! An acknowledgement of "a queue was used" alone may be left to the kernel, which does nothing
//! ([`ACKNOWLEDGED_USED`]): the bit then stays set, and all it says is to look at the queues,
//! which is what the interrupt itself means. Nothing is lost by that, and no exit is needed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::io::Errno;

use crate::kvm::IrqLine;
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

/// One device's.
#[derive(Debug)]
pub struct Interrupt {
    page: Arc<RegisterPage>,
    line: Option<IrqLine>,
    raised: AtomicU64,
}

impl Interrupt {
    /// With the registers of its device. Without a line interrupts are counted and nobody gets
    /// them, which is enough to test a device.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn new(line: Option<IrqLine>) -> Result<Self, Errno> {
        Ok(Self {
            page: Arc::new(RegisterPage::new()?),
            line,
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
        if let Some(line) = &self.line {
            line.pulse();
        }
    }

    /// Interrupts raised so far.
    pub fn raised(&self) -> u64 {
        self.raised.load(Ordering::Relaxed)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_stay_until_each_is_acknowledged() {
        let interrupt = Interrupt::new(None).unwrap();
        interrupt.signal_used();
        interrupt.signal_config();
        assert_eq!(interrupt.status(), 3);
        interrupt.acknowledge(1);
        assert_eq!(interrupt.status(), 2);
        assert_eq!(interrupt.raised(), 2);
    }
}
