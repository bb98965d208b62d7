//! A machine around the device for tests: rings driven by hand, an event loop turned by hand.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use tempfile::TempDir;
use virtio_core::features;
use virtio_core::mock::{MockBuffer, MockDriver, mock_ram};
use virtio_core::ram::GuestRam;
use virtio_core::ring::{Ring, RingState};
use virtio_core::vsock::mock::MockGuest;
use virtio_core::vsock::{EVENT_QUEUE, QUEUE_COUNT};

use super::{Vsock, VsockConfig};
use crate::interrupt::Interrupt;
use crate::virtio::device::{Activation, DeviceError, Queue, VirtioDevice, Watcher};

pub(super) const CID: u64 = 3;
const QUEUE_SIZE: u16 = 128;
const EVENT_RING: u64 = MockGuest::MEMORY_SIZE;
const EVENT_BUFFERS: u64 = EVENT_RING + 0x8000;
const MEMORY_SIZE: u64 = EVENT_RING + 0x1_0000;

/// The device, its driver, and the loop it runs in.
pub(super) struct MockMachine {
    directory: TempDir,
    pub(super) device: Vsock,
    pub(super) guest: MockGuest,
    pub(super) events: MockDriver,
    pub(super) interrupt: Arc<Interrupt>,
    ram: Arc<GuestRam>,
    has_event_idx: bool,
    epoll: Arc<OwnedFd>,
    kicks: Vec<Arc<OwnedFd>>,
}

fn new_eventfd() -> Arc<OwnedFd> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    Arc::new(eventfd(0, flags).unwrap())
}

fn device(directory: &TempDir) -> Vsock {
    let path = directory.path().join("vsock");
    Vsock::new(VsockConfig {
        guest_cid: CID,
        path,
    })
    .unwrap()
}

