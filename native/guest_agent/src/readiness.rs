//! Owned descriptors on the runtime's event loop.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

/// Has the current runtime watch `fd`, which should be non-blocking.
///
/// # Errors
/// The descriptor cannot be watched (a plain file).
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor names the same open file for as long as it lives, and the watcher
    // owns it: nothing closes or replaces it before it is deregistered.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}
