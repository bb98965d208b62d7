//! The protocol state of one stream: no sockets, no memory, no clock.
//!
//! ```text
//!   host dialled                           guest dialled (host socket connected)
//!        │ queue REQUEST                         │ queue RESPONSE
//!        ▼                                       ▼
//!   [Requested] ────── RESPONSE ──────────► [Established] ◄─┐ RW, CREDIT_UPDATE, CREDIT_REQUEST,
//!        │                                    │  │   │  └───┘ SHUTDOWN of one direction
//!        │ RST, anything else, 2 s            │  │   └─ guest SHUTDOWN of both ─► reply RST ─┐
//!        │                                    │  └─ host closed: send SHUTDOWN of both       │
//!        │                                    │        [Closing] ── RST, or 2 s: send RST ───┤
//!        │                                    └─ RST, or a broken rule: reply RST ───────────┤
//!        └────────────────────────────────────────────────────────────────────────► (closed) ◄
//! ```
//!
//! A half-close travels both ways: the guest's SHUTDOWN(SEND) becomes `shutdown(SHUT_WR)` of the
//! host socket once everything before it is written, and end of file on the host socket becomes
//! SHUTDOWN(SEND). The muxer owns one of these per connection and calls it on the I/O thread.

use thiserror::Error;

use super::credit::Credit;
use super::packet::{Operation, PacketHeader, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// A rule of the protocol that the guest broke on this connection. It costs it the connection.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ConnectionError {
    /// the operation makes no sense now
    #[error("{operation:?} is not allowed in state {phase:?}")]
    UnexpectedOperation {
        /// What the guest sent.
        operation: Operation,
        /// Where the connection stood.
        phase: Phase,
    },
    /// more bytes than the credit given
    #[error("{len} payload bytes are more than the credit")]
    CreditExceeded {
        /// Payload length of the packet.
        len: u32,
    },
    /// data after the guest said it would send no more
    #[error("{len} payload bytes after the end of the stream")]
    DataAfterShutdown {
        /// Payload length of the packet.
        len: u32,
    },
}

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The host dialled; the guest has not answered.
    Requested,
    /// Data may flow.
    Established,
    /// The host is gone; the guest was told and has not confirmed.
    Closing,
}

/// What the muxer has to do after a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// The guest accepted: tell the host.
    Accepted,
    /// Deliver this many payload bytes to the host.
    Deliver(u32),
    /// The guest closed one direction: see [`Connection::guest_sends_no_more`] and its twin.
    HalfClosed,
    /// The guest closed both directions: answer with a reset, deliver what is buffered.
    Closed,
    /// The guest reset the connection: forget it, answer nothing.
    Reset,
}

/// One control packet or permission to send data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlPacket {
    /// What to send.
    pub operation: Operation,
    /// Its flags.
    pub flags: u32,
}

/// Control packets that wait for a guest buffer: at most one of each kind, bounded by design.
#[derive(Clone, Copy, Debug, Default)]
struct PendingControl(u16);

impl PendingControl {
    /// The most urgent first. Resets never wait here: they outlive the connection.
    const ORDER: [Operation; 5] = [
        Operation::Request,
        Operation::Response,
        Operation::Shutdown,
        Operation::CreditRequest,
        Operation::CreditUpdate,
    ];

    fn of(operation: Operation) -> Self {
        Self(1 << operation as u16)
    }

    fn insert(&mut self, operation: Operation) {
        self.0 |= Self::of(operation).0;
    }

    fn remove(&mut self, operation: Operation) {
        self.0 &= !Self::of(operation).0;
    }

    fn first(self) -> Option<Operation> {
        Self::ORDER
            .into_iter()
            .find(|operation| self.0 & Self::of(*operation).0 != 0)
    }
}

/// The state of one stream.
#[derive(Debug)]
pub struct Connection {
    phase: Phase,
    credit: Credit,
    pending: PendingControl,
    /// SHUTDOWN flags the guest sent.
    guest_shutdown: u32,
    /// SHUTDOWN flags we sent or are about to send.
    host_shutdown: u32,
    is_closing_new: bool,
}

impl Connection {
    /// The host wants a connection to the guest: queues REQUEST.
    pub fn requested() -> Self {
        let pending = PendingControl::of(Operation::Request);
        Self::new(Phase::Requested, Credit::default(), pending)
    }

    /// The guest's REQUEST was accepted by the host: queues RESPONSE.
    pub fn accepted(request: &PacketHeader) -> Self {
        let mut credit = Credit::default();
        credit.learn(request.buf_alloc, request.fwd_cnt);
        let pending = PendingControl::of(Operation::Response);
        Self::new(Phase::Established, credit, pending)
    }

    fn new(phase: Phase, credit: Credit, pending: PendingControl) -> Self {
        Self {
            phase,
            credit,
            pending,
            guest_shutdown: 0,
            host_shutdown: 0,
            is_closing_new: false,
        }
    }

    /// Where the connection stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The credit account, for headers of outgoing packets.
    pub fn credit(&self) -> &Credit {
        &self.credit
    }

    /// The guest closed its sending direction.
    pub fn guest_sends_no_more(&self) -> bool {
        self.guest_shutdown & SHUTDOWN_SEND != 0
    }

    /// The guest closed its receiving direction.
    pub fn guest_receives_no_more(&self) -> bool {
        self.guest_shutdown & SHUTDOWN_RECEIVE != 0
    }

