//! The muxer between a hand-driven guest and real sockets.

use std::io::{Read, Write};
use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::buffers::GuestBuffers;
use crate::mock::{MockBuffer, MockDriver, mock_ram};
use crate::ram::GuestRam;
use crate::ring::Ring;
use crate::vsock::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::vsock::receive::{ChainPool, RxRing};

const CID: u64 = 3;
const QUEUE_SIZE: u16 = 64;
const RING: u64 = 0x1000;
const PAYLOAD: u64 = 0x1_0000;
const BUFFERS: u64 = 0x10_0000;
const BUFFER_LEN: u32 = 44 + 4096;

type Dialled = Arc<Mutex<Vec<UnixStream>>>;

/// Somebody listens on every even port.
struct EvenDialer(Dialled);

impl Dialer for EvenDialer {
    fn dial(&mut self, port: u32) -> io::Result<UnixStream> {
        if port % 2 == 1 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = pair();
        self.0.lock().unwrap().push(theirs);
        Ok(ours)
    }
}

fn pair() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    (ours, theirs)
}

struct Guest {
    ram: Arc<GuestRam>,
    driver: MockDriver,
    rx: Ring,
    pool: ChainPool,
    free_buffers: u16,
    epoll: Arc<OwnedFd>,
    muxer: Muxer,
    dialled: Dialled,
}

fn buffer_address(head: u32) -> u64 {
    BUFFERS + u64::from(head) * 0x2000
}

impl Guest {
    fn new() -> Self {
        let ram = mock_ram(0x20_0000);
        let driver = MockDriver::new(&ram, RING, QUEUE_SIZE);
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).unwrap());
        let dialled = Dialled::default();
        let muxer = Muxer::new(
            CID,
            Box::new(EvenDialer(Arc::clone(&dialled))),
            Arc::clone(&epoll),
        );
        Self {
            rx: driver.ring(false).unwrap(),
            ram,
            driver,
            pool: ChainPool::default(),
            free_buffers: QUEUE_SIZE,
            epoll,
            muxer,
            dialled,
        }
    }

    /// Make `count` more receive buffers available.
    fn post(&mut self, count: u16) {
        for _ in 0..count {
            let address = buffer_address(u32::from(self.driver.next_head()));
            self.driver
                .add(&[MockBuffer::writable(address, BUFFER_LEN)]);
            self.free_buffers -= 1;
        }
    }

    fn free_buffers(&self) -> u16 {
        self.free_buffers
    }

    /// Let the muxer work, with the buffers posted so far; gives what it put there.
    fn turn(&mut self) -> Vec<(PacketHeader, Vec<u8>)> {
        let mut events = Vec::with_capacity(2 * MAX_CONNECTIONS);
        let no_wait = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut events),
            Some(&no_wait),
        )
        .unwrap();
        for event in events {
            self.muxer.on_socket(event.data.u64(), event.flags, true);
        }
        self.muxer
            .transmit(&mut RxRing::new(&mut self.rx, &mut self.pool, 1000))
            .unwrap();
        let mut packets = Vec::new();
        for used in self.driver.take_used() {
            let mut bytes = self
                .driver
                .read(buffer_address(used.head), used.len as usize);
            let header = PacketHeader::parse_prefix(&bytes).unwrap();
            assert_eq!(
                (header.src_cid, header.len as usize),
                (HOST_CID, bytes.len() - 44)
            );
            packets.push((header, bytes.split_off(44)));
            self.free_buffers += 1;
        }
        packets
    }

    /// As many turns as it takes until nothing more comes.
    fn receive(&mut self) -> Vec<(PacketHeader, Vec<u8>)> {
        let mut all = Vec::new();
        loop {
            self.post(self.free_buffers());
            let packets = self.turn();
            if packets.is_empty() {
                return all;
            }
            all.extend(packets);
        }
    }

    fn send_raw(&mut self, header: &PacketHeader, payload: &[u8]) {
        self.driver.write(PAYLOAD, payload);
        let mut buffers = GuestBuffers::new(Arc::clone(&self.ram));
        assert!(buffers.push(PAYLOAD, payload.len()));
        self.muxer.receive(header, &buffers);
    }

    fn send(&mut self, ports: PortPair, operation: Operation, flags: u32, payload: &[u8]) {
        let len = u32::try_from(payload.len()).unwrap();
        let header = PacketHeader {
            len,
            flags,
            ..packet(ports, operation)
        };
        self.send_raw(&header, payload);
    }

    /// A connection from the host to guest port 1024, accepted.
    fn established(&mut self) -> (PortPair, UnixStream) {
        let (ports, host) = self.requested();
        self.send(ports, Operation::Response, 0, b"");
        assert_eq!(read_now(&host), format!("OK {}\n", ports.host).as_bytes());
        (ports, host)
    }

    fn requested(&mut self) -> (PortPair, UnixStream) {
        let (ours, mut theirs) = pair();
        self.muxer.accept(ours);
        theirs.write_all(b"CONNECT 1024\n").unwrap();
        let packets = self.receive();
        let [(header, _)] = packets.as_slice() else {
            panic!("{packets:?}")
        };
        assert_eq!(
            (header.op, header.dst_port, header.dst_cid),
            (Operation::Request as u16, 1024, CID)
        );
        (
            PortPair {
                host: header.src_port,
                guest: 1024,
            },
            theirs,
        )
    }
}

