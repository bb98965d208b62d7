//! All connections of one guest: ports to sockets, and what waits to go to the guest.
//!
//! Guest packets come in through [`Muxer::receive`], packets for the guest leave through
//! [`Muxer::transmit`], socket readiness enters through [`Muxer::on_socket`]. Everything is
//! bounded: connections by [`MAX_CONNECTIONS`], each by its credit, replies to broken packets by
//! [`MAX_RESETS`] (the device stops taking packets until the guest takes the replies). Runs on
//! the I/O thread; knows nothing of vhost-user.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll;

use super::buffers::GuestBuffers;
use super::connection::{Action, Connection, Phase};
use super::credit::BUFFER_SIZE;
use super::endpoint::{Endpoint, PortPair, Role};
use super::packet::{HOST_CID, MAX_PAYLOAD_SIZE, Operation, PacketHeader, TYPE_STREAM};
use super::queue::{QueueError, RxRing};

/// Most endpoints at a time, in any stage.
pub const MAX_CONNECTIONS: usize = 1023;

/// Resets that may wait for the guest before its packets are left on the ring.
pub const MAX_RESETS: usize = 256;

/// For the handshake line, for the guest's answer to REQUEST and to SHUTDOWN.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// Host ports are given out from here up, wrapping below twice this.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Makes the host's end of connections that the guest opens.
pub trait Dialer: Send {
    /// Connect, without blocking, to whoever listens for the guest's `port`.
    ///
    /// # Errors
    /// Nobody listens, or their queue is full: the guest gets a reset.
    fn dial(&mut self, port: u32) -> io::Result<UnixStream>;
}

/// Names an endpoint in epoll events: slot below, generation above, so that an event for a past
/// endpoint never reaches the next one in its slot. Never below `1 << 32`.
pub type Token = u64;

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    endpoint: Option<Box<Endpoint>>,
}

