//! What a machine reports on its own, and to whom.
//!
//! One report that it ended, and why; never more, never fewer once it was started, whatever thread
//! found out. Warnings besides, for a log. The owner passes the sink in; `pyext` has one that
//! leads to Python's event loop.

use std::error::Error;
use std::fmt;

/// Why a machine is no longer running.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmExit {
    /// The guest switched itself off (ACPI S5).
    Shutdown,
    /// The guest restarted itself (keyboard controller or ACPI reset register); machines here have
    /// nothing to restart with.
    Reset,
    /// The guest's kernel said that it panicked, then restarted; with the line it said it in.
    Panic(String),
    /// A vCPU ended in a triple fault; with its registers.
    TripleFault(String),
    /// The host asked for it.
    Stopped,
    /// KVM or a thread of the machine failed; with what is known of it.
    Failed(String),
}

impl VmExit {
    /// The reason in one word, for programs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Shutdown => "guest-shutdown",
            Self::Reset => "guest-reset",
            Self::Panic(_) => "guest-panic",
            Self::TripleFault(_) => "guest-triple-fault",
            Self::Stopped => "killed",
            Self::Failed(_) => "failed",
        }
    }

    /// The rest, for people.
    pub fn detail(&self) -> &str {
        match self {
            Self::Shutdown => "the guest switched itself off",
            Self::Reset => "the guest restarted itself",
            Self::Stopped => "stopped by the host",
            Self::Panic(detail) | Self::TripleFault(detail) | Self::Failed(detail) => detail,
        }
    }
}

impl fmt::Display for VmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason(), self.detail())
    }
}

/// Where reports go. Called on threads of the machine: must neither block nor panic.
pub trait VmEvents: Send + Sync {
    /// The machine has ended: its vCPUs are gone and its devices at rest.
    fn exited(&self, exit: &VmExit);

    /// Something odd that was handled: a device that its driver broke, say.
    fn warning(&self, text: &str);
}

/// An error and its causes in one line, for a warning or a reason.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
