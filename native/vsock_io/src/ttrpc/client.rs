//! The requests in flight on one connection: stream ids, deadlines, and the bytes that the
//! socket has not taken yet.
//!
//! [`Requests`] is shared by the I/O thread, which receives, and the threads that call. A caller
//! sends straight from its own thread when the socket takes the bytes, which spares a wake-up
//! of the I/O thread per call; what the socket refuses is queued (bounded) and the I/O thread
//! asked to continue.
//!
//! There are two locks, taken in this order: one for sending, held during the system call, and
//! one for the book-keeping, which is not. The reply can be there before the send has returned,
//! and the I/O thread must be able to look up its request then.

use std::collections::{BTreeSet, HashMap};
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{self, SendAncillaryBuffer, SendFlags};

use super::message::{MessageError, encode_request_frame};
use crate::status::Code;

/// Bytes that may wait for the socket: four requests of the largest size.
const MAX_QUEUED: usize = 16 << 20;
/// A queue that has been larger than this gives its memory back when it is empty.
const KEPT_QUEUE: usize = 64 << 10;

/// Who gets the reply to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyTo {
    /// The event with this token.
    Event(u64),
    /// The stdio copy with this number.
    Copy(u64),
}

/// Why a request could not be sent. Nothing was sent and no reply will come.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The connection has ended.
    #[error("{1}")]
    Ended(Code, String),
    /// The request exceeds a frame.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The guest does not take what was sent before.
    #[error("{MAX_QUEUED} bytes of requests wait for the guest to read them")]
    QueueFull,
    /// All 2³¹ odd stream ids were used; the connection must be made anew.
    #[error("the connection has no stream id left")]
    OutOfStreamIds,
}

impl RequestError {
    /// The code to report.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Ended(code, _) => *code,
            Self::Message(_) | Self::QueueFull => Code::RESOURCE_EXHAUSTED,
            Self::OutOfStreamIds => Code::UNAVAILABLE,
        }
    }
}

/// A unary request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Full name of the service, for example `grpc.AgentService`.
    pub service: &'a str,
    /// Bare name of the method.
    pub method: &'a str,
    /// The encoded message, in two parts so that data need not be copied behind its head.
    pub payload: [&'a [u8]; 2],
    /// Sent to the server and enforced here; `None` waits for ever.
    pub timeout: Option<Duration>,
}

/// Whether the I/O thread must look after the connection: write, set a timer, or end it.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeedsAttention(pub bool);

/// The book-keeping of one connection.
#[derive(Debug)]
pub struct Requests {
    outgoing: Mutex<Outgoing>,
    book: Mutex<Book>,
}

#[derive(Debug)]
struct Outgoing {
    socket: Option<Arc<OwnedFd>>,
    /// `None` when they have run out.
    next_stream_id: Option<u32>,
    queue: Vec<u8>,
    queue_start: usize,
    send_error: Option<Errno>,
}

#[derive(Debug, Default)]
struct Book {
    pending: HashMap<u32, Pending>,
    deadlines: BTreeSet<(Instant, u32)>,
    /// When the I/O thread's timer is due; never later than the first deadline.
    timer: Option<Instant>,
    end: Option<(Code, String)>,
}

#[derive(Debug)]
struct Pending {
    reply_to: ReplyTo,
    deadline: Option<Instant>,
}

impl Requests {
    /// Start on a connected socket.
    #[must_use]
    pub fn new(socket: Arc<OwnedFd>) -> Self {
        Self {
            outgoing: Mutex::new(Outgoing {
                socket: Some(socket),
                next_stream_id: Some(1),
                queue: Vec::new(),
                queue_start: 0,
                send_error: None,
            }),
            book: Mutex::default(),
        }
    }

