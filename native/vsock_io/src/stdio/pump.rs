//! The two copies. Output: ask the guest for a chunk, and when it comes ask for the next before
//! writing this one, straight from the receive buffer. Input: read a chunk, hand it to the guest,
//! wait for its word, go on; at end of file close the guest's end with an empty write.
//!
//! ```text
//! output:  reading ──empty data or error──▶ flushing ──all written──▶ finished
//!             └─ write fails: draining (bytes dropped) ──end──▶ finished with DATA_LOSS
//! input:   waiting ──readable──▶ sending ──reply──▶ waiting … ──end of file──▶ closing ──▶ finished
//! ```
//!
//! They live in the agent connection's source ([`crate::agent`]) on the I/O thread, which passes
//! them a [`Link`]. A method that returns an [`Outcome`] was the last to be called.

use std::io;

use super::fifo::{HostEnd, Wait};
use super::window::{Backlog, CHUNK};
use crate::reactor::{Context, Interest};
use crate::status::Code;
use crate::ttrpc::client::{NeedsAttention, ReplyTo, Request, RequestError, Requests};
use crate::ttrpc::message::{
    Response, decode_read_stream_response, decode_write_stream_response,
    encode_read_stream_request, encode_write_stream_head,
};

/// The agent's main service.
pub const AGENT_SERVICE: &str = "grpc.AgentService";
/// Bytes of stdin sent at once: a FIFO of the default size holds no more.
const INPUT_CHUNK: usize = 64 << 10;

/// Which guest process a copy belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessName {
    /// The container.
    pub container_id: String,
    /// The process within it; the init process has its own id too.
    pub exec_id: String,
}

/// An output stream of a guest process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputStream {
    /// Standard output, or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a copy ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// OK when everything the process wrote (or was sent) arrived.
    pub code: Code,
    /// What happened otherwise.
    pub message: String,
    /// Bytes that reached their destination.
    pub count: u64,
}

/// How a request ended: the reply, or the status it failed with.
pub type Reply<'a> = Result<&'a [u8], (Code, String)>;

/// Split a response into its payload or the status it carries.
///
/// # Errors
/// The status, if it is not OK.
pub fn reply_of<'a>(response: &Response<'a>) -> Reply<'a> {
    if response.code.is_ok() {
        Ok(response.payload)
    } else {
        Err((
            response.code,
            String::from_utf8_lossy(response.message).into_owned(),
        ))
    }
}

/// What a copy needs of its surroundings.
pub struct Link<'a, 'b> {
    /// The number of the copy: its replies and its descriptor carry it.
    pub id: u64,
    /// The connection.
    pub requests: &'a Requests,
    /// The I/O thread.
    pub context: &'a mut Context<'b>,
    /// Set when the connection needs to be looked after.
    pub needs_attention: &'a mut bool,
}

impl Link<'_, '_> {
    fn send(&mut self, method: &str, payload: [&[u8]; 2]) -> Result<(), (Code, String)> {
        let request = Request {
            service: AGENT_SERVICE,
            method,
            payload,
            timeout: None,
        };
        match self.requests.send(ReplyTo::Copy(self.id), request) {
            Ok(NeedsAttention(needs_attention)) => {
                *self.needs_attention |= needs_attention;
                Ok(())
            }
            Err(error) => Err(status_of(&error)),
        }
    }
}

fn status_of(error: &RequestError) -> (Code, String) {
    (error.code(), error.to_string())
}

/// A copy from a guest process to the host.
#[derive(Debug)]
pub struct OutputCopy {
    host: HostEnd,
    method: &'static str,
    request: Vec<u8>,
    backlog: Backlog,
    is_requested: bool,
    count: u64,
    write_error: Option<io::Error>,
    end: Option<(Code, String)>,
}

impl OutputCopy {
    /// Prepare the copy; [`start`](Self::start) sends the first request.
    #[must_use]
    pub fn new(host: HostEnd, process: &ProcessName, stream: OutputStream) -> Self {
        let method = match stream {
            OutputStream::Stdout => "ReadStdout",
            OutputStream::Stderr => "ReadStderr",
        };
        Self {
            host,
            method,
            request: encode_read_stream_request(&process.container_id, &process.exec_id, CHUNK),
            backlog: Backlog::default(),
            is_requested: false,
            count: 0,
            write_error: None,
            end: None,
        }
    }

