//! The device without its registers: the hybrid socket, the muxer, and the epoll set they share.
//!
//! Everything on the host's side is watched in an epoll set of the device's own, whose descriptor
//! is readable when [`HybridVsock::poll`] has something to do; the owner watches only that, and a
//! time limit. Packets move in [`HybridVsock::exchange`], on the rings it is given.
//!
//! ```text
//!   epoll readable, or next_deadline over ──► poll ──┐
//!   a ring was kicked ───────────────────────────────┴─► exchange ──► interrupts; true: again soon
//! ```
//!
//! Each call handles a bounded number of events and packets. Used on the I/O thread.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use thiserror::Error;

use crate::ring::Ring;

use super::exchange::{Exchange, QueueError};
use super::listener::{BoundListener, ListenError, PathDialer};
use super::muxer::{Muxer, MuxerCounters};

/// Socket events handled in one call.
const EVENTS_PER_POLL: usize = 64;
/// Connections accepted in one call.
const ACCEPTS_PER_POLL: usize = 64;
/// Before accepting again after the process ran out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Epoll datum of the listener; tokens of the muxer are far above.
const LISTENER: u64 = 0;

/// Why the device cannot be made.
#[derive(Debug, Error)]
pub enum HybridError {
    /// the hybrid socket could not be made
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// its epoll set could not be made
    #[error("watch the hybrid socket")]
    Watch(#[source] io::Error),
}

/// One guest's connections and the hybrid socket.
pub struct HybridVsock {
    epoll: Arc<OwnedFd>,
    listener: BoundListener,
    muxer: Muxer,
    exchange: Exchange,
    accept_after: Option<Instant>,
}

impl HybridVsock {
    /// Listen for host processes at `path`; they can connect from now on.
    ///
    /// # Errors
    /// The path cannot be bound, or the system refused; nothing is left behind.
    pub fn bind(path: &Path, guest_cid: u64) -> Result<Self, HybridError> {
        let failed = |errno: Errno| HybridError::Watch(errno.into());
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)?;
        let epoll = Arc::new(epoll);
        let listener = BoundListener::bind(path)?;
        let data = epoll::EventData::new_u64(LISTENER);
        // Edge-triggered: what waits while we pause accepting is no event.
        let interest = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &listener, data, interest).map_err(failed)?;
        let dialer = Box::new(PathDialer::new(path));
        Ok(Self {
            muxer: Muxer::new(guest_cid, dialer, Arc::clone(&epoll)),
            epoll,
            listener,
            exchange: Exchange::default(),
            accept_after: None,
        })
    }

    /// Look at the host's sockets, accept connections, and give up what waited too long. True if
    /// more is to be done at once. `is_guest_ready`: packets can be exchanged; if not, hosts that
    /// ask for a port are turned away.
    ///
    /// # Errors
    /// The epoll set failed, which should not be.
    pub fn poll(&mut self, is_guest_ready: bool) -> Result<bool, Errno> {
        let mut room = [MaybeUninit::uninit(); EVENTS_PER_POLL];
        let no_wait = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let events = match epoll::wait(&self.epoll, &mut room, Some(&no_wait)) {
            Ok((events, _rest)) => &*events,
            Err(Errno::INTR) => &[],
            Err(errno) => return Err(errno),
        };
        for event in events {
            match event.data.u64() {
                LISTENER => self.accept(),
                token => self.muxer.on_socket(token, event.flags, is_guest_ready),
            }
        }
        let has_more = events.len() == EVENTS_PER_POLL;
        let now = Instant::now();
        self.muxer.expire(now);
        if self.accept_after.is_some_and(|after| after <= now) {
            self.accept();
        }
        Ok(has_more)
    }

    fn accept(&mut self) {
        self.accept_after = None;
        for _ in 0..ACCEPTS_PER_POLL {
            match self.listener.accept() {
                Ok(socket) => self.muxer.accept(socket),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return,
                Err(_out_of_resources) => {
                    self.accept_after = Some(Instant::now() + ACCEPT_PAUSE);
                    return;
                }
            }
        }
        self.accept_after = Some(Instant::now());
    }

    /// Move packets both ways. True if more can be moved at once.
    ///
    /// # Errors
    /// A ring is broken.
    pub fn exchange(&mut self, rx: &mut Ring, tx: &mut Ring) -> Result<bool, QueueError> {
        self.exchange.run(&mut self.muxer, rx, tx)
    }

    /// When [`HybridVsock::poll`] has to be called next, whatever happens.
    pub fn next_deadline(&self) -> Option<Instant> {
        let deadlines = [self.muxer.next_deadline(), self.accept_after];
        deadlines.into_iter().flatten().min()
    }

    /// Time stood still for the guest: have everything wait that much longer.
    pub fn postpone(&mut self, by: Duration) {
        self.muxer.postpone(by);
    }

    /// The guest is gone or started anew: connections end, nothing of its memory is kept. Host
    /// processes may still connect.
    pub fn reset(&mut self) {
        self.muxer.reset();
        self.exchange.forget();
    }

    /// See [`Muxer::next_host_port`].
    pub fn next_host_port(&self) -> u32 {
        self.muxer.next_host_port()
    }

    /// See [`Muxer::set_next_host_port`].
    pub fn set_next_host_port(&mut self, port: u32) {
        self.muxer.set_next_host_port(port);
    }

    /// Counts for diagnosis.
    pub fn counters(&self) -> MuxerCounters {
        self.muxer.counters()
    }

    /// Connections in any stage.
    pub fn connection_count(&self) -> usize {
        self.muxer.connection_count()
    }
}

impl std::fmt::Debug for HybridVsock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HybridVsock")
            .field("path", &self.listener.path())
            .field("muxer", &self.muxer)
            .finish_non_exhaustive()
    }
}

/// The epoll set: readable when [`HybridVsock::poll`] has something to do.
impl AsFd for HybridVsock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

#[cfg(test)]
#[path = "hybrid_tests.rs"]
mod tests;
