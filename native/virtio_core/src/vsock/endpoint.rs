//! The host side of one connection: its socket, and the guest's bytes the socket did not take.
//!
//! Sockets are registered edge-triggered, so an endpoint remembers readiness itself and drops it
//! only on EAGAIN. Bytes go straight between guest memory and the socket; only what a full
//! socket refuses is copied, at most [`super::credit::BUFFER_SIZE`] bytes. Owned by the muxer.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, SendFlags};

use crate::buffers::GuestBuffers;

use super::connection::Connection;
use super::handshake::{HandshakeError, MAX_LINE_SIZE, parse_connect};

/// Ports of a connection: unique among the living ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortPair {
    /// Port on the host's side.
    pub host: u32,
    /// Port on the guest's side.
    pub guest: u32,
}

/// Most guest buffers filled by one read of a socket.
const MAX_READ_BATCH: usize = 32;

/// A host socket and everything about its connection.
#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "readiness facts, each independent of the others"
)]
pub struct Endpoint {
    socket: UnixStream,
    /// A read may give something.
    pub is_readable: bool,
    is_writable: bool,
    /// The host closed both directions.
    pub is_hung_up: bool,
    /// In the muxer's list of endpoints with something for the guest.
    pub is_queued: bool,
    /// How many guest buffers to offer to the next read.
    pub read_batch: usize,
    backlog: Vec<u8>,
    backlog_start: usize,
    is_write_shut: bool,
    /// What the socket is used for.
    pub role: Role,
}

/// The stages of an endpoint's life.
#[derive(Debug)]
pub enum Role {
    /// The host connected and has not named a port yet.
    Handshake,
    /// A connection with the guest.
    Stream(PortPair, Connection),
    /// The guest's side is over; the backlog is still being delivered.
    Draining,
}

impl Endpoint {
    /// Wrap a non-blocking socket.
    pub fn new(socket: UnixStream, role: Role) -> Self {
        Self {
            socket,
            is_readable: false,
            is_writable: true,
            is_hung_up: false,
            is_queued: false,
            read_batch: 1,
            backlog: Vec::new(),
            backlog_start: 0,
            is_write_shut: false,
            role,
        }
    }

    /// The socket, for registration.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Read the `CONNECT` line, and no byte more. `None`: not complete yet.
    ///
    /// # Errors
    /// No such line, or the socket failed.
    pub fn read_handshake(&mut self) -> Result<Option<u32>, HandshakeError> {
        let mut line = [0; MAX_LINE_SIZE];
        let received = rustix::net::recv(&self.socket, &mut line, RecvFlags::PEEK);
        let count = match received {
            Ok((_, 0)) => return Err(HandshakeError::Closed),
            Ok((_, count)) => count,
            Err(errno) if errno == rustix::io::Errno::AGAIN => return Ok(None),
            Err(errno) => return Err(HandshakeError::Socket(errno.into())),
        };
        let Some((port, line_len)) = parse_connect(&line[..count])? else {
            return Ok(None);
        };
        // What was just peeked is there: one call takes it.
        rustix::net::recv(&self.socket, &mut line[..line_len], RecvFlags::empty())
            .map_err(|errno| HandshakeError::Socket(errno.into()))?;
        Ok(Some(port))
    }

    /// Tell the host which port it got.
    ///
    /// # Errors
    /// The socket did not take the line: it is closed, since nothing was written before.
    pub fn write_accepted(&mut self, host_port: u32) -> io::Result<()> {
        let line = format!("OK {host_port}\n");
        let sent = rustix::net::send(&self.socket, line.as_bytes(), SendFlags::NOSIGNAL)?;
        if sent == line.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }

    /// Deliver payload of the guest: gives the bytes the socket took at once; the rest is kept.
    ///
    /// # Errors
    /// The host takes no more; nothing is kept.
    pub fn deliver(&mut self, payload: &GuestBuffers) -> io::Result<usize> {
        let mut sent = 0;
        while self.is_writable && !self.has_backlog() && sent < payload.len() {
            match payload.send(self.socket.as_fd(), sent) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.is_writable = false,
                Err(error) => return Err(error),
            }
        }
        let rest = payload.len() - sent;
        if rest > 0 {
            // The connection's credit bounds this: it admitted no more than BUFFER_SIZE bytes.
            let start = self.backlog.len();
            self.backlog.resize(start + rest, 0);
            payload.copy_to(sent, &mut self.backlog[start..]);
        }
        Ok(sent)
    }

    /// The socket can be written: give it the backlog. Gives how many bytes it took.
    ///
    /// # Errors
    /// The host takes no more; the backlog is dropped.
    pub fn flush(&mut self) -> io::Result<usize> {
        self.is_writable = true;
        let mut flushed = 0;
        while let Some(rest) = self
            .backlog
            .get(self.backlog_start..)
            .filter(|b| !b.is_empty())
        {
            match rustix::net::send(&self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(count) => {
                    flushed += count;
                    self.backlog_start += count;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    self.is_writable = false;
                    self.compact();
                    return Ok(flushed);
                }
                Err(errno) => {
                    self.drop_backlog();
                    return Err(errno.into());
                }
            }
        }
        self.drop_backlog();
        Ok(flushed)
    }

    /// Keep the buffer no larger than what is in it.
    fn compact(&mut self) {
        self.backlog.drain(..self.backlog_start);
        self.backlog_start = 0;
    }

    /// Forget what could not be delivered.
    pub fn drop_backlog(&mut self) {
        self.backlog = Vec::new();
        self.backlog_start = 0;
    }

    /// Bytes wait for the host to read.
    pub fn has_backlog(&self) -> bool {
        self.backlog.len() > self.backlog_start
    }

    /// Read into guest memory.
    ///
    /// # Errors
    /// As readv(2); EAGAIN clears the readiness.
    pub fn read_into(&mut self, payload: &GuestBuffers) -> io::Result<usize> {
        let result = payload.receive(self.socket.as_fd());
        match &result {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.is_readable = false,
            Ok(count) if *count == payload.len() => {
                self.read_batch = (self.read_batch * 2).min(MAX_READ_BATCH);
            }
            _ => self.read_batch = 1,
        }
        result
    }

    /// The guest sends no more and everything was written: pass that on, once.
    pub fn shut_write(&mut self) {
        if !std::mem::replace(&mut self.is_write_shut, true) {
            // ENOTCONN: the host is gone, which the hang-up event tells.
            let _result = self.socket.shutdown(Shutdown::Write);
        }
    }

    /// The guest receives no more: the host's writes fail from now on.
    pub fn shut_read(&mut self) {
        let _result = self.socket.shutdown(Shutdown::Read);
    }
}
