//! Many streams at once through the device, and a guest that keeps no rule.

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use virtio_core::mock::MockBuffer;
use virtio_core::vsock::mock::MAX_MOCK_PAYLOAD;
use virtio_core::vsock::packet::{
    HEADER_SIZE, Operation, PacketHeader, SHUTDOWN_BOTH, SHUTDOWN_SEND,
};

use super::mock_machine::{CID, MockMachine};
use crate::virtio::device::{DeviceError, VirtioDevice};

const STREAMS: u32 = 1000;
const HOST_PORT: u32 = 2000;
/// Credit the guest gives.
const GUEST_BUFFER: u32 = 32 * 1024;
/// Credit the device gives.
const DEVICE_BUFFER: usize = 256 * 1024;
/// New streams of each kind in one round: a listener's backlog holds them.
const NEW_PER_ROUND: u32 = 60;

/// Of eight bytes at a time; where each stands counts.
fn checksum(bytes: &[u8]) -> [u8; 8] {
    let mix = |sum: u64, word: &[u8]| {
        let mut padded = [0; 8];
        padded[..word.len()].copy_from_slice(word);
        (sum ^ u64::from_le_bytes(padded))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29)
    };
    bytes.chunks(8).fold(bytes.len() as u64, mix).to_le_bytes()
}

