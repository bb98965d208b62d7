//! Every native error to its Python exception, in one exhaustive match: a new variant does not
//! build until it is mapped. What the operating system refused becomes the matching `OSError`
//! subclass with errno; a wrong argument becomes `ValueError`; causes are kept in the text.

mod machine;

use std::error::Error;
use std::io;
use std::path::Path;

use pyo3::PyErr;
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use virtio_core::vsock::hybrid::HybridError;
use virtio_core::vsock::listener::ListenError;
use vsock_io::address::AddressError;
use vsock_io::reactor::ReactorError;
use vsock_io::vhost_user::VhostUserError;
use vsock_io::vhost_user::device::DeviceError;

pub(crate) use machine::{MachineError, VmmError};

/// What a call of the extension can fail with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NativeError {
    /// A descriptor argument.
    #[error("take over a descriptor")]
    Descriptor(#[source] io::Error),
    /// An argument that is not one of the allowed words.
    #[error("{argument} must be one of {allowed}, not {given:?}")]
    Word {
        /// The argument's name.
        argument: &'static str,
        /// The words.
        allowed: &'static str,
        /// What was given.
        given: String,
    },
    /// The event port's eventfd.
    #[error("make an event port")]
    EventPort(#[source] io::Error),
    /// A host call.
    #[error("{operation}")]
    Host {
        /// What was attempted.
        operation: &'static str,
        /// The path it was attempted on, for `OSError.filename`.
        path: Option<String>,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// An address.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The I/O thread.
    #[error(transparent)]
    Reactor(#[from] ReactorError),
    /// The vsock device for another process's machine.
    #[error(transparent)]
    VhostUser(#[from] VhostUserError),
    /// The machine, or a device of it.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

impl From<NativeError> for PyErr {
    fn from(error: NativeError) -> Self {
        let text = chain(&error);
        match error {
            NativeError::Descriptor(source) | NativeError::EventPort(source) => {
                os_error(&source, &text, None)
            }
            NativeError::Host {
                operation: _,
                path,
                source,
            } => os_error(&source, &text, path),
            NativeError::Reactor(error)
            | NativeError::VhostUser(VhostUserError::Reactor(error)) => {
                reactor_error(&error, &text)
            }
            NativeError::VhostUser(VhostUserError::Device(error)) => device_error(error, &text),
            NativeError::Machine(error) => machine::exception(&error, &text),
            NativeError::Word {
                argument: _,
                allowed: _,
                given: _,
            }
            | NativeError::Address(
                AddressError::UnknownForm(_)
                | AddressError::BadContextId(_)
                | AddressError::BadPath(_),
            ) => PyValueError::new_err(text),
        }
    }
}

fn reactor_error(error: &ReactorError, text: &str) -> PyErr {
    match error {
        ReactorError::Start(source) => os_error(source, text, None),
        ReactorError::Closed | ReactorError::Stuck(_) => PyRuntimeError::new_err(text.to_owned()),
    }
}

fn device_error(error: DeviceError, text: &str) -> PyErr {
    match error {
        DeviceError::Hybrid(HybridError::Listen(ListenError { path, source })) => {
            path_error(&source, text, &path)
        }
        DeviceError::Hybrid(HybridError::Watch(source))
        | DeviceError::System {
            operation: _,
            source,
        } => os_error(&source, text, None),
        DeviceError::Disconnected | DeviceError::Protocol(_) | DeviceError::Queue(_) => {
            PyRuntimeError::new_err(text.to_owned())
        }
    }
}

/// `OSError` with `filename`.
fn path_error(source: &io::Error, text: &str, path: &Path) -> PyErr {
    os_error(source, text, Some(path.to_string_lossy().into_owned()))
}

/// `OSError(errno, text[, filename])`, which Python turns into the subclass for errno.
fn os_error(source: &io::Error, text: &str, path: Option<String>) -> PyErr {
    match (source.raw_os_error(), path) {
        (Some(errno), Some(path)) => PyOSError::new_err((errno, text.to_owned(), path)),
        (Some(errno), None) => PyOSError::new_err((errno, text.to_owned())),
        (None, _) => PyOSError::new_err(text.to_owned()),
    }
}

/// The error and its causes: `operation: cause: cause`.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_names_each_cause_once() {
        let error = NativeError::Host {
            operation: "mount",
            path: Some("/x".to_owned()),
            source: io::Error::from_raw_os_error(2),
        };
        assert_eq!(
            chain(&error),
            "mount: No such file or directory (os error 2)"
        );
    }
}