/// Counts for diagnosis; all wrap.
#[derive(Clone, Copy, Debug, Default)]
pub struct MuxerCounters {
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
    epoll: Arc<OwnedFd>,
    slots: Vec<Slot>,
    free: Vec<usize>,
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
            epoll,
            slots: Vec::new(),
            free: Vec::new(),
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
        self.counters.invalid_packets += 1;
    }

    /// Endpoints in any stage.
    pub fn connection_count(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Replies pile up: leave packets on the ring until the guest has taken some.
    pub fn is_reply_queue_full(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// Something waits for guest buffers.
    pub fn has_pending(&self) -> bool {
        !self.resets.is_empty() || !self.queued.is_empty()
    }

    /// When [`Muxer::expire`] has to be called next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.front().map(|entry| entry.0)
    }

    /// The guest is gone or started anew: every connection ends.
    pub fn reset(&mut self) {
        for index in 0..self.slots.len() {
            let Some(endpoint) = &mut self.slots[index].endpoint else {
                continue;
            };
            endpoint.is_queued = false;
            // What the guest sent before is still the host's.
            if endpoint.has_backlog() {
                endpoint.role = Role::Draining;
            } else {
                self.release(index);
            }
        }
        self.by_ports.clear();
        self.queued.clear();
        self.resets.clear();
        self.deadlines.clear();
    }

    // --- endpoints ---------------------------------------------------------------------------

    fn insert(&mut self, endpoint: Endpoint) -> io::Result<Token> {
        if self.connection_count() >= MAX_CONNECTIONS {
            self.counters.refused_connections += 1;
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let index = self.free.last().copied().unwrap_or(self.slots.len());
        let generation = self.slots.get(index).map_or(1, |slot| slot.generation);
        let token = (u64::from(generation) << 32) | index as u64;
        let flags = epoll::EventFlags::IN
            | epoll::EventFlags::OUT
            | epoll::EventFlags::RDHUP
            | epoll::EventFlags::ET;
        epoll::add(
            &self.epoll,
            endpoint.socket(),
            epoll::EventData::new_u64(token),
            flags,
        )?;
        if self.free.pop().is_none() {
            self.slots.push(Slot {
                generation,
                endpoint: None,
            });
        }
        self.slots[index].endpoint = Some(Box::new(endpoint));
        Ok(token)
    }

    fn index_of(&self, token: Token) -> Option<usize> {
        // Truncation is the point: the low half is the slot.
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the low half of a token is the slot"
        )]
        let index = token as u32 as usize;
        let slot = self.slots.get(index)?;
        (u64::from(slot.generation) == token >> 32 && slot.endpoint.is_some()).then_some(index)
    }

    fn endpoint(&mut self, token: Token) -> Option<&mut Endpoint> {
        let index = self.index_of(token)?;
        self.slots[index].endpoint.as_deref_mut()
    }

    /// Close a slot's socket (which also ends its registration) and free the slot.
    fn release(&mut self, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        let Some(endpoint) = slot.endpoint.take() else {
            return;
        };
        slot.generation = slot.generation.wrapping_add(1).max(1);
        self.free.push(index);
        if let Role::Stream(ports, _) = endpoint.role {
            self.by_ports.remove(&ports);
        }
    }

    fn close(&mut self, token: Token) {
        if let Some(index) = self.index_of(token) {
            self.release(index);
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

    // --- guest side --------------------------------------------------------------------------

    /// A packet came from the guest. `payload` is everything after the header.
    pub fn receive(&mut self, header: &PacketHeader, payload: &GuestBuffers<'_>) {
        let operation = match header.check(self.guest_cid) {
            Ok(operation) if header.len as usize <= payload.len() => operation,
            _ => return self.refuse(header),
        };
        let ports = PortPair {
            host: header.dst_port,
            guest: header.src_port,
        };
        let Some(token) = self.by_ports.get(&ports).copied() else {
            match operation {
                Operation::Request => self.dial(ports, header),
                Operation::Reset => {}
                _ => self.refuse(header),
            }
            return;
        };
        let Some(endpoint) = self.endpoint(token) else {
            return;
        };
        let Role::Stream(_, connection) = &mut endpoint.role else {
            return;
        };
        match connection.on_packet(operation, header) {
            Ok(action) => self.act(token, action, payload),
            Err(_broken_rule) => {
                self.counters.invalid_packets += 1;
                self.abort(token);
            }
        }
    }

    /// A packet that belongs to nothing, or is malformed: answer with a reset, and end the
    /// connection it names, if the guest has one by those ports.
    fn refuse(&mut self, header: &PacketHeader) {
        self.counters.invalid_packets += 1;
        if header.op == Operation::Reset as u16 {
            return;
        }
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            // No reset would find its way to a sender that lies about its address.
            return;
        }
        let ports = PortPair {
            host: header.dst_port,
            guest: header.src_port,
        };
        if header.socket_type == TYPE_STREAM
            && let Some(token) = self.by_ports.get(&ports).copied()
        {
            self.abort(token);
        } else {
            self.resets.push_back(header.reset_reply());
        }
    }

    /// The guest asks for a connection to the host.
    fn dial(&mut self, ports: PortPair, request: &PacketHeader) {
        let made = self.dialer.dial(ports.host).and_then(|socket| {
            let role = Role::Stream(ports, Connection::accepted(request));
            self.insert(Endpoint::new(socket, role))
        });
        match made {
            Ok(token) => {
                self.by_ports.insert(ports, token);
                self.enqueue(token);
            }
            Err(_refusal) => self.resets.push_back(request.reset_reply()),
        }
    }

    fn act(&mut self, token: Token, action: Action, payload: &GuestBuffers<'_>) {
        let Some(endpoint) = self.endpoint(token) else {
            return;
        };
        let has_backlog = endpoint.has_backlog();
        let Role::Stream(ports, connection) = &mut endpoint.role else {
            return;
        };
        match action {
            Action::None => {}
            Action::Accepted => {
                let host_port = ports.host;
                if endpoint.write_accepted(host_port).is_err() {
                    return self.abort(token);
                }
            }
            Action::Deliver(len) => self.deliver(token, len, payload),
            Action::HalfClosed => {
                let (is_silent, is_deaf) = (
                    connection.guest_sends_no_more(),
                    connection.guest_receives_no_more(),
                );
                if is_silent && !has_backlog {
                    endpoint.shut_write();
                }
                if is_deaf {
                    endpoint.shut_read();
                }
            }
            Action::Closed => return self.abort(token),
            Action::Reset => return self.drain_and_close(token),
        }
        self.after_change(token);
    }

    fn deliver(&mut self, token: Token, len: u32, payload: &GuestBuffers<'_>) {
        let Some(endpoint) = self.endpoint(token) else {
            return;
        };
        let delivered = if payload.len() == len as usize {
            endpoint.deliver(payload)
        } else {
            endpoint.deliver(&payload.range(0, len as usize))
        };
        let Role::Stream(_, connection) = &mut endpoint.role else {
            return;
        };
        match delivered {
            // At most `len`, which is a u32.
            Ok(count) => connection.on_forwarded(u32::try_from(count).unwrap_or(len)),
            Err(_gone) => {
                connection.on_host_deaf();
                endpoint.drop_backlog();
            }
        }
    }

    /// Fill guest buffers with what waits, fairly: one packet or batch of each in turn.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn transmit(&mut self, ring: &mut RxRing<'_, '_>) -> Result<(), QueueError> {
        while self.has_pending() && !ring.is_done() {
            if let Some(reset) = self.resets.front() {
                if ring.put(reset)? {
                    self.resets.pop_front();
                }
                continue;
            }
            let Some(token) = self.queued.pop_front() else {
                break;
            };
            let Some(endpoint) = self.endpoint(token) else {
                continue;
            };
            endpoint.is_queued = false;
            self.transmit_one(token, ring)?;
            self.after_change(token);
        }
        Ok(())
    }

    fn transmit_one(&mut self, token: Token, ring: &mut RxRing<'_, '_>) -> Result<(), QueueError> {
        let guest_cid = self.guest_cid;
        let Some(endpoint) = self.endpoint(token) else {
            return Ok(());
        };
        let Role::Stream(ports, connection) = &mut endpoint.role else {
            return Ok(());
        };
        let ports = *ports;
        if let Some(packet) = connection.next_control_packet() {
            let header = outgoing(guest_cid, ports, connection, packet.operation);
            if ring.put(&PacketHeader {
                flags: packet.flags,
                ..header
            })? {
                connection.on_control_sent(packet);
            }
            return Ok(());
        }
        let allowance = connection.data_allowance();
        if allowance == 0 || !endpoint.is_readable {
            return Ok(());
        }
        let wanted = allowance.min(MAX_PAYLOAD_SIZE) as usize;
        let reservation = ring.reserve(wanted, endpoint.read_batch)?;
        if reservation.payload.is_empty() {
            return Ok(());
        }
        let result = endpoint.read_into(&reservation.payload);
        let is_gone = endpoint.is_hung_up;
        let Role::Stream(_, connection) = &mut endpoint.role else {
            return Ok(());
        };
        let filled = match result {
            Ok(0) => {
                connection.on_host_closed(is_gone);
                0
            }
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(_broken) => {
                connection.on_host_closed(true);
                0
            }
        };
        ring.commit(&reservation, filled, |len| {
            connection.on_data_sent(len);
            connection.on_account_sent();
            let header = outgoing(guest_cid, ports, connection, Operation::ReadWrite);
            PacketHeader { len, ..header }
        })
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
