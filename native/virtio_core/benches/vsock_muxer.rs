//! Streams of a guest through rings and muxer to real sockets and back, one turn of the I/O thread
//! at a time; beside them the same bytes through a socket pair, which no device can undercut.
//!
//! An iteration of `to_host` and `to_guest` moves [`PACKETS`] packets of [`MAX_MOCK_PAYLOAD`] bytes
//! (criterion prints the throughput), one of `connect` opens and ends one stream of the guest's.

#![allow(missing_docs, reason = "criterion's macros make public functions")]

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rustix::event::{Timespec, epoll};
use virtio_core::mock::mock_ram;
use virtio_core::ring::Ring;
use virtio_core::vsock::exchange::Exchange;
use virtio_core::vsock::mock::{MAX_MOCK_PAYLOAD, MockGuest};
use virtio_core::vsock::muxer::{Dialer, Muxer};
use virtio_core::vsock::packet::{Operation, PacketHeader, SHUTDOWN_BOTH};

/// Packets in an iteration: within the window that either side gives the other.
const PACKETS: u16 = 15;
const BYTES: usize = PACKETS as usize * MAX_MOCK_PAYLOAD;
const QUEUE_SIZE: u16 = 64;
const CID: u64 = 3;
const GUEST_PORT: u32 = 1024;
const HOST_PORT: u32 = 5000;

/// Takes every connection, and gives the other end to the benchmark.
struct Listener(Sender<UnixStream>);

impl Dialer for Listener {
    fn dial(&mut self, _port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        self.0.send(theirs).map_err(io::Error::other)?;
        Ok(ours)
    }
}

/// A guest and the device's side of it.
struct Machine {
    guest: MockGuest,
    rx: Ring,
    tx: Ring,
    exchange: Exchange,
    muxer: Muxer,
    epoll: Arc<OwnedFd>,
    hosts: Receiver<UnixStream>,
}

impl Machine {
    fn new() -> Self {
        let size = usize::try_from(MockGuest::MEMORY_SIZE).expect("a small memory");
        let ram = mock_ram(size);
        let mut guest = MockGuest::new(&ram, 0, QUEUE_SIZE, CID);
        guest.post(QUEUE_SIZE);
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll set"));
        let (sender, hosts) = channel();
        Self {
            rx: guest.rx.ring(true).expect("a ring in memory"),
            tx: guest.tx.ring(true).expect("a ring in memory"),
            guest,
            exchange: Exchange::default(),
            muxer: Muxer::new(CID, Box::new(Listener(sender)), Arc::clone(&epoll)),
            epoll,
            hosts,
        }
    }

    /// A turn of the I/O thread: sockets, then packets both ways.
    fn turn(&mut self) {
        let mut events = Vec::with_capacity(8);
        let no_wait = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let room = rustix::buffer::spare_capacity(&mut events);
        epoll::wait(&self.epoll, room, Some(&no_wait)).expect("an epoll set");
        for event in events {
            self.muxer.on_socket(event.data.u64(), event.flags, true);
        }
        self.exchange
            .run(&mut self.muxer, &mut self.rx, &mut self.tx)
            .expect("sound rings");
    }

    /// What came for the guest: payload bytes, and the operation of the last packet.
    fn take(&mut self) -> (usize, Option<u16>) {
        let packets = self.guest.take();
        self.guest.post(self.guest.rx_free());
        let bytes = packets.iter().map(|(_, payload)| payload.len()).sum();
        (bytes, packets.back().map(|(header, _)| header.op))
    }

    fn send(&mut self, operation: Operation, forwarded: u32, payload: &[u8]) {
        let header = PacketHeader {
            len: u32::try_from(payload.len()).expect("a packet"),
            flags: if operation == Operation::Shutdown {
                SHUTDOWN_BOTH
            } else {
                0
            },
            fwd_cnt: forwarded,
            ..self.guest.header(GUEST_PORT, HOST_PORT, operation)
        };
        self.guest.send(&header, payload);
    }

    fn connect(&mut self) -> UnixStream {
        self.send(Operation::Request, 0, &[]);
        self.turn();
        assert_eq!(self.take().1, Some(Operation::Response as u16));
        self.hosts.try_recv().expect("the muxer dialled")
    }
}

fn vsock_muxer(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("vsock_muxer");
    let payload = vec![7; MAX_MOCK_PAYLOAD];
    let mut received = vec![0; BYTES];

    group.throughput(Throughput::Bytes(BYTES as u64));
    let (mut near, mut far) = UnixStream::pair().expect("a socket pair");
    group.bench_function("socket_pair", |bencher| {
        bencher.iter(|| {
            for _ in 0..PACKETS {
                near.write_all(&payload).expect("room in the socket");
            }
            far.read_exact(&mut received).expect("what was written");
        });
    });

    let mut machine = Machine::new();
    let mut host = machine.connect();
    group.bench_function("to_host", |bencher| {
        bencher.iter(|| {
            for _ in 0..PACKETS {
                machine.send(Operation::ReadWrite, 0, &payload);
            }
            machine.turn();
            host.read_exact(&mut received).expect("what the guest sent");
            // News of credit, now and then.
            machine.take();
        });
    });

    let mut machine = Machine::new();
    let mut host = machine.connect();
    let mut forwarded = 0u32;
    let bytes = vec![7; BYTES];
    group.bench_function("to_guest", |bencher| {
        bencher.iter(|| {
            host.write_all(&bytes).expect("room in the socket");
            let mut left = BYTES;
            while left > 0 {
                machine.turn();
                left -= machine.take().0;
            }
            forwarded = forwarded.wrapping_add(u32::try_from(BYTES).expect("a window"));
            machine.send(Operation::CreditUpdate, forwarded, &[]);
            machine.turn();
        });
    });

    group.throughput(Throughput::Elements(1));
    let mut machine = Machine::new();
    group.bench_function("connect", |bencher| {
        bencher.iter(|| {
            let _host = machine.connect();
            machine.send(Operation::Shutdown, 0, &[]);
            machine.turn();
            assert_eq!(machine.take().1, Some(Operation::Reset as u16));
        });
    });
    group.finish();
}

criterion_group!(benches, vsock_muxer);
criterion_main!(benches);
