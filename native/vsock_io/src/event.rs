//! How results leave the I/O thread: one [`Completion`] per token through an [`EventSink`].
//!
//! [`EventQueue`] is the sink used in practice: a queue with a bound on the bytes it holds and
//! an eventfd that is readable while it is not empty. The I/O thread pushes, the owner's event
//! loop polls the eventfd and drains. Neither side ever waits for the other.
//!
//! Lines for a log travel the same way under a token of their own, which they may use any number
//! of times. They are the one thing that is dropped when too many wait, and counted then.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::status::Code;

/// The token of events that belong to no operation: a panic on the I/O thread.
pub const FATAL_TOKEN: u64 = 0;

/// What an operation yields beside its code.
#[derive(Debug)]
pub enum Value {
    /// Nothing.
    None,
    /// A reply's payload.
    Bytes(Vec<u8>),
    /// A descriptor that the receiver owns from now on.
    Fd(OwnedFd),
    /// A number of bytes.
    Count(u64),
}

/// The end of one operation.
#[derive(Debug)]
pub struct Completion {
    /// The number the caller gave the operation.
    pub token: u64,
    /// How it ended.
    pub code: Code,
    /// Its result; copies report their count on failure too.
    pub value: Value,
    /// Error text, empty on success.
    pub message: String,
}

impl Completion {
    /// A success.
    #[must_use]
    pub fn ok(token: u64, value: Value) -> Self {
        Self {
            token,
            code: Code::OK,
            value,
            message: String::new(),
        }
    }

    /// A failure without a value.
    #[must_use]
    pub fn failed(token: u64, code: Code, message: impl Into<String>) -> Self {
        Self {
            token,
            code,
            value: Value::None,
            message: message.into(),
        }
    }
}

/// Where completions go. Called on the I/O thread and, for operations refused at once, on the
/// caller's: it must neither block nor panic.
pub trait EventSink: Send + Sync {
    /// Deliver the end of an operation. Never dropped: each token is reported exactly once.
    fn complete(&self, completion: Completion);

    /// Report that a part of the I/O thread died. Its operations are completed separately.
    fn fatal(&self, message: String) {
        self.complete(Completion::failed(FATAL_TOKEN, Code::INTERNAL, message));
    }
}

/// A queue of completions and an eventfd that is readable while the queue is not empty.
///
/// Memory is bounded: when the payloads waiting exceed the budget, a further payload is dropped
/// and its completion becomes `RESOURCE_EXHAUSTED`. The completion itself is never lost.
#[derive(Debug)]
pub struct EventQueue {
    ready: OwnedFd,
    byte_budget: usize,
    state: Mutex<QueueState>,
}

#[derive(Debug, Default)]
struct QueueState {
    completions: VecDeque<Completion>,
    queued_bytes: usize,
    queued_lines: usize,
    /// Lines that found no room since the last drain, by token.
    dropped_lines: BTreeMap<u64, u64>,
}

impl QueueState {
    fn is_empty(&self) -> bool {
        self.completions.is_empty() && self.dropped_lines.is_empty()
    }
}

impl EventQueue {
    /// Payload bytes a queue holds unless told otherwise: 16 replies of the largest size.
    pub const DEFAULT_BYTE_BUDGET: usize = 64 << 20;
    /// Lines of logs that wait at most.
    pub const MAX_LINES: usize = 256;
    /// Bytes of a line that are kept.
    pub const MAX_LINE_BYTES: usize = 1024;

