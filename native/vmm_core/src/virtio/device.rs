//! What a virtio device is to the machine: the trait each implements, and what it is given.
//!
//! ```text
//!            activate                       pause
//!   inactive ────────▶ active ◀─────────▶ paused
//!       ▲                 │      resume       │
//!       └───── reset ─────┴───────────────────┘
//! ```
//!
//! Register accesses and activation come from whichever vCPU made them, [`VirtioDevice::handle`]
//! from the I/O thread, `pause` to `restore` from the I/O thread too; the transport holds a lock
//! around each call, so a device sees one at a time. None of them may block or panic: what takes
//! long is started, and its end watched through the [`Watcher`].

use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll;
use rustix::io::Errno;
use thiserror::Error;
use virtio_core::ram::GuestRam;
use virtio_core::ring::{Ring, RingError, RingState};

use crate::interrupt::Interrupt;

/// What [`Watcher`] tokens devices may use: from here up to `u32::MAX`. Below are queue kicks.
pub const FIRST_DEVICE_TOKEN: u32 = 64;

/// The kinds of device there are (virtio 1.2, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceKind {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Entropy source.
    Rng = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Socket device.
    Vsock = 19,
    /// File system.
    Fs = 26,
}

impl DeviceKind {
    /// The kind's name in errors, events and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Block => "block",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
            Self::Vsock => "vsock",
            Self::Fs => "fs",
        }
    }
}

/// Why a device could not go on. The guest sees `DEVICE_NEEDS_RESET`; the machine goes on.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// the driver broke the rules of a ring
    #[error("queue {index}")]
    Ring {
        /// Which queue.
        index: usize,
        /// The cause.
        #[source]
        source: RingError,
    },
    /// the driver activated the device without a queue it needs
    #[error("queue {index} is not ready")]
    QueueMissing {
        /// Which queue.
        index: usize,
    },
    /// a system call that should not fail did
    #[error("{operation}")]
    System {
        /// What was attempted.
        operation: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// a snapshot's device is another than this one, or says what cannot be
    #[error("restore {kind}: {reason}")]
    State {
        /// The device.
        kind: &'static str,
        /// What does not fit.
        reason: String,
    },
}

impl DeviceError {
    /// For `map_err` on a rustix call.
    pub fn system(operation: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::System {
            operation,
            source: errno.into(),
        }
    }

    /// For `map_err` on ring operations of queue `index`.
    pub fn ring(index: usize) -> impl Fn(RingError) -> Self {
        move |source| Self::Ring { index, source }
    }
}

/// One queue of an active device.
#[derive(Debug)]
pub struct Queue {
    /// Its number among the device's queues.
    pub index: usize,
    /// The ring.
    pub ring: Ring,
    /// The driver's doorbell; writing 1 to it makes [`VirtioDevice::handle`] be called again.
    pub kick: Arc<OwnedFd>,
    /// How the driver is told.
    pub interrupt: Arc<Interrupt>,
}

impl Queue {
    /// Interrupt the driver if it wants to know of what was completed since the last call.
    pub fn signal(&mut self) {
        if self.ring.needs_signal() {
            self.interrupt.signal_used();
        }
    }

    /// Be called again soon: used at the end of a bounded turn that left work.
    pub fn kick_self(&self) {
        // A full counter is a kick already.
        let _written = rustix::io::write(&*self.kick, &1u64.to_ne_bytes());
    }
}

/// What a device gets when its driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// The guest's memory.
    pub ram: Arc<GuestRam>,
    /// Accepted by the driver, a subset of what was offered.
    pub features: u64,
    /// One per [`VirtioDevice::queue_sizes`] entry; `None` where the driver set none up.
    pub queues: Vec<Option<Queue>>,
    /// For changes of the configuration space; queues have it too.
    pub interrupt: Arc<Interrupt>,
    /// Watches descriptors on the I/O thread. Kicks are watched already.
    pub watcher: Watcher,
}

