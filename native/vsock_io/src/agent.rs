//! The connection to a guest agent: calls, and copies of standard streams, over one socket.
//!
//! [`AgentClient`] is the caller's half, usable from any thread. Its other half, a source on the
//! I/O thread, receives, keeps the deadlines and runs the copies. When the connection ends, every
//! call completes; copies finish writing what they hold; then the source goes.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{self, RecvFlags, Shutdown};

use crate::event::{Completion, Value};
use crate::reactor::{
    Context, Interest, ReactorError, ReactorHandle, Readiness, Source, SourceId, StopReason,
};
use crate::status::Code;
use crate::stdio::fifo::HostEnd;
use crate::stdio::pump::{
    InputCopy, Link, Outcome, OutputCopy, OutputStream, ProcessName, Reply, reply_of,
};
use crate::ttrpc::client::{NeedsAttention, ReplyTo, Request, Requests};
use crate::ttrpc::frame::{Frame, FrameDecoder, FrameHeader, MAX_PAYLOAD, TYPE_RESPONSE};
use crate::ttrpc::message::Response;

/// The socket's key; copies count up from 1.
const SOCKET: u64 = 0;
const DEADLINE_TIMER: u64 = 0;
/// Reads of the socket per wake-up, so that other sources get their turn.
const READS_PER_TURN: usize = 4;
const CLOSED_BY_US: &str = "the connection was closed";

/// A ttRPC client on one connection to the agent. Dropping it closes the connection.
pub struct AgentClient {
    handle: ReactorHandle,
    id: Result<SourceId, ReactorError>,
    requests: Arc<Requests>,
    next_copy: AtomicU64,
    ignored_frames: Arc<AtomicU64>,
}

/// A running copy of a standard stream.
#[derive(Debug)]
pub struct StdioCopy {
    handle: ReactorHandle,
    source: Option<SourceId>,
    copy: u64,
}

impl fmt::Debug for AgentClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AgentClient")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl AgentClient {
    /// Take over the connected socket `fd`. The event `closed_token` comes when it ends, however
    /// it ends; also when the I/O thread is closed already.
    #[must_use]
    pub fn new(handle: &ReactorHandle, fd: OwnedFd, closed_token: u64) -> Self {
        let socket = Arc::new(fd);
        let requests = Arc::new(Requests::new(Arc::clone(&socket)));
        let ignored_frames = Arc::new(AtomicU64::new(0));
        let source = AgentSource {
            socket: Some(socket),
            requests: Arc::clone(&requests),
            decoder: FrameDecoder::default(),
            copies: HashMap::new(),
            closed_token,
            ignored_frames: Arc::clone(&ignored_frames),
            is_failing: false,
        };
        let id = handle.add(source);
        if let Err(error) = &id {
            requests.end(Code::CANCELLED, &error.to_string());
            let completion = Completion::failed(closed_token, Code::CANCELLED, error.to_string());
            handle.sink().complete(completion);
        }
        let next_copy = AtomicU64::new(SOCKET + 1);
        Self {
            handle: handle.clone(),
            id,
            requests,
            next_copy,
            ignored_frames,
        }
    }

    /// Send a unary request; the event `token` carries the reply's payload or the failure.
    /// A zero `timeout` means no deadline.
    pub fn call(&self, token: u64, service: &str, method: &str, payload: &[u8], timeout: Duration) {
        let timeout = (!timeout.is_zero()).then_some(timeout);
        let request = Request {
            service,
            method,
            payload: [payload, &[]],
            timeout,
        };
        match self.requests.send(ReplyTo::Event(token), request) {
            Ok(NeedsAttention(false)) => {}
            Ok(NeedsAttention(true)) => {
                self.with_source(AgentSource::attend);
            }
            Err(error) => {
                let completion = Completion::failed(token, error.code(), error.to_string());
                self.handle.sink().complete(completion);
            }
        }
    }

    /// Copy an output stream of a guest process to `fd` until its end, then close `fd`.
    pub fn copy_output(
        &self,
        token: u64,
        process: ProcessName,
        stream: OutputStream,
        fd: OwnedFd,
    ) -> StdioCopy {
        self.copy(token, fd, move |host| {
            Pump::Output(OutputCopy::new(host, &process, stream))
        })
    }

    /// Copy `fd` to the standard input of a guest process until end of file, then close both.
    pub fn copy_input(&self, token: u64, process: ProcessName, fd: OwnedFd) -> StdioCopy {
        self.copy(token, fd, move |host| {
            Pump::Input(InputCopy::new(host, process))
        })
    }

    /// Close the connection: calls and copies complete with CANCELLED.
    pub fn close(&self) {
        self.with_source(|source, context| source.close(Code::CANCELLED, CLOSED_BY_US, context));
    }

    /// Frames that belonged to no request: late replies, even or unknown stream ids, unknown types.
    pub fn ignored_frames(&self) -> u64 {
        self.ignored_frames.load(Ordering::Relaxed)
    }

    fn copy(&self, token: u64, fd: OwnedFd, make: impl FnOnce(HostEnd) -> Pump) -> StdioCopy {
        let copy = self.next_copy.fetch_add(1, Ordering::Relaxed);
        let started = match (&self.id, HostEnd::new(fd, copy)) {
            (Err(error), _) => Err((Code::CANCELLED, error.to_string())),
            (Ok(_), Err(error)) => Err((Code::INVALID_ARGUMENT, format!("descriptor: {error}"))),
            (Ok(id), Ok(host)) => self.post_copy(token, *id, copy, make(host)),
        };
        if let Err((code, message)) = started {
            complete_copy(
                &self.handle,
                token,
                Outcome {
                    code,
                    message,
                    count: 0,
                },
            );
        }
        let source = self.id.as_ref().ok().copied();
        StdioCopy {
            handle: self.handle.clone(),
            source,
            copy,
        }
    }

    fn post_copy(
        &self,
        token: u64,
        id: SourceId,
        copy: u64,
        pump: Pump,
    ) -> Result<(), (Code, String)> {
        let requests = Arc::clone(&self.requests);
        let posted = self.handle.post(move |registry| {
            let mut pump = Some(pump);
            registry.with(id, |source: &mut AgentSource, context| {
                if let Some(pump) = pump.take() {
                    source.add_copy(copy, Copy { token, pump }, context);
                }
            });
            if pump.take().is_some() {
                let (code, message) = requests.ended().unwrap_or_else(gone);
                complete_copy(
                    registry.handle(),
                    token,
                    Outcome {
                        code,
                        message,
                        count: 0,
                    },
                );
            }
        });
        posted.map_err(|error| (Code::CANCELLED, error.to_string()))
    }

    fn with_source(&self, f: impl FnOnce(&mut AgentSource, &mut Context<'_>) + Send + 'static) {
        if let Ok(id) = self.id {
            // A closed thread has stopped the source, which completed everything.
            let _posted = self.handle.post(move |registry| {
                registry.with(id, f);
            });
        }
    }
}

