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

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;

use crate::event::EventSink;
use crate::status::Code;
use crate::thread;

/// Events taken from one `epoll_wait`.
const EVENT_BATCH: usize = 128;
/// How long [`Reactor::close`] waits for the thread. Only a blocking plain file can use it up.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// The epoll datum of the mailbox; registrations count up from 1.
const MAILBOX: u64 = 0;

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

/// A descriptor that the reactor can watch: shared, so that it stays open while it is watched.
///
/// `Arc<OwnedFd>`, `Arc<UnixStream>`, `Arc<File>` and the like convert by themselves. The
/// description closes when the source has unwatched it *and* dropped its own `Arc`.
pub type SharedFd = Arc<dyn AsFd + Send + Sync>;

/// Names a source for as long as the reactor lives; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceId(u64);

/// What a source wants to hear about a descriptor. Level-triggered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// Call when a read would not block (or reports an error or end of file).
    pub readable: bool,
    /// Call when a write would not block (or reports an error).
    pub writable: bool,
}

impl Interest {
    /// Reads only.
    pub const READ: Self = Self {
        readable: true,
        writable: false,
    };
    /// Writes only.
    pub const WRITE: Self = Self {
        readable: false,
        writable: true,
    };
    /// Both.
    pub const BOTH: Self = Self {
        readable: true,
        writable: true,
    };
    /// Keep the registration but hear nothing, not even a hang-up.
    pub const NONE: Self = Self {
        readable: false,
        writable: false,
    };

    fn flags(self) -> epoll::EventFlags {
        let mut flags = epoll::EventFlags::empty();
        flags.set(
            epoll::EventFlags::IN | epoll::EventFlags::RDHUP,
            self.readable,
        );
        flags.set(epoll::EventFlags::OUT, self.writable);
        flags
    }
}

/// What epoll said about a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readiness {
    /// A read will not block. Set too on hang-up and error, so that the read reports them.
    pub readable: bool,
    /// A write will not block. Set too on hang-up and error.
    pub writable: bool,
    /// The peer is gone entirely (EPOLLHUP) or the descriptor has an error (EPOLLERR). It is
    /// reported until the descriptor is unwatched or its interest is [`Interest::NONE`].
    pub hung_up: bool,
}

impl Readiness {
    fn from_flags(flags: epoll::EventFlags) -> Self {
        let hung_up = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
        let read = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
        Self {
            readable: hung_up || flags.intersects(read),
            writable: hung_up || flags.contains(epoll::EventFlags::OUT),
            hung_up,
        }
    }
}

/// Why a source is being stopped from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The reactor is closing: report `CANCELLED`.
    Closed,
    /// One of the source's own callbacks panicked with this text: report `INTERNAL`. The fatal
    /// event was sent already; the source's state may be half changed.
    Panicked(String),
}

impl StopReason {
    /// The code and text with which pending operations end.
    #[must_use]
    pub fn status(&self) -> (Code, String) {
        match self {
            Self::Closed => (Code::CANCELLED, "the I/O thread was closed".to_owned()),
            Self::Panicked(text) => (Code::INTERNAL, format!("panic on the I/O thread: {text}")),
        }
    }
}

