//! A machine around the device for tests: a guest by hand, and its transport.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use tempfile::TempDir;
use virtio_core::features;
use virtio_core::mock::{MockBuffer, MockDriver, mock_ram};
use virtio_core::ram::GuestRam;
use virtio_core::ring::{Ring, RingState};
use virtio_core::vsock::EVENT_QUEUE;
use virtio_core::vsock::mock::MockGuest;

use super::{Vsock, VsockConfig};
use crate::virtio::device::{DeviceError, VirtioDevice};
use crate::virtio::mock::MockTransport;

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
    pub(super) transport: MockTransport,
    ram: Arc<GuestRam>,
    has_event_idx: bool,
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
        Self {
            device: device(&directory),
            directory,
            guest: MockGuest::new(&ram, 0, QUEUE_SIZE, CID),
            events: MockDriver::new(&ram, EVENT_RING, 16),
            transport: MockTransport::new(&ram, 3),
            ram,
            has_event_idx,
        }
    }

    /// Activated, with all receive buffers and some for events.
    pub(super) fn active(has_event_idx: bool) -> Self {
        let mut machine = Self::new(has_event_idx);
        machine.boot();
        machine
    }

    /// The driver lays out its rings anew and activates the device.
    pub(super) fn boot(&mut self) {
        self.guest = MockGuest::new(&self.ram, 0, QUEUE_SIZE, CID);
        self.events = MockDriver::new(&self.ram, EVENT_RING, 16);
        self.activate(true).unwrap();
        self.guest.post(QUEUE_SIZE);
        for index in 0..8 {
            let buffer = MockBuffer::writable(EVENT_BUFFERS + index * 8, 4);
            self.events.add(&[buffer]);
        }
        self.kick();
    }

    fn features(&self) -> u64 {
        let event_idx = if self.has_event_idx {
            features::EVENT_IDX
        } else {
            0
        };
        features::VERSION_1 | event_idx
    }

    /// The driver is ready, with an event queue or without.
    pub(super) fn activate(&mut self, has_events: bool) -> Result<(), DeviceError> {
        let events = has_events.then_some(&self.events);
        let drivers = [Some(&self.guest.rx), Some(&self.guest.tx), events];
        let activation = self.transport.activation(self.features(), &drivers);
        self.device.activate(activation)
    }

    /// The driver rings the doorbells that the device wants to hear.
    pub(super) fn kick(&mut self) {
        let drivers = [&mut self.guest.rx, &mut self.guest.tx, &mut self.events];
        for (index, driver) in drivers.into_iter().enumerate() {
            if driver.needs_kick(self.has_event_idx) {
                self.transport.kick(index);
            }
        }
    }

    /// Wait up to this long, and have the device do what became ready; gives how much that was.
    pub(super) fn turn(&mut self, timeout_ms: u32) -> usize {
        self.transport.turn(&mut self.device, timeout_ms).unwrap()
    }

    /// Kick where wanted, and call the device until nothing is ready.
    pub(super) fn try_settle(&mut self) -> Result<(), DeviceError> {
        self.kick();
        self.transport.settle(&mut self.device)
    }

    /// As [`MockMachine::try_settle`], of a driver that keeps the rules.
    pub(super) fn settle(&mut self) {
        self.try_settle().unwrap();
    }

    /// The driver takes the event and offers its buffer again.
    pub(super) fn take_event(&mut self) -> Option<Vec<u8>> {
        let used = self.events.take_used().pop()?;
        let at = EVENT_BUFFERS + u64::from(used.head) * 8;
        let event = self.events.read(at, used.len as usize);
        self.events.add(&[MockBuffer::writable(at, 4)]);
        Some(event)
    }

    /// How far the event queue was worked through.
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
        self.transport = MockTransport::new(&self.ram, 3);
        self.device.restore(&state).unwrap();
        let drivers = [
            Some(&self.guest.rx),
            Some(&self.guest.tx),
            Some(&self.events),
        ];
        let mut activation = self.transport.activation(self.features(), &drivers);
        for (queue, state) in activation.queues.iter_mut().zip(rings) {
            match (queue.as_mut(), state) {
                (Some(queue), Some(state)) => {
                    queue.ring = Ring::new(Arc::clone(&self.ram), state).unwrap();
                }
                _ => *queue = None,
            }
        }
        self.device.activate(activation).unwrap();
        self
    }
}