impl Activation {
    /// Take queue `index`, which the device cannot do without.
    ///
    /// # Errors
    /// The driver did not set it up.
    pub fn take_queue(&mut self, index: usize) -> Result<Queue, DeviceError> {
        let queue = self.queues.get_mut(index).and_then(Option::take);
        queue.ok_or(DeviceError::QueueMissing { index })
    }
}

/// A device's share of the I/O thread's epoll set: tokens come back through `handle`.
#[derive(Clone, Debug)]
pub struct Watcher {
    epoll: Arc<OwnedFd>,
    /// Upper half of the epoll data: which device.
    subscriber: u32,
}

impl Watcher {
    /// For the subscriber with this number.
    pub fn new(epoll: Arc<OwnedFd>, subscriber: u32) -> Self {
        Self { epoll, subscriber }
    }

    fn data(&self, token: u32) -> epoll::EventData {
        epoll::EventData::new_u64(u64::from(self.subscriber) << 32 | u64::from(token))
    }

    /// Have `handle(token)` called when `fd` is ready. Tokens may be used for several descriptors.
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub fn add(&self, fd: impl AsFd, token: u32, interest: epoll::EventFlags) -> Result<(), Errno> {
        epoll::add(&self.epoll, fd.as_fd(), self.data(token), interest)
    }

    /// Change what a descriptor is watched for.
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub fn modify(
        &self,
        fd: impl AsFd,
        token: u32,
        interest: epoll::EventFlags,
    ) -> Result<(), Errno> {
        epoll::modify(&self.epoll, fd.as_fd(), self.data(token), interest)
    }

    /// Stop watching. An event seen before may still be delivered: devices ignore tokens that
    /// mean nothing any more.
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub fn remove(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        epoll::delete(&self.epoll, fd)
    }
}

/// A virtio device.
pub trait VirtioDevice: Any + Send {
    /// What it is.
    fn kind(&self) -> DeviceKind;

    /// Which of its kind: a disk's or folder's name, for errors and metrics.
    fn name(&self) -> &str;

    /// Features offered, `virtio_core::features::RING` among them.
    fn features(&self) -> u64;

    /// The largest size of each queue, powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Read the configuration space; bytes past its end stay 0 (`data` arrives zeroed).
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// Write the configuration space. Most devices have nothing to write there.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// The driver is ready: start serving.
    ///
    /// # Errors
    /// A queue is missing or a system call failed; the device stays inactive.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// Queue `token` was kicked (each kick is told once, nothing is to be read), or a descriptor
    /// watched with `token` is ready. May come when nothing is to be done, and when inactive. Bounded: after
    /// some hundred requests leave the rest for another call (`Queue::kick_self`).
    ///
    /// # Errors
    /// The device cannot go on; the transport resets it and tells the driver.
    fn handle(&mut self, token: u32, readiness: epoll::EventFlags) -> Result<(), DeviceError>;

    /// Stop using guest memory, finish what is under way (this may wait for the disk), and drop
    /// the rings and watches: back to before `activate`. Idempotent.
    fn reset(&mut self);

    /// Finish what is under way; nothing touches guest memory until `resume`. `handle` is not
    /// called meanwhile. Only when active.
    ///
    /// # Errors
    /// A request under way did not end.
    fn pause(&mut self) -> Result<(), DeviceError>;

    /// Go on: look at the queues even without a kick.
    fn resume(&mut self);

    /// Rings as they stand, in the order of the queues. While paused.
    fn ring_states(&self) -> Vec<Option<RingState>>;

    /// What else a snapshot keeps, as [`serde`] data of the device's `state.rs`, encoded with
    /// postcard. While paused.
    ///
    /// # Errors
    /// The device cannot be kept as it is now; the text says why.
    fn save(&self) -> Result<Vec<u8>, DeviceError>;

    /// Take over what [`VirtioDevice::save`] gave. Called on a fresh device: before `activate`
    /// with the saved rings if it was active.
    ///
    /// # Errors
    /// It is of another device or version, or says what cannot be.
    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError>;

    /// Counters: names in words separated by `_`, values that only grow unless the name says
    /// otherwise.
    fn metrics(&self) -> Vec<(&'static str, u64)>;
}