fn packet(ports: PortPair, operation: Operation) -> PacketHeader {
    PacketHeader {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: ports.guest,
        dst_port: ports.host,
        socket_type: TYPE_STREAM,
        op: operation as u16,
        buf_alloc: 65_536,
        ..Default::default()
    }
}

fn read_now(mut socket: &UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut part = vec![0; 65_536];
    while let Ok(count) = socket.read(&mut part) {
        if count == 0 {
            break;
        }
        all.extend_from_slice(&part[..count]);
    }
    all
}

fn is_at_end(mut socket: &UnixStream) -> bool {
    matches!(socket.read(&mut [0]), Ok(0))
}

fn operations(packets: &[(PacketHeader, Vec<u8>)]) -> Vec<Operation> {
    packets
        .iter()
        .map(|(header, _)| Operation::try_from(header.op).unwrap())
        .collect()
}

const PORTS: PortPair = PortPair {
    host: 2000,
    guest: 50,
};

#[test]
fn data_flows_both_ways_after_the_handshake() {
    let mut guest = Guest::new();
    let (ports, mut host) = guest.established();
    guest.send(ports, Operation::ReadWrite, 0, b"to the host");
    assert_eq!(read_now(&host), b"to the host");
    host.write_all(b"to the guest").unwrap();
    assert_eq!(guest.receive()[0].1, b"to the guest");
}

#[test]
fn bytes_after_the_connect_line_wait_for_the_guest() {
    let mut guest = Guest::new();
    let (ports, mut host) = guest.requested();
    host.write_all(b"early").unwrap();
    assert!(guest.receive().is_empty());
    guest.send(ports, Operation::Response, 0, b"");
    assert_eq!(guest.receive()[0].1, b"early");
}

#[test]
fn a_refused_connection_closes_without_text() {
    let mut guest = Guest::new();
    let (ports, host) = guest.requested();
    guest.send(ports, Operation::Reset, 0, b"");
    assert!(is_at_end(&host));
    assert!(guest.receive().is_empty());
    assert_eq!(guest.muxer.connection_count(), 0);
}

#[test]
fn an_unanswered_request_times_out_with_a_reset() {
    let mut guest = Guest::new();
    let (_, host) = guest.requested();
    guest.muxer.expire(Instant::now() + REQUEST_TIMEOUT);
    assert!(is_at_end(&host));
    assert_eq!(operations(&guest.receive()), [Operation::Reset]);
    assert_eq!(guest.muxer.counters().timeouts, 1);
}

#[test]
fn an_answered_request_does_not_time_out() {
    let mut guest = Guest::new();
    let (_, host) = guest.established();
    guest.muxer.expire(Instant::now() + REQUEST_TIMEOUT);
    assert!(!is_at_end(&host));
    assert_eq!(guest.muxer.next_deadline(), None);
}

