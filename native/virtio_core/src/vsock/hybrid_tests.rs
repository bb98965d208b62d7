//! The device with real socket files, and rings driven by hand.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::event::{PollFd, PollFlags, poll};
use tempfile::TempDir;

use super::*;
use crate::mock::mock_ram;
use crate::vsock::mock::MockGuest;
use crate::vsock::muxer::REQUEST_TIMEOUT;
use crate::vsock::packet::Operation;

const CID: u64 = 3;
const QUEUE_SIZE: u16 = 128;

struct Machine {
    directory: TempDir,
    device: HybridVsock,
    guest: MockGuest,
    rx: Ring,
    tx: Ring,
}

impl Machine {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let device = HybridVsock::bind(&directory.path().join("vsock"), CID).unwrap();
        let ram = mock_ram(usize::try_from(MockGuest::MEMORY_SIZE).unwrap());
        let mut guest = MockGuest::new(&ram, 0, QUEUE_SIZE, CID);
        guest.post(QUEUE_SIZE);
        Self {
            directory,
            device,
            rx: guest.rx.ring(false).unwrap(),
            tx: guest.tx.ring(false).unwrap(),
            guest,
        }
    }

    fn connect(&self) -> UnixStream {
        let host = UnixStream::connect(self.directory.path().join("vsock")).unwrap();
        host.set_nonblocking(true).unwrap();
        host
    }

    fn dial(&self) -> UnixStream {
        let mut host = self.connect();
        host.write_all(b"CONNECT 1024\n").unwrap();
        host
    }

    fn is_readable(&self) -> bool {
        let no_wait = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::new(&self.device, PollFlags::IN)];
        poll(&mut fds, Some(&no_wait)).unwrap() == 1
    }

    /// Turns until nothing is to be done at once.
    fn settle(&mut self, is_guest_ready: bool) {
        loop {
            let mut has_more = self.device.poll(is_guest_ready).unwrap();
            if is_guest_ready {
                has_more |= self.device.exchange(&mut self.rx, &mut self.tx).unwrap();
            }
            let now = Instant::now();
            let is_due = self.device.next_deadline().is_some_and(|due| due <= now);
            if !has_more && !is_due && !self.is_readable() {
                return;
            }
        }
    }
}

fn read(mut socket: &UnixStream) -> Vec<u8> {
    let mut bytes = vec![0; 100];
    let count = socket.read(&mut bytes).unwrap();
    bytes.truncate(count);
    bytes
}

#[test]
fn a_host_reaches_the_guest_and_both_talk() {
    let mut machine = Machine::new();
    assert!(!machine.is_readable());
    let mut host = machine.dial();
    assert!(machine.is_readable());
    machine.settle(true);
    let (request, _) = machine.guest.take().pop_front().unwrap();
    assert_eq!((request.op, request.dst_port), (1, 1024));
    let guest = &mut machine.guest;
    guest.answer(&request, Operation::Response, b"");
    guest.answer(&request, Operation::ReadWrite, b"to the host");
    host.write_all(b"to the guest").unwrap();
    machine.settle(true);
    let expected = format!("OK {}\nto the host", request.src_port);
    assert_eq!(read(&host), expected.as_bytes());
    assert_eq!(machine.guest.take()[0].1, b"to the guest");
    let counters = machine.device.counters();
    assert_eq!(
        (
            counters.host_connections,
            counters.packets_from_guest,
            counters.bytes_from_guest,
            counters.bytes_to_guest
        ),
        (1, 2, 11, 12)
    );
}

#[test]
fn the_guest_reaches_a_listener_beside_the_path() {
    let mut machine = Machine::new();
    let listener = UnixListener::bind(machine.directory.path().join("vsock_1025")).unwrap();
    for port in [1025, 1026] {
        let header = machine.guest.header(50, port, Operation::Request);
        machine.guest.send(&header, b"");
    }
    machine.settle(true);
    let answers: Vec<_> = machine
        .guest
        .take()
        .iter()
        .map(|p| (p.0.src_port, p.0.op))
        .collect();
    assert_eq!(answers, [(1026, 3), (1025, 2)]);
    let (host, _) = listener.accept().unwrap();
    let header = machine.guest.header(50, 1025, Operation::ReadWrite);
    let header = crate::vsock::packet::PacketHeader { len: 5, ..header };
    machine.guest.send(&header, b"hello");
    machine.settle(true);
    assert_eq!(read(&host), b"hello");
    assert_eq!(machine.device.counters().guest_connections, 1);
}

#[test]
fn hosts_are_turned_away_while_there_is_no_guest() {
    let mut machine = Machine::new();
    let host = machine.dial();
    machine.settle(false);
    assert_eq!(read(&host), b"");
    assert_eq!(machine.device.connection_count(), 0);
}

#[test]
fn more_hosts_than_one_poll_accepts_all_come_in() {
    let mut machine = Machine::new();
    let hosts: Vec<_> = (0..ACCEPTS_PER_POLL + 40).map(|_| machine.dial()).collect();
    machine.settle(true);
    assert_eq!(machine.device.connection_count(), hosts.len());
    assert_eq!(machine.guest.take().len(), hosts.len());
}

#[test]
fn a_host_that_says_nothing_is_closed_in_time_and_later_if_postponed() {
    let mut machine = Machine::new();
    let host = machine.connect();
    machine.settle(true);
    let due = machine.device.next_deadline().unwrap();
    assert!(due <= Instant::now() + REQUEST_TIMEOUT);
    let hour = Duration::from_secs(3600);
    machine.device.postpone(hour);
    assert_eq!(machine.device.next_deadline(), Some(due + hour));
    machine.device.muxer.expire(due);
    let waiting = (&host).read(&mut [0]).unwrap_err();
    assert_eq!(waiting.kind(), ErrorKind::WouldBlock);
    machine.device.muxer.expire(due + hour);
    assert_eq!(read(&host), b"");
}

#[test]
fn a_reset_ends_connections_but_not_the_socket() {
    let mut machine = Machine::new();
    let host = machine.dial();
    machine.settle(true);
    machine.device.reset();
    assert_eq!(read(&host), b"");
    let _again = machine.dial();
    machine.settle(true);
    assert_eq!(machine.device.connection_count(), 1);
}

#[test]
fn a_broken_ring_names_its_queue() {
    let mut machine = Machine::new();
    machine.guest.tx.set_available_index(QUEUE_SIZE + 1);
    let result = machine.device.exchange(&mut machine.rx, &mut machine.tx);
    assert_eq!(result.unwrap_err().to_string(), "serve the transmit queue");
}

#[test]
fn a_taken_path_is_an_error() {
    let machine = Machine::new();
    let path = machine.directory.path().join("vsock");
    let error = HybridVsock::bind(&path, CID).unwrap_err();
    assert!(matches!(&error, HybridError::Listen(listen) if listen.path == path));
    let Machine {
        directory, device, ..
    } = machine;
    drop(device);
    assert!(directory.path().read_dir().unwrap().next().is_none());
}
