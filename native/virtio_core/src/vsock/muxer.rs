//! All connections of one guest: ports to sockets, and what waits to go to the guest.
//!
//! Guest packets come in through [`Muxer::receive`], packets for the guest leave through
//! [`Muxer::transmit`], socket readiness enters through [`Muxer::on_socket`]. Everything is
//! bounded: connections by [`MAX_CONNECTIONS`], each by its credit, replies to broken packets by
//! [`MAX_RESETS`] (the device stops taking packets until the guest takes the replies). Runs on
//! the I/O thread; knows nothing of the transport.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll;

use super::connection::{Connection, Phase};
use super::credit::BUFFER_SIZE;
use super::endpoint::{Endpoint, PortPair, Role};
use super::packet::{HOST_CID, Operation, PacketHeader, TYPE_STREAM};
use super::table::{EndpointTable, Token};

/// Most endpoints at a time, in any stage. Each is a descriptor of this process.
pub const MAX_CONNECTIONS: usize = 4096;

/// Resets that may wait for the guest before its packets are left on the ring.
pub const MAX_RESETS: usize = 256;

/// Entries in the list of endpoints with something for the guest, before the same happens.
const MAX_QUEUED: usize = 2 * MAX_CONNECTIONS;

/// For the handshake line, for the guest's answer to REQUEST and to SHUTDOWN.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// Host ports are given out from here up, wrapping below twice this.
const FIRST_HOST_PORT: u32 = 1 << 30;

mod guest_side;

/// Makes the host's end of connections that the guest opens.
pub trait Dialer: Send {
    /// Connect, without blocking, to whoever listens for the guest's `port`.
    ///
    /// # Errors
    /// Nobody listens, or their queue is full: the guest gets a reset.
    fn dial(&mut self, port: u32) -> io::Result<UnixStream>;
}

/// Counts for diagnosis.
#[derive(Clone, Copy, Debug, Default)]
pub struct MuxerCounters {
    /// Packets the guest sent.
    pub packets_from_guest: u64,
    /// Payload bytes of those that belonged to a stream.
    pub bytes_from_guest: u64,
    /// Payload bytes the guest was sent.
    pub bytes_to_guest: u64,
    /// Connections that hosts asked for.
    pub host_connections: u64,
    /// Connections that the guest asked for and got.
    pub guest_connections: u64,
    /// Packets refused because of their header, their length or their connection.
    pub invalid_packets: u64,
    /// Connections refused because there were too many.
    pub refused_connections: u64,
    /// Connections given up because an answer did not come.
    pub timeouts: u64,
}

/// The connections of one guest.
pub struct Muxer {
    guest_cid: u64,
    dialer: Box<dyn Dialer>,
    endpoints: EndpointTable,
    by_ports: HashMap<PortPair, Token>,
    /// Endpoints that may have something for the guest; each at most once.
    queued: VecDeque<Token>,
    resets: VecDeque<PacketHeader>,
    /// In order of time, since all waits are equally long. Stale entries are skipped.
    deadlines: VecDeque<(Instant, Token, Wait)>,
    next_host_port: u32,
    counters: MuxerCounters,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    Handshake,
    Response,
    Confirmation,
}

impl Muxer {
    /// For the guest with `guest_cid`; sockets are registered with `epoll`.
    pub fn new(guest_cid: u64, dialer: Box<dyn Dialer>, epoll: Arc<OwnedFd>) -> Self {
        Self {
            guest_cid,
            dialer,
            endpoints: EndpointTable::new(epoll, MAX_CONNECTIONS),
            by_ports: HashMap::new(),
            queued: VecDeque::new(),
            resets: VecDeque::new(),
            deadlines: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
            counters: MuxerCounters::default(),
        }
    }

    /// What went wrong so far.
    pub fn counters(&self) -> MuxerCounters {
        self.counters
    }

    /// A packet was too broken to be given to [`Muxer::receive`].
    pub fn count_invalid(&mut self) {
        self.counters.packets_from_guest += 1;
        self.counters.invalid_packets += 1;
    }

    /// Endpoints in any stage.
    pub fn connection_count(&self) -> usize {
        self.endpoints.len()
    }

    /// Replies pile up: leave packets on the ring until the guest has taken some.
    pub fn is_reply_queue_full(&self) -> bool {
        // The list of endpoints may hold some that are gone: a guest that opens and resets
        // connections, and takes nothing, would make it grow.
        self.resets.len() >= MAX_RESETS || self.queued.len() >= MAX_QUEUED
    }

    /// What the next host that connects is called, as far as it is free. Who takes over a guest
    /// goes on from there: it still has its ends of streams that are gone.
    pub fn next_host_port(&self) -> u32 {
        self.next_host_port
    }

