//! The transport's side of a device, for tests and fuzz targets of devices (feature `mock`).
//!
//! [`MockTransport`] stands for the MMIO transport and the I/O thread: it activates a device with
//! the rings of [`MockDriver`]s, rings doorbells, and calls the device for what became ready.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::epoll::{self, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;
use virtio_core::features;
use virtio_core::mock::MockDriver;
use virtio_core::ram::GuestRam;

use crate::interrupt::Interrupt;
use crate::virtio::device::{Activation, DeviceError, Queue, VirtioDevice, Watcher};

/// Rounds after which a device that always has something to do is left alone.
const MAX_ROUNDS: usize = 10_000;
/// The number this transport's only device is known by in the epoll set.
const SUBSCRIBER: u32 = 7;

/// A transport for one device.
#[derive(Debug)]
pub struct MockTransport {
    ram: Arc<GuestRam>,
    /// The device's line.
    pub interrupt: Arc<Interrupt>,
    epoll: Arc<OwnedFd>,
    kicks: Vec<Arc<OwnedFd>>,
}

#[expect(clippy::missing_panics_doc, reason = "panics are a test's failures")]
impl MockTransport {
    /// For a device with this many queues.
    pub fn new(ram: &Arc<GuestRam>, queue_count: u32) -> Self {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll set");
        let epoll = Arc::new(epoll);
        let watcher = Watcher::new(Arc::clone(&epoll), SUBSCRIBER);
        let kick = |index| {
            let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
            let kick = eventfd(0, flags).expect("an eventfd");
            watcher.add(&kick, index, EventFlags::IN).expect("watch");
            Arc::new(kick)
        };
        Self {
            ram: Arc::clone(ram),
            interrupt: Arc::new(Interrupt::new(None).expect("a page")),
            kicks: (0..queue_count).map(kick).collect(),
            epoll,
        }
    }

    /// What the device gets when a driver with these rings accepts `features`.
    pub fn activation(&self, features: u64, drivers: &[Option<&MockDriver>]) -> Activation {
        let has_event_idx = features & features::EVENT_IDX != 0;
        let queue = |(index, driver): (usize, Option<&MockDriver>)| {
            driver.map(|driver| Queue {
                index,
                ring: driver.ring(has_event_idx).expect("a sound ring"),
                kick: Arc::clone(&self.kicks[index]),
                interrupt: Arc::clone(&self.interrupt),
            })
        };
        Activation {
            ram: Arc::clone(&self.ram),
            features,
            queues: drivers.iter().copied().enumerate().map(queue).collect(),
            interrupt: Arc::clone(&self.interrupt),
            watcher: Watcher::new(Arc::clone(&self.epoll), SUBSCRIBER),
        }
    }

    /// The driver rings a doorbell.
    pub fn kick(&self, index: usize) {
        rustix::io::write(&*self.kicks[index], &1u64.to_ne_bytes()).expect("kick");
    }

    /// Whether a doorbell was rung; it is not any more.
    pub fn is_kicked(&self, index: usize) -> bool {
        rustix::io::read(&*self.kicks[index], &mut [0; 8]).is_ok()
    }

    /// Wait up to `timeout_ms` for something to be ready and call the device for all that is;
    /// gives how often it was called.
    ///
    /// # Errors
    /// What the device says.
    pub fn turn(
        &self,
        device: &mut dyn VirtioDevice,
        timeout_ms: u32,
    ) -> Result<usize, DeviceError> {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(32);
        let timeout = Timespec {
            tv_sec: i64::from(timeout_ms / 1000),
            tv_nsec: i64::from(timeout_ms % 1000) * 1_000_000,
        };
        let buffer = rustix::buffer::spare_capacity(&mut events);
        match epoll::wait(&*self.epoll, buffer, Some(&timeout)) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(0),
            Err(errno) => panic!("epoll_wait: {errno}"),
        }
        for event in &events {
            let data = event.data.u64();
            assert_eq!(data >> 32, u64::from(SUBSCRIBER));
            let token = u32::try_from(data & 0xffff_ffff).expect("32 bits");
            if self.kicks.get(token as usize).is_some() {
                self.is_kicked(token as usize);
            }
            device.handle(token, event.flags)?;
        }
        Ok(events.len())
    }

    /// Call the device until nothing is ready for it.
    ///
    /// # Errors
    /// What the device says.
    pub fn settle(&self, device: &mut dyn VirtioDevice) -> Result<(), DeviceError> {
        for _ in 0..MAX_ROUNDS {
            if self.turn(device, 0)? == 0 {
                return Ok(());
            }
        }
        panic!("the device never comes to rest");
    }
}
