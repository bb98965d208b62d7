//! How a machine ended, as a value for Python.

use pyo3::prelude::*;

/// Why a machine is no longer running. Frozen.
#[pyclass(frozen, module = "kata_hybrid._native.vmm")]
pub(crate) struct VmExit {
    /// The reason in one word.
    #[pyo3(get)]
    reason: &'static str,
    /// The rest, for people.
    #[pyo3(get)]
    detail: String,
}

#[pymethods]
impl VmExit {
    fn __repr__(&self) -> String {
        format!("<VmExit reason={} detail={:?}>", self.reason, self.detail)
    }
}

impl From<&vmm_core::event::VmExit> for VmExit {
    fn from(exit: &vmm_core::event::VmExit) -> Self {
        Self {
            reason: exit.reason(),
            detail: exit.detail().to_owned(),
        }
    }
}