    /// Ask for the first chunk.
    pub fn start(&mut self, link: &mut Link<'_, '_>) -> Option<Outcome> {
        self.request_more(link);
        self.finished()
    }

    /// The reply to the request, or the news that none will come.
    pub fn reply(&mut self, reply: Reply<'_>, link: &mut Link<'_, '_>) -> Option<Outcome> {
        self.is_requested = false;
        let data = reply.and_then(|payload| {
            decode_read_stream_response(payload)
                .map_err(|error| (Code::INTERNAL, error.to_string()))
        });
        match data {
            Ok([]) | Err((Code::NOT_FOUND, _)) => self.end = Some((Code::OK, String::new())),
            Ok(data) => {
                let is_idle = self.backlog.is_empty();
                if is_idle {
                    // First, so that the guest works while we write.
                    self.request_more(link);
                    self.write(data, link);
                } else {
                    self.backlog.push(data);
                }
            }
            Err(status) => self.end = Some(status),
        }
        self.finished()
    }

    /// The host end takes bytes again.
    pub fn ready(&mut self, link: &mut Link<'_, '_>) -> Option<Outcome> {
        self.flush();
        if self.backlog.is_empty() {
            self.set_interest(Interest::NONE, link);
        }
        self.request_more(link);
        self.finished()
    }

    /// End now: write what can be written without waiting.
    pub fn stop(&mut self, code: Code, message: &str) -> Outcome {
        self.flush();
        if let Some(outcome) = self.finished() {
            return outcome;
        }
        let left = self.backlog.waiting().len();
        let message = match left {
            0 => message.to_owned(),
            _ => format!("{message}; {left} bytes were not written"),
        };
        Outcome {
            code,
            message,
            count: self.count,
        }
    }

    fn request_more(&mut self, link: &mut Link<'_, '_>) {
        if self.is_requested || self.end.is_some() || !self.backlog.has_room() {
            return;
        }
        match link.send(self.method, [&self.request, &[]]) {
            Ok(()) => self.is_requested = true,
            Err(status) => self.end = Some(status),
        }
    }

    /// Write fresh bytes to an idle host end and keep the rest.
    fn write(&mut self, data: &[u8], link: &mut Link<'_, '_>) {
        let written = self.write_through(data);
        if self.write_error.is_none()
            && let Some(rest) = data.get(written..)
            && !rest.is_empty()
        {
            self.backlog.push(rest);
            self.set_interest(Interest::WRITE, link);
        }
    }

    fn flush(&mut self) {
        let backlog = std::mem::take(&mut self.backlog);
        let written = self.write_through(backlog.waiting());
        self.backlog = backlog;
        if self.write_error.is_some() {
            self.backlog.clear();
        } else {
            self.backlog.consume(written);
        }
    }

    fn write_through(&mut self, data: &[u8]) -> usize {
        if self.write_error.is_some() || data.is_empty() {
            return 0;
        }
        let (written, result) = self.host.write(data);
        self.count += u64::try_from(written).unwrap_or(u64::MAX);
        self.write_error = result.err();
        written
    }

    fn set_interest(&mut self, interest: Interest, link: &mut Link<'_, '_>) {
        match self.host.wait(interest, link.context) {
            Ok(Wait::Armed) => {}
            // A plain file never asks to wait; if it does, it cannot be waited for.
            Ok(Wait::AlwaysReady) if interest == Interest::NONE => {}
            Ok(Wait::AlwaysReady) => self.fail(io::ErrorKind::WouldBlock.into()),
            Err(error) => self.fail(error),
        }
    }

    fn fail(&mut self, error: io::Error) {
        self.write_error = Some(error);
        self.backlog.clear();
    }

    fn finished(&self) -> Option<Outcome> {
        let (code, message) = self.end.as_ref()?;
        if !self.backlog.is_empty() {
            return None;
        }
        let (code, message) = match &self.write_error {
            Some(error) => (Code::DATA_LOSS, format!("write: {error}")),
            None => (*code, message.clone()),
        };
        Some(Outcome {
            code,
            message,
            count: self.count,
        })
    }
}

