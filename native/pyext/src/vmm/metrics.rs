//! Counters of a machine's devices, as values for Python.

use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Counters of one device at one moment. Frozen.
#[pyclass(frozen, module = "kata_hybrid._native.vmm")]
pub(crate) struct DeviceMetrics {
    inner: vmm_core::running_devices::DeviceMetrics,
}

#[pymethods]
impl DeviceMetrics {
    #[getter]
    fn kind(&self) -> &'static str {
        self.inner.kind.name()
    }

    #[getter]
    fn name(&self) -> &str {
        &self.inner.name
    }

    #[getter]
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = PyDict::new(py);
        for (name, value) in &self.inner.counters {
            counters.set_item(name, value)?;
        }
        Ok(counters)
    }

    fn __repr__(&self) -> String {
        format!("<DeviceMetrics {} {:?}>", self.kind(), self.inner.name)
    }
}

impl From<vmm_core::running_devices::DeviceMetrics> for DeviceMetrics {
    fn from(inner: vmm_core::running_devices::DeviceMetrics) -> Self {
        Self { inner }
    }
}
