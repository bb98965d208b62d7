//! The host end of a stdio copy: a FIFO, pipe, socket, terminal or plain file, never blocking the
//! I/O thread for longer than a plain file's write. The descriptor is owned here and closed with
//! the [`HostEnd`]. Used on the I/O thread only.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::window::CHUNK;
use crate::reactor::{Context, Interest};

/// A pipe that fills up is made this large, once: the default of 64 KiB costs a round of waiting
/// per quarter of a chunk. Idle pipes stay as they are.
const PIPE_SIZE: usize = 2 * CHUNK as usize;

/// An owned descriptor and how it can be waited for.
#[derive(Debug)]
pub struct HostEnd {
    fd: Arc<OwnedFd>,
    key: u64,
    watch: Watch,
    is_enlarged: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watch {
    /// Not registered yet.
    None,
    /// Registered with epoll.
    Registered,
    /// epoll refused it: a plain file, which is always ready.
    AlwaysReady,
}

/// What a wait came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The source will be called.
    Armed,
    /// No need to wait: the descriptor is always ready.
    AlwaysReady,
}

impl HostEnd {
    /// Take over `fd`; `key` names it in the reactor.
    ///
    /// # Errors
    /// The descriptor's flags cannot be changed: it is not open.
    pub fn new(fd: OwnedFd, key: u64) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        if !flags.contains(OFlags::NONBLOCK) {
            rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        }
        Ok(Self {
            fd: Arc::new(fd),
            key,
            watch: Watch::None,
            is_enlarged: false,
        })
    }

    /// Hear about readiness, or ([`Interest::NONE`]) no longer.
    ///
    /// # Errors
    /// The kernel is out of memory or watches.
    pub fn wait(&mut self, interest: Interest, context: &mut Context<'_>) -> io::Result<Wait> {
        if self.watch == Watch::None && interest != Interest::NONE {
            match context.watch(self.key, self.fd.clone(), interest) {
                Ok(()) => self.watch = Watch::Registered,
                Err(error) if Errno::from_io_error(&error) == Some(Errno::PERM) => {
                    self.watch = Watch::AlwaysReady;
                }
                Err(error) => return Err(error),
            }
        } else if self.watch == Watch::Registered {
            context.set_interest(self.key, interest)?;
        }
        Ok(if self.watch == Watch::AlwaysReady {
            Wait::AlwaysReady
        } else {
            Wait::Armed
        })
    }

    /// Write until everything is written or the next write would block; the bytes written.
    ///
    /// # Errors
    /// The other end is gone or the file cannot grow. What was written before is lost to the
    /// count: the first element says how much.
    pub fn write(&mut self, bytes: &[u8]) -> (usize, io::Result<()>) {
        let mut written = 0;
        while let Some(rest) = bytes.get(written..)
            && !rest.is_empty()
        {
            match rustix::io::write(&self.fd, rest) {
                Ok(0) => return (written, Err(io::ErrorKind::WriteZero.into())),
                Ok(count) => written += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if self.enlarge() => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return (written, Err(errno.into())),
            }
        }
        (written, Ok(()))
    }

    /// Whether there is more room now.
    fn enlarge(&mut self) -> bool {
        if std::mem::replace(&mut self.is_enlarged, true) {
            return false;
        }
        // Refused for what is no pipe, and past the user's limit: both are fine.
        rustix::pipe::fcntl_getpipe_size(&self.fd).is_ok_and(|size| size < PIPE_SIZE)
            && rustix::pipe::fcntl_setpipe_size(&self.fd, PIPE_SIZE).is_ok()
    }

    /// Read once. `None` when that would block, `Some(0)` at end of file.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match rustix::io::read(&self.fd, &mut *buffer) {
                Ok(count) => return Ok(Some(count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