impl Drop for AgentClient {
    fn drop(&mut self) {
        self.close();
    }
}

impl StdioCopy {
    /// End the copy now: what is buffered is written as far as that does not block, and the
    /// event has code CANCELLED. Nothing happens if the copy has ended.
    pub fn stop(&self) {
        let Some(id) = self.source else { return };
        let copy = self.copy;
        // A closed thread has stopped the copy.
        let _posted = self.handle.post(move |registry| {
            registry.with(id, |source: &mut AgentSource, context| {
                source.stop_copy(copy, Code::CANCELLED, "the copy was stopped", context);
                source.leave_if_done(context);
            });
        });
    }
}

fn gone() -> (Code, String) {
    (Code::UNAVAILABLE, "the connection has ended".to_owned())
}

fn complete_copy(handle: &ReactorHandle, token: u64, outcome: Outcome) {
    let Outcome {
        code,
        message,
        count,
    } = outcome;
    handle.sink().complete(Completion {
        token,
        code,
        value: Value::Count(count),
        message,
    });
}

struct Copy {
    token: u64,
    pump: Pump,
}

enum Pump {
    Output(OutputCopy),
    Input(InputCopy),
}

impl Pump {
    fn start(&mut self, link: &mut Link<'_, '_>) -> Option<Outcome> {
        match self {
            Self::Output(copy) => copy.start(link),
            Self::Input(copy) => copy.start(link),
        }
    }

    fn reply(&mut self, reply: Reply<'_>, link: &mut Link<'_, '_>) -> Option<Outcome> {
        match self {
            Self::Output(copy) => copy.reply(reply, link),
            Self::Input(copy) => copy.reply(reply, link),
        }
    }

    fn ready(&mut self, link: &mut Link<'_, '_>) -> Option<Outcome> {
        match self {
            Self::Output(copy) => copy.ready(link),
            Self::Input(copy) => copy.ready(link),
        }
    }

    fn stop(&mut self, code: Code, message: &str) -> Outcome {
        match self {
            Self::Output(copy) => copy.stop(code, message),
            Self::Input(copy) => copy.stop(code, message),
        }
    }
}