#[test]
fn a_silent_or_nonsensical_host_is_closed() {
    let mut guest = Guest::new();
    let (ours, silent) = pair();
    guest.muxer.accept(ours);
    let (ours, mut nonsense) = pair();
    guest.muxer.accept(ours);
    nonsense.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    assert!(guest.receive().is_empty());
    // Closed with its text unread, which a Unix socket tells as a reset.
    let ended = nonsense.read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(ended, Err(io::ErrorKind::ConnectionReset));
    guest.muxer.expire(Instant::now() + REQUEST_TIMEOUT);
    assert!(is_at_end(&silent));
    assert_eq!(guest.muxer.connection_count(), 0);
}

#[test]
fn a_host_that_gives_up_before_the_answer_resets_the_request() {
    let mut guest = Guest::new();
    let (_, host) = guest.requested();
    drop(host);
    assert_eq!(operations(&guest.receive()), [Operation::Reset]);
}

#[test]
fn the_guest_reaches_listeners_and_is_refused_elsewhere() {
    let mut guest = Guest::new();
    guest.send(PORTS, Operation::Request, 0, b"");
    guest.send(
        PortPair {
            host: 2001,
            guest: 50,
        },
        Operation::Request,
        0,
        b"",
    );
    let answers = guest.receive();
    assert_eq!(
        operations(&answers),
        [Operation::Reset, Operation::Response]
    );
    assert_eq!((answers[0].0.src_port, answers[1].0.src_port), (2001, 2000));
    guest.send(PORTS, Operation::ReadWrite, 0, b"hello");
    let host = guest.dialled.lock().unwrap().pop().unwrap();
    assert_eq!(read_now(&host), b"hello");
}

#[test]
fn packets_of_no_connection_are_reset_but_resets_are_not() {
    let mut guest = Guest::new();
    for operation in [
        Operation::Response,
        Operation::Shutdown,
        Operation::ReadWrite,
        Operation::CreditUpdate,
    ] {
        guest.send(PORTS, operation, 0, b"");
        assert_eq!(operations(&guest.receive()), [Operation::Reset]);
    }
    guest.send(PORTS, Operation::Reset, 0, b"");
    assert!(guest.receive().is_empty());
}

#[test]
fn malformed_headers_are_reset_and_foreign_ones_ignored() {
    let mut guest = Guest::new();
    let good = packet(PORTS, Operation::Request);
    guest.send_raw(
        &PacketHeader {
            socket_type: 2,
            ..good
        },
        b"",
    );
    let answers = guest.receive();
    assert_eq!((answers[0].0.op, answers[0].0.socket_type), (3, 2));
    guest.send_raw(&PacketHeader { op: 99, ..good }, b"");
    assert_eq!(operations(&guest.receive()), [Operation::Reset]);
    guest.send_raw(&PacketHeader { src_cid: 4, ..good }, b"");
    guest.send_raw(&PacketHeader { dst_cid: 1, ..good }, b"");
    assert!(guest.receive().is_empty());
    assert_eq!(guest.muxer.counters().invalid_packets, 4);
}

#[test]
fn a_payload_shorter_than_claimed_costs_the_connection() {
    let mut guest = Guest::new();
    let (ports, host) = guest.established();
    let header = PacketHeader {
        len: 10,
        ..packet(ports, Operation::ReadWrite)
    };
    guest.send_raw(&header, b"short");
    assert_eq!(operations(&guest.receive()), [Operation::Reset]);
    assert!(is_at_end(&host));
}

/// Fill the host's socket and the connection's buffer; gives how many bytes went in.
fn fill(guest: &mut Guest, ports: PortPair) -> usize {
    let mut sent = 0;
    let mut known_forwarded = 0;
    loop {
        let room = BUFFER_SIZE as usize - (sent - known_forwarded);
        if room == 0 {
            return sent;
        }
        let chunk: Vec<u8> = (sent..sent + room.min(10_000))
            .map(|i| u8::try_from(i % 251).unwrap())
            .collect();
        guest.send(ports, Operation::ReadWrite, 0, &chunk);
        sent += chunk.len();
        if let Some((header, _)) = guest.receive().last() {
            known_forwarded = header.fwd_cnt as usize;
        }
    }
}