    /// The host takes no more bytes: what the guest still sends is dropped.
    pub fn host_receives_no_more(&self) -> bool {
        self.host_shutdown & SHUTDOWN_RECEIVE != 0
    }

    /// A packet of this connection arrived; its header passed [`PacketHeader::check`].
    ///
    /// # Errors
    /// The guest broke a rule: reset the connection.
    pub fn on_packet(
        &mut self,
        operation: Operation,
        header: &PacketHeader,
    ) -> Result<Action, ConnectionError> {
        if operation == Operation::Reset {
            return Ok(Action::Reset);
        }
        self.credit.learn(header.buf_alloc, header.fwd_cnt);
        match (self.phase, operation) {
            (Phase::Requested, Operation::Response) => {
                self.phase = Phase::Established;
                Ok(Action::Accepted)
            }
            (Phase::Established | Phase::Closing, Operation::ReadWrite) => self.on_data(header.len),
            (Phase::Established | Phase::Closing, Operation::Shutdown) => {
                self.guest_shutdown |= header.flags & SHUTDOWN_BOTH;
                if self.guest_shutdown == SHUTDOWN_BOTH {
                    return Ok(Action::Closed);
                }
                Ok(Action::HalfClosed)
            }
            (Phase::Established | Phase::Closing, Operation::CreditRequest) => {
                self.pending.insert(Operation::CreditUpdate);
                Ok(Action::None)
            }
            (Phase::Established | Phase::Closing, Operation::CreditUpdate) => Ok(Action::None),
            (phase, operation) => Err(ConnectionError::UnexpectedOperation { operation, phase }),
        }
    }

    fn on_data(&mut self, len: u32) -> Result<Action, ConnectionError> {
        if self.guest_sends_no_more() {
            return Err(ConnectionError::DataAfterShutdown { len });
        }
        if !self.credit.receive(len) {
            return Err(ConnectionError::CreditExceeded { len });
        }
        if self.host_receives_no_more() {
            // Bytes that crossed our SHUTDOWN: nobody will read them, but the guest's account
            // must stay right for the other direction.
            self.on_forwarded(len);
            return Ok(Action::None);
        }
        Ok(Action::Deliver(len))
    }

    /// `len` bytes reached the host socket: the guest may send as many again.
    pub fn on_forwarded(&mut self, len: u32) {
        self.credit.forward(len);
        if self.credit.is_update_due() && !self.guest_sends_no_more() {
            self.pending.insert(Operation::CreditUpdate);
        }
    }

    /// The host socket is at its end of file; `is_gone` when it also takes no more bytes.
    pub fn on_host_closed(&mut self, is_gone: bool) {
        self.shut_down(if is_gone {
            SHUTDOWN_BOTH
        } else {
            SHUTDOWN_SEND
        });
    }

    /// The host socket takes no more bytes, but may still have some for the guest.
    pub fn on_host_deaf(&mut self) {
        self.shut_down(SHUTDOWN_RECEIVE);
    }

    fn shut_down(&mut self, flags: u32) {
        if self.host_shutdown | flags != self.host_shutdown {
            self.host_shutdown |= flags;
            self.pending.insert(Operation::Shutdown);
        }
        if self.host_shutdown == SHUTDOWN_BOTH && self.phase == Phase::Established {
            self.phase = Phase::Closing;
            self.is_closing_new = true;
        }
    }

    /// Payload bytes that may go to the guest now; 0 if none may.
    pub fn data_allowance(&self) -> u32 {
        let may_send = self.phase == Phase::Established
            && self.host_shutdown & SHUTDOWN_SEND == 0
            && !self.guest_receives_no_more();
        if may_send { self.credit.peer_free() } else { 0 }
    }

    /// The host socket's bytes are still wanted (with or without credit right now).
    pub fn wants_host_data(&self) -> bool {
        self.phase == Phase::Established
            && self.host_shutdown & SHUTDOWN_SEND == 0
            && !self.guest_receives_no_more()
    }

    /// The host has data and the guest no room: ask it to tell when it has. Asked once per stop.
    pub fn on_blocked_by_credit(&mut self) {
        if self.credit.ask_once() {
            self.pending.insert(Operation::CreditRequest);
        }
    }

    /// `len` payload bytes were put in a guest buffer.
    pub fn on_data_sent(&mut self, len: u32) {
        self.credit.send(len);
    }

    /// True once after the connection went to [`Phase::Closing`]: a time limit starts.
    pub fn take_closing_start(&mut self) -> bool {
        std::mem::take(&mut self.is_closing_new)
    }

    /// The next control packet, the most urgent first. It stays until
    /// [`Connection::on_control_sent`].
    pub fn next_control_packet(&self) -> Option<ControlPacket> {
        let operation = self.pending.first()?;
        let flags = if operation == Operation::Shutdown {
            self.host_shutdown
        } else {
            0
        };
        Some(ControlPacket { operation, flags })
    }

    /// The packet given by [`Connection::next_control_packet`] left for the guest.
    pub fn on_control_sent(&mut self, packet: ControlPacket) {
        self.pending.remove(packet.operation);
        self.on_account_sent();
    }

    /// A packet with our account left for the guest: no separate credit update is due.
    pub fn on_account_sent(&mut self) {
        self.credit.told();
        self.pending.remove(Operation::CreditUpdate);
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
