//! Making containers and processes: the only code that knows libcontainer.
//!
//! libcontainer clones with a raw `clone3`, which is unsound in a process with threads. So the
//! agent runs itself again as `kata-agent oci` (`child`), a single-threaded process that makes one
//! container or one process and ends; `launch` is the agent's side. They talk over a socket on a
//! fixed descriptor, one JSON message per packet:
//!
//! ```text
//! agent -> child   Order
//! child -> agent   Note*           errors libcontainer logged, deepest first
//! child -> agent   Done | Failed
//! agent -> child   (one packet)    the pid is registered with the reaper: the child may end
//! ```
//!
//! The child is the process's parent until it ends, so the process cannot be reaped before the
//! agent knows its pid.

pub(crate) mod child;
mod executor;
mod launch;
mod notes;

use std::os::fd::RawFd;
use std::path::PathBuf;

use libcontainer::oci_spec::runtime::LinuxCapabilities;
use serde::{Deserialize, Serialize};

pub(crate) use launch::{ChildStdio, Launched, launch, read_failure, start_error};

/// The word after which `kata-agent` is the child.
pub(crate) const CHILD_ARGUMENT: &str = "oci";

/// The socket to the agent.
const CONTROL_FD: RawFd = 3;

/// Where the new process says why it could not execute; closed by a successful `execve`.
const FAILURE_FD: RawFd = 4;

/// A packet holds at most this much.
const PACKET_BYTES: usize = 64 * 1024;

/// One container or one process to make.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) container_id: String,
    /// libcontainer keeps its state below this directory.
    pub(crate) state_root: PathBuf,
    /// Receives the terminal's master side.
    pub(crate) console_socket: Option<PathBuf>,
    pub(crate) kind: OrderKind,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum OrderKind {
    /// Make the container described by `<bundle>/config.json`.
    Create { bundle: PathBuf },
    /// Run another process in it.
    Exec(Box<ExecOrder>),
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ExecOrder {
    /// OCI process, as JSON, with [`EXTRA_CAPABILITIES`] added where `restricted` is given.
    pub(crate) process: PathBuf,
    /// The `config.json` whose seccomp profile applies: libcontainer gives the container's profile
    /// to its first process only.
    pub(crate) seccomp_from: Option<PathBuf>,
    /// What to keep after the profile is loaded.
    pub(crate) restricted: Option<LinuxCapabilities>,
    pub(crate) sub_cgroup: Option<String>,
}

/// Needed to load a seccomp profile without `no_new_privs`, and to drop what was added.
pub(crate) const EXTRA_CAPABILITIES: [&str; 2] = ["CAP_SETPCAP", "CAP_SYS_ADMIN"];

#[derive(Debug, Serialize, Deserialize)]
enum Report {
    Note(String),
    Done { pid: i32 },
    Failed(String),
}
