//! What the tests share: the I/O thread with a queue to wait on, and an agent that a test scripts
//! frame by frame at the other end of a socket pair.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(unreachable_pub, reason = "shared by test binaries")]

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vsock_io::agent::AgentClient;
use vsock_io::event::{Completion, EventQueue, EventSink};
use vsock_io::reactor::Reactor;
use vsock_io::ttrpc::frame::{FrameHeader, HEADER_LEN, TYPE_RESPONSE};

/// No wait in a test is longer.
pub const PATIENCE: Duration = Duration::from_secs(30);
pub const CLOSED: u64 = 1_000_000;

/// The I/O thread and its events.
pub struct Io {
    pub reactor: Reactor,
    pub queue: Arc<EventQueue>,
    seen: Vec<Completion>,
}

impl Io {
    pub fn start() -> Self {
        let queue = Arc::new(EventQueue::new(EventQueue::DEFAULT_BYTE_BUDGET).unwrap());
        let reactor = Reactor::start(Arc::clone(&queue) as Arc<dyn EventSink>).unwrap();
        Self {
            reactor,
            queue,
            seen: Vec::new(),
        }
    }

    /// The event with `token`; others are kept for later.
    pub fn wait(&mut self, token: u64) -> Completion {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(position) = self.seen.iter().position(|seen| seen.token == token) {
                return self.seen.remove(position);
            }
            let left = deadline
                .checked_duration_since(Instant::now())
                .expect("no event in time");
            let mut fds = [PollFd::new(&*self.queue, PollFlags::IN)];
            let _ready = poll(&mut fds, Some(&Timespec::try_from(left).unwrap())).unwrap();
            self.seen.extend(self.queue.drain());
        }
    }

    /// Everything that has come and was not waited for.
    pub fn rest(&mut self) -> Vec<Completion> {
        self.seen.extend(self.queue.drain());
        std::mem::take(&mut self.seen)
    }

    /// A client and the agent it talks to.
    pub fn connect(&self) -> (AgentClient, ScriptedAgent) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let client = AgentClient::new(&self.reactor.handle(), OwnedFd::from(ours), CLOSED);
        theirs.set_read_timeout(Some(PATIENCE)).unwrap();
        theirs.set_write_timeout(Some(PATIENCE)).unwrap();
        (client, ScriptedAgent { stream: theirs })
    }
}

/// A request as the agent sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Received {
    pub stream_id: u32,
    pub service: String,
    pub method: String,
    pub payload: Vec<u8>,
    pub timeout_nano: u64,
}

/// The other end of the connection.
pub struct ScriptedAgent {
    pub stream: UnixStream,
}

impl ScriptedAgent {
    /// The next request; `None` when the client has closed.
    pub fn receive(&mut self) -> Option<Received> {
        let mut header = [0; HEADER_LEN];
        match self.stream.read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("no request"),
            Err(_) => return None,
        }
        let header = FrameHeader::from_bytes(header);
        let mut body = vec![0; header.length as usize];
        self.stream.read_exact(&mut body).ok()?;
        let mut received = Received {
            stream_id: header.stream_id,
            ..Received::default()
        };
        for (field, number, bytes) in fields(&body) {
            match field {
                1 => received.service = String::from_utf8(bytes).unwrap(),
                2 => received.method = String::from_utf8(bytes).unwrap(),
                3 => received.payload = bytes,
                4 => received.timeout_nano = number,
                _ => panic!("unexpected field {field}"),
            }
        }
        Some(received)
    }

    pub fn reply(&mut self, stream_id: u32, payload: &[u8]) {
        self.send(stream_id, TYPE_RESPONSE, &bytes_field(2, payload));
    }

    pub fn fail(&mut self, stream_id: u32, code: u8, message: &str) {
        let mut status = vec![0x08, code];
        status.extend(bytes_field(2, message.as_bytes()));
        self.send(stream_id, TYPE_RESPONSE, &bytes_field(1, &status));
    }

    pub fn send(&mut self, stream_id: u32, kind: u8, body: &[u8]) {
        let length = u32::try_from(body.len()).unwrap();
        let header = FrameHeader {
            length,
            stream_id,
            kind,
            flags: 0,
        };
        self.raw(&[&header.to_bytes()[..], body].concat());
    }

    /// Bytes as they are. A client that has gone is no failure of the agent's.
    pub fn raw(&mut self, bytes: &[u8]) {
        let _written = self.stream.write_all(bytes);
    }
}

/// Protobuf fields: number, value of a varint, value of a string.
pub fn fields(mut bytes: &[u8]) -> Vec<(u64, u64, Vec<u8>)> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let (first, rest) = bytes.split_first().unwrap();
            *bytes = rest;
            value |= u64::from(first & 0x7f) << shift;
            if first & 0x80 == 0 {
                break;
            }
        }
        value
    }
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        let value = varint(&mut bytes);
        if tag & 7 == 2 {
            let (taken, rest) = bytes.split_at(usize::try_from(value).unwrap());
            bytes = rest;
            found.push((tag >> 3, 0, taken.to_vec()));
        } else {
            found.push((tag >> 3, value, Vec::new()));
        }
    }
    found
}

pub fn number_field(number: u8, value: usize) -> Vec<u8> {
    let mut out = vec![number << 3];
    put_varint(&mut out, value);
    out
}

pub fn bytes_field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    put_varint(&mut out, bytes.len());
    out.extend_from_slice(bytes);
    out
}

fn put_varint(out: &mut Vec<u8>, mut value: usize) {
    while value >= 0x80 {
        out.push(u8::try_from(value & 0x7f).unwrap() | 0x80);
        value >>= 7;
    }
    out.push(u8::try_from(value).unwrap());
}