/// What one side of stream `id` sends: the id, pseudo-random bytes, a checksum.
fn content(id: u32, is_initiator: bool) -> Vec<u8> {
    let mut state = u64::from(id) << 1 | u64::from(is_initiator) | 1 << 40;
    let mut bytes = id.to_le_bytes().to_vec();
    // Up to 24 KiB; now and then 160, so that credit runs out.
    let words = if id % 50 < 2 {
        20_000
    } else {
        (id * 7919 + u32::from(is_initiator) * 31) % 3000
    };
    for _ in 0..words {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.extend(checksum(&bytes));
    bytes
}

/// The id of a whole, undamaged stream.
fn verified(bytes: &[u8]) -> u32 {
    let (body, sum) = bytes
        .split_last_chunk::<8>()
        .expect("a stream has a checksum");
    assert_eq!(
        checksum(body),
        *sum,
        "a damaged stream of {} bytes",
        bytes.len()
    );
    id_of(body).unwrap()
}

fn id_of(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().copied().map(u32::from_le_bytes)
}

/// One side of a stream.
#[derive(Default)]
struct Side {
    /// Known from the start to the initiator, from the first bytes to the other.
    outgoing: Option<Vec<u8>>,
    sent: usize,
    is_sending_over: bool,
    received: Vec<u8>,
    is_receiving_over: bool,
}

impl Side {
    fn initiator(id: u32) -> Self {
        Self {
            outgoing: Some(content(id, true)),
            ..Self::default()
        }
    }

    /// Take received bytes; the other side answers once it knows the stream.
    fn take(&mut self, bytes: &[u8]) {
        self.received.extend_from_slice(bytes);
        if self.outgoing.is_none()
            && let Some(id) = id_of(&self.received)
        {
            self.outgoing = Some(content(id, false));
        }
    }

    fn rest(&self) -> Option<&[u8]> {
        self.outgoing.as_ref().map(|bytes| &bytes[self.sent..])
    }

    /// All was received: it has to be whole, and of this stream.
    fn end(&mut self) {
        let id = verified(&self.received);
        assert_eq!(self.outgoing.as_deref().and_then(id_of), Some(id));
        self.is_receiving_over = true;
    }

    fn is_over(&self) -> bool {
        self.is_sending_over && self.is_receiving_over
    }
}

/// The host's end.
struct Host {
    socket: UnixStream,
    side: Side,
    /// `OK <port>` is still to come.
    is_shaking: bool,
}

impl Host {
    fn step(&mut self, may_end: bool) {
        self.read();
        while let Some(rest) = self.side.rest().filter(|_| !self.is_shaking) {
            if rest.is_empty() {
                if may_end && !self.side.is_sending_over {
                    self.socket.shutdown(std::net::Shutdown::Write).unwrap();
                    self.side.is_sending_over = true;
                }
                return;
            }
            match self.socket.write(rest) {
                Ok(count) => self.side.sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => panic!("write: {error}"),
            }
        }
    }

    fn read(&mut self) {
        let mut part = [0; 16_384];
        while !self.side.is_receiving_over {
            match self.socket.read(&mut part) {
                Ok(0) => self.side.end(),
                Ok(count) if self.is_shaking => {
                    let end = part[..count]
                        .iter()
                        .position(|byte| *byte == b'\n')
                        .unwrap();
                    assert!(part.starts_with(b"OK "));
                    self.is_shaking = false;
                    self.side.take(&part[end + 1..count]);
                }
                Ok(count) => self.side.take(&part[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => panic!("read: {error}"),
            }
        }
    }
}

/// The guest's end.
struct GuestStream {
    side: Side,
    is_established: bool,
    peer_forwarded: u32,
    told_received: usize,
}

/// The guest's sockets: `(guest port, host port)`.
#[derive(Default)]
struct GuestSockets {
    streams: HashMap<(u32, u32), GuestStream>,
    control: VecDeque<((u32, u32), Operation, u32)>,
    finished: u32,
}

impl GuestSockets {
    fn open(&mut self, id: u32) {
        let ports = (10_000 + id, HOST_PORT);
        self.insert(ports, Side::initiator(id));
        self.control.push_back((ports, Operation::Request, 0));
    }

    fn insert(&mut self, ports: (u32, u32), side: Side) {
        let stream = GuestStream {
            side,
            is_established: false,
            peer_forwarded: 0,
            told_received: 0,
        };
        assert!(self.streams.insert(ports, stream).is_none());
    }

    fn receive(&mut self, header: &PacketHeader, payload: &[u8]) {
        let ports = (header.dst_port, header.src_port);
        let operation = Operation::try_from(header.op).unwrap();
        if operation == Operation::Request {
            self.insert(ports, Side::default());
            self.streams.get_mut(&ports).unwrap().is_established = true;
            self.control.push_back((ports, Operation::Response, 0));
            return;
        }
        let Some(stream) = self.streams.get_mut(&ports) else {
            panic!("{operation:?} for no stream");
        };
        stream.peer_forwarded = header.fwd_cnt;
        match operation {
            Operation::Response => stream.is_established = true,
            Operation::ReadWrite => {
                stream.side.take(payload);
                let untold = stream.side.received.len() - stream.told_received;
                assert!(untold <= GUEST_BUFFER as usize, "more than the credit");
                if untold > GUEST_BUFFER as usize / 2 {
                    stream.told_received = stream.side.received.len();
                    self.control.push_back((ports, Operation::CreditUpdate, 0));
                }
            }
            Operation::CreditRequest => {
                self.control.push_back((ports, Operation::CreditUpdate, 0));
            }
            Operation::CreditUpdate => {}
            Operation::Shutdown => {
                if header.flags & SHUTDOWN_SEND != 0 && !stream.side.is_receiving_over {
                    stream.side.end();
                }
                if header.flags == SHUTDOWN_BOTH {
                    assert!(stream.side.is_over());
                    self.streams.remove(&ports);
                    self.control.push_back((ports, Operation::Reset, 0));
                    self.finished += 1;
                }
            }
            Operation::Reset => {
                assert!(stream.side.is_over(), "a stream was cut off");
                self.streams.remove(&ports);
                self.finished += 1;
            }
            Operation::Request => unreachable!(),
        }
    }

    /// Send what may be sent, a packet of each stream in turn.
    fn transmit(&mut self, machine: &mut MockMachine) {
        while machine.guest.tx_free() > 0
            && let Some((ports, operation, flags)) = self.control.pop_front()
        {
            self.send(machine, ports, operation, flags, &[]);
        }
        let all: Vec<(u32, u32)> = self.streams.keys().copied().collect();
        for ports in all {
            if machine.guest.tx_free() == 0 {
                return;
            }
            self.transmit_one(machine, ports);
        }
    }

    fn transmit_one(&mut self, machine: &mut MockMachine, ports: (u32, u32)) {
        let stream = self.streams.get_mut(&ports).unwrap();
        let Some(rest) = stream.side.rest().filter(|_| stream.is_established) else {
            return;
        };
        if rest.is_empty() {
            if !stream.side.is_sending_over {
                stream.side.is_sending_over = true;
                self.send(machine, ports, Operation::Shutdown, SHUTDOWN_SEND, &[]);
            }
            return;
        }
        let in_flight = stream.side.sent - stream.peer_forwarded as usize;
        let len = rest
            .len()
            .min(DEVICE_BUFFER - in_flight)
            .min(MAX_MOCK_PAYLOAD);
        if len > 0 {
            let payload = rest[..len].to_vec();
            stream.side.sent += len;
            self.send(machine, ports, Operation::ReadWrite, 0, &payload);
        }
    }

    fn send(
        &mut self,
        machine: &mut MockMachine,
        ports: (u32, u32),
        operation: Operation,
        flags: u32,
        payload: &[u8],
    ) {
        let stream = self.streams.get_mut(&ports);
        let received = stream.map_or(0, |stream| {
            stream.told_received = stream.side.received.len();
            stream.told_received
        });
        let header = PacketHeader {
            len: u32::try_from(payload.len()).unwrap(),
            flags,
            buf_alloc: GUEST_BUFFER,
            fwd_cnt: u32::try_from(received).unwrap(),
            ..machine.guest.header(ports.0, ports.1, operation)
        };
        machine.guest.send(&header, payload);
    }
}

fn connections(machine: &MockMachine) -> u64 {
    machine.device.metrics()[0].1
}

/// Half of the streams each begun by hosts and by the guest; all whole, both ways, half-closed.
fn run_streams(has_event_idx: bool, mut pauses: u32) {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit {
        current: limit.maximum,
        ..limit
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    let mut machine = MockMachine::active(has_event_idx);
    let listener =
        UnixListener::bind(machine.path().with_file_name(format!("vsock_{HOST_PORT}"))).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut sockets = GuestSockets::default();
    let mut hosts: Vec<Host> = Vec::new();
    let (mut begun, mut finished_hosts, mut most) = (0, 0, 0);
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut turn_start = Instant::now();
    while finished_hosts < STREAMS || sockets.finished < STREAMS {
        assert!(
            Instant::now() < deadline,
            "{finished_hosts} and {} are over",
            sockets.finished
        );
        for _ in 0..NEW_PER_ROUND.min((STREAMS - begun) / 2) {
            let socket = machine.dial();
            let side = Side::initiator(begun);
            hosts.push(Host {
                socket,
                side,
                is_shaking: true,
            });
            sockets.open(begun + 1);
            begun += 2;
        }
        while let Ok((socket, _)) = listener.accept() {
            socket.set_nonblocking(true).unwrap();
            hosts.push(Host {
                socket,
                side: Side::default(),
                is_shaking: false,
            });
        }
        // No stream ends before all are there.
        most = most.max(connections(&machine));
        for host in &mut hosts {
            host.step(most == u64::from(STREAMS));
        }
        let before = hosts.len();
        hosts.retain(|host| !host.side.is_over());
        finished_hosts += u32::try_from(before - hosts.len()).unwrap();
        for _ in 0..8 {
            // A busy test machine is not a guest that does not answer.
            machine.device.host.postpone(turn_start.elapsed());
            turn_start = Instant::now();
            if pauses > 0 {
                pauses -= 1;
                machine.device.pause().unwrap();
            }
            sockets.transmit(&mut machine);
            machine.settle();
            machine.device.resume();
            machine.settle();
            for (header, payload) in machine.guest.take() {
                sockets.receive(&header, &payload);
            }
            let free = machine.guest.rx_free();
            machine.guest.post(free);
            machine.settle();
        }
    }
    assert_eq!((pauses, most), (0, u64::from(STREAMS)));
    sockets.transmit(&mut machine);
    machine.settle();
    let metrics: HashMap<&str, u64> = machine.device.metrics().into_iter().collect();
    for (name, expected) in [
        ("connections_now", 0),
        ("host_connections", STREAMS / 2),
        ("guest_connections", STREAMS / 2),
        ("refused_connections", 0),
        ("connection_timeouts", 0),
        ("invalid_packets", 0),
        ("malformed_chains", 0),
    ] {
        assert_eq!(metrics[name], u64::from(expected), "{name}");
    }
}

#[test]
fn a_thousand_streams_arrive_whole() {
    run_streams(true, 0);
}

#[test]
fn a_thousand_streams_arrive_whole_through_fifty_pauses_and_without_event_indices() {
    run_streams(false, 50);
}

#[derive(Clone, Debug)]
enum Step {
    /// A packet; small numbers choose likely values.
    Packet {
        numbers: [u8; 6],
        len: usize,
        extra: u32,
    },
    /// Any bytes as a header.
    Garbage([u8; 32]),
    /// A chain of any shape on any of the rings.
    Chain {
        ring: u8,
        buffers: Vec<(u64, u32, bool)>,
    },
    Head {
        ring: u8,
        head: u16,
    },
    AvailableIndex {
        ring: u8,
        index: u16,
    },
    HostDials,
    HostWrites(usize, usize),
    HostLeaves(usize),
    Post(u16),
    Settle,
    Handle(u32),
    Pause,
    Resume,
    Reset,
    Restore,
}

fn any_step() -> impl Strategy<Value = Step> {
    let ring = 0u8..3;
    let buffer = (
        prop_oneof![0u64..0x21_0000, any::<u64>()],
        prop_oneof![0u32..100, any::<u32>()],
        any::<bool>(),
    );
    let buffers = proptest::collection::vec(buffer, 1..5);
    prop_oneof![
        12 => (any::<[u8; 6]>(), 0..=MAX_MOCK_PAYLOAD, any::<u32>())
            .prop_map(|(numbers, len, extra)| Step::Packet { numbers, len, extra }),
        1 => any::<[u8; 32]>().prop_map(Step::Garbage),
        2 => (ring.clone(), buffers).prop_map(|(ring, buffers)| Step::Chain { ring, buffers }),
        1 => (ring.clone(), 0u16..140).prop_map(|(ring, head)| Step::Head { ring, head }),
        1 => (ring, any::<u16>())
            .prop_map(|(ring, index)| Step::AvailableIndex { ring, index }),
        3 => Just(Step::HostDials),
        3 => (any::<usize>(), 0usize..100_000).prop_map(|(who, len)| Step::HostWrites(who, len)),
        1 => any::<usize>().prop_map(Step::HostLeaves),
        2 => (0u16..128).prop_map(Step::Post),
        8 => Just(Step::Settle),
        1 => (0u32..70).prop_map(Step::Handle),
        1 => Just(Step::Pause),
        1 => Just(Step::Resume),
        1 => Just(Step::Reset),
        1 => Just(Step::Restore),
    ]
}

/// Do one step; the error is what the transport would answer by a reset.
fn apply(
    machine: &mut MockMachine,
    hosts: &mut Vec<UnixStream>,
    step: Step,
) -> Result<(), DeviceError> {
    match step {
        Step::Packet {
            numbers: [src, host, port, op, flags, kind],
            len,
            extra,
        } => {
            if machine.guest.tx_free() == 0 {
                return machine.try_settle();
            }
            let header = PacketHeader {
                src_cid: if src == 0 { u64::from(extra) } else { CID },
                src_port: if port % 4 == 0 { extra } else { 1024 },
                dst_port: if host < 200 {
                    (1 << 30) + u32::from(host % 4)
                } else {
                    extra
                },
                op: u16::from(op % 9),
                len: if kind == 0 {
                    extra
                } else if op % 9 == 5 {
                    u32::try_from(len).unwrap_or(0)
                } else {
                    0
                },
                flags: u32::from(flags % 5),
                socket_type: if kind == 1 { 2 } else { 1 },
                fwd_cnt: if kind == 2 { extra } else { 0 },
                ..machine.guest.header(0, 0, Operation::Request)
            };
            machine.guest.send(&header, &vec![src; len]);
        }
        Step::Garbage(bytes) if machine.guest.tx_free() > 0 => {
            let mut header = [0; HEADER_SIZE];
            header[..32].copy_from_slice(&bytes);
            machine.guest.send(&PacketHeader::parse(&header), b"");
        }
        Step::Chain { ring, buffers } => {
            let buffers: Vec<MockBuffer> = buffers
                .into_iter()
                .map(|(address, len, is_writable)| MockBuffer {
                    address,
                    len,
                    is_writable,
                })
                .collect();
            driver(machine, ring).add(&buffers);
        }
        Step::Head { ring, head } => driver(machine, ring).make_available(head),
        Step::AvailableIndex { ring, index } => driver(machine, ring).set_available_index(index),
        Step::HostDials if hosts.len() < 100 => hosts.push(machine.dial()),
        Step::HostWrites(who, len) if !hosts.is_empty() => {
            let who = who % hosts.len();
            let _sent = hosts[who].write(&vec![0; len]);
        }
        Step::HostLeaves(who) if !hosts.is_empty() => {
            hosts.swap_remove(who % hosts.len());
        }
        Step::Post(count) => {
            let free = machine.guest.rx_free();
            machine.guest.post(count.min(free));
        }
        Step::Settle => machine.try_settle()?,
        Step::Handle(token) => machine
            .device
            .handle(token, rustix::event::epoll::EventFlags::IN)?,
        Step::Pause => machine.device.pause()?,
        Step::Resume => machine.device.resume(),
        Step::Reset => {
            machine.device.reset();
            machine.boot();
        }
        Step::Restore => {
            machine.device.pause()?;
            let state = machine.device.save()?;
            machine.device.reset();
            machine.device.restore(&state)?;
            machine.boot();
            machine.device.resume();
        }
        Step::Garbage(_) | Step::HostDials | Step::HostWrites(..) | Step::HostLeaves(_) => {}
    }
    Ok(())
}

fn driver(machine: &mut MockMachine, ring: u8) -> &mut virtio_core::mock::MockDriver {
    match ring {
        0 => &mut machine.guest.rx,
        1 => &mut machine.guest.tx,
        _ => &mut machine.events,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever the driver does costs it the device until it resets it, and nothing else.
    #[test]
    fn a_hostile_driver_hurts_only_itself(
        has_event_idx: bool,
        steps in proptest::collection::vec(any_step(), 0..80),
    ) {
        let mut machine = MockMachine::active(has_event_idx);
        let mut hosts = Vec::new();
        for step in steps {
            if let Err(error) = apply(&mut machine, &mut hosts, step) {
                prop_assert!(matches!(error, DeviceError::Ring { .. }), "{error:?}");
                machine.device.reset();
                machine.boot();
            }
        }
        // A driver that keeps the rules is served as if nothing had been.
        drop(hosts);
        machine.device.reset();
        machine.boot();
        machine.settle();
        machine.guest.take();
        let mut host = machine.dial();
        machine.settle();
        let request = machine.guest.take().pop_back().unwrap().0;
        prop_assert_eq!(request.op, Operation::Request as u16);
        machine.guest.answer(&request, Operation::Response, b"");
        machine.guest.answer(&request, Operation::ReadWrite, b"hello");
        machine.settle();
        let mut answer = String::new();
        let _would_block = host.read_to_string(&mut answer);
        prop_assert_eq!(answer, format!("OK {}\nhello", request.src_port));
    }
}
