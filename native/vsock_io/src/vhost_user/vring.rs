//! One ring as the monitor sets it up: its state while negotiated, the ring once its doorbell was
//! handed over, and the kick and call descriptors.
//!
//! ```text
//!   stopped (size, addresses, base) ── kick descriptor ──► started ── GET_VRING_BASE ──► stopped
//! ```
//!
//! Owned by the back end, used on the I/O thread.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Arc;

use thiserror::Error;
use virtio_core::ram::GuestRam;
use virtio_core::ring::{Ring, RingError, RingState};
use vm_memory::{Bytes, GuestAddress};

/// The largest queue this device takes (`QEMU` uses 128).
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// What the monitor said of a ring makes no sense.
#[derive(Debug, Error)]
pub enum VringError {
    /// a size that is none, or too large
    #[error("ring of {0} entries: not a power of two up to {MAX_QUEUE_SIZE}")]
    Size(u16),
    /// the areas are no ring
    #[error("start the ring")]
    Ring(#[source] RingError),
    /// the used index is not in memory
    #[error("read the used index at {address:#x}")]
    UsedIndex {
        /// Guest address of the used ring.
        address: u64,
        /// The cause.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// A ring and its descriptors.
#[derive(Debug, Default)]
pub struct Vring {
    /// What was negotiated; of a started ring its own state is ahead of this.
    state: RingState,
    ring: Option<Ring>,
    /// The driver's doorbell.
    pub kick: Option<File>,
    /// The driver's interrupt.
    pub call: Option<File>,
    /// `SET_VRING_ENABLE` said so, or protocol features are off.
    pub is_enabled: bool,
}

impl Vring {
    /// Set the number of entries.
    ///
    /// # Errors
    /// Not a power of two, or over [`MAX_QUEUE_SIZE`].
    pub fn set_size(&mut self, size: u16) -> Result<(), VringError> {
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(VringError::Size(size));
        }
        self.state.size = size;
        Ok(())
    }

    /// Set the guest addresses of the three areas.
    pub fn set_addresses(&mut self, descriptors: u64, available: u64, used: u64) {
        self.state.descriptors = descriptors;
        self.state.available = available;
        self.state.used = used;
    }

    /// Set where to go on in the available ring.
    pub fn set_base(&mut self, base: u16) {
        self.state.next_available = base;
    }

    /// The next entry of the available ring.
    pub fn base(&self) -> u16 {
        let ring = self.ring.as_ref();
        ring.map_or(self.state, Ring::state).next_available
    }

    /// Use `EVENT_IDX` or not, from the next start on.
    pub fn set_event_idx(&mut self, is_enabled: bool) {
        self.state.has_event_idx = is_enabled;
    }

    /// Start serving. The used ring goes on where it stands.
    ///
    /// # Errors
    /// The areas are no ring in this memory.
    pub fn start(&mut self, ram: &Arc<GuestRam>) -> Result<(), VringError> {
        let address = self.state.used;
        let at = GuestAddress(address.wrapping_add(2));
        let used: u16 = ram
            .mappings()
            .read_obj(at)
            .map_err(|source| VringError::UsedIndex { address, source })?;
        self.state.next_used = u16::from_le(used);
        let ring = Ring::new(Arc::clone(ram), self.state).map_err(VringError::Ring)?;
        self.ring = Some(ring);
        Ok(())
    }

    /// Stop serving; addresses and indices stay.
    pub fn stop(&mut self) {
        self.state.next_available = self.base();
        self.ring = None;
        self.kick = None;
    }

    /// Go on in the memory that replaced the old. False: the ring does not lie in it.
    pub fn set_memory(&mut self, ram: &Arc<GuestRam>) -> bool {
        self.ring
            .as_mut()
            .is_none_or(|ring| ring.set_memory(Arc::clone(ram)).is_ok())
    }

    /// Chains may be taken.
    pub fn is_running(&self) -> bool {
        self.is_enabled && self.ring.is_some()
    }

    /// The ring, while chains may be taken.
    pub fn running(&mut self) -> Option<&mut Ring> {
        self.ring.as_mut().filter(|_| self.is_enabled)
    }

    /// Interrupt the driver, if chains were given back since the last time and it wants to know.
    ///
    /// # Errors
    /// The call descriptor is broken.
    pub fn signal(&mut self) -> io::Result<()> {
        if !self.ring.as_mut().is_some_and(Ring::needs_signal) {
            return Ok(());
        }
        let Some(call) = &mut self.call else {
            return Ok(());
        };
        match call.write(&1u64.to_ne_bytes()) {
            // A full counter is a pending interrupt already.
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    /// Reset the doorbell after it rang.
    pub fn clear_kick(&mut self) {
        if let Some(kick) = &mut self.kick {
            let mut counter = [0; 8];
            // It polled readable and nobody else reads it, so this cannot block; if it fails, the
            // queue is looked at all the same.
            let _cleared = kick.read(&mut counter);
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};
    use virtio_core::chain::Chain;
    use virtio_core::mock::{MockBuffer, MockDriver, mock_ram};

    use super::*;

    const RING: u64 = 0x1000;
    const DATA: u64 = 0x1_0000;

    fn set_up(driver: &MockDriver) -> Vring {
        let mut vring = Vring {
            is_enabled: true,
            ..Vring::default()
        };
        let state = driver.state();
        vring.set_size(state.size).unwrap();
        vring.set_addresses(state.descriptors, state.available, state.used);
        vring
    }

    fn work(vring: &mut Vring, ram: &Arc<GuestRam>) -> usize {
        let ring = vring.running().unwrap();
        let mut chain = Chain::new(ram);
        let mut count = 0;
        while ring.pop(&mut chain).unwrap() {
            ring.complete(chain.head, 0);
            count += 1;
        }
        count
    }

    fn call_descriptors() -> (File, File) {
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        let ours = File::from(fd);
        (ours.try_clone().unwrap(), ours)
    }

    fn count(call: &mut File) -> u64 {
        let mut counter = [0; 8];
        call.read(&mut counter)
            .map_or(0, |_| u64::from_ne_bytes(counter))
    }

    #[test]
    fn a_ring_goes_on_where_it_was_stopped() {
        let ram = mock_ram(0x2_0000);
        let mut driver = MockDriver::new(&ram, RING, 16);
        let mut vring = set_up(&driver);
        assert!(!vring.is_running());
        vring.start(&ram).unwrap();
        driver.add(&[MockBuffer::readable(DATA, 1)]);
        driver.add(&[MockBuffer::readable(DATA, 1)]);
        assert_eq!(work(&mut vring, &ram), 2);
        assert_eq!(driver.take_used().len(), 2);
        vring.stop();
        assert_eq!(vring.base(), 2);
        assert!(vring.running().is_none());

        driver.add(&[MockBuffer::readable(DATA, 1)]);
        vring.start(&ram).unwrap();
        assert_eq!(work(&mut vring, &ram), 1);
        let used = driver.take_used();
        assert_eq!((used.len(), used[0].head), (1, 2));
        vring.stop();

        // Told to look again from the start, with the used ring still in step.
        vring.set_base(1);
        vring.start(&ram).unwrap();
        assert_eq!(work(&mut vring, &ram), 2);
        assert_eq!(driver.take_used().len(), 2);
    }

    #[test]
    fn a_ring_that_is_not_enabled_does_not_run() {
        let ram = mock_ram(0x2_0000);
        let mut vring = set_up(&MockDriver::new(&ram, RING, 16));
        vring.is_enabled = false;
        vring.start(&ram).unwrap();
        assert!(!vring.is_running());
        assert!(vring.running().is_none());
    }

    #[test]
    fn nonsense_is_refused() {
        let ram = mock_ram(0x2_0000);
        let mut vring = set_up(&MockDriver::new(&ram, RING, 16));
        for size in [0, 3, 2048] {
            assert!(matches!(vring.set_size(size), Err(VringError::Size(_))));
        }
        vring.set_addresses(0x1_fff0, 0x1000, 0x2000);
        assert!(matches!(vring.start(&ram), Err(VringError::Ring(_))));
        vring.set_addresses(0x1000, 0x1000, u64::MAX);
        assert!(vring.start(&ram).is_err());
        vring.set_addresses(0x1000, 0x1000, 0x2_0000);
        assert!(matches!(
            vring.start(&ram),
            Err(VringError::UsedIndex { .. })
        ));
        assert!(!vring.is_running());
    }

    #[test]
    fn memory_that_lost_the_ring_is_noticed() {
        let ram = mock_ram(0x2_0000);
        let mut vring = set_up(&MockDriver::new(&ram, RING, 16));
        assert!(vring.set_memory(&mock_ram(0x800)));
        vring.start(&ram).unwrap();
        assert!(vring.set_memory(&mock_ram(0x4000)));
        assert!(!vring.set_memory(&mock_ram(0x800)));
    }

    #[test]
    fn a_batch_is_announced_once() {
        let ram = mock_ram(0x2_0000);
        let mut driver = MockDriver::new(&ram, RING, 16);
        let mut vring = set_up(&driver);
        let (theirs, mut ours) = call_descriptors();
        vring.call = Some(theirs);
        vring.start(&ram).unwrap();
        for _ in 0..4 {
            driver.add(&[MockBuffer::readable(DATA, 1)]);
        }
        assert_eq!(work(&mut vring, &ram), 4);
        vring.signal().unwrap();
        vring.signal().unwrap();
        assert_eq!(count(&mut ours), 1);
    }

    #[test]
    fn with_event_idx_the_driver_is_told_when_it_asked() {
        let ram = mock_ram(0x2_0000);
        let mut driver = MockDriver::new(&ram, RING, 16);
        let mut vring = set_up(&driver);
        vring.set_event_idx(true);
        let (theirs, mut ours) = call_descriptors();
        vring.call = Some(theirs);
        vring.start(&ram).unwrap();
        driver.set_used_event(2);
        for expected in [0, 0, 1, 0] {
            driver.add(&[MockBuffer::readable(DATA, 1)]);
            assert_eq!(work(&mut vring, &ram), 1);
            vring.signal().unwrap();
            assert_eq!(count(&mut ours), expected);
        }
    }
}
