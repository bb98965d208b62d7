//! Errors of machines and their devices to exceptions.
//!
//! `ValueError` for a description that nothing can be made of, the `OSError` subclass for what the
//! operating system refused (`/dev/kvm` and files by name), `TimeoutError` for a machine that does
//! not answer, and `VmmError` for the rest: what the machine itself cannot do.

use std::error::Error;
use std::io;
use std::path::Path;

use pyo3::exceptions::{PyRuntimeError, PyTimeoutError, PyValueError};
use pyo3::{PyErr, create_exception};
use rustix::io::Errno;
use virtio_core::vsock::hybrid::HybridError;
use vmm_core::boot::BootError;
use vmm_core::kvm::KvmError;
use vmm_core::running_devices::PlugError;
use vmm_core::snapshot::SnapshotError;
use vmm_core::virtio::block::BlockError;
use vmm_core::virtio::block::disk::DiskError;
use vmm_core::virtio::fs::FsError;
use vmm_core::virtio::net::{NetError, TapError};
use vmm_core::virtio::throttle::ThrottleError;
use vmm_core::virtio::vsock::VsockError;
use vmm_core::vm::VmError;

use super::{NativeError, os_error, path_error};

create_exception!(
    kata_hybrid._native.vmm,
    VmmError,
    PyRuntimeError,
    "A machine failed, or cannot do what was asked of it; the text has every cause."
);

/// The device file that every machine begins with.
const KVM_DEVICE: &str = "/dev/kvm";

/// What a call of a machine can fail with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    /// The machine.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] BlockError),
    /// A shared folder.
    #[error(transparent)]
    Folder(#[from] FsError),
    /// A network card.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The socket device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// The entropy device, which has nothing but its limits to go wrong.
    #[error("limit the entropy device")]
    Rng(#[source] ThrottleError),
}

impl From<PlugError> for MachineError {
    fn from(error: PlugError) -> Self {
        match error {
            PlugError::Disk(error) => error.into(),
            PlugError::Vm(error) => error.into(),
        }
    }
}

impl From<PlugError> for NativeError {
    fn from(error: PlugError) -> Self {
        Self::Machine(error.into())
    }
}

impl From<VmError> for NativeError {
    fn from(error: VmError) -> Self {
        Self::Machine(error.into())
    }
}

/// The exception for an error whose text, causes and all, is `text`.
pub(super) fn exception(error: &MachineError, text: &str) -> PyErr {
    match error {
        MachineError::Vm(error) => vm_error(error, text),
        MachineError::Disk(BlockError::Disk { id: _, source }) => disk_error(source, text),
        MachineError::Disk(BlockError::Uring { id: _, source })
        | MachineError::Vsock(VsockError::Timer(source)) => os_error(source, text, None),
        MachineError::Disk(BlockError::Throttle { id: _, source }) | MachineError::Rng(source) => {
            throttle_error(source, text)
        }
        MachineError::Folder(error) => folder_error(error, text),
        MachineError::Net(error) => net_error(error, text),
        MachineError::Vsock(VsockError::GuestCid(_)) => PyValueError::new_err(text.to_owned()),
        MachineError::Vsock(VsockError::Hybrid(error)) => hybrid_error(error, text),
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
        | VmError::Snapshot(_) => refusal_or_failure(error, text),
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
    let source = io::Error::from_raw_os_error(errno);
    path_error(&source, text, Path::new(KVM_DEVICE))
}

fn disk_error(error: &DiskError, text: &str) -> PyErr {
    match error {
        DiskError::Open {
            path,
            access: _,
            source,
        }
        | DiskError::OpenDirect { path, source }
        | DiskError::Measure { path, source } => path_error(source, text, path),
        DiskError::Kind { path: _ } | DiskError::TooSmall { path: _, size: _ } => {
            PyValueError::new_err(text.to_owned())
        }
    }
}

fn folder_error(error: &FsError, text: &str) -> PyErr {
    match error {
        FsError::Folder { folder, source } => path_error(source, text, folder),
        FsError::NotDirectory { folder } => path_error(&Errno::NOTDIR.into(), text, folder),
        FsError::Tag(_) | FsError::QueueSize(_) => PyValueError::new_err(text.to_owned()),
    }
}

fn net_error(error: &NetError, text: &str) -> PyErr {
    match error {
        NetError::QueuePairs { count: _ }
        | NetError::Mac { mac: _ }
        | NetError::Mtu { mtu: _ }
        | NetError::Tap(
            TapError::Name { name: _ }
            | TapError::Kind {
                name: _,
                queue_pairs: _,
            }
            | TapError::Count {
                given: _,
                queue_pairs: _,
            }
            | TapError::Descriptor { fd: _ },
        ) => PyValueError::new_err(text.to_owned()),
        NetError::Limiter {
            direction: _,
            source,
        } => throttle_error(source, text),
        NetError::Tap(TapError::Missing { name }) => tap_error(Errno::NODEV, text, name),
        NetError::Tap(TapError::Busy { name }) => tap_error(Errno::BUSY, text, name),
        NetError::Tap(TapError::NoPermission { name }) => tap_error(Errno::PERM, text, name),
        NetError::Tap(
            TapError::Unavailable(source)
            | TapError::System {
                operation: _,
                source,
            },
        ) => os_error(source, text, None),
    }
}

fn tap_error(errno: Errno, text: &str, name: &str) -> PyErr {
    os_error(&errno.into(), text, Some(name.to_owned()))
}

fn hybrid_error(error: &HybridError, text: &str) -> PyErr {
    match error {
        HybridError::Listen(error) => path_error(&error.source, text, &error.path),
        HybridError::Watch(source) => os_error(source, text, None),
    }
}

fn throttle_error(error: &ThrottleError, text: &str) -> PyErr {
    match error {
        ThrottleError::Limits(_) => PyValueError::new_err(text.to_owned()),
        ThrottleError::Timer(source) => os_error(source, text, None),
    }
}

/// The operating system's refusal, if one is at the bottom; else the machine's own failure.
fn refusal_or_failure(error: &(dyn Error + 'static), text: &str) -> PyErr {
    let mut causes = std::iter::successors(Some(error), |error| (*error).source());
    let refusal = causes.find_map(|cause| cause.downcast_ref::<io::Error>());
    match refusal.filter(|refusal| refusal.raw_os_error().is_some()) {
        Some(refusal) => os_error(refusal, text, None),
        None => VmmError::new_err(text.to_owned()),
    }
}
