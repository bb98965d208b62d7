//! The connection to a guest agent: calls, and copies of standard streams, over one socket.
//!
//! [`AgentClient`] is the caller's half, usable from any thread. Its other half, a source on the
//! I/O thread (`agent/source.rs`), receives, keeps the deadlines and runs the copies
//! (`agent/copy.rs`). When the connection ends, every call completes; copies finish writing what
//! they hold; then the source goes.

mod copy;
mod source;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use self::copy::{Copy, Pump};
use self::source::{AgentSource, SOCKET};
use crate::event::Completion;
use crate::reactor::{Context, ReactorError, ReactorHandle, SourceId};
use crate::status::Code;
use crate::stdio::fifo::HostEnd;
use crate::stdio::pump::{InputCopy, OutputCopy, OutputStream, ProcessName};
use crate::ttrpc::client::{NeedsAttention, ReplyTo, Request, Requests};

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
        let source = AgentSource::new(
            socket,
            Arc::clone(&requests),
            closed_token,
            Arc::clone(&ignored_frames),
        );
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
            copy::complete(&self.handle, token, copy::not_started(code, message));
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
                let outcome = copy::not_started(code, message);
                copy::complete(registry.handle(), token, outcome);
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