    /// Go on with host ports from `port`; one that is out of their range is brought into it.
    pub fn set_next_host_port(&mut self, port: u32) {
        self.next_host_port = port % FIRST_HOST_PORT + FIRST_HOST_PORT;
    }

    /// Something waits for guest buffers.
    pub fn has_pending(&self) -> bool {
        !self.resets.is_empty() || !self.queued.is_empty()
    }

    /// When [`Muxer::expire`] has to be called next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.front().map(|entry| entry.0)
    }

    /// Have everything that waits do so for `by` longer: the guest could not answer meanwhile.
    pub fn postpone(&mut self, by: Duration) {
        for (deadline, ..) in &mut self.deadlines {
            *deadline += by;
        }
    }

    /// The guest is gone or started anew: every connection ends.
    pub fn reset(&mut self) {
        for token in self.endpoints.tokens() {
            let Some(endpoint) = self.endpoints.get_mut(token) else {
                continue;
            };
            endpoint.is_queued = false;
            // What the guest sent before is still the host's.
            if endpoint.has_backlog() {
                endpoint.role = Role::Draining;
            } else {
                self.close(token);
            }
        }
        self.by_ports.clear();
        self.queued.clear();
        self.resets.clear();
        self.deadlines.clear();
    }

    // --- endpoints ---------------------------------------------------------------------------

    fn insert(&mut self, endpoint: Endpoint) -> io::Result<Token> {
        let inserted = self.endpoints.insert(endpoint);
        if inserted.is_err() {
            self.counters.refused_connections += 1;
        }
        inserted
    }

    fn endpoint(&mut self, token: Token) -> Option<&mut Endpoint> {
        self.endpoints.get_mut(token)
    }

    fn close(&mut self, token: Token) {
        if let Some(endpoint) = self.endpoints.remove(token)
            && let Role::Stream(ports, _) = endpoint.role
        {
            self.by_ports.remove(&ports);
        }
    }

    /// The guest's side of a stream is over: what it sent is still delivered to the host.
    fn drain_and_close(&mut self, token: Token) {
        let Some(endpoint) = self.endpoint(token) else {
            return;
        };
        if !endpoint.has_backlog() {
            self.close(token);
            return;
        }
        let role = std::mem::replace(&mut endpoint.role, Role::Draining);
        if let Role::Stream(ports, _) = role {
            self.by_ports.remove(&ports);
        }
    }

    fn enqueue(&mut self, token: Token) {
        if let Some(endpoint) = self.endpoint(token)
            && !std::mem::replace(&mut endpoint.is_queued, true)
        {
            self.queued.push_back(token);
        }
    }

    fn wait_for(&mut self, token: Token, wait: Wait) {
        self.deadlines
            .push_back((Instant::now() + REQUEST_TIMEOUT, token, wait));
    }

    /// End a stream and tell the guest by a reset.
    fn abort(&mut self, token: Token) {
        let guest_cid = self.guest_cid;
        let Some(endpoint) = self.endpoint(token) else {
            return;
        };
        if let Role::Stream(ports, connection) = &endpoint.role {
            let reset = outgoing(guest_cid, *ports, connection, Operation::Reset);
            self.resets.push_back(reset);
        }
        self.drain_and_close(token);
    }

    // --- host side ---------------------------------------------------------------------------

    /// A host process connected to the hybrid socket.
    pub fn accept(&mut self, socket: UnixStream) {
        // Each could leave a reset behind when it times out: no more of them while the guest
        // takes none. Too many connections, or no memory for a registration: closed as well.
        if self.is_reply_queue_full() {
            self.counters.refused_connections += 1;
            return;
        }
        if let Ok(token) = self.insert(Endpoint::new(socket, Role::Handshake)) {
            self.wait_for(token, Wait::Handshake);
        }
    }

    /// Epoll reported `flags` for `token`. `is_guest_ready`: packets can be exchanged.
    pub fn on_socket(&mut self, token: Token, flags: epoll::EventFlags, is_guest_ready: bool) {
        let Some(endpoint) = self.endpoint(token) else {
            return;
        };
        let is_broken = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
        endpoint.is_hung_up |= is_broken;
        if is_broken || flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::RDHUP) {
            endpoint.is_readable = true;
        }
        match endpoint.role {
            Role::Handshake => self.on_handshake(token, is_guest_ready),
            Role::Draining => {
                if endpoint.flush().is_err() || !endpoint.has_backlog() {
                    self.close(token);
                }
            }
            Role::Stream(..) => self.on_stream(token, flags),
        }
    }

    fn on_handshake(&mut self, token: Token, is_guest_ready: bool) {
        let Some(endpoint) = self.endpoint(token) else {
            return;
        };
        match endpoint.read_handshake() {
            Ok(None) => {}
            Ok(Some(guest_port)) if is_guest_ready => self.request(token, guest_port),
            Ok(Some(_)) | Err(_) => self.close(token),
        }
    }

    fn request(&mut self, token: Token, guest: u32) {
        let mut host = self.next_host_port;
        while self.by_ports.contains_key(&PortPair { host, guest }) {
            // Ends: there are far more ports than connections.
            host = next_port(host);
        }
        self.next_host_port = next_port(host);
        let ports = PortPair { host, guest };
        let Some(endpoint) = self.endpoint(token) else {
            return;
        };
        endpoint.role = Role::Stream(ports, Connection::requested());
        self.counters.host_connections += 1;
        self.by_ports.insert(ports, token);
        self.wait_for(token, Wait::Response);
        self.enqueue(token);
    }

    fn on_stream(&mut self, token: Token, flags: epoll::EventFlags) {
        let Some(endpoint) = self.endpoint(token) else {
            return;
        };
        if flags.contains(epoll::EventFlags::OUT) && endpoint.has_backlog() {
            let flushed = endpoint.flush();
            let is_empty = !endpoint.has_backlog();
            let Role::Stream(_, connection) = &mut endpoint.role else {
                return;
            };
            match flushed {
                // The counter type holds: a backlog is at most BUFFER_SIZE.
                Ok(count) => connection.on_forwarded(u32::try_from(count).unwrap_or(BUFFER_SIZE)),
                Err(_) => connection.on_host_deaf(),
            }
            if is_empty && connection.guest_sends_no_more() {
                endpoint.shut_write();
            }
        }
        let Some(endpoint) = self.endpoint(token) else {
            return;
        };
        let is_hung_up = endpoint.is_hung_up;
        let Role::Stream(_, connection) = &mut endpoint.role else {
            return;
        };
        if is_hung_up && connection.phase() == Phase::Established && !connection.wants_host_data() {
            // Nothing is left to read, so the hang-up is news for the guest now.
            connection.on_host_closed(true);
        }
        self.after_change(token);
    }

    /// A stream's state changed: queue it, or start waiting, as that needs.
    fn after_change(&mut self, token: Token) {
        let Some(endpoint) = self.endpoint(token) else {
            return;
        };
        let (is_readable, is_hung_up) = (endpoint.is_readable, endpoint.is_hung_up);
        let Role::Stream(_, connection) = &mut endpoint.role else {
            return;
        };
        let has_data = is_readable && connection.wants_host_data();
        if has_data && connection.data_allowance() == 0 {
            connection.on_blocked_by_credit();
        }
        let is_abandoned = connection.phase() == Phase::Requested && is_hung_up;
        let is_due = connection.next_control_packet().is_some()
            || has_data && connection.data_allowance() > 0;
        let has_to_confirm = connection.take_closing_start();
        if is_abandoned {
            // The host gave up before the guest answered.
            self.abort(token);
            return;
        }
        if has_to_confirm {
            self.wait_for(token, Wait::Confirmation);
        }
        if is_due {
            self.enqueue(token);
        }
    }

    /// Give up what has waited too long.
    pub fn expire(&mut self, now: Instant) {
        while let Some(&(deadline, token, wait)) = self.deadlines.front()
            && deadline <= now
        {
            self.deadlines.pop_front();
            let Some(endpoint) = self.endpoint(token) else {
                continue;
            };
            let is_still_waiting = match (&endpoint.role, wait) {
                (Role::Handshake, Wait::Handshake) => true,
                (Role::Stream(_, connection), Wait::Response) => {
                    connection.phase() == Phase::Requested
                }
                (Role::Stream(_, connection), Wait::Confirmation) => {
                    connection.phase() == Phase::Closing
                }
                _ => false,
            };
            if is_still_waiting {
                self.counters.timeouts += 1;
                if wait == Wait::Handshake {
                    self.close(token);
                } else {
                    self.abort(token);
                }
            }
        }
    }
}

impl std::fmt::Debug for Muxer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Muxer")
            .field("guest_cid", &self.guest_cid)
            .field("connections", &self.connection_count())
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

fn next_port(port: u32) -> u32 {
    (port + 1) % FIRST_HOST_PORT + FIRST_HOST_PORT
}

/// The header of a packet of this connection to the guest.
fn outgoing(
    guest_cid: u64,
    ports: PortPair,
    connection: &Connection,
    operation: Operation,
) -> PacketHeader {
    PacketHeader {
        src_cid: HOST_CID,
        dst_cid: guest_cid,
        src_port: ports.host,
        dst_port: ports.guest,
        len: 0,
        socket_type: TYPE_STREAM,
        op: operation as u16,
        flags: 0,
        buf_alloc: BUFFER_SIZE,
        fwd_cnt: connection.credit().forwarded(),
    }
}

#[cfg(test)]
#[path = "muxer_tests.rs"]
mod tests;