/// A copy from the host to a guest process.
#[derive(Debug)]
pub struct InputCopy {
    host: HostEnd,
    process: ProcessName,
    buffer: Vec<u8>,
    /// The part of the buffer that the guest has not accepted.
    unsent: std::ops::Range<usize>,
    is_sending: bool,
    is_closing: bool,
    is_always_ready: bool,
    count: u64,
}

impl InputCopy {
    /// Prepare the copy; [`start`](Self::start) waits for the first byte.
    #[must_use]
    pub fn new(host: HostEnd, process: ProcessName) -> Self {
        Self {
            host,
            process,
            buffer: Vec::new(),
            unsent: 0..0,
            is_sending: false,
            is_closing: false,
            is_always_ready: false,
            count: 0,
        }
    }

    /// Wait for the first byte. A FIFO that no writer has opened yet reads as end of file but is
    /// not reported readable, so nothing is read before epoll says so.
    pub fn start(&mut self, link: &mut Link<'_, '_>) -> Option<Outcome> {
        match self.host.wait(Interest::READ, link.context) {
            Ok(Wait::Armed) => None,
            Ok(Wait::AlwaysReady) => {
                self.is_always_ready = true;
                self.advance(link)
            }
            Err(error) => Some(self.outcome(Code::DATA_LOSS, format!("wait for input: {error}"))),
        }
    }

    /// The guest's word on what was sent.
    pub fn reply(&mut self, reply: Reply<'_>, link: &mut Link<'_, '_>) -> Option<Outcome> {
        self.is_sending = false;
        let accepted = reply.and_then(|payload| {
            decode_write_stream_response(payload)
                .map_err(|error| (Code::INTERNAL, error.to_string()))
        });
        match accepted {
            Ok(_) if self.is_closing => Some(self.outcome(Code::OK, String::new())),
            Ok(accepted) => {
                let accepted = usize::try_from(accepted).unwrap_or(usize::MAX);
                if accepted == 0 || accepted > self.unsent.len() {
                    let sent = self.unsent.len();
                    let text = format!("the guest says it took {accepted} of {sent} bytes");
                    return Some(self.outcome(Code::INTERNAL, text));
                }
                self.unsent.start += accepted;
                self.count += u64::try_from(accepted).unwrap_or(u64::MAX);
                self.advance(link)
            }
            // The process is gone; nobody misses what it did not read.
            Err((Code::NOT_FOUND, _)) => Some(self.outcome(Code::OK, String::new())),
            Err((code, message)) => Some(self.outcome(code, message)),
        }
    }

    /// The host end has bytes or its end.
    pub fn ready(&mut self, link: &mut Link<'_, '_>) -> Option<Outcome> {
        if self.is_sending {
            return self.wait(Interest::NONE, link);
        }
        self.advance(link)
    }

    /// End now.
    pub fn stop(&mut self, code: Code, message: &str) -> Outcome {
        self.outcome(code, message.to_owned())
    }

    fn advance(&mut self, link: &mut Link<'_, '_>) -> Option<Outcome> {
        if self.unsent.is_empty() {
            self.buffer.resize(INPUT_CHUNK, 0);
            match self.host.read(&mut self.buffer) {
                Ok(None) => {
                    self.buffer = Vec::new();
                    return self.wait(Interest::READ, link);
                }
                Ok(Some(count)) => {
                    self.unsent = 0..count;
                    self.is_closing = count == 0;
                }
                Err(error) => {
                    return Some(self.outcome(Code::DATA_LOSS, format!("read input: {error}")));
                }
            }
        }
        let data = self.buffer.get(self.unsent.clone()).unwrap_or_default();
        let head = encode_write_stream_head(
            &self.process.container_id,
            &self.process.exec_id,
            data.len(),
        );
        match link.send("WriteStdin", [&head, data]) {
            Ok(()) => self.is_sending = true,
            Err((code, message)) => return Some(self.outcome(code, message)),
        }
        None
    }

    fn wait(&mut self, interest: Interest, link: &mut Link<'_, '_>) -> Option<Outcome> {
        match self.host.wait(interest, link.context) {
            Ok(_) => None,
            Err(error) => Some(self.outcome(Code::DATA_LOSS, format!("wait for input: {error}"))),
        }
    }

    fn outcome(&self, code: Code, message: String) -> Outcome {
        Outcome {
            code,
            message,
            count: self.count,
        }
    }
}
