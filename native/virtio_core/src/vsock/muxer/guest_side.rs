//! The muxer's dealings with the guest: packets in, packets out.
//!
//! A packet that breaks a rule costs the guest that connection, or nothing but a reset; replies
//! are queued and leave when the guest has buffers. I/O thread.

use std::io;

use crate::buffers::GuestBuffers;
use crate::ring::RingError;

use super::super::connection::{Action, Connection};
use super::super::endpoint::{Endpoint, PortPair, Role};
use super::super::packet::{HOST_CID, MAX_PAYLOAD_SIZE, Operation, PacketHeader, TYPE_STREAM};
use super::super::receive::RxRing;
use super::super::table::Token;
use super::{Muxer, outgoing};

impl Muxer {
    /// A packet came from the guest. `payload` is everything after the header.
    pub fn receive(&mut self, header: &PacketHeader, payload: &GuestBuffers) {
        self.counters.packets_from_guest += 1;
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
                self.counters.guest_connections += 1;
                self.by_ports.insert(ports, token);
                self.enqueue(token);
            }
            Err(_refusal) => self.resets.push_back(request.reset_reply()),
        }
    }

    fn act(&mut self, token: Token, action: Action, payload: &GuestBuffers) {
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
            Action::Deliver(len) => {
                self.counters.bytes_from_guest += u64::from(len);
                self.deliver(token, len, payload);
            }
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

    fn deliver(&mut self, token: Token, len: u32, payload: &GuestBuffers) {
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
    pub fn transmit(&mut self, ring: &mut RxRing<'_>) -> Result<(), RingError> {
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

    fn transmit_one(&mut self, token: Token, ring: &mut RxRing<'_>) -> Result<(), RingError> {
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
        let filled = if reservation.payload.is_empty() {
            0
        } else {
            read_host(endpoint, &reservation.payload)
        };
        let Role::Stream(_, connection) = &mut endpoint.role else {
            return Ok(());
        };
        ring.commit(reservation, filled, |len| {
            connection.on_data_sent(len);
            connection.on_account_sent();
            let header = outgoing(guest_cid, ports, connection, Operation::ReadWrite);
            PacketHeader { len, ..header }
        });
        self.counters.bytes_to_guest += filled as u64;
        Ok(())
    }
}

/// Read the host's socket into guest buffers; what its end means for the stream is noted.
fn read_host(endpoint: &mut Endpoint, payload: &GuestBuffers) -> usize {
    let result = endpoint.read_into(payload);
    let is_gone = endpoint.is_hung_up;
    let Role::Stream(_, connection) = &mut endpoint.role else {
        return 0;
    };
    match result {
        Ok(0) => connection.on_host_closed(is_gone),
        Ok(count) => return count,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        Err(_broken) => connection.on_host_closed(true),
    }
    0
}