/// The I/O thread's half of a connection.
struct AgentSource {
    /// `None` once the connection has ended.
    socket: Option<Arc<OwnedFd>>,
    requests: Arc<Requests>,
    decoder: FrameDecoder,
    copies: HashMap<u64, Copy>,
    closed_token: u64,
    ignored_frames: Arc<AtomicU64>,
    /// A send has failed and what was received before is being read.
    is_failing: bool,
}

impl AgentSource {
    fn begin(&self, context: &mut Context<'_>) -> std::io::Result<()> {
        let Some(socket) = &self.socket else {
            return Ok(());
        };
        context.watch(SOCKET, socket.clone(), Interest::READ)
    }

    /// Bring the timer and the socket's interest in line with the requests.
    fn attend(&mut self, context: &mut Context<'_>) {
        if let Some(deadline) = self.requests.timer() {
            context.set_timer(DEADLINE_TIMER, deadline);
        }
        if self.socket.is_none() {
            return;
        }
        let armed = self
            .requests
            .flush()
            .map_err(std::io::Error::from)
            .and_then(|is_waiting| {
                let interest = if is_waiting {
                    Interest::BOTH
                } else {
                    Interest::READ
                };
                context.set_interest(SOCKET, interest)
            });
        if let Err(error) = armed
            && !std::mem::replace(&mut self.is_failing, true)
        {
            // Replies may have arrived before the connection broke.
            self.receive(context);
            self.end(
                Code::UNAVAILABLE,
                &format!("send to the agent: {error}"),
                context,
            );
        }
    }

    fn receive(&mut self, context: &mut Context<'_>) {
        for _ in 0..READS_PER_TURN {
            let Some(socket) = &self.socket else { return };
            let spare = self.decoder.spare();
            let room = spare.len();
            let count = match net::recv(socket, spare, RecvFlags::DONTWAIT) {
                Ok((0, _)) => {
                    let message = if self.decoder.is_at_boundary() {
                        "the agent closed the connection"
                    } else {
                        "the connection ended within a message"
                    };
                    return self.end(Code::UNAVAILABLE, message, context);
                }
                Ok((count, _)) => count,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return,
                Err(errno) => {
                    let message = format!("receive from the agent: {errno}");
                    return self.end(Code::UNAVAILABLE, &message, context);
                }
            };
            self.decoder.commit(count);
            self.dispatch(context);
            if count < room {
                return;
            }
        }
    }

