//! The I/O thread: epoll, a mailbox with an eventfd, timers, and the sources it serves.
//!
//! [`Reactor::start`] makes the one thread `vsock-io`. What happens on it is written as
//! [`Source`]s: objects that own descriptors and are called when one is ready or a timer is due.
//! Sources are added and reached from other threads by posting commands ([`ReactorHandle::post`]);
//! on the thread they reach each other through [`Registry::with`]. Nothing may block here.
//!
//! A panic in a source removes that source, tells it so ([`Source::stopped`]) and is reported as
//! a fatal event; the others live on. When the reactor closes, every command already posted runs
//! first, then every source is stopped, so that each operation completes exactly once.

mod descriptor;
mod mailbox;
mod registry;
mod source;
mod timer;

use std::fmt;
use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;

pub use self::mailbox::{Command, ReactorHandle};
pub use self::registry::Registry;
pub use self::source::{Context, Interest, Readiness, SharedFd, Source, SourceId, StopReason};

use self::descriptor::Descriptors;
use self::mailbox::Mailbox;
use crate::event::EventSink;
use crate::thread;

/// How long [`Reactor::close`] waits for the thread. Only a blocking plain file can use it up.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// What can go wrong with the thread itself.
#[derive(Debug, thiserror::Error)]
pub enum ReactorError {
    /// A descriptor for epoll or the mailbox, or the thread, could not be made.
    #[error("start the I/O thread")]
    Start(#[source] io::Error),
    /// The thread was closed before the command was posted.
    #[error("the I/O thread is closed")]
    Closed,
    /// The thread did not come to its end in time.
    #[error("the I/O thread did not stop within {0:?}")]
    Stuck(Duration),
}

/// The I/O thread's owner. Dropping it closes the thread.
pub struct Reactor {
    handle: ReactorHandle,
    thread: Mutex<Option<(JoinHandle<()>, mpsc::Receiver<()>)>>,
}

impl Reactor {
    /// Start the thread. Completions and fatal events go to `sink`.
    ///
    /// # Errors
    /// [`ReactorError::Start`]: no descriptor or thread is to be had.
    pub fn start(sink: Arc<dyn EventSink>) -> Result<Self, ReactorError> {
        let start = |errno: Errno| ReactorError::Start(errno.into());
        let mailbox = Arc::new(Mailbox::new().map_err(start)?);
        let descriptors = Descriptors::new(&mailbox.wake).map_err(start)?;
        let handle = ReactorHandle { mailbox, sink };
        let mut registry = Registry::new(descriptors, handle.clone());
        let (done, is_done) = mpsc::channel();
        let thread = thread::spawn("vsock-io", move || {
            registry.run();
            drop(registry);
            // The receiver is gone if nobody waits: nothing to tell then.
            let _was_awaited = done.send(());
        })
        .map_err(ReactorError::Start)?;
        Ok(Self {
            handle,
            thread: Mutex::new(Some((thread, is_done))),
        })
    }

    /// A handle to post commands with.
    pub fn handle(&self) -> ReactorHandle {
        self.handle.clone()
    }

    /// Run the commands already posted, stop every source, end the thread and wait for that.
    /// Repeating it is harmless. Must not be called on the thread itself.
    ///
    /// # Errors
    /// [`ReactorError::Stuck`]: a source blocks; the thread is left behind.
    pub fn close(&self) -> Result<(), ReactorError> {
        self.handle.mailbox.close();
        let taken = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some((thread, is_done)) = taken else {
            return Ok(());
        };
        if is_done.recv_timeout(CLOSE_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
            return Err(ReactorError::Stuck(CLOSE_TIMEOUT));
        }
        // The body catches panics, so there is no result to look at.
        let _result = thread.join();
        Ok(())
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            self.handle.sink.fatal(error.to_string());
        }
    }
}

impl fmt::Debug for Reactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reactor").finish_non_exhaustive()
    }
}
