//! Starting the native thread: its name, and a signal mask that leaves the process's signals to
//! the interpreter's main thread. Called once by [`crate::reactor::Reactor::start`].

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::thread::{self, JoinHandle};

/// Start a thread called `name` (at most 15 bytes are visible to `ps`) with signals blocked.
///
/// # Errors
/// The system has no room for another thread.
pub(crate) fn spawn(
    name: &'static str,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        block_signals();
        body();
    })
}

/// Block every signal that is not raised by the thread's own faults. A failure is not reported:
/// with these arguments `pthread_sigmask` has none.
#[expect(
    unsafe_code,
    reason = "signal masks have no safe interface in rustix or std"
)]
fn block_signals() {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `set` is valid for writes of one sigset_t; sigfillset initialises it entirely.
    unsafe { libc::sigfillset(set.as_mut_ptr()) };
    for fault in [
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGTRAP,
    ] {
        // SAFETY: `set` was initialised by sigfillset and `fault` is a valid signal number.
        unsafe { libc::sigdelset(set.as_mut_ptr(), fault) };
    }
    // SAFETY: `set` is initialised; the old mask is not asked for (null is allowed).
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, set.as_ptr(), ptr::null_mut()) };
}
