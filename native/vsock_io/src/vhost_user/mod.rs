//! A virtio-vsock device for another process's machine, served over vhost-user.
//!
//! Made for `QEMU` on hosts without `/dev/vhost-vsock`. [`VhostUserVsock`] lives in the reactor:
//! the whole device, with all its connections, runs on the I/O thread as one source. The device
//! proper is `virtio_core::vsock`; here is what hands it the rings:
//!
//! - `vring`: one ring as the monitor sets it up;
//! - `backend`: the vhost-user negotiation;
//! - `device`: the monitor's connection and the turns the device takes.

pub mod backend;
pub mod device;
pub mod vring;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use crate::event::{Completion, Value};
use crate::reactor::{
    Context, Interest, ReactorError, ReactorHandle, Readiness, Source, SourceId, StopReason,
};
use crate::status::Code;

use device::{Device, DeviceError};

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// its sockets could not be made
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// the I/O thread takes no more work
    #[error("hand the device to the I/O thread")]
    Reactor(#[from] ReactorError),
}

/// A device in service. Dropping it does not stop it: [`VhostUserVsock::close`] does, or the end
/// of the machine, or of the I/O thread.
#[derive(Debug)]
pub struct VhostUserVsock {
    reactor: ReactorHandle,
    source: Arc<OnceLock<SourceId>>,
    paths: [PathBuf; 2],
}

impl VhostUserVsock {
    /// Listen on `socket_path` for the monitor and on `hybrid_path` for host processes, and
    /// serve. `closed_token` is completed once, when the device ends: `UNAVAILABLE` if the
    /// machine disconnected, `INTERNAL` if it or the guest broke a protocol, `CANCELLED` if the
    /// device or the I/O thread was closed.
    ///
    /// # Errors
    /// A path cannot be bound (nothing is left of the other), or the I/O thread is closed. The
    /// token is not completed then.
    pub fn new(
        reactor: &ReactorHandle,
        socket_path: &Path,
        hybrid_path: &Path,
        guest_cid: u64,
        closed_token: u64,
    ) -> Result<Self, VhostUserError> {
        let device = Device::bind(socket_path, hybrid_path, guest_cid)?;
        let source = Arc::new(OnceLock::new());
        let slot = Arc::clone(&source);
        reactor.post(move |registry| {
            let id = registry.add(DeviceSource {
                device: Some(device),
                closed_token,
            });
            // Set once, here.
            let _result = slot.set(id);
        })?;
        let paths = [socket_path.to_owned(), hybrid_path.to_owned()];
        Ok(Self {
            reactor: reactor.clone(),
            source,
            paths,
        })
    }

    /// Stop serving: connections end, both paths are gone when this returns. Idempotent.
    pub fn close(&self) {
        for path in &self.paths {
            // Gone already is as good.
            let _result = rustix::fs::unlink(path);
        }
        let source = Arc::clone(&self.source);
        // A closed thread has stopped the device already.
        let _result = self.reactor.post(move |registry| {
            let Some(id) = source.get().copied() else {
                return;
            };
            registry.with(id, |source: &mut DeviceSource, context| {
                source.end(context, Code::CANCELLED, "the device was closed".to_owned());
            });
        });
    }
}

/// The epoll set of the device, as the reactor knows it.
const DEVICE_KEY: u64 = 0;

/// The device as a part of the I/O thread.
struct DeviceSource {
    /// `None` once it has ended and was reported.
    device: Option<Device>,
    closed_token: u64,
}

impl DeviceSource {
    /// Take the device down, then tell: whoever hears of it finds its paths gone.
    fn finish(&mut self, context: &Context<'_>, code: Code, message: String) {
        if let Some(device) = self.device.take() {
            drop(device);
            let token = self.closed_token;
            context.sink().complete(Completion {
                token,
                code,
                value: Value::None,
                message,
            });
        }
    }

    fn end(&mut self, context: &mut Context<'_>, code: Code, message: String) {
        context.remove();
        self.finish(context, code, message);
    }

    fn run(&mut self, context: &mut Context<'_>) {
        let Some(device) = &mut self.device else {
            return;
        };
        match device.run() {
            Ok(turn) => {
                let next = if turn.has_more {
                    Some(Instant::now())
                } else {
                    turn.deadline
                };
                match next {
                    Some(deadline) => context.set_timer(DEVICE_KEY, deadline),
                    None => context.cancel_timer(DEVICE_KEY),
                }
            }
            Err(error) => {
                let code = match error {
                    DeviceError::Disconnected => Code::UNAVAILABLE,
                    DeviceError::Hybrid(_)
                    | DeviceError::Queue(_)
                    | DeviceError::Protocol(_)
                    | DeviceError::System { .. } => Code::INTERNAL,
                };
                self.end(context, code, chain_text(&error));
            }
        }
    }
}

impl Source for DeviceSource {
    fn started(&mut self, context: &mut Context<'_>) {
        let Some(device) = &self.device else { return };
        if let Err(error) = context.watch(DEVICE_KEY, device.epoll(), Interest::READ) {
            self.end(
                context,
                Code::INTERNAL,
                format!("watch the device: {error}"),
            );
        }
    }

    fn ready(&mut self, _key: u64, _readiness: Readiness, context: &mut Context<'_>) {
        self.run(context);
    }

    fn timeout(&mut self, _key: u64, context: &mut Context<'_>) {
        self.run(context);
    }

    fn stopped(&mut self, reason: &StopReason, context: &mut Context<'_>) {
        let (code, message) = match reason {
            StopReason::Closed => (Code::CANCELLED, "the I/O thread was closed".to_owned()),
            StopReason::Panicked(text) => (Code::INTERNAL, format!("the device panicked: {text}")),
        };
        self.finish(context, code, message);
    }
}

fn chain_text(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
