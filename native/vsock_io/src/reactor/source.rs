//! What lives on the I/O thread, and what it may do there.
//!
//! [`Source`] is the trait a connection, a listener or a device implements; [`Context`] is what
//! each of its callbacks gets: its own descriptors and timers, and the way to the others. All of
//! it is used on the I/O thread only. The rest are the values that pass between the two.

use std::any::Any;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::epoll;

use super::registry::Registry;
use crate::event::EventSink;
use crate::status::Code;

/// A descriptor that the reactor can watch: shared, so that it stays open while it is watched.
///
/// `Arc<OwnedFd>`, `Arc<UnixStream>`, `Arc<File>` and the like convert by themselves. The
/// description closes when the source has unwatched it *and* dropped its own `Arc`.
pub type SharedFd = Arc<dyn AsFd + Send + Sync>;

/// Names a source for as long as the reactor lives; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceId(pub(super) u64);

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

    pub(super) fn flags(self) -> epoll::EventFlags {
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
    pub(super) fn from_flags(flags: epoll::EventFlags) -> Self {
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

impl<'a> Context<'a> {
    pub(super) fn new(registry: &'a mut Registry, id: SourceId) -> Self {
        Self { registry, id }
    }

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
        self.registry
            .descriptors
            .watch((self.id, key), fd, interest)
    }

    /// Change what is heard about `key`; free when nothing changes.
    ///
    /// # Errors
    /// ENOENT: the key is not watched.
    pub fn set_interest(&mut self, key: u64, interest: Interest) -> io::Result<()> {
        self.registry
            .descriptors
            .set_interest((self.id, key), interest)
    }

    /// Stop watching `key` and give the descriptor's share back. Unknown keys are ignored.
    pub fn unwatch(&mut self, key: u64) {
        self.registry.descriptors.unwatch((self.id, key));
    }

    /// Be called at `deadline` (or as soon after as the thread can). Replaces the timer `key`.
    pub fn set_timer(&mut self, key: u64, deadline: Instant) {
        self.registry.timers.set((self.id, key), deadline);
    }

    /// Forget the timer `key`, if it is set.
    pub fn cancel_timer(&mut self, key: u64) {
        self.registry.timers.cancel((self.id, key));
    }

    /// End this source: everything it watches is forgotten now, it is dropped after the callback.
    pub fn remove(&mut self) {
        self.registry.remove(self.id);
    }
}
