//! The whole device in the reactor, driven by the front end of the `vhost` crate and a driver by
//! hand: what a machine monitor and its guest do, in one process.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_core::ram::GuestRam;
use virtio_core::vsock::mock::{MockGuest, MockPacket};
use virtio_core::vsock::packet::Operation;
use virtio_core::vsock::{RX_QUEUE, TX_QUEUE};
use vm_memory::{FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::event::{Completion, EventQueue};
use crate::reactor::Reactor;
use crate::status::Code;
use crate::vhost_user::VhostUserVsock;

const QUEUE_SIZE: u16 = 64;
const TOKEN: u64 = 7;
const CID: u64 = 42;
const DEADLINE: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};

fn wait_readable(fd: impl AsFd) {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    assert_eq!(
        poll(&mut fds, Some(&DEADLINE)).unwrap(),
        1,
        "nothing within the deadline"
    );
}

/// A directory of its own, removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("vsock-device-{}-{count}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn is_empty(&self) -> bool {
        std::fs::read_dir(&self.0).unwrap().next().is_none()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _result = std::fs::remove_dir_all(&self.0);
    }
}

/// The device in a reactor.
struct Served {
    directory: Directory,
    queue: Arc<EventQueue>,
    device: VhostUserVsock,
    _reactor: Reactor,
}

impl Served {
    fn new() -> Self {
        let directory = Directory::new();
        let queue = Arc::new(EventQueue::new(1 << 20).unwrap());
        let reactor = Reactor::start(Arc::clone(&queue) as _).unwrap();
        let (socket, hybrid) = (directory.0.join("monitor"), directory.0.join("hybrid"));
        let device = VhostUserVsock::new(&reactor.handle(), &socket, &hybrid, CID, TOKEN).unwrap();
        Self {
            directory,
            queue,
            device,
            _reactor: reactor,
        }
    }

    fn ended(&self) -> Completion {
        wait_readable(&*self.queue);
        let mut completions = self.queue.drain();
        assert_eq!(completions.len(), 1);
        let completion = completions.pop_front().unwrap();
        assert_eq!(completion.token, TOKEN);
        completion
    }

    fn dial(&self) -> UnixStream {
        let mut host = UnixStream::connect(self.directory.0.join("hybrid")).unwrap();
        host.set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        host.write_all(b"CONNECT 1024\n").unwrap();
        host
    }
}

/// How one queue is told of things.
struct Notifications {
    call: EventFd,
    kick: EventFd,
}

impl Notifications {
    fn new() -> Self {
        Self {
            call: EventFd::new(0).unwrap(),
            kick: EventFd::new(0).unwrap(),
        }
    }
}

/// The machine: monitor and guest.
struct Machine {
    frontend: Frontend,
    ram: Arc<GuestRam>,
    guest: MockGuest,
    /// Of the receive and the transmit queue.
    queues: [Notifications; 2],
    received: VecDeque<MockPacket>,
}

