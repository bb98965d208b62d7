//! Whether KVM can run a real kernel here.

use pyo3::prelude::*;

/// What the probe found. Frozen.
#[pyclass(frozen, module = "kata_hybrid._native.vmm")]
pub(crate) struct KvmProbe {
    /// A guest that meets the instructions a Linux kernel needs ran to its end.
    #[pyo3(get)]
    is_usable: bool,
    /// Why not, in one line, or what was seen to work.
    #[pyo3(get)]
    reason: String,
    /// ``KVM_GET_API_VERSION``, if ``/dev/kvm`` could be opened.
    #[pyo3(get)]
    api_version: Option<i32>,
}

/// Open ``/dev/kvm`` and run a tiny long-mode guest. Takes milliseconds; never raises.
#[pyfunction]
pub(crate) fn probe_kvm(py: Python<'_>) -> KvmProbe {
    let vmm_core::probe::KvmProbe {
        is_usable,
        reason,
        api_version,
    } = py.detach(vmm_core::probe::probe_kvm);
    KvmProbe {
        is_usable,
        reason,
        api_version,
    }
}