    fn dispatch(&mut self, context: &mut Context<'_>) {
        let mut needs_attention = false;
        while let Some(frame) = self.decoder.next() {
            let (header, payload) = match frame {
                Frame::Whole(header, payload) => (header, Ok(payload)),
                Frame::Oversized(header) => (header, Err(oversized(header))),
            };
            let reply_to = match header.kind {
                TYPE_RESPONSE => self.requests.take(header.stream_id),
                _ => None,
            };
            let Some(reply_to) = reply_to else {
                self.ignored_frames.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            let reply = payload.and_then(|bytes| {
                let response =
                    Response::decode(bytes).map_err(|error| (Code::INTERNAL, error.to_string()))?;
                reply_of(&response)
            });
            match reply_to {
                ReplyTo::Event(token) => complete_call(token, reply, context),
                ReplyTo::Copy(id) => {
                    let requests = &*self.requests;
                    let mut link = Link {
                        id,
                        requests,
                        context,
                        needs_attention: &mut needs_attention,
                    };
                    // Gone if it was stopped while its request was in flight.
                    let outcome = self
                        .copies
                        .get_mut(&id)
                        .and_then(|copy| copy.pump.reply(reply, &mut link));
                    finish_copy(&mut self.copies, id, outcome, context);
                }
            }
        }
        if needs_attention {
            self.attend(context);
        }
    }

    /// Tell whoever waits that no reply will come.
    fn fail(
        &mut self,
        reply_to: Vec<ReplyTo>,
        code: Code,
        message: &str,
        context: &mut Context<'_>,
    ) {
        for reply_to in reply_to {
            let reply = Err((code, message.to_owned()));
            match reply_to {
                ReplyTo::Event(token) => complete_call(token, reply, context),
                ReplyTo::Copy(id) => {
                    self.with_copy(id, context, |pump, link| pump.reply(reply, link));
                }
            }
        }
    }

    fn with_copy(
        &mut self,
        id: u64,
        context: &mut Context<'_>,
        f: impl FnOnce(&mut Pump, &mut Link<'_, '_>) -> Option<Outcome>,
    ) {
        let mut needs_attention = false;
        let requests = &*self.requests;
        let mut link = Link {
            id,
            requests,
            context,
            needs_attention: &mut needs_attention,
        };
        let outcome = self
            .copies
            .get_mut(&id)
            .and_then(|copy| f(&mut copy.pump, &mut link));
        finish_copy(&mut self.copies, id, outcome, context);
        if needs_attention {
            self.attend(context);
        }
    }

    fn add_copy(&mut self, id: u64, copy: Copy, context: &mut Context<'_>) {
        self.copies.insert(id, copy);
        self.with_copy(id, context, Pump::start);
        self.leave_if_done(context);
    }

    fn stop_copy(&mut self, id: u64, code: Code, message: &str, context: &mut Context<'_>) {
        let outcome = self
            .copies
            .get_mut(&id)
            .map(|copy| copy.pump.stop(code, message));
        finish_copy(&mut self.copies, id, outcome, context);
    }

    /// The connection is over: complete everything but the copies' last bytes.
    fn end(&mut self, code: Code, message: &str, context: &mut Context<'_>) {
        let Some(socket) = self.socket.take() else {
            return;
        };
        context.unwatch(SOCKET);
        context.cancel_timer(DEADLINE_TIMER);
        let reply_to = self.requests.end(code, message);
        // Whatever holds another copy of the descriptor must not keep the connection alive.
        let _shut = net::shutdown(&socket, Shutdown::Both);
        drop(socket);
        self.decoder = FrameDecoder::empty();
        self.fail(reply_to, code, message, context);
        // An input copy that waits for its host end would not notice; an output copy notices when
        // it has written what it holds.
        let is_input = |copy: &Copy| matches!(copy.pump, Pump::Input(_));
        let inputs: Vec<u64> = self
            .copies
            .iter()
            .filter_map(|(id, copy)| is_input(copy).then_some(*id))
            .collect();
        for id in inputs {
            self.stop_copy(id, code, message, context);
        }
        let completion = Completion::failed(self.closed_token, code, message);
        context.sink().complete(completion);
        self.leave_if_done(context);
    }

    fn close(&mut self, code: Code, message: &str, context: &mut Context<'_>) {
        let ids: Vec<u64> = self.copies.keys().copied().collect();
        for id in ids {
            self.stop_copy(id, code, message, context);
        }
        self.end(code, message, context);
        self.leave_if_done(context);
    }

    fn leave_if_done(&self, context: &mut Context<'_>) {
        if self.socket.is_none() && self.copies.is_empty() {
            context.remove();
        }
    }
}

impl Source for AgentSource {
    fn started(&mut self, context: &mut Context<'_>) {
        if let Err(error) = self.begin(context) {
            self.end(
                Code::INVALID_ARGUMENT,
                &format!("watch the socket: {error}"),
                context,
            );
        }
    }

    fn ready(&mut self, key: u64, readiness: Readiness, context: &mut Context<'_>) {
        if key == SOCKET {
            if readiness.writable {
                self.attend(context);
            }
            if readiness.readable {
                self.receive(context);
            }
        } else {
            self.with_copy(key, context, Pump::ready);
            self.leave_if_done(context);
        }
    }

    fn timeout(&mut self, _key: u64, context: &mut Context<'_>) {
        let expired = self.requests.take_expired(Instant::now());
        self.fail(
            expired,
            Code::DEADLINE_EXCEEDED,
            "no reply within the deadline",
            context,
        );
        self.attend(context);
    }

    fn stopped(&mut self, reason: &StopReason, context: &mut Context<'_>) {
        let (code, message) = reason.status();
        self.close(code, &message, context);
    }
}

fn oversized(header: FrameHeader) -> (Code, String) {
    let text = format!(
        "a reply of {} bytes exceeds the limit of {MAX_PAYLOAD}",
        header.length
    );
    (Code::RESOURCE_EXHAUSTED, text)
}

fn complete_call(token: u64, reply: Reply<'_>, context: &Context<'_>) {
    let completion = match reply {
        Ok(payload) => Completion::ok(token, Value::Bytes(payload.to_vec())),
        Err((code, message)) => Completion::failed(token, code, message),
    };
    context.sink().complete(completion);
}

/// Close the copy's descriptor, then report, so that the receiver finds it closed.
fn finish_copy(
    copies: &mut HashMap<u64, Copy>,
    id: u64,
    outcome: Option<Outcome>,
    context: &mut Context<'_>,
) {
    if let Some(outcome) = outcome
        && let Some(Copy { token, pump }) = copies.remove(&id)
    {
        context.unwatch(id);
        drop(pump);
        complete_copy(context.registry().handle(), token, outcome);
    }
}