    /// Send a request. Its reply, timeout or loss is reported to `reply_to`.
    ///
    /// # Errors
    /// See [`RequestError`]; `reply_to` hears nothing then.
    pub fn send(
        &self,
        reply_to: ReplyTo,
        request: Request<'_>,
    ) -> Result<NeedsAttention, RequestError> {
        let mut outgoing = lock(&self.outgoing);
        if outgoing.queue.len() - outgoing.queue_start > MAX_QUEUED {
            return Err(RequestError::QueueFull);
        }
        let stream_id = outgoing
            .next_stream_id
            .ok_or(RequestError::OutOfStreamIds)?;
        let [first, second] = request.payload;
        let timeout = request.timeout.unwrap_or_default();
        let (head, tail) = encode_request_frame(
            stream_id,
            request.service,
            request.method,
            first.len().saturating_add(second.len()),
            i64::try_from(timeout.as_nanos()).unwrap_or(i64::MAX),
        )?;
        let deadline = request
            .timeout
            .and_then(|timeout| Instant::now().checked_add(timeout));
        let is_first = lock(&self.book).open(stream_id, reply_to, deadline)?;
        outgoing.next_stream_id = stream_id.checked_add(2);
        let had_queue = outgoing.has_queue();
        outgoing.send(&[&head, first, second, &tail]);
        let is_stuck = outgoing.send_error.is_some() || outgoing.has_queue() != had_queue;
        Ok(NeedsAttention(is_first || is_stuck))
    }

    /// A reply to `stream_id` came. `None`: nobody waits for it (any more).
    pub fn take(&self, stream_id: u32) -> Option<ReplyTo> {
        let mut book = lock(&self.book);
        let pending = book.pending.remove(&stream_id)?;
        if let Some(deadline) = pending.deadline {
            book.deadlines.remove(&(deadline, stream_id));
        }
        Some(pending.reply_to)
    }

    /// Take the requests whose deadline is over. Call when the timer fires.
    pub fn take_expired(&self, now: Instant) -> Vec<ReplyTo> {
        let mut book = lock(&self.book);
        let mut expired = Vec::new();
        while let Some((deadline, stream_id)) = book.deadlines.first().copied() {
            if deadline > now {
                break;
            }
            book.deadlines.pop_first();
            if let Some(pending) = book.pending.remove(&stream_id) {
                expired.push(pending.reply_to);
            }
        }
        book.timer = book.deadlines.first().map(|(deadline, _)| *deadline);
        expired
    }

    /// When the timer must be due.
    pub fn timer(&self) -> Option<Instant> {
        lock(&self.book).timer
    }

