//! The whole device in the reactor, driven by the front end of the `vhost` crate and a driver by
//! hand: what a machine monitor and its guest do, in one process.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::event::{Completion, EventQueue};
use crate::reactor::Reactor;
use crate::status::Code;
use crate::vhost_user::VhostUserVsock;
use crate::vhost_user::packet::{HOST_CID, Operation, TYPE_STREAM};

const MEMORY_SIZE: usize = 0x10_0000;
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

/// A driver's side of one queue.
struct DriverQueue {
    table: u64,
    available: u64,
    used: u64,
    posted: u16,
    seen: u16,
    call: EventFd,
    kick: EventFd,
}

/// The machine: monitor and guest.
struct Machine {
    frontend: Frontend,
    memory: GuestMemoryMmap,
    queues: Vec<DriverQueue>,
}

const RX: usize = 0;
const TX: usize = 1;

impl Machine {
    fn connect(served: &Served) -> Self {
        let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(MEMORY_SIZE as u64).unwrap();
        let range = (GuestAddress(0), MEMORY_SIZE, Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let frontend = Frontend::connect(served.directory.0.join("monitor"), 3).unwrap();
        Self {
            frontend,
            memory,
            queues: Vec::new(),
        }
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
        let region = self.memory.iter().next().unwrap();
        let info = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        self.frontend.set_mem_table(&[info]).unwrap();
        for index in 0..2usize {
            let base = 0x1000 + index as u64 * 0x4000;
            let queue = DriverQueue {
                table: base,
                available: base + 0x1000,
                used: base + 0x2000,
                posted: 0,
                seen: 0,
                call: EventFd::new(0).unwrap(),
                kick: EventFd::new(0).unwrap(),
            };
            let config = VringConfigData {
                queue_max_size: QUEUE_SIZE,
                queue_size: QUEUE_SIZE,
                flags: 0,
                desc_table_addr: info.userspace_addr + queue.table,
                used_ring_addr: info.userspace_addr + queue.used,
                avail_ring_addr: info.userspace_addr + queue.available,
                log_addr: None,
            };
            self.frontend.set_vring_num(index, QUEUE_SIZE).unwrap();
            self.frontend.set_vring_base(index, 0).unwrap();
            self.frontend.set_vring_addr(index, &config).unwrap();
            self.frontend.set_vring_call(index, &queue.call).unwrap();
            self.frontend.set_vring_kick(index, &queue.kick).unwrap();
            self.frontend.set_vring_enable(index, true).unwrap();
            self.queues.push(queue);
        }
        for _ in 0..16 {
            self.post(RX, 0x2_0000, 8192, true);
        }
        // Answered only after everything above was handled.
        self.frontend.get_queue_num().unwrap();
    }

    fn post(&mut self, index: usize, base: u64, len: u32, is_writable: bool) {
        let queue = &mut self.queues[index];
        let slot = queue.posted % QUEUE_SIZE;
        let flags = if is_writable {
            u16::try_from(VRING_DESC_F_WRITE).unwrap()
        } else {
            0
        };
        let address = base + u64::from(slot) * 8192;
        let made = RawDescriptor::from(Descriptor::new(address, len, flags, 0));
        self.memory
            .write_obj(made, GuestAddress(queue.table + u64::from(slot) * 16))
            .unwrap();
        self.memory
            .write_obj(
                slot,
                GuestAddress(queue.available + 4 + u64::from(slot) * 2),
            )
            .unwrap();
        queue.posted = queue.posted.wrapping_add(1);
        self.memory
            .write_obj(queue.posted, GuestAddress(queue.available + 2))
            .unwrap();
        queue.kick.write(1).unwrap();
    }

    fn send(&mut self, header: &PacketHeader, payload: &[u8]) {
        let slot = self.queues[TX].posted % QUEUE_SIZE;
        let at = 0x8_0000 + u64::from(slot) * 8192;
        self.memory
            .write_slice(&header.to_bytes(), GuestAddress(at))
            .unwrap();
        self.memory
            .write_slice(payload, GuestAddress(at + 44))
            .unwrap();
        self.post(
            TX,
            0x8_0000,
            44 + u32::try_from(payload.len()).unwrap(),
            false,
        );
    }

    fn receive(&mut self) -> (PacketHeader, Vec<u8>) {
        let queue = &mut self.queues[RX];
        loop {
            let used: u16 = self.memory.read_obj(GuestAddress(queue.used + 2)).unwrap();
            if used != queue.seen {
                break;
            }
            wait_readable(as_fd(&queue.call));
            queue.call.read().unwrap();
        }
        let at = queue.used + 4 + u64::from(queue.seen % QUEUE_SIZE) * 8;
        queue.seen = queue.seen.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        let mut bytes = vec![0; len as usize];
        self.memory
            .read_slice(&mut bytes, GuestAddress(0x2_0000 + u64::from(head) * 8192))
            .unwrap();
        (
            PacketHeader::parse_prefix(&bytes).unwrap(),
            bytes.split_off(44),
        )
    }

    fn answer(&mut self, request: &PacketHeader, operation: Operation, payload: &[u8]) {
        let header = PacketHeader {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: request.dst_port,
            dst_port: request.src_port,
            len: u32::try_from(payload.len()).unwrap(),
            socket_type: TYPE_STREAM,
            op: operation as u16,
            buf_alloc: 65_536,
            ..Default::default()
        };
        self.send(&header, payload);
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
    let (request, _) = machine.receive();
    assert_eq!(
        (request.op, request.dst_port, request.dst_cid),
        (1, 1024, CID)
    );
    machine.answer(&request, Operation::Response, b"");
    let mut line = vec![0; format!("OK {}\n", request.src_port).len()];
    host.read_exact(&mut line).unwrap();
    assert_eq!(line, format!("OK {}\n", request.src_port).as_bytes());
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
fn stopping_a_ring_ends_the_connections() {
    let (served, mut machine) = active();
    let mut host = served.dial();
    let (request, _) = machine.receive();
    machine.answer(&request, Operation::Response, b"");
    host.read_exact(&mut [0; 3]).unwrap();
    assert_eq!(machine.frontend.get_vring_base(RX).unwrap(), 1);
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
    let (served, machine) = active();
    let queue = &machine.queues[TX];
    machine
        .memory
        .write_obj(QUEUE_SIZE + 1, GuestAddress(queue.available + 2))
        .unwrap();
    queue.kick.write(1).unwrap();
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
    let region = machine.memory.iter().next().unwrap();
    let mut info = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
    info.memory_size = region.len() + 0x1000;
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
    assert!(matches!(error, DeviceError::Listen { path, .. } if path == hybrid));
    assert!(!other.exists());
    assert!(hybrid.exists());
}
