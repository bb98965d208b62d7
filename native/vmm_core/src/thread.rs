//! Starting a thread of the machine: its name, its signals, its filter, and what becomes of a panic.
//!
//! The process belongs to somebody else (an interpreter, say): the thread blocks every signal but
//! those its own faults raise, and a panic is told to its owner instead of vanishing with it.

use std::any::Any;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};

use crate::kvm;
use crate::seccomp;
use crate::virtio::fs;

/// Which filter a thread gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Runs a vCPU.
    Vcpu,
    /// Runs the devices.
    Io,
}

/// What a thread does.
pub(crate) trait Body: Send + 'static {
    /// The thread's work.
    fn run(&mut self);

    /// `run` panicked; what it held is as the panic left it.
    fn panicked(&mut self, message: &str);

    /// Called last, also after a panic.
    fn finished(&mut self);
}

/// Start a thread called `name` (15 bytes are visible to `ps`); gives the kernel's id of it too.
pub(crate) fn spawn(
    name: String,
    kind: Kind,
    mut body: impl Body,
) -> io::Result<(JoinHandle<()>, i32)> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let thread = Builder::new().name(name).spawn(move || {
        kvm::block_signals();
        let is_confined = prepare(kind);
        let is_running = is_confined.is_ok();
        let id = rustix::thread::gettid().as_raw_nonzero().get();
        let _received = sender.send(is_confined.map(|()| id));
        drop(sender);
        if is_running {
            let result = panic::catch_unwind(AssertUnwindSafe(|| body.run()));
            if let Err(payload) = result {
                body.panicked(panic_text(payload.as_ref()));
            }
        }
        body.finished();
    })?;
    let id = receiver
        .recv()
        .map_err(|_| io::Error::other("the thread ended before it began"))??;
    Ok((thread, id))
}

/// What has to be done before the thread sees anything of the guest.
fn prepare(kind: Kind) -> io::Result<()> {
    if kind == Kind::Io {
        // What the filter would forbid, such as a umask of the thread's own.
        fs::prepare_thread()?;
    }
    seccomp::confine(kind)
}

fn panic_text(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