/// Something that lives on the I/O thread: a connection, a listener, a device.
///
/// A source owns its descriptors and state alone, so it needs no locks. It names descriptors and
/// timers by keys of its own choice (`u64`, two separate name spaces, unique within the source).
/// Every callback must return promptly: read or write what does not block, in bounded portions
/// (level-triggered descriptors are reported again), and set a timer for `Instant::now()` to be
/// called again after the others.
///
/// Callbacks run in this order: [`started`](Self::started) once, then any of the others, then
/// either the source removed itself ([`Context::remove`]: it is dropped after the callback and
/// hears nothing more) or [`stopped`](Self::stopped) once. Dropping closes what it owns; watched
/// descriptors and timers are forgotten before.
pub trait Source: Any + Send {
    /// The source was added: watch descriptors, set timers.
    fn started(&mut self, context: &mut Context<'_>);

    /// A watched descriptor is ready. It may no longer be (another callback may have read it):
    /// treat EAGAIN as normal.
    fn ready(&mut self, key: u64, readiness: Readiness, context: &mut Context<'_>);

    /// A timer is due. It is gone now; set it again if it should repeat.
    fn timeout(&mut self, key: u64, context: &mut Context<'_>) {
        let _ = (key, context);
    }

    /// The source ends, not by its own wish: complete what is pending. It is dropped next.
    fn stopped(&mut self, reason: &StopReason, context: &mut Context<'_>);
}

/// A command for the I/O thread.
pub type Command = Box<dyn FnOnce(&mut Registry) + Send>;

/// The I/O thread's owner. Dropping it closes the thread.
pub struct Reactor {
    handle: ReactorHandle,
    thread: Mutex<Option<(JoinHandle<()>, mpsc::Receiver<()>)>>,
}

/// Posts commands to the I/O thread from any thread. Cheap to clone.
#[derive(Clone)]
pub struct ReactorHandle {
    mailbox: Arc<Mailbox>,
    sink: Arc<dyn EventSink>,
}

struct Mailbox {
    wake: OwnedFd,
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
    fn lock(&self) -> MutexGuard<'_, MailboxState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        while rustix::io::write(&self.wake, &1_u64.to_ne_bytes()) == Err(Errno::INTR) {}
    }
}

impl Reactor {
    /// Start the thread. Completions and fatal events go to `sink`.
    ///
    /// # Errors
    /// [`ReactorError::Start`]: no descriptor or thread is to be had.
    pub fn start(sink: Arc<dyn EventSink>) -> Result<Self, ReactorError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| ReactorError::Start(errno.into()))?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|errno| ReactorError::Start(errno.into()))?;
        // Edge-triggered: each write to the eventfd wakes, and it never needs to be read.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(MAILBOX), flags)
            .map_err(|errno| ReactorError::Start(errno.into()))?;
        let mailbox = Arc::new(Mailbox {
            wake,
            next_source: AtomicU64::new(1),
            state: Mutex::default(),
        });
        let handle = ReactorHandle { mailbox, sink };
        let mut registry = Registry::new(epoll, handle.clone());
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
        self.handle.mailbox.lock().is_closing = true;
        self.handle.mailbox.wake();
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
        let mut state = self.mailbox.lock();
        if state.is_closed {
            return Err(ReactorError::Closed);
        }
        let was_empty = state.commands.is_empty();
        state.commands.push(Box::new(command));
        drop(state);
        if was_empty {
            self.mailbox.wake();
        }
        Ok(())
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

    fn fresh_source_id(&self) -> SourceId {
        SourceId(self.mailbox.next_source.fetch_add(1, Ordering::Relaxed))
    }
}

struct Registration {
    source: SourceId,
    key: u64,
    fd: SharedFd,
    interest: Interest,
}

/// Everything on the I/O thread: sources, descriptors, timers. Commands and callbacks reach it.
pub struct Registry {
    epoll: OwnedFd,
    handle: ReactorHandle,
    next_id: u64,
    /// `None` while the source is being called.
    sources: HashMap<SourceId, Option<Box<dyn Source>>>,
    registrations: HashMap<u64, Registration>,
    registration_ids: HashMap<(SourceId, u64), u64>,
    timers: BTreeMap<(Instant, u64), (SourceId, u64)>,
    timer_ids: HashMap<(SourceId, u64), (Instant, u64)>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("sources", &self.sources.len())
            .field("descriptors", &self.registrations.len())
            .field("timers", &self.timers.len())
            .finish_non_exhaustive()
    }
}

