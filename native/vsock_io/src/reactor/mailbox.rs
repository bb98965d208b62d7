//! The way onto the I/O thread: commands in a queue, and an eventfd that wakes the thread.
//!
//! Any thread posts through a [`ReactorHandle`]; [`Registry`] takes the commands and runs them in
//! order. A closing mailbox still takes commands until the thread takes the last of them, so that
//! one accepted is always run and one refused never is.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::ReactorError;
use super::registry::Registry;
use super::source::{Source, SourceId};
use crate::event::EventSink;

/// A command for the I/O thread.
pub type Command = Box<dyn FnOnce(&mut Registry) + Send>;

pub(super) struct Mailbox {
    /// Nonblocking; epoll watches it edge-triggered, so it is written and never read.
    pub(super) wake: OwnedFd,
    /// The next source id, so that any thread can name a source before it exists.
    next_source: AtomicU64,
    state: Mutex<MailboxState>,
}

#[derive(Default)]
struct MailboxState {
    commands: Vec<Command>,
    is_closing: bool,
    is_closed: bool,
}

impl Mailbox {
    pub(super) fn new() -> Result<Self, Errno> {
        Ok(Self {
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            next_source: AtomicU64::new(1),
            state: Mutex::default(),
        })
    }

    /// Ask the thread to come to its end.
    pub(super) fn close(&self) {
        self.lock().is_closing = true;
        self.wake();
    }

    /// The commands posted so far; `None` once the thread shall end.
    pub(super) fn take(&self) -> Option<Vec<Command>> {
        let mut state = self.lock();
        if state.is_closing {
            return None;
        }
        Some(std::mem::take(&mut state.commands))
    }

    /// The last commands: none is accepted after this.
    pub(super) fn take_last(&self) -> Vec<Command> {
        let mut state = self.lock();
        state.is_closed = true;
        std::mem::take(&mut state.commands)
    }

    /// Queue `command`.
    fn push(&self, command: Command) -> Result<(), ReactorError> {
        let mut state = self.lock();
        if state.is_closed {
            return Err(ReactorError::Closed);
        }
        let was_empty = state.commands.is_empty();
        state.commands.push(command);
        drop(state);
        if was_empty {
            self.wake();
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, MailboxState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        while rustix::io::write(&self.wake, &1_u64.to_ne_bytes()) == Err(Errno::INTR) {}
    }
}

/// Posts commands to the I/O thread from any thread. Cheap to clone.
#[derive(Clone)]
pub struct ReactorHandle {
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) sink: Arc<dyn EventSink>,
}

impl fmt::Debug for ReactorHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReactorHandle").finish_non_exhaustive()
    }
}

impl ReactorHandle {
    /// Have `command` run on the I/O thread, after those posted before. It will run, unless this
    /// returns an error.
    ///
    /// # Errors
    /// [`ReactorError::Closed`]: the thread takes no more; `command` was dropped.
    pub fn post(
        &self,
        command: impl FnOnce(&mut Registry) + Send + 'static,
    ) -> Result<(), ReactorError> {
        self.mailbox.push(Box::new(command))
    }

    /// Add a source from any thread; [`Source::started`] is called on the I/O thread. Commands
    /// posted after this find it under the id returned (unless it ended meanwhile).
    ///
    /// # Errors
    /// [`ReactorError::Closed`]: the thread takes no more; `source` was dropped.
    pub fn add(&self, source: impl Source) -> Result<SourceId, ReactorError> {
        let id = self.fresh_source_id();
        self.post(move |registry| registry.insert(id, Box::new(source)))?;
        Ok(id)
    }

    /// Where completions go.
    pub fn sink(&self) -> &Arc<dyn EventSink> {
        &self.sink
    }

    pub(super) fn fresh_source_id(&self) -> SourceId {
        SourceId(self.mailbox.next_source.fetch_add(1, Ordering::Relaxed))
    }
}
