//! What a machine is made of, besides its devices, as Python describes it.

use std::path::PathBuf;

use pyo3::prelude::*;
use vmm_core::memory::MemoryBacking;
use vmm_core::vm::{MAX_VCPUS, MEMORY_MIB, VmError};

use crate::errors::NativeError;

/// What a machine is made of, besides its devices. Frozen.
#[pyclass(frozen, module = "kata_hybrid._native.vmm")]
pub(crate) struct VmConfig {
    pub(super) inner: vmm_core::vm::VmConfig,
}

#[pymethods]
impl VmConfig {
    #[new]
    #[pyo3(signature = (
        *,
        kernel,
        initrd = None,
        command_line,
        vcpu_count = 1,
        memory_mib,
        memory = "anonymous",
    ))]
    fn new(
        kernel: PathBuf,
        initrd: Option<PathBuf>,
        command_line: String,
        vcpu_count: u64,
        memory_mib: u64,
        memory: &str,
    ) -> Result<Self, NativeError> {
        let (least, most) = (u64::from(*MEMORY_MIB.start()), u64::from(*MEMORY_MIB.end()));
        Ok(Self {
            inner: vmm_core::vm::VmConfig {
                kernel,
                initrd,
                command_line,
                vcpu_count: within("vcpu_count", vcpu_count, 1, MAX_VCPUS.into())?,
                memory_mib: within("memory_mib", memory_mib, least, most)?,
                memory_backing: backing(memory)?,
            },
        })
    }

    #[getter]
    fn kernel(&self) -> PathBuf {
        self.inner.kernel.clone()
    }

    #[getter]
    fn initrd(&self) -> Option<PathBuf> {
        self.inner.initrd.clone()
    }

    #[getter]
    fn command_line(&self) -> &str {
        &self.inner.command_line
    }

    #[getter]
    fn vcpu_count(&self) -> u8 {
        self.inner.vcpu_count
    }

    #[getter]
    fn memory_mib(&self) -> u32 {
        self.inner.memory_mib
    }

    #[getter]
    fn memory(&self) -> &'static str {
        match self.inner.memory_backing {
            MemoryBacking::Anonymous => "anonymous",
            MemoryBacking::Shared => "shared",
            MemoryBacking::HugePages => "hugepages",
        }
    }

    fn __repr__(&self) -> String {
        format!(
            "<VmConfig kernel={} vcpu_count={} memory_mib={} memory={}>",
            self.inner.kernel.display(),
            self.inner.vcpu_count,
            self.inner.memory_mib,
            self.memory()
        )
    }
}

fn backing(word: &str) -> Result<MemoryBacking, NativeError> {
    match word {
        "anonymous" => Ok(MemoryBacking::Anonymous),
        "shared" => Ok(MemoryBacking::Shared),
        "hugepages" => Ok(MemoryBacking::HugePages),
        _ => Err(NativeError::Word {
            argument: "memory",
            allowed: "anonymous, shared, hugepages",
            given: word.to_owned(),
        }),
    }
}

/// A number within bounds, in the type it has inside.
fn within<T: TryFrom<u64>>(
    name: &'static str,
    value: u64,
    min: u64,
    max: u64,
) -> Result<T, VmError> {
    let fitting = (min..=max)
        .contains(&value)
        .then(|| T::try_from(value).ok());
    fitting.flatten().ok_or(VmError::OutOfRange {
        name,
        value,
        min,
        max,
    })
}
