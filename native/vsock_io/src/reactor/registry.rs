//! The sources, and the loop that calls them.
//!
//! [`Registry`] is everything on the I/O thread. The loop takes commands from the mailbox, fires
//! timers, waits in epoll and calls the sources concerned, each call guarded against panics. A
//! source is out of the table while it is called, so it cannot be entered twice.

use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::epoll;
use rustix::io::Errno;

use super::descriptor::Descriptors;
use super::mailbox::{Command, ReactorHandle};
use super::source::{Context, Readiness, Source, SourceId, StopReason};
use super::timer::Timers;
use crate::event::EventSink;

/// Events taken from one `epoll_wait`.
const EVENT_BATCH: usize = 128;

/// Everything on the I/O thread: sources, descriptors, timers. Commands and callbacks reach it.
pub struct Registry {
    pub(super) descriptors: Descriptors,
    pub(super) timers: Timers,
    handle: ReactorHandle,
    /// `None` while the source is being called.
    sources: HashMap<SourceId, Option<Box<dyn Source>>>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("sources", &self.sources.len())
            .field("descriptors", &self.descriptors.len())
            .field("timers", &self.timers.len())
            .finish_non_exhaustive()
    }
}

impl Registry {
    pub(super) fn new(descriptors: Descriptors, handle: ReactorHandle) -> Self {
        Self {
            descriptors,
            timers: Timers::default(),
            handle,
            sources: HashMap::new(),
        }
    }

    /// Where completions go.
    pub fn sink(&self) -> &Arc<dyn EventSink> {
        &self.handle.sink
    }

    /// A handle to this thread's own mailbox.
    pub fn handle(&self) -> &ReactorHandle {
        &self.handle
    }

    /// Add a source and call its [`Source::started`].
    pub fn add(&mut self, source: impl Source) -> SourceId {
        let id = self.handle.fresh_source_id();
        self.insert(id, Box::new(source));
        id
    }

    pub(super) fn insert(&mut self, id: SourceId, source: Box<dyn Source>) {
        self.sources.insert(id, Some(source));
        self.invoke(id, Source::started);
    }

    /// Call `f` with the source `id`. `None` if there is no such source, it is of another type,
    /// it is being called right now, or `f` panicked (which then was reported).
    pub fn with<T: Source, R>(
        &mut self,
        id: SourceId,
        f: impl FnOnce(&mut T, &mut Context<'_>) -> R,
    ) -> Option<R> {
        self.invoke(id, |source, context| {
            let any: &mut dyn Any = source;
            any.downcast_mut::<T>().map(|source| f(source, context))
        })
        .flatten()
    }

    /// Take a source away. Its descriptors and timers are forgotten, then it is dropped without
    /// a callback (after the current one, if it is being called).
    pub fn remove(&mut self, id: SourceId) {
        self.descriptors.forget(id);
        self.timers.forget(id);
        if let Some(Some(source)) = self.sources.remove(&id) {
            self.drop_source(source);
        }
    }

    fn invoke<R>(
        &mut self,
        id: SourceId,
        f: impl FnOnce(&mut dyn Source, &mut Context<'_>) -> R,
    ) -> Option<R> {
        let mut source = self.sources.get_mut(&id)?.take()?;
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            f(source.as_mut(), &mut Context::new(self, id))
        }));
        match outcome {
            Ok(result) => {
                if let Some(slot) = self.sources.get_mut(&id) {
                    *slot = Some(source);
                } else {
                    self.drop_source(source);
                }
                Some(result)
            }
            Err(panic) => {
                let text = panic_text(panic.as_ref());
                self.sink()
                    .fatal(format!("panic on the I/O thread: {text}"));
                self.stop(id, source, &StopReason::Panicked(text));
                None
            }
        }
    }

    fn stop(&mut self, id: SourceId, mut source: Box<dyn Source>, reason: &StopReason) {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            source.stopped(reason, &mut Context::new(self, id));
        }));
        if let Err(panic) = outcome {
            let text = panic_text(panic.as_ref());
            self.sink()
                .fatal(format!("panic while stopping on the I/O thread: {text}"));
        }
        self.remove(id);
        self.drop_source(source);
    }

    fn drop_source(&self, source: Box<dyn Source>) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(source))) {
            let text = panic_text(panic.as_ref());
            self.sink()
                .fatal(format!("panic while dropping on the I/O thread: {text}"));
        }
    }

    /// The thread: serve until the mailbox closes, then stop every source.
    pub(super) fn run(&mut self) {
        let reason = match catch_unwind(AssertUnwindSafe(|| self.serve())) {
            Ok(Ok(())) => StopReason::Closed,
            Ok(Err(errno)) => StopReason::Panicked(format!("epoll_wait: {errno}")),
            Err(panic) => StopReason::Panicked(panic_text(panic.as_ref())),
        };
        if let StopReason::Panicked(text) = &reason {
            self.sink().fatal(format!("the I/O thread died: {text}"));
        }
        let last_commands = self.handle.mailbox.take_last();
        self.run_commands(last_commands);
        while let Some(id) = self.sources.keys().next().copied() {
            match self.sources.get_mut(&id).and_then(Option::take) {
                Some(source) => self.stop(id, source, &reason),
                None => self.remove(id),
            }
        }
    }

    fn serve(&mut self) -> Result<(), Errno> {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(EVENT_BATCH);
        while let Some(commands) = self.handle.mailbox.take() {
            self.run_commands(commands);
            self.fire_timers();
            let timeout = self.timers.next_timeout();
            events.clear();
            match self.descriptors.wait(&mut events, timeout.as_ref()) {
                Ok(()) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
            }
            for event in &events {
                let (id, flags) = (event.data.u64(), event.flags);
                // Gone if a callback of this batch has unwatched it; ids are never reused.
                let Some((source, key)) = self.descriptors.owner(id) else {
                    continue;
                };
                let readiness = Readiness::from_flags(flags);
                self.invoke(source, |source, context| {
                    source.ready(key, readiness, context);
                });
            }
        }
        Ok(())
    }

    fn run_commands(&mut self, commands: Vec<Command>) {
        for command in commands {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| command(self))) {
                let text = panic_text(panic.as_ref());
                self.sink()
                    .fatal(format!("panic in a command of the I/O thread: {text}"));
            }
        }
    }

    fn fire_timers(&mut self) {
        if self.timers.is_empty() {
            return;
        }
        // Collected first: a timer set to "now" by a callback waits for the next round.
        for due in self.timers.due(Instant::now()) {
            // Gone if an earlier callback has cancelled it.
            if let Some((source, key)) = self.timers.take(due) {
                self.invoke(source, |source, context| source.timeout(key, context));
            }
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text.clone()
    } else {
        "unknown panic".to_owned()
    }
}