#[test]
fn a_host_that_does_not_read_stops_the_guest_and_loses_nothing() {
    let mut guest = Guest::new();
    let (ports, host) = guest.established();
    let sent = fill(&mut guest, ports);
    let mut received = Vec::new();
    let mut is_updated = false;
    while received.len() < sent {
        received.extend(read_now(&host));
        is_updated |= operations(&guest.receive()).contains(&Operation::CreditUpdate);
    }
    assert!(
        received
            .iter()
            .enumerate()
            .all(|(i, byte)| *byte == u8::try_from(i % 251).unwrap())
    );
    assert!(is_updated);
}

#[test]
fn a_guest_that_ignores_its_credit_is_reset_and_the_host_gets_the_rest() {
    let mut guest = Guest::new();
    let (ports, host) = guest.established();
    let sent = fill(&mut guest, ports);
    guest.send(ports, Operation::ReadWrite, 0, b"x");
    assert_eq!(operations(&guest.receive()), [Operation::Reset]);
    let mut received = 0;
    while received < sent {
        received += read_now(&host).len();
        guest.turn();
    }
    assert_eq!(received, sent);
    assert!(is_at_end(&host));
    assert_eq!(guest.muxer.connection_count(), 0);
}

#[test]
fn the_guests_room_bounds_what_it_gets() {
    let mut guest = Guest::new();
    let (ports, mut host) = guest.requested();
    let response = PacketHeader {
        buf_alloc: 5000,
        ..packet(ports, Operation::Response)
    };
    guest.send_raw(&response, b"");
    host.write_all(&[7; 12_000]).unwrap();
    let packets = guest.receive();
    let got: usize = packets.iter().map(|(_, payload)| payload.len()).sum();
    assert_eq!(got, 5000);
    assert_eq!(
        *operations(&packets).last().unwrap(),
        Operation::CreditRequest
    );
    let update = PacketHeader {
        buf_alloc: 5000,
        fwd_cnt: 5000,
        ..packet(ports, Operation::CreditUpdate)
    };
    guest.send_raw(&update, b"");
    let got: usize = guest
        .receive()
        .iter()
        .map(|(_, payload)| payload.len())
        .sum();
    assert_eq!(got, 5000);
}

#[test]
fn without_guest_buffers_nothing_is_lost() {
    let mut guest = Guest::new();
    let (_, mut host) = guest.established();
    // Buffers left over from the handshake are used up first.
    let left = u64::from(QUEUE_SIZE - guest.free_buffers());
    let sent = usize::try_from(left).unwrap() * 10;
    let mut got = Vec::new();
    for _ in 0..left {
        host.write_all(&[1; 10]).unwrap();
        got.extend(guest.turn());
    }
    host.write_all(b"later").unwrap();
    assert!(guest.turn().is_empty());
    assert_eq!(
        got.iter().map(|(_, payload)| payload.len()).sum::<usize>(),
        sent
    );
    guest.post(1);
    assert_eq!(guest.turn()[0].1, b"later");
}

#[test]
fn half_closes_travel_both_ways() {
    let mut guest = Guest::new();
    let (ports, mut host) = guest.established();
    guest.send(ports, Operation::ReadWrite, 0, b"last");
    guest.send(ports, Operation::Shutdown, SHUTDOWN_SEND, b"");
    assert_eq!(read_now(&host), b"last");
    assert!(is_at_end(&host));
    host.write_all(b"answer").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let packets = guest.receive();
    assert_eq!(packets[0].1, b"answer");
    assert_eq!(packets[1].0.op, Operation::Shutdown as u16);
    assert_eq!(packets[1].0.flags & SHUTDOWN_SEND, SHUTDOWN_SEND);
    guest.send(ports, Operation::Shutdown, SHUTDOWN_BOTH, b"");
    assert_eq!(operations(&guest.receive()), [Operation::Reset]);
    assert_eq!(guest.muxer.connection_count(), 0);
}

#[test]
fn the_end_of_a_stream_waits_for_its_backlog() {
    let mut guest = Guest::new();
    let (ports, host) = guest.established();
    let sent = fill(&mut guest, ports);
    guest.send(ports, Operation::Shutdown, SHUTDOWN_SEND, b"");
    let mut received = 0;
    while received < sent {
        received += read_now(&host).len();
        guest.receive();
    }
    assert_eq!(received, sent);
    assert!(is_at_end(&host));
}

