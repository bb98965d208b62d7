//! The balloon's configuration space: the host's target, and how far the driver got.
//!
//! Shared by the device and whoever controls the machine, so that a new target waits for no lock
//! of the device's. Each side writes one of the two numbers.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::interrupt::Interrupt;
use crate::lock::lock;

/// `actual` in the configuration space; `num_pages` is before it.
const ACTUAL_OFFSET: usize = 4;

/// What the control plane sees of a balloon.
#[derive(Debug)]
pub struct BalloonControl {
    target_pages: AtomicU32,
    actual_pages: AtomicU32,
    /// The line of the active device.
    interrupt: Mutex<Option<Arc<Interrupt>>>,
}

impl BalloonControl {
    pub(super) fn new(target_pages: u32) -> Self {
        Self {
            target_pages: AtomicU32::new(target_pages),
            actual_pages: AtomicU32::new(0),
            interrupt: Mutex::new(None),
        }
    }

    /// Ask the guest to give up `pages` of 4 KiB in all. It does so in its own time, or never;
    /// [`BalloonControl::actual_pages`] tells.
    pub fn set_target(&self, pages: u32) {
        // Before the interrupt: its handler reads it.
        self.target_pages.store(pages, Ordering::SeqCst);
        if let Some(interrupt) = &*self.interrupt() {
            interrupt.signal_config();
        }
    }

    /// Pages the guest is to give up.
    pub fn target_pages(&self) -> u32 {
        self.target_pages.load(Ordering::SeqCst)
    }

    /// Pages the guest says it gave up. It may lie; what the host got back is in the metrics.
    pub fn actual_pages(&self) -> u32 {
        self.actual_pages.load(Ordering::SeqCst)
    }

    pub(super) fn set_actual(&self, pages: u32) {
        self.actual_pages.store(pages, Ordering::SeqCst);
    }

    pub(super) fn set_interrupt(&self, interrupt: Option<Arc<Interrupt>>) {
        *self.interrupt() = interrupt;
    }

    fn interrupt(&self) -> MutexGuard<'_, Option<Arc<Interrupt>>> {
        lock(&self.interrupt)
    }

    pub(super) fn read_config(&self, offset: usize, data: &mut [u8]) {
        let words = u64::from(self.target_pages()) | u64::from(self.actual_pages()) << 32;
        let bytes = words.to_le_bytes();
        for (target, source) in data.iter_mut().zip(bytes.iter().skip(offset)) {
            *target = *source;
        }
    }

    pub(super) fn write_config(&self, offset: usize, data: &[u8]) {
        if let (ACTUAL_OFFSET, Ok(bytes)) = (offset, data.try_into()) {
            self.set_actual(u32::from_le_bytes(bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_side_writes_its_number() {
        let control = BalloonControl::new(0x0102);
        control.write_config(4, &[1, 0, 0, 2]);
        let mut data = [0; 10];
        control.read_config(0, &mut data);
        assert_eq!(data, [2, 1, 0, 0, 1, 0, 0, 2, 0, 0]);
        data = [0; 10];
        control.read_config(7, &mut data);
        assert_eq!(data, [2, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        control.read_config(usize::MAX, &mut data);
        // The target is the host's; `actual` is one register.
        control.write_config(0, &[9; 4]);
        control.write_config(4, &[9; 2]);
        control.write_config(5, &[9; 4]);
        control.write_config(usize::MAX, &[9; 4]);
        assert_eq!(
            (control.target_pages(), control.actual_pages()),
            (0x0102, 0x0200_0001)
        );
    }

    #[test]
    fn a_new_target_interrupts_an_active_driver() {
        let control = BalloonControl::new(0);
        control.set_target(5);
        let interrupt = Arc::new(Interrupt::new(None).unwrap());
        control.set_interrupt(Some(Arc::clone(&interrupt)));
        control.set_target(6);
        assert_eq!((control.target_pages(), interrupt.status()), (6, 2));
    }
}