impl Registry {
    fn new(epoll: OwnedFd, handle: ReactorHandle) -> Self {
        Self {
            epoll,
            handle,
            next_id: MAILBOX + 1,
            sources: HashMap::new(),
            registrations: HashMap::new(),
            registration_ids: HashMap::new(),
            timers: BTreeMap::new(),
            timer_ids: HashMap::new(),
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

    fn insert(&mut self, id: SourceId, source: Box<dyn Source>) {
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
        let keys: Vec<u64> = self
            .registration_ids
            .keys()
            .filter_map(|(source, key)| (*source == id).then_some(*key))
            .collect();
        for key in keys {
            self.unwatch(id, key);
        }
        self.timer_ids.retain(|(source, _), _| *source != id);
        self.timers.retain(|_, (source, _)| *source != id);
        if let Some(Some(source)) = self.sources.remove(&id) {
            self.drop_source(source);
        }
    }

    fn fresh_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    fn invoke<R>(
        &mut self,
        id: SourceId,
        f: impl FnOnce(&mut dyn Source, &mut Context<'_>) -> R,
    ) -> Option<R> {
        let mut source = self.sources.get_mut(&id)?.take()?;
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            f(source.as_mut(), &mut Context { registry: self, id })
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
            source.stopped(reason, &mut Context { registry: self, id });
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

    fn watch(
        &mut self,
        source: SourceId,
        key: u64,
        fd: SharedFd,
        interest: Interest,
    ) -> io::Result<()> {
        if self.registration_ids.contains_key(&(source, key)) {
            return Err(Errno::EXIST.into());
        }
        let id = self.fresh_id();
        if interest != Interest::NONE {
            epoll::add(
                &self.epoll,
                &fd,
                epoll::EventData::new_u64(id),
                interest.flags(),
            )?;
        }
        self.registration_ids.insert((source, key), id);
        self.registrations.insert(
            id,
            Registration {
                source,
                key,
                fd,
                interest,
            },
        );
        Ok(())
    }

    fn set_interest(&mut self, source: SourceId, key: u64, interest: Interest) -> io::Result<()> {
        let id = self
            .registration_ids
            .get(&(source, key))
            .copied()
            .ok_or(Errno::NOENT)?;
        let registration = self.registrations.get_mut(&id).ok_or(Errno::NOENT)?;
        if registration.interest == interest {
            return Ok(());
        }
        let data = epoll::EventData::new_u64(id);
        if interest == Interest::NONE {
            epoll::delete(&self.epoll, &registration.fd)?;
        } else if registration.interest == Interest::NONE {
            epoll::add(&self.epoll, &registration.fd, data, interest.flags())?;
        } else {
            epoll::modify(&self.epoll, &registration.fd, data, interest.flags())?;
        }
        registration.interest = interest;
        Ok(())
    }

    fn unwatch(&mut self, source: SourceId, key: u64) {
        let Some(id) = self.registration_ids.remove(&(source, key)) else {
            return;
        };
        if let Some(registration) = self.registrations.remove(&id)
            && registration.interest != Interest::NONE
        {
            // It is registered, so this cannot fail in a way that leaves it registered.
            let _deleted = epoll::delete(&self.epoll, &registration.fd);
        }
    }

    fn cancel_timer(&mut self, source: SourceId, key: u64) {
        if let Some(due) = self.timer_ids.remove(&(source, key)) {
            self.timers.remove(&due);
        }
    }

    fn set_timer(&mut self, source: SourceId, key: u64, deadline: Instant) {
        self.cancel_timer(source, key);
        let due = (deadline, self.fresh_id());
        self.timers.insert(due, (source, key));
        self.timer_ids.insert((source, key), due);
    }

    fn run(&mut self) {
        let reason = match catch_unwind(AssertUnwindSafe(|| self.serve())) {
            Ok(Ok(())) => StopReason::Closed,
            Ok(Err(errno)) => StopReason::Panicked(format!("epoll_wait: {errno}")),
            Err(panic) => StopReason::Panicked(panic_text(panic.as_ref())),
        };
        if let StopReason::Panicked(text) = &reason {
            self.sink().fatal(format!("the I/O thread died: {text}"));
        }
        let last_commands = {
            let mut state = self.handle.mailbox.lock();
            state.is_closed = true;
            std::mem::take(&mut state.commands)
        };
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
        loop {
            let commands = {
                let mut state = self.handle.mailbox.lock();
                if state.is_closing {
                    return Ok(());
                }
                std::mem::take(&mut state.commands)
            };
            self.run_commands(commands);
            self.fire_timers();
            let timeout = self.next_timeout();
            events.clear();
            let spare = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, spare, timeout.as_ref()) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
            }
            for event in &events {
                let (id, flags) = (event.data.u64(), event.flags);
                // Gone if a callback of this batch has unwatched it; ids are never reused.
                let Some(registration) = self.registrations.get(&id) else {
                    continue;
                };
                let (source, key) = (registration.source, registration.key);
                let readiness = Readiness::from_flags(flags);
                self.invoke(source, |source, context| {
                    source.ready(key, readiness, context);
                });
            }
        }
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
        let now = Instant::now();
        // Collected first: a timer set to "now" by a callback waits for the next round.
        let due: Vec<_> = self
            .timers
            .range(..=(now, u64::MAX))
            .map(|(due, who)| (*due, *who))
            .collect();
        for (due, (source, key)) in due {
            // Gone if an earlier callback has cancelled it.
            if self.timers.remove(&due).is_some() {
                self.timer_ids.remove(&(source, key));
                self.invoke(source, |source, context| source.timeout(key, context));
            }
        }
    }

    fn next_timeout(&self) -> Option<Timespec> {
        let ((deadline, _), _) = self.timers.first_key_value()?;
        let left = deadline.saturating_duration_since(Instant::now());
        // A day at most: it is only a wake-up, and always representable.
        Timespec::try_from(left.min(Duration::from_secs(86_400))).ok()
    }
}

/// What a source's callback can do: its own descriptors and timers, and the rest of the thread.
pub struct Context<'a> {
    registry: &'a mut Registry,
    id: SourceId,
}

impl fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Context<'_> {
    /// The source being called.
    pub fn id(&self) -> SourceId {
        self.id
    }

