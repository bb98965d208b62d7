//! Every native error to its Python exception, in one exhaustive match: a new variant does not
//! build until it is mapped. What the operating system refused becomes the matching `OSError`
//! subclass with errno; a wrong argument becomes `ValueError`; causes are kept in the text.

use std::error::Error;
use std::io;
use std::path::Path;

use pyo3::exceptions::{PyOSError, PyRuntimeError, PyTimeoutError, PyValueError};
use pyo3::{PyErr, create_exception};
use rustix::io::Errno;
use virtio_core::vsock::hybrid::HybridError;
use virtio_core::vsock::listener::ListenError;
use vmm_core::boot::BootError;
use vmm_core::kvm::KvmError;
use vmm_core::snapshot::SnapshotError;
use vmm_core::virtio::fs::FsError;
use vmm_core::vm::VmError;
use vsock_io::address::AddressError;
use vsock_io::reactor::ReactorError;
use vsock_io::vhost_user::VhostUserError;
use vsock_io::vhost_user::device::DeviceError;

create_exception!(
    kata_hybrid._native.vmm,
    VmmError,
    PyRuntimeError,
    "A machine failed, or cannot do what was asked of it; the text has every cause."
);

/// The device file that every machine begins with.
const KVM_DEVICE: &str = "/dev/kvm";

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
    /// The machine.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A shared folder.
    #[error(transparent)]
    Folder(#[from] FsError),
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
            NativeError::Vm(error) => vm_error(&error, &text),
            NativeError::Folder(error) => folder_error(&error, &text),
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

fn vm_error(error: &VmError, text: &str) -> PyErr {
    match error {
        VmError::OutOfRange {
            name: _,
            value: _,
            min: _,
            max: _,
        } => PyValueError::new_err(text.to_owned()),
        VmError::Timeout(_) => PyTimeoutError::new_err(text.to_owned()),
        VmError::Kvm(error) => kvm_error(error, text),
        VmError::State {
            state: _,
            request: _,
        }
        | VmError::Gone
        | VmError::VcpuStuck(_)
        | VmError::TooManyDevices { max: _ }
        | VmError::Bus(_) => VmmError::new_err(text.to_owned()),
        VmError::Boot(BootError::Open {
            what: _,
            path,
            source,
        })
        | VmError::Snapshot(SnapshotError::File {
            operation: _,
            path,
            source,
        }) => path_error(source, text, path),
        VmError::Console(source)
        | VmError::System {
            operation: _,
            source,
        } => os_error(source, text, None),
        VmError::Memory(_)
        | VmError::Boot(_)
        | VmError::Vcpu(_)
        | VmError::Tables(_)
        | VmError::Serial(_)
        | VmError::Device(_)
        | VmError::Snapshot(_) => machine_error(error, text),
    }
}

fn kvm_error(error: &KvmError, text: &str) -> PyErr {
    let errno = match error {
        KvmError::Absent => Errno::NOENT.raw_os_error(),
        KvmError::PermissionDenied => Errno::ACCESS.raw_os_error(),
        KvmError::Open(source) => source.errno(),
        KvmError::ApiVersion(_)
        | KvmError::Call { name: _, source: _ }
        | KvmError::Allocate(_)
        | KvmError::Memory(_) => return VmmError::new_err(text.to_owned()),
    };
    path_error(
        &io::Error::from_raw_os_error(errno),
        text,
        Path::new(KVM_DEVICE),
    )
}

fn folder_error(error: &FsError, text: &str) -> PyErr {
    match error {
        FsError::Folder { folder, source } => path_error(source, text, folder),
        FsError::NotDirectory { folder } => {
            let not_directory = Errno::NOTDIR.into();
            path_error(&not_directory, text, folder)
        }
        FsError::Tag(_) | FsError::QueueSize(_) => PyValueError::new_err(text.to_owned()),
    }
}

/// `OSError` with `filename`.
fn path_error(source: &io::Error, text: &str, path: &Path) -> PyErr {
    os_error(source, text, Some(path.to_string_lossy().into_owned()))
}

/// The operating system's refusal, if one is at the bottom; else the machine's own failure.
fn machine_error(error: &(dyn Error + 'static), text: &str) -> PyErr {
    let mut causes = std::iter::successors(Some(error), |error| (*error).source());
    let refusal = causes.find_map(|cause| cause.downcast_ref::<io::Error>());
    match refusal.filter(|refusal| refusal.raw_os_error().is_some()) {
        Some(refusal) => os_error(refusal, text, None),
        None => VmmError::new_err(text.to_owned()),
    }
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
