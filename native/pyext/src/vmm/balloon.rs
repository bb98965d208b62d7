//! What stays with Python of a balloon that was given to a machine.

use std::sync::Arc;

use pyo3::prelude::*;
use vmm_core::virtio::balloon::BalloonControl;

/// A machine's memory balloon. Frozen; the numbers are the guest's and the host's.
#[pyclass(frozen, module = "kata_hybrid._native.vmm")]
pub(crate) struct Balloon {
    control: Arc<BalloonControl>,
}

#[pymethods]
impl Balloon {
    /// Ask the guest to give up ``pages`` of 4 KiB in all.
    fn set_target(&self, pages: u32) {
        self.control.set_target(pages);
    }

    /// Pages the guest is to give up.
    #[getter]
    fn target_pages(&self) -> u32 {
        self.control.target_pages()
    }

    /// Pages the guest says it gave up.
    #[getter]
    fn actual_pages(&self) -> u32 {
        self.control.actual_pages()
    }
}

impl From<Arc<BalloonControl>> for Balloon {
    fn from(control: Arc<BalloonControl>) -> Self {
        Self { control }
    }
}