impl Machine {
    fn connect(served: &Served) -> Self {
        let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(MockGuest::MEMORY_SIZE).unwrap();
        let size = usize::try_from(MockGuest::MEMORY_SIZE).unwrap();
        let range = (GuestAddress(0), size, Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let ram = GuestRam::new(memory);
        let frontend = Frontend::connect(served.directory.0.join("monitor"), 3).unwrap();
        Self {
            frontend,
            guest: MockGuest::new(&ram, 0, QUEUE_SIZE, CID),
            ram,
            queues: [Notifications::new(), Notifications::new()],
            received: VecDeque::new(),
        }
    }

    fn region(&self) -> VhostUserMemoryRegionInfo {
        let region = self.ram.mappings().iter().next().unwrap();
        VhostUserMemoryRegionInfo::from_guest_region(region).unwrap()
    }

    fn negotiate(&mut self) {
        self.frontend.set_owner().unwrap();
        let features = self.frontend.get_features().unwrap();
        // Notifications by flags keep the mock driver small; QEMU's guest uses EVENT_IDX.
        self.frontend.set_features(features & !(1 << 29)).unwrap();
        let offered = self.frontend.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ;
        assert!(offered.contains(wanted));
        self.frontend.set_protocol_features(wanted).unwrap();
    }

    fn activate(&mut self) {
        let info = self.region();
        self.frontend.set_mem_table(&[info]).unwrap();
        let rings = [self.guest.rx.state(), self.guest.tx.state()];
        for (index, (ring, queue)) in rings.iter().zip(&self.queues).enumerate() {
            let config = VringConfigData {
                queue_max_size: QUEUE_SIZE,
                queue_size: QUEUE_SIZE,
                flags: 0,
                desc_table_addr: info.userspace_addr + ring.descriptors,
                used_ring_addr: info.userspace_addr + ring.used,
                avail_ring_addr: info.userspace_addr + ring.available,
                log_addr: None,
            };
            self.frontend.set_vring_num(index, QUEUE_SIZE).unwrap();
            self.frontend.set_vring_base(index, 0).unwrap();
            self.frontend.set_vring_addr(index, &config).unwrap();
            self.frontend.set_vring_call(index, &queue.call).unwrap();
            self.frontend.set_vring_kick(index, &queue.kick).unwrap();
            self.frontend.set_vring_enable(index, true).unwrap();
        }
        self.guest.post(QUEUE_SIZE);
        self.kick(RX_QUEUE);
        // Answered only after everything above was handled.
        self.frontend.get_queue_num().unwrap();
    }

    fn kick(&self, index: usize) {
        self.queues[index].kick.write(1).unwrap();
    }

    fn receive(&mut self) -> MockPacket {
        loop {
            if let Some(packet) = self.received.pop_front() {
                return packet;
            }
            self.received = self.guest.take();
            if self.received.is_empty() {
                let call = &self.queues[RX_QUEUE].call;
                wait_readable(as_fd(call));
                call.read().unwrap();
            }
        }
    }

    fn answer(&mut self, request: &MockPacket, operation: Operation, payload: &[u8]) {
        self.guest.answer(&request.0, operation, payload);
        self.kick(TX_QUEUE);
    }
}

fn as_fd(eventfd: &EventFd) -> OwnedFd {
    use std::os::fd::{FromRawFd, IntoRawFd};
    let copy = eventfd.try_clone().unwrap().into_raw_fd();
    #[expect(unsafe_code, reason = "EventFd implements no AsFd")]
    // SAFETY: into_raw_fd gave up ownership of this open descriptor.
    unsafe {
        OwnedFd::from_raw_fd(copy)
    }
}

fn active() -> (Served, Machine) {
    let served = Served::new();
    let mut machine = Machine::connect(&served);
    machine.negotiate();
    machine.activate();
    (served, machine)
}

#[test]
fn a_host_and_a_guest_talk_through_shared_memory() {
    let (served, mut machine) = active();
    let mut host = served.dial();
    let request = machine.receive();
    assert_eq!(
        (request.0.op, request.0.dst_port, request.0.dst_cid),
        (1, 1024, CID)
    );
    machine.answer(&request, Operation::Response, b"");
    let mut line = vec![0; format!("OK {}\n", request.0.src_port).len()];
    host.read_exact(&mut line).unwrap();
    assert_eq!(line, format!("OK {}\n", request.0.src_port).as_bytes());
    machine.answer(&request, Operation::ReadWrite, b"hello host");
    let mut hello = [0; 10];
    host.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello host");
    host.write_all(b"hello guest").unwrap();
    assert_eq!(machine.receive().1, b"hello guest");
}

#[test]
fn the_guests_cid_is_in_the_configuration() {
    let served = Served::new();
    let mut machine = Machine::connect(&served);
    machine.negotiate();
    let flags = VhostUserConfigFlags::empty();
    let (_, payload) = machine.frontend.get_config(0, 8, flags, &[0; 8]).unwrap();
    assert_eq!(payload, CID.to_le_bytes());
    let (_, upper) = machine.frontend.get_config(4, 4, flags, &[0; 4]).unwrap();
    assert_eq!(upper, [0; 4]);
}

#[test]
fn without_a_driver_hosts_are_turned_away() {
    let served = Served::new();
    let mut machine = Machine::connect(&served);
    machine.negotiate();
    assert_eq!(served.dial().read(&mut [0]).unwrap(), 0);
}

#[test]
fn memory_that_is_mapped_anew_keeps_the_connections() {
    let (served, mut machine) = active();
    let mut host = served.dial();
    let request = machine.receive();
    let info = machine.region();
    machine.frontend.set_mem_table(&[info]).unwrap();
    machine.answer(&request, Operation::Response, b"");
    machine.answer(&request, Operation::ReadWrite, b"still here");
    let mut text = vec![0; format!("OK {}\nstill here", request.0.src_port).len()];
    host.read_exact(&mut text).unwrap();
    assert!(text.ends_with(b"\nstill here"));
}

#[test]
fn stopping_a_ring_ends_the_connections() {
    let (served, mut machine) = active();
    let mut host = served.dial();
    let request = machine.receive();
    machine.answer(&request, Operation::Response, b"");
    host.read_exact(&mut [0; 3]).unwrap();
    assert_eq!(machine.frontend.get_vring_base(RX_QUEUE).unwrap(), 1);
    let mut rest = Vec::new();
    host.read_to_end(&mut rest).unwrap();
    assert_eq!(served.dial().read(&mut [0]).unwrap(), 0);
}

#[test]
fn the_machines_end_is_reported_and_cleaned_up() {
    let (served, machine) = active();
    let mut host = served.dial();
    drop(machine);
    assert_eq!(served.ended().code, Code::UNAVAILABLE);
    assert_eq!(host.read(&mut [0]).unwrap_or(0), 0);
    assert!(served.directory.is_empty());
}

#[test]
fn a_broken_ring_ends_the_device() {
    let (served, mut machine) = active();
    machine.guest.tx.set_available_index(QUEUE_SIZE + 1);
    machine.kick(TX_QUEUE);
    let ended = served.ended();
    assert_eq!(ended.code, Code::INTERNAL);
    assert!(
        ended.message.contains("transmit queue"),
        "{}",
        ended.message
    );
    assert!(served.directory.is_empty());
}

#[test]
fn a_monitor_that_talks_nonsense_ends_the_device() {
    let served = Served::new();
    let mut monitor = UnixStream::connect(served.directory.0.join("monitor")).unwrap();
    monitor.write_all(&[0xff; 64]).unwrap();
    assert_eq!(served.ended().code, Code::INTERNAL);
}

#[test]
fn rings_outside_of_memory_end_the_device() {
    let served = Served::new();
    let mut machine = Machine::connect(&served);
    machine.negotiate();
    machine.frontend.set_vring_num(0, QUEUE_SIZE).unwrap();
    let config = VringConfigData {
        queue_max_size: QUEUE_SIZE,
        queue_size: QUEUE_SIZE,
        flags: 0,
        desc_table_addr: 0x1000,
        used_ring_addr: 0x2000,
        avail_ring_addr: 0x3000,
        log_addr: None,
    };
    machine.frontend.set_vring_addr(0, &config).unwrap();
    assert_eq!(served.ended().code, Code::INTERNAL);
}

#[test]
fn memory_shorter_than_its_region_ends_the_device() {
    let served = Served::new();
    let mut machine = Machine::connect(&served);
    machine.negotiate();
    let mut info = machine.region();
    info.memory_size += 0x1000;
    machine.frontend.set_mem_table(&[info]).unwrap();
    assert_eq!(served.ended().code, Code::INTERNAL);
}

#[test]
fn closing_unlinks_at_once_and_is_reported_once() {
    let (served, _machine) = active();
    let mut host = served.dial();
    served.device.close();
    assert!(served.directory.is_empty());
    served.device.close();
    assert_eq!(served.ended().code, Code::CANCELLED);
    assert_eq!(host.read(&mut [0]).unwrap_or(0), 0);
    assert!(served.queue.drain().is_empty());
}

#[test]
fn sockets_are_private_and_a_taken_path_is_an_error() {
    let served = Served::new();
    let (monitor, hybrid) = (
        served.directory.0.join("monitor"),
        served.directory.0.join("hybrid"),
    );
    for path in [&monitor, &hybrid] {
        let mode = std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    let other = served.directory.0.join("other");
    let error = Device::bind(&other, &hybrid, CID).unwrap_err();
    assert!(matches!(
        error,
        DeviceError::Hybrid(HybridError::Listen(listen)) if listen.path == hybrid
    ));
    assert!(!other.exists());
    assert!(hybrid.exists());
}