#[test]
fn a_guest_that_hears_no_more_fails_the_hosts_writes() {
    let mut guest = Guest::new();
    let (ports, mut host) = guest.established();
    guest.send(ports, Operation::Shutdown, SHUTDOWN_RECEIVE, b"");
    assert_eq!(
        host.write(b"x").unwrap_err().kind(),
        io::ErrorKind::BrokenPipe
    );
    guest.send(ports, Operation::ReadWrite, 0, b"still talking");
    assert_eq!(read_now(&host), b"still talking");
}

#[test]
fn a_host_that_is_gone_is_confirmed_or_times_out() {
    let mut guest = Guest::new();
    for is_confirmed in [true, false] {
        let (ports, mut host) = guest.established();
        host.write_all(b"bye").unwrap();
        drop(host);
        let packets = guest.receive();
        assert_eq!(
            operations(&packets),
            [Operation::ReadWrite, Operation::Shutdown]
        );
        assert_eq!(packets[1].0.flags, SHUTDOWN_BOTH);
        if is_confirmed {
            guest.send(ports, Operation::Reset, 0, b"");
        } else {
            guest.muxer.expire(Instant::now() + REQUEST_TIMEOUT);
            assert_eq!(operations(&guest.receive()), [Operation::Reset]);
        }
        assert_eq!(guest.muxer.connection_count(), 0);
    }
}

#[test]
fn too_many_connections_are_refused_and_room_comes_back() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit {
        current: limit.maximum,
        ..limit
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    let mut guest = Guest::new();
    let mut hosts = Vec::new();
    for _ in 0..=MAX_CONNECTIONS {
        let (ours, theirs) = pair();
        guest.muxer.accept(ours);
        hosts.push(theirs);
    }
    assert!(is_at_end(&hosts[MAX_CONNECTIONS]));
    assert_eq!(guest.muxer.counters().refused_connections, 1);
    drop(hosts);
    guest.receive();
    assert_eq!(guest.muxer.connection_count(), 0);
    guest.established();
}

#[test]
fn replies_that_nobody_takes_stop_the_intake() {
    let mut guest = Guest::new();
    for _ in 0..MAX_RESETS {
        assert!(!guest.muxer.is_reply_queue_full());
        guest.send(PORTS, Operation::ReadWrite, 0, b"");
    }
    assert!(guest.muxer.is_reply_queue_full());
    let (ours, theirs) = pair();
    guest.muxer.accept(ours);
    assert!(is_at_end(&theirs));
    assert_eq!(guest.receive().len(), MAX_RESETS);
}

#[test]
fn opening_and_resetting_without_taking_replies_is_bounded() {
    let mut guest = Guest::new();
    let mut count = 0;
    while !guest.muxer.is_reply_queue_full() {
        guest.send(PORTS, Operation::Request, 0, b"");
        guest.send(PORTS, Operation::Reset, 0, b"");
        count += 1;
        assert!(count <= 10_000);
    }
    assert_eq!(guest.muxer.connection_count(), 0);
    guest.receive();
    assert!(!guest.muxer.is_reply_queue_full());
}

#[test]
fn a_restarted_guest_has_no_connections_but_its_last_words_arrive() {
    let mut guest = Guest::new();
    let (ports, host) = guest.established();
    let (_, idle) = guest.established();
    let sent = fill(&mut guest, ports);
    guest.muxer.reset();
    assert!(is_at_end(&idle));
    let mut received = 0;
    while received < sent {
        received += read_now(&host).len();
        guest.turn();
    }
    assert_eq!(received, sent);
    assert!(is_at_end(&host));
    assert_eq!(guest.muxer.connection_count(), 0);
}

#[test]
fn busy_streams_take_turns() {
    let mut guest = Guest::new();
    let streams: Vec<_> = (0..3).map(|_| guest.established()).collect();
    for (_, host) in &streams {
        let mut host: &UnixStream = host;
        host.write_all(&vec![1; 50_000]).unwrap();
    }
    guest.post(guest.free_buffers());
    let mut first = guest.turn();
    first.truncate(6);
    let mut ports: Vec<u32> = first.iter().map(|(header, _)| header.src_port).collect();
    ports.dedup();
    assert!(ports.len() >= 3, "{ports:?}");
}

