//! Bytes both ways between two connected stream sockets, each direction ending by itself.
//!
//! ```text
//! each direction:  copying ──end of file──▶ flushing ──all written──▶ shut
//!                     └──────────── read or write fails ────────────────┘
//! ```
//!
//! [`Relay`] is a source on the I/O thread. It ends when both directions have; then both descriptors
//! close. A direction that fails leaves the other alone: a server may answer and close without
//! having read everything, and its answer is still to be delivered. What waits to be written is
//! bounded, so that a slow reader slows the writer and not the memory.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{self, RecvFlags, SendFlags, Shutdown};

use crate::event::{Completion, Value};
use crate::reactor::{Context, Interest, Readiness, Source, StopReason};
use crate::status::Code;

/// Bytes on their way in one direction.
const BUFFER: usize = 64 << 10;

/// One direction.
#[derive(Default)]
struct Direction {
    buffer: Vec<u8>,
    start: usize,
    is_at_end: bool,
    is_shut: bool,
}

impl Direction {
    fn waiting(&self) -> &[u8] {
        self.buffer.get(self.start..).unwrap_or_default()
    }

    /// Move what does not block: at most one buffer, so that the others get their turn.
    fn advance(&mut self, from: &OwnedFd, to: &OwnedFd) -> io::Result<u64> {
        if self.waiting().is_empty() && !self.is_at_end {
            self.read(from)?;
        }
        let moved = self.write(to)?;
        if self.is_at_end && self.waiting().is_empty() && !self.is_shut {
            self.is_shut = true;
            match net::shutdown(to, Shutdown::Write) {
                // The peer has gone entirely: nobody is left to tell.
                Ok(()) | Err(Errno::NOTCONN) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(moved)
    }

    /// Give up: what waits is nobody's any more.
    fn fail(&mut self, to: &OwnedFd) {
        self.buffer = Vec::new();
        self.start = 0;
        self.is_at_end = true;
        self.is_shut = true;
        // Whoever reads there learns of it, unless that end is gone as well.
        let _shut = net::shutdown(to, Shutdown::Write);
    }

    fn read(&mut self, from: &OwnedFd) -> io::Result<()> {
        self.start = 0;
        self.buffer.resize(BUFFER, 0);
        match net::recv(from, self.buffer.as_mut_slice(), RecvFlags::DONTWAIT) {
            Ok((0, _)) => {
                self.is_at_end = true;
                self.buffer = Vec::new();
            }
            Ok((count, _)) => self.buffer.truncate(count),
            // Idle: a connection that says nothing needs no memory.
            Err(Errno::AGAIN | Errno::INTR) => self.buffer = Vec::new(),
            Err(errno) => return Err(errno.into()),
        }
        Ok(())
    }

    fn write(&mut self, to: &OwnedFd) -> io::Result<u64> {
        if self.waiting().is_empty() {
            return Ok(0);
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match net::send(to, self.waiting(), flags) {
            Ok(count) => {
                self.start += count;
                Ok(u64::try_from(count).unwrap_or(u64::MAX))
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// A relay between two sockets; add it to the reactor, its token is completed when it ends.
pub struct Relay {
    token: u64,
    ends: [Arc<OwnedFd>; 2],
    /// From the first end to the second, and back.
    directions: [Direction; 2],
    count: u64,
    /// The first failure.
    error: Option<io::Error>,
}

impl Relay {
    /// Take over two connected stream sockets.
    #[must_use]
    pub fn new(token: u64, first: OwnedFd, second: OwnedFd) -> Self {
        Self {
            token,
            ends: [Arc::new(first), Arc::new(second)],
            directions: Default::default(),
            count: 0,
            error: None,
        }
    }

    fn advance(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let [first, second] = &self.ends;
        let [forth, back] = &mut self.directions;
        for (direction, from, to) in [(&mut *forth, first, second), (&mut *back, second, first)] {
            match direction.advance(from, to) {
                Ok(moved) => self.count += moved,
                Err(error) => {
                    direction.fail(to);
                    self.error.get_or_insert(error);
                }
            }
        }
        for (key, incoming, outgoing) in [(0, &*forth, &*back), (1, &*back, &*forth)] {
            let interest = Interest {
                readable: !incoming.is_at_end && incoming.waiting().is_empty(),
                writable: !outgoing.waiting().is_empty(),
            };
            context.set_interest(key, interest)?;
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        self.directions.iter().all(|direction| direction.is_shut)
    }

    fn finish(&mut self, code: Code, message: String, context: &mut Context<'_>) {
        context.sink().complete(Completion {
            token: self.token,
            code,
            value: Value::Count(self.count),
            message,
        });
    }

    fn serve(&mut self, context: &mut Context<'_>) {
        let outcome = self.advance(context);
        if outcome.is_ok() && !self.is_over() {
            return;
        }
        match outcome.err().or_else(|| self.error.take()) {
            Some(error) => self.finish(Code::UNAVAILABLE, error.to_string(), context),
            None => self.finish(Code::OK, String::new(), context),
        }
        context.remove();
    }
}

impl Source for Relay {
    fn started(&mut self, context: &mut Context<'_>) {
        for (key, end) in (0..).zip(self.ends.clone()) {
            if let Err(error) = context.watch(key, end, Interest::READ) {
                self.finish(Code::INTERNAL, format!("watch a socket: {error}"), context);
                return context.remove();
            }
        }
    }

    fn ready(&mut self, _key: u64, _readiness: Readiness, context: &mut Context<'_>) {
        self.serve(context);
    }

    fn stopped(&mut self, reason: &StopReason, context: &mut Context<'_>) {
        let (code, message) = reason.status();
        self.finish(code, message, context);
    }
}