    /// Give the socket what waits for it. `Ok(true)` when something still waits.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn flush(&self) -> Result<bool, Errno> {
        let mut outgoing = lock(&self.outgoing);
        outgoing.flush();
        match outgoing.send_error {
            Some(errno) => Err(errno),
            None => Ok(outgoing.has_queue()),
        }
    }

    /// End the connection: take every request in flight, refuse later ones with this status and
    /// let go of the socket. The first end counts.
    pub fn end(&self, code: Code, message: &str) -> Vec<ReplyTo> {
        let mut outgoing = lock(&self.outgoing);
        outgoing.socket = None;
        outgoing.queue = Vec::new();
        outgoing.queue_start = 0;
        let mut book = lock(&self.book);
        if book.end.is_none() {
            book.end = Some((code, message.to_owned()));
        }
        book.deadlines.clear();
        book.timer = None;
        book.pending
            .drain()
            .map(|(_, pending)| pending.reply_to)
            .collect()
    }

    /// How the connection ended, if it has.
    pub fn ended(&self) -> Option<(Code, String)> {
        lock(&self.book).end.clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Both states are consistent between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Book {
    /// Note a request about to be sent; whether the timer must be set for it.
    fn open(
        &mut self,
        stream_id: u32,
        reply_to: ReplyTo,
        deadline: Option<Instant>,
    ) -> Result<bool, RequestError> {
        if let Some((code, message)) = &self.end {
            return Err(RequestError::Ended(*code, message.clone()));
        }
        self.pending
            .insert(stream_id, Pending { reply_to, deadline });
        let Some(deadline) = deadline else {
            return Ok(false);
        };
        self.deadlines.insert((deadline, stream_id));
        let is_first = self.timer.is_none_or(|timer| deadline < timer);
        if is_first {
            self.timer = Some(deadline);
        }
        Ok(is_first)
    }
}

impl Outgoing {
    fn has_queue(&self) -> bool {
        self.queue_start < self.queue.len()
    }

    /// Send the parts as far as the socket takes them and queue the rest.
    fn send(&mut self, parts: &[&[u8]; 4]) {
        let mut sent = 0;
        if !self.has_queue() && self.send_error.is_none() {
            let slices = parts.map(IoSlice::new);
            sent = self.send_slices(&slices);
        }
        for part in parts {
            let skipped = sent.min(part.len());
            sent -= skipped;
            self.queue
                .extend_from_slice(part.get(skipped..).unwrap_or_default());
        }
    }

    fn flush(&mut self) {
        while self.has_queue() && self.send_error.is_none() {
            let queue = std::mem::take(&mut self.queue);
            let rest = queue.get(self.queue_start..).unwrap_or_default();
            let sent = self.send_slices(&[IoSlice::new(rest)]);
            self.queue = queue;
            self.queue_start += sent;
            if sent == 0 {
                break;
            }
        }
        if !self.has_queue() {
            self.queue_start = 0;
            self.queue.clear();
            self.queue.shrink_to(KEPT_QUEUE);
        }
    }

    /// How many bytes the socket took; 0 when it would block or is broken.
    fn send_slices(&mut self, slices: &[IoSlice<'_>]) -> usize {
        let Some(socket) = &self.socket else { return 0 };
        // Whatever mode the descriptor came in: a caller's thread must not block.
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        loop {
            let mut control = SendAncillaryBuffer::default();
            match net::sendmsg(socket, slices, &mut control, flags) {
                Ok(sent) => return sent,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return 0,
                Err(errno) => {
                    self.send_error = Some(errno);
                    return 0;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn connected() -> (Requests, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        (Requests::new(Arc::new(ours)), theirs)
    }

    fn request(payload: &[u8], timeout: Option<Duration>) -> Request<'_> {
        Request {
            service: "s",
            method: "m",
            payload: [payload, &[]],
            timeout,
        }
    }

    #[test]
    fn stream_ids_are_odd_and_run_out_with_an_error() {
        let (requests, _theirs) = connected();
        lock(&requests.outgoing).next_stream_id = Some(u32::MAX);
        let sent = requests.send(ReplyTo::Event(1), request(b"", None));
        assert_eq!(sent.unwrap(), NeedsAttention(false));
        let refused = requests
            .send(ReplyTo::Event(2), request(b"", None))
            .unwrap_err();
        assert_eq!(refused.code(), Code::UNAVAILABLE);
        assert_eq!(requests.take(u32::MAX), Some(ReplyTo::Event(1)));
    }

    #[test]
    fn a_peer_that_never_reads_fills_a_bounded_queue() {
        let (requests, _theirs) = connected();
        let payload = vec![0; 4_000_000];
        let mut accepted = 0_u64;
        let refused = loop {
            match requests.send(ReplyTo::Event(accepted), request(&payload, None)) {
                Ok(_) => accepted += 1,
                Err(error) => break error,
            }
            assert!(accepted < 10);
        };
        assert_eq!(refused.code(), Code::RESOURCE_EXHAUSTED);
        assert_eq!(requests.flush(), Ok(true));
    }

    #[test]
    fn only_a_deadline_before_the_timer_needs_attention() {
        let (requests, _theirs) = connected();
        let send = |seconds| {
            let timeout = Some(Duration::from_secs(seconds));
            requests
                .send(ReplyTo::Event(seconds), request(b"", timeout))
                .unwrap()
        };
        assert_eq!(send(20), NeedsAttention(true));
        assert_eq!(send(30), NeedsAttention(false));
        assert_eq!(send(10), NeedsAttention(true));
        let expired = requests.take_expired(Instant::now() + Duration::from_secs(25));
        assert_eq!(expired, [ReplyTo::Event(10), ReplyTo::Event(20)]);
        assert!(requests.timer().unwrap() > Instant::now() + Duration::from_secs(25));
    }

    #[test]
    fn after_the_end_requests_are_refused_with_its_status() {
        let (requests, _theirs) = connected();
        let _ = requests.send(ReplyTo::Copy(7), request(b"", None)).unwrap();
        assert_eq!(requests.end(Code::UNAVAILABLE, "gone"), [ReplyTo::Copy(7)]);
        assert!(requests.end(Code::CANCELLED, "closed").is_empty());
        let refused = requests
            .send(ReplyTo::Event(1), request(b"", None))
            .unwrap_err();
        assert_eq!(
            (refused.code(), refused.to_string()),
            (Code::UNAVAILABLE, "gone".to_owned())
        );
    }
}