#[derive(Clone, Debug)]
enum Step {
    Packet {
        op: u16,
        host: u32,
        guest: u32,
        flags: u32,
        len: usize,
        claimed: i32,
        fwd_cnt: u32,
        kind: u16,
    },
    HostConnects,
    HostWrites(usize, usize),
    HostReads(usize),
    HostLeaves(usize),
    Turn(u16),
    Expire,
}

fn any_step() -> impl Strategy<Value = Step> {
    let packet = (
        0u16..9,
        0u32..6,
        0u32..3,
        0u32..5,
        0usize..70_000,
        -3i32..4,
        prop_oneof![3 => Just(0u32), 1 => any::<u32>()],
        0u16..8,
    );
    prop_oneof![
        8 => packet.prop_map(|(op, host, guest, flags, len, claimed, fwd_cnt, kind)| {
            let (len, claimed) = if op == 5 { (len, claimed / 3) } else { (0, claimed / 3) };
            Step::Packet { op, host, guest, flags, len, claimed, fwd_cnt, kind }
        }),
        2 => Just(Step::HostConnects),
        2 => (any::<usize>(), 0usize..50_000).prop_map(|(who, len)| Step::HostWrites(who, len)),
        2 => any::<usize>().prop_map(Step::HostReads),
        1 => any::<usize>().prop_map(Step::HostLeaves),
        4 => (0u16..64).prop_map(Step::Turn),
        1 => Just(Step::Expire),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever guest and hosts do, the muxer stays within its bounds and comes to rest.
    #[test]
    fn nothing_breaks_the_bounds(steps in proptest::collection::vec(any_step(), 0..120)) {
        let mut guest = Guest::new();
        let mut hosts: Vec<UnixStream> = Vec::new();
        for step in steps {
            match step {
                Step::Packet { op, host, guest: port, flags, len, claimed, fwd_cnt, kind } => {
                    if guest.muxer.is_reply_queue_full() {
                        continue;
                    }
                    let host = if host < 3 { FIRST_HOST_PORT + host } else { host };
                    let ports = PortPair { host, guest: if port == 0 { 1024 } else { port } };
                    let header = PacketHeader {
                        op,
                        flags,
                        fwd_cnt,
                        len: u32::try_from(len).unwrap().saturating_add_signed(claimed),
                        socket_type: if kind == 0 { 2 } else { 1 },
                        ..packet(ports, Operation::ReadWrite)
                    };
                    guest.send_raw(&header, &vec![0; len]);
                }
                Step::HostConnects => {
                    let (ours, mut theirs) = pair();
                    guest.muxer.accept(ours);
                    let _sent = theirs.write(b"CONNECT 1024\n");
                    hosts.push(theirs);
                }
                Step::HostWrites(who, len) if !hosts.is_empty() => {
                    let who = who % hosts.len();
                    let _sent = hosts[who].write(&vec![0; len]);
                }
                Step::HostReads(who) if !hosts.is_empty() => {
                    read_now(&hosts[who % hosts.len()]);
                }
                Step::HostLeaves(who) if !hosts.is_empty() => {
                    hosts.swap_remove(who % hosts.len());
                }
                Step::Turn(count) => {
                    guest.post(count.min(guest.free_buffers()));
                    guest.turn();
                    hosts.append(&mut guest.dialled.lock().unwrap());
                }
                Step::Expire => guest.muxer.expire(Instant::now() + REQUEST_TIMEOUT),
                _ => {}
            }
            prop_assert!(guest.muxer.connection_count() <= MAX_CONNECTIONS);
            prop_assert!(guest.muxer.resets.len() <= MAX_RESETS + MAX_CONNECTIONS);
            prop_assert!(guest.muxer.queued.len() <= 2 * MAX_CONNECTIONS);
        }
        // With every host gone, only waits for the guest remain, and those end in time.
        drop(hosts);
        guest.dialled.lock().unwrap().clear();
        guest.receive();
        guest.muxer.expire(Instant::now() + REQUEST_TIMEOUT);
        guest.receive();
        prop_assert!(!guest.muxer.has_pending());
    }
}
