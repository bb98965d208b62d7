//! Who makes the system calls of the requests' steps.
//!
//! ```text
//!   submit(request) … submit(request) ─► run ─► finished: (request, result) …
//! ```
//!
//! Two engines with one interface. [`uring`]'s `run` hands all submissions to the kernel in one
//! system call and collects what is done; [`sync`]'s makes the calls itself, for a bounded
//! time, and keeps the rest for the next turn. Either owns a request from `submit` until it comes
//! back. Used by the device under the transport's lock.

mod ranges;
mod sync;
mod uring;

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use self::ranges::Ranges;
use self::sync::SyncEngine;
use self::uring::UringEngine;
use super::disk::Disk;
use super::request::Request;

/// Requests under way at once. Enough for any device's own queue; more wait in the ring.
pub(super) const MAX_IN_FLIGHT: u16 = 128;

/// Which engine a disk is to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// `io_uring` if this process may, else plain system calls.
    #[default]
    Auto,
    /// `io_uring`, or the disk cannot be used.
    Uring,
    /// System calls on the I/O thread, which wait for the disk.
    Sync,
}

/// A step that was done, and what came of it.
pub(super) type Finished = (Box<Request>, io::Result<usize>);

/// An engine.
#[expect(clippy::large_enum_variant, reason = "one a disk, never moved in bulk")]
#[derive(Debug)]
pub(super) enum Engine {
    Uring(UringEngine),
    Sync(SyncEngine),
}

impl Engine {
    /// Make the engine chosen, or the one that is possible; then with the reason why `io_uring`
    /// is not.
    ///
    /// # Errors
    /// `io_uring` was demanded and refused.
    pub(super) fn new(choice: EngineChoice, disk: &Disk) -> io::Result<(Self, Option<io::Error>)> {
        let sync = || Self::Sync(SyncEngine::default());
        if choice == EngineChoice::Sync {
            return Ok((sync(), None));
        }
        match UringEngine::new(disk) {
            Ok(engine) => Ok((Self::Uring(engine), None)),
            Err(error) if choice == EngineChoice::Auto => Ok((sync(), Some(error))),
            Err(error) => Err(error),
        }
    }

    /// Its name in metrics and logs.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Uring(_) => "io_uring",
            Self::Sync(_) => "sync",
        }
    }

    /// A descriptor that is readable when `run` would find something finished.
    pub(super) fn completions(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Uring(engine) => Some(engine.completions()),
            Self::Sync(_) => None,
        }
    }

    /// Requests owned: under way or waiting for `run`.
    pub(super) fn in_flight(&self) -> usize {
        match self {
            Self::Uring(engine) => engine.in_flight(),
            Self::Sync(engine) => engine.in_flight(),
        }
    }

    /// Some requests wait for `run`.
    pub(super) fn has_queued(&mut self) -> bool {
        match self {
            Self::Uring(engine) => engine.has_queued(),
            Self::Sync(engine) => engine.in_flight() > 0,
        }
    }

    /// Take a request over, to do its step. The caller sees to it that there are no more than
    /// [`MAX_IN_FLIGHT`].
    pub(super) fn submit(&mut self, request: Box<Request>, disk: &Disk) {
        match self {
            Self::Uring(engine) => engine.submit(request, disk),
            Self::Sync(engine) => engine.submit(request),
        }
    }

    /// Do what was submitted, until `deadline` if it is done here, and add what is finished.
    ///
    /// # Errors
    /// The kernel does not take submissions any more.
    pub(super) fn run(
        &mut self,
        disk: &Disk,
        deadline: Instant,
        finished: &mut Vec<Finished>,
    ) -> io::Result<()> {
        match self {
            Self::Uring(engine) => engine.run(finished),
            Self::Sync(engine) => {
                engine.run(disk, deadline, finished);
                Ok(())
            }
        }
    }

    /// Wait until something is finished.
    ///
    /// # Errors
    /// Nothing was by `deadline` (`TimedOut`), or as `poll(2)`.
    pub(super) fn wait(&self, deadline: Instant) -> io::Result<()> {
        match self {
            Self::Uring(engine) => engine.wait(deadline),
            Self::Sync(_) if Instant::now() < deadline => Ok(()),
            Self::Sync(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// Whether a transfer has to go through the page cache although direct I/O is on.
fn needs_cache(request: &Request, ranges: &Ranges, disk: &Disk) -> bool {
    match disk.direct_alignment() {
        Some(alignment) => {
            request.is_cached() || !ranges.is_aligned(request.step().position, alignment)
        }
        None => false,
    }
}
