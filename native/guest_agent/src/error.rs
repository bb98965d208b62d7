//! What can go wrong in the agent, and the one place where it becomes a ttRPC status.
//!
//! Every handler in `server` returns `AgentError`; the modules below it build one with the values
//! of the failed operation and keep the cause. Codes follow what Kata runtimes expect: `NOT_FOUND`
//! means "this process is gone", so it is used for nothing else.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use ttrpc::{Code, get_status};

/// A failed request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error("invalid {what}: {why}")]
    Invalid { what: &'static str, why: String },
    #[error("invalid container id {0:?}: no such container")]
    UnknownContainer(String),
    #[error("process not found: container {container:?}, exec {exec:?}")]
    UnknownProcess { container: String, exec: String },
    #[error("exec_id '{0}' already exists")]
    ExecExists(String),
    #[error("container {0:?} already exists")]
    ContainerExists(String),
    #[error("container {id:?} is {state}: {operation} is not possible")]
    State {
        id: String,
        state: &'static str,
        operation: &'static str,
    },
    #[error("no tty")]
    NoTty,
    #[error("cannot get stream {0}")]
    NoStream(&'static str),
    #[error("{0}")]
    Runtime(String),
    #[error("{operation} {}", path.display())]
    Path {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{operation}")]
    System {
        operation: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("netlink: {operation}")]
    Netlink {
        operation: &'static str,
        #[source]
        source: rtnetlink::Error,
    },
    #[error("{what} did not appear within {seconds} s")]
    DeviceTimeout { what: String, seconds: u64 },
    #[error("{what} did not finish in time")]
    Timeout { what: &'static str },
    #[error("{0} is not implemented by this agent")]
    Unimplemented(&'static str),
    #[error("the task serving this request ended early")]
    TaskLost,
}

pub(crate) type Result<T, E = AgentError> = std::result::Result<T, E>;

impl AgentError {
    pub(crate) fn invalid(what: &'static str, why: impl Into<String>) -> Self {
        Self::Invalid {
            what,
            why: why.into(),
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } | Self::UnknownContainer(_) => Code::INVALID_ARGUMENT,
            Self::UnknownProcess { .. } => Code::NOT_FOUND,
            Self::NoTty => Code::UNAVAILABLE,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            Self::ExecExists(_)
            | Self::ContainerExists(_)
            | Self::State { .. }
            | Self::NoStream(_)
            | Self::Runtime(_)
            | Self::Path { .. }
            | Self::System { .. }
            | Self::Netlink { .. }
            | Self::DeviceTimeout { .. }
            | Self::Timeout { .. }
            | Self::TaskLost => Code::INTERNAL,
        }
    }
}

/// The error and its causes on one line: `mount /x: permission denied`.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&os_text(cause));
        source = cause.source();
    }
    text
}

/// `No such file or directory (os error 2)` as container users know it: `no such file or directory`.
fn os_text(error: &(dyn Error + 'static)) -> String {
    error
        .downcast_ref::<io::Error>()
        .and_then(io::Error::raw_os_error)
        .map_or_else(|| error.to_string(), errno_text)
}

/// The text of an errno, in lower case and without the number.
pub(crate) fn errno_text(errno: i32) -> String {
    let text = io::Error::from_raw_os_error(errno).to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| {
        first.to_lowercase().collect::<String>() + chars.as_str()
    })
}

impl From<AgentError> for ttrpc::Error {
    fn from(error: AgentError) -> Self {
        Self::RpcStatus(get_status(error.code(), chain(&error)))
    }
}

/// Adds what was attempted to an I/O error.
pub(crate) trait IoContext<T> {
    fn during(self, operation: &'static str) -> Result<T>;
    fn on(self, operation: &'static str, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn during(self, operation: &'static str) -> Result<T> {
        self.map_err(|error| AgentError::System {
            operation,
            source: error.into(),
        })
    }

    fn on(self, operation: &'static str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|error| AgentError::Path {
            operation,
            path: path.into(),
            source: error.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_names_operation_path_and_cause() {
        let error = Err::<(), _>(io::Error::from_raw_os_error(libc::ENOENT))
            .on("open", "/x")
            .expect_err("is an error");
        assert_eq!(chain(&error), "open /x: no such file or directory");
    }

    #[test]
    fn gone_process_is_not_found_and_unknown_container_is_invalid() {
        let gone = AgentError::UnknownProcess {
            container: "c".into(),
            exec: String::new(),
        };
        assert_eq!(gone.code(), Code::NOT_FOUND);
        assert_eq!(
            AgentError::UnknownContainer("c".into()).code(),
            Code::INVALID_ARGUMENT
        );
    }
}