    /// The rest of the thread: add sources, reach others.
    pub fn registry(&mut self) -> &mut Registry {
        self.registry
    }

    /// Where completions go.
    pub fn sink(&self) -> &Arc<dyn EventSink> {
        self.registry.sink()
    }

    /// Watch `fd` under `key`. The reactor keeps a share of it until it is unwatched.
    ///
    /// # Errors
    /// EPERM: a plain file or directory, which epoll refuses because it is always ready.
    /// EEXIST: the key, or this very descriptor, is watched already. ENOMEM, ENOSPC: limits.
    pub fn watch(&mut self, key: u64, fd: SharedFd, interest: Interest) -> io::Result<()> {
        self.registry.watch(self.id, key, fd, interest)
    }

    /// Change what is heard about `key`; free when nothing changes.
    ///
    /// # Errors
    /// ENOENT: the key is not watched.
    pub fn set_interest(&mut self, key: u64, interest: Interest) -> io::Result<()> {
        self.registry.set_interest(self.id, key, interest)
    }

    /// Stop watching `key` and give the descriptor's share back. Unknown keys are ignored.
    pub fn unwatch(&mut self, key: u64) {
        self.registry.unwatch(self.id, key);
    }

    /// Be called at `deadline` (or as soon after as the thread can). Replaces the timer `key`.
    pub fn set_timer(&mut self, key: u64, deadline: Instant) {
        self.registry.set_timer(self.id, key, deadline);
    }

    /// Forget the timer `key`, if it is set.
    pub fn cancel_timer(&mut self, key: u64) {
        self.registry.cancel_timer(self.id, key);
    }

    /// End this source: everything it watches is forgotten now, it is dropped after the callback.
    pub fn remove(&mut self) {
        self.registry.remove(self.id);
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
