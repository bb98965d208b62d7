//! Bytes both ways between two connected stream sockets, each direction ending by itself.
//!
//! ```text
//! each direction:  copying ──end of file──▶ flushing ──all written──▶ shut
//!                     └──write fails──▶ discarding ──end of file, or time──▶ shut
//! ```
//!
//! [`Relay`] is a source on the I/O thread. It ends when both directions have; then both descriptors
//! close. A direction that cannot write leaves the other alone: a server may answer and close without
//! having read everything, and its answer is still to be delivered. So what the client goes on to
//! send is read and dropped: TCP takes back what it has not sent yet when a socket is closed with
//! something unread. A socket that cannot be read is gone for the other direction as well. What
//! waits to be written is bounded, so that a slow reader slows the writer and not the memory.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{self, RecvFlags, SendFlags, Shutdown};

use crate::event::{Completion, Value};
use crate::reactor::{Context, Interest, Readiness, Source, StopReason};
use crate::status::Code;

/// Bytes on their way in one direction.
const BUFFER: usize = 64 << 10;

/// How long a discarding direction goes on once the other is shut.
const LINGER: Duration = Duration::from_secs(10);
const LINGER_TIMER: u64 = 0;

/// What a direction could not do.
enum Failure {
    Read(io::Error),
    Write(io::Error),
}

/// One direction.
#[derive(Default)]
struct Direction {
    buffer: Vec<u8>,
    start: usize,
    is_at_end: bool,
    /// What is read is nobody's any more.
    is_discarding: bool,
    is_shut: bool,
}

impl Direction {
    fn waiting(&self) -> &[u8] {
        self.buffer.get(self.start..).unwrap_or_default()
    }

    /// Move what does not block: at most one buffer, so that the others get their turn.
    fn advance(&mut self, from: &OwnedFd, to: &OwnedFd) -> Result<u64, Failure> {
        if self.is_shut {
            return Ok(0);
        }
        if self.waiting().is_empty() && !self.is_at_end {
            self.read(from).map_err(Failure::Read)?;
        }
        if self.is_discarding {
            self.buffer = Vec::new();
            self.start = 0;
            self.is_shut = self.is_at_end;
            return Ok(0);
        }
        let moved = self.write(to).map_err(Failure::Write)?;
        if self.is_at_end && self.waiting().is_empty() {
            self.is_shut = true;
            // The peer may have gone entirely: nobody is left to tell.
            let _shut = net::shutdown(to, Shutdown::Write);
        }
        Ok(moved)
    }

    /// Nothing can be written any more: read and drop, if there is something to read.
    fn discard(&mut self, to: &OwnedFd) {
        if self.is_shut {
            return;
        }
        self.buffer = Vec::new();
        self.start = 0;
        self.is_discarding = true;
        self.is_shut = self.is_at_end;
        // Whoever reads there learns of it, unless that end is gone as well.
        let _shut = net::shutdown(to, Shutdown::Write);
    }

    fn read(&mut self, from: &OwnedFd) -> io::Result<()> {
        self.start = 0;
        self.buffer.resize(BUFFER, 0);
        match net::recv(from, self.buffer.as_mut_slice(), RecvFlags::DONTWAIT) {
            Ok((count, _)) if count > 0 => {
                self.buffer.truncate(count);
                return Ok(());
            }
            // Idle: a connection that says nothing needs no memory.
            Err(Errno::AGAIN | Errno::INTR) => self.buffer = Vec::new(),
            ended => {
                self.buffer = Vec::new();
                self.is_at_end = true;
                ended?;
            }
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
    /// The timer runs.
    lingers: bool,
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
            lingers: false,
        }
    }

    fn advance(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        for index in [0, 1] {
            self.advance_one(index);
        }
        let [forth, back] = &self.directions;
        for (key, incoming, outgoing) in [(0, forth, back), (1, back, forth)] {
            let interest = Interest {
                readable: !incoming.is_at_end && incoming.waiting().is_empty(),
                writable: !outgoing.waiting().is_empty(),
            };
            context.set_interest(key, interest)?;
        }
        // Nothing is delivered any more: what is left is to wait for the ends of files.
        let is_lingering = |direction: &Direction| direction.is_shut || direction.is_discarding;
        let is_over = forth.is_shut && back.is_shut;
        if !self.lingers && !is_over && is_lingering(forth) && is_lingering(back) {
            self.lingers = true;
            context.set_timer(LINGER_TIMER, Instant::now() + LINGER);
        }
        Ok(())
    }

    fn advance_one(&mut self, index: usize) {
        let [first, second] = &self.ends;
        let [forth, back] = &mut self.directions;
        let (direction, other, from, to) = if index == 0 {
            (forth, back, first, second)
        } else {
            (back, forth, second, first)
        };
        let error = match direction.advance(from, to) {
            Ok(moved) => {
                self.count += moved;
                return;
            }
            Err(Failure::Write(error)) => {
                direction.discard(to);
                error
            }
            Err(Failure::Read(error)) => {
                other.discard(from);
                // What it had said before it went is still to be delivered.
                if let Err(Failure::Write(_)) = direction.advance(from, to) {
                    direction.discard(to);
                }
                error
            }
        };
        self.error.get_or_insert(error);
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

    fn timeout(&mut self, _key: u64, context: &mut Context<'_>) {
        for direction in &mut self.directions {
            direction.is_shut |= direction.is_discarding;
        }
        self.serve(context);
    }

    fn stopped(&mut self, reason: &StopReason, context: &mut Context<'_>) {
        let (code, message) = reason.status();
        self.finish(code, message, context);
    }
}