impl MockMachine {
    /// Not yet activated.
    pub(super) fn new(has_event_idx: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let ram = mock_ram(usize::try_from(MEMORY_SIZE).unwrap());
        let mut machine = Self {
            device: device(&directory),
            directory,
            guest: MockGuest::new(&ram, 0, QUEUE_SIZE, CID),
            events: MockDriver::new(&ram, EVENT_RING, 16),
            interrupt: Arc::new(Interrupt::new(5).unwrap()),
            ram,
            has_event_idx,
            epoll: Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).unwrap()),
            kicks: Vec::new(),
        };
        machine.watch_kicks();
        machine
    }

    /// Activated, with all receive buffers and some for events.
    pub(super) fn active(has_event_idx: bool) -> Self {
        let mut machine = Self::new(has_event_idx);
        machine.boot();
        machine
    }

    fn watcher(&self) -> Watcher {
        Watcher::new(Arc::clone(&self.epoll), 0)
    }

    fn watch_kicks(&mut self) {
        self.kicks = (0..QUEUE_COUNT).map(|_| new_eventfd()).collect();
        for (token, kick) in (0..).zip(&self.kicks) {
            self.watcher()
                .add(kick, token, epoll::EventFlags::IN)
                .unwrap();
        }
    }

    /// The driver lays out its rings anew and activates the device.
    pub(super) fn boot(&mut self) {
        self.guest = MockGuest::new(&self.ram, 0, QUEUE_SIZE, CID);
        self.events = MockDriver::new(&self.ram, EVENT_RING, 16);
        self.activate(self.fresh_states()).unwrap();
        self.guest.post(QUEUE_SIZE);
        for index in 0..8 {
            let buffer = MockBuffer::writable(EVENT_BUFFERS + index * 8, 4);
            self.events.add(&[buffer]);
        }
        self.kick();
    }

    pub(super) fn fresh_states(&self) -> Vec<Option<RingState>> {
        [&self.guest.rx, &self.guest.tx, &self.events]
            .map(|driver| {
                Some(RingState {
                    has_event_idx: self.has_event_idx,
                    ..driver.state()
                })
            })
            .into()
    }

    /// Give the device its queues.
    pub(super) fn activate(&mut self, states: Vec<Option<RingState>>) -> Result<(), DeviceError> {
        let queue = |(index, state): (usize, Option<RingState>)| {
            state.map(|state| Queue {
                index,
                ring: Ring::new(Arc::clone(&self.ram), state).unwrap(),
                kick: Arc::clone(&self.kicks[index]),
                interrupt: Arc::clone(&self.interrupt),
            })
        };
        let activation = Activation {
            ram: Arc::clone(&self.ram),
            features: features::RING,
            queues: states.into_iter().enumerate().map(queue).collect(),
            interrupt: Arc::clone(&self.interrupt),
            watcher: self.watcher(),
        };
        self.device.activate(activation)
    }

    /// The driver rings the doorbells that the device wants to hear.
    pub(super) fn kick(&mut self) {
        let drivers = [&mut self.guest.rx, &mut self.guest.tx, &mut self.events];
        for (driver, kick) in drivers.into_iter().zip(&self.kicks) {
            if driver.needs_kick(self.has_event_idx) {
                rustix::io::write(kick, &1u64.to_ne_bytes()).unwrap();
            }
        }
    }

    /// One turn of the loop; gives how many events there were within this time.
    pub(super) fn turn(&mut self, wait: Duration) -> Result<usize, DeviceError> {
        let timeout = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap(),
            tv_nsec: wait.subsec_nanos().into(),
        };
        let mut events = Vec::with_capacity(16);
        let spare = rustix::buffer::spare_capacity(&mut events);
        epoll::wait(&self.epoll, spare, Some(&timeout)).unwrap();
        for event in &events {
            let token = u32::try_from(event.data.u64()).unwrap();
            if let Some(kick) = self.kicks.get(token as usize) {
                let _cleared = rustix::io::read(kick, &mut [0; 8]);
            }
            self.device.handle(token, event.flags)?;
        }
        Ok(events.len())
    }

    /// Kick where wanted, and turn the loop until nothing is ready.
    pub(super) fn try_settle(&mut self) -> Result<(), DeviceError> {
        self.kick();
        while self.turn(Duration::ZERO)? > 0 {}
        Ok(())
    }

    /// As [`MockMachine::try_settle`], of a driver that keeps the rules.
    pub(super) fn settle(&mut self) {
        self.try_settle().unwrap();
    }

    /// Interrupts since the last time.
    pub(super) fn interrupts(&self) -> u64 {
        let mut counter = [0; 8];
        rustix::io::read(&*self.interrupt, &mut counter).map_or(0, |_| u64::from_ne_bytes(counter))
    }

    /// The driver takes the event and offers its buffer again.
    pub(super) fn take_event(&mut self) -> Option<Vec<u8>> {
        let used = self.events.take_used().pop()?;
        let at = EVENT_BUFFERS + u64::from(used.head) * 8;
        let event = self.events.read(at, used.len as usize);
        self.events.add(&[MockBuffer::writable(at, 4)]);
        Some(event)
    }

    /// Events buffers the device has not got.
    pub(super) fn event_state(&self) -> Option<RingState> {
        self.device.ring_states()[EVENT_QUEUE]
    }

    /// Where hosts connect.
    pub(super) fn path(&self) -> PathBuf {
        self.directory.path().join("vsock")
    }

    /// A host process asks for port 1024 of the guest.
    pub(super) fn dial(&self) -> UnixStream {
        let mut host = UnixStream::connect(self.path()).unwrap();
        host.set_nonblocking(true).unwrap();
        host.write_all(b"CONNECT 1024\n").unwrap();
        host
    }

    /// The paused machine's guest goes on under another process's device, as after a restore.
    pub(super) fn restored(mut self) -> Self {
        let state = self.device.save().unwrap();
        let rings = self.device.ring_states();
        let directory = tempfile::tempdir().unwrap();
        self.device = device(&directory);
        self.directory = directory;
        self.epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).unwrap());
        self.watch_kicks();
        self.device.restore(&state).unwrap();
        self.activate(rings).unwrap();
        self
    }
}
