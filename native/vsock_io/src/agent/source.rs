//! The I/O thread's half of a connection: it receives, keeps the deadlines and runs the copies.
//!
//! ```text
//! connected ──closed by us or the agent, or broken──▶ ended ──last copy ends──▶ removed
//! ```
//!
//! At the end of the connection every call completes and input copies stop; output copies live
//! on until they have written what they hold. A source on the I/O thread, made by
//! [`AgentClient`](super::AgentClient) and reached from other threads through it only.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{self, RecvFlags, Shutdown};

use super::copy::{self, Copy, Pump};
use crate::event::{Completion, Value};
use crate::reactor::{Context, Interest, Readiness, Source, StopReason};
use crate::status::Code;
use crate::stdio::pump::{Link, Outcome, Reply, reply_of};
use crate::ttrpc::client::{ReplyTo, Requests};
use crate::ttrpc::frame::{Frame, FrameDecoder, FrameHeader, MAX_PAYLOAD, TYPE_RESPONSE};
use crate::ttrpc::message::Response;

/// The socket's key; copies count up from 1.
pub(super) const SOCKET: u64 = 0;
const DEADLINE_TIMER: u64 = 0;
/// Reads of the socket per wake-up, so that other sources get their turn.
const READS_PER_TURN: usize = 4;

/// See the module.
pub(super) struct AgentSource {
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
    pub(super) fn new(
        socket: Arc<OwnedFd>,
        requests: Arc<Requests>,
        closed_token: u64,
        ignored_frames: Arc<AtomicU64>,
    ) -> Self {
        Self {
            socket: Some(socket),
            requests,
            decoder: FrameDecoder::default(),
            copies: HashMap::new(),
            closed_token,
            ignored_frames,
            is_failing: false,
        }
    }

    fn begin(&self, context: &mut Context<'_>) -> std::io::Result<()> {
        let Some(socket) = &self.socket else {
            return Ok(());
        };
        context.watch(SOCKET, socket.clone(), Interest::READ)
    }

    /// Bring the timer and the socket's interest in line with the requests.
    pub(super) fn attend(&mut self, context: &mut Context<'_>) {
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
                    copy::finish(&mut self.copies, id, outcome, context);
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
        copy::finish(&mut self.copies, id, outcome, context);
        if needs_attention {
            self.attend(context);
        }
    }

    pub(super) fn add_copy(&mut self, id: u64, copy: Copy, context: &mut Context<'_>) {
        self.copies.insert(id, copy);
        self.with_copy(id, context, Pump::start);
        self.leave_if_done(context);
    }

    pub(super) fn stop_copy(
        &mut self,
        id: u64,
        code: Code,
        message: &str,
        context: &mut Context<'_>,
    ) {
        let outcome = self
            .copies
            .get_mut(&id)
            .map(|copy| copy.pump.stop(code, message));
        copy::finish(&mut self.copies, id, outcome, context);
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

    pub(super) fn close(&mut self, code: Code, message: &str, context: &mut Context<'_>) {
        let ids: Vec<u64> = self.copies.keys().copied().collect();
        for id in ids {
            self.stop_copy(id, code, message, context);
        }
        self.end(code, message, context);
        self.leave_if_done(context);
    }

    /// Remove the source when the connection and all copies have ended.
    pub(super) fn leave_if_done(&self, context: &mut Context<'_>) {
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