    /// Create a queue that holds at most `byte_budget` payload bytes.
    ///
    /// # Errors
    /// The process has no descriptor left for the eventfd.
    pub fn new(byte_budget: usize) -> std::io::Result<Self> {
        let ready = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            ready,
            byte_budget,
            state: Mutex::default(),
        })
    }

    /// Queue a line for the log that `token` stands for. Past [`Self::MAX_LINES`] waiting ones it
    /// is dropped; what was, is said by a `RESOURCE_EXHAUSTED` with the count, after the lines
    /// that were kept.
    pub fn log(&self, token: u64, line: &str) {
        let mut state = self.lock();
        let was_empty = state.is_empty();
        if state.queued_lines < Self::MAX_LINES {
            state.queued_lines += 1;
            state.completions.push_back(Completion {
                token,
                code: Code::OK,
                value: Value::None,
                message: cut(line, Self::MAX_LINE_BYTES).to_owned(),
            });
        } else {
            *state.dropped_lines.entry(token).or_default() += 1;
        }
        drop(state);
        self.announce(was_empty);
    }

    fn announce(&self, was_empty: bool) {
        if was_empty {
            // EAGAIN would mean a counter at its maximum: readable, which is the point.
            while rustix::io::write(&self.ready, &1_u64.to_ne_bytes()) == Err(Errno::INTR) {}
        }
    }

    /// Take every queued completion and line, in order, and reset the eventfd.
    pub fn drain(&self) -> VecDeque<Completion> {
        let mut state = self.lock();
        let mut counter = [0; 8];
        // Always, and under the lock: a push is announced after its lock is released, so the
        // eventfd can be readable with the queue already empty. EAGAIN means nothing to reset.
        let _was_reset = rustix::io::read(&self.ready, &mut counter);
        let mut taken = std::mem::take(&mut *state);
        drop(state);
        for (token, count) in taken.dropped_lines {
            taken.completions.push_back(Completion {
                token,
                code: Code::RESOURCE_EXHAUSTED,
                value: Value::Count(count),
                message: "lines were dropped: too many waited".to_owned(),
            });
        }
        taken.completions
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        // The state is consistent between any two statements, so poisoning means nothing here.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The beginning of `text`: whole characters, at most `limit` bytes.
fn cut(text: &str, limit: usize) -> &str {
    let mut end = limit.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

impl EventSink for EventQueue {
    fn complete(&self, mut completion: Completion) {
        let mut state = self.lock();
        if let Value::Bytes(bytes) = &completion.value {
            let total = state.queued_bytes.saturating_add(bytes.len());
            if total > self.byte_budget {
                completion = Completion::failed(
                    completion.token,
                    Code::RESOURCE_EXHAUSTED,
                    "too many reply bytes wait to be collected",
                );
            } else {
                state.queued_bytes = total;
            }
        }
        let was_empty = state.is_empty();
        state.completions.push_back(completion);
        drop(state);
        self.announce(was_empty);
    }
}

impl AsFd for EventQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn is_readable(queue: &EventQueue) -> bool {
        let mut fds = [PollFd::new(queue, PollFlags::IN)];
        poll(
            &mut fds,
            Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            }),
        )
        .unwrap()
            == 1
    }

    #[test]
    fn eventfd_is_readable_exactly_while_the_queue_is_not_empty() {
        let queue = EventQueue::new(100).unwrap();
        assert!(!is_readable(&queue));
        queue.complete(Completion::ok(1, Value::None));
        queue.complete(Completion::ok(2, Value::Count(5)));
        assert!(is_readable(&queue));
        let tokens: Vec<u64> = queue.drain().into_iter().map(|c| c.token).collect();
        assert_eq!(tokens, [1, 2]);
        assert!(!is_readable(&queue));
        assert!(queue.drain().is_empty());
    }

    #[test]
    fn a_payload_past_the_budget_is_dropped_but_its_completion_is_not() {
        let queue = EventQueue::new(10).unwrap();
        queue.complete(Completion::ok(1, Value::Bytes(vec![0; 8])));
        queue.complete(Completion::ok(2, Value::Bytes(vec![0; 8])));
        let drained = queue.drain();
        assert_eq!(drained[0].code, Code::OK);
        assert_eq!(drained[1].code, Code::RESOURCE_EXHAUSTED);
        queue.complete(Completion::ok(3, Value::Bytes(vec![0; 8])));
        assert_eq!(queue.drain()[0].code, Code::OK);
    }

    #[test]
    fn lines_past_the_limit_are_counted_and_completions_still_pass() {
        let queue = EventQueue::new(10).unwrap();
        for _ in 0..EventQueue::MAX_LINES + 3 {
            queue.log(7, "odd");
        }
        queue.complete(Completion::ok(1, Value::None));
        let drained = queue.drain();
        assert_eq!(drained.len(), EventQueue::MAX_LINES + 2);
        assert_eq!(drained[0].message, "odd");
        assert_eq!(drained[EventQueue::MAX_LINES].token, 1);
        let last = drained.back().unwrap();
        assert_eq!((last.token, last.code), (7, Code::RESOURCE_EXHAUSTED));
        assert!(matches!(last.value, Value::Count(3)));
        queue.log(7, "again");
        assert!(is_readable(&queue));
        assert_eq!(queue.drain().len(), 1);
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        let queue = EventQueue::new(10).unwrap();
        queue.log(
            7,
            &format!("-{}", "\u{e9}".repeat(EventQueue::MAX_LINE_BYTES)),
        );
        let line = &queue.drain()[0].message;
        assert_eq!(line.len(), EventQueue::MAX_LINE_BYTES - 1);
    }
}
