//! The module tree of `kata_hybrid._native`. The only crate that knows Python: it translates
//! arguments, results and errors, and holds no logic of its own beyond the host calls that
//! Python's standard library lacks. No thread of ours ever attaches to the interpreter; results
//! wait in the event port until Python drains it.

#![deny(unsafe_code)]

mod convert;
mod detach;
mod errors;
mod events;
mod host;
mod loopback;
mod mount;
mod vmm;
mod vsock;

use pyo3::prelude::pymodule;

/// The compiled extension: machine, guest I/O and host calls. Submodules are attributes.
#[pymodule(gil_used = false)]
mod _native {
    use pyo3::prelude::{Bound, PyAnyMethods, PyModule, PyResult, pymodule};

    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "Python's name for it")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    /// The event port: how native threads tell Python that something is done, without attaching.
    #[pymodule]
    mod events {
        #[pymodule_export]
        use crate::events::{Event, EventPort};
    }

    /// Linux calls that Python's standard library lacks.
    #[pymodule]
    mod host {
        #[pymodule_export]
        use crate::host::{
            enter_private_mount_namespace, mount, set_child_subreaper, set_thread_name, unmount,
        };
        #[pymodule_export]
        use crate::loopback::catch_loopback;
    }

    /// Machines in this process, and what this host can run.
    #[pymodule]
    mod vmm {
        #[pymodule_export]
        use crate::errors::VmmError;
        #[pymodule_export]
        use crate::vmm::{
            Balloon, DeviceMetrics, KvmProbe, Limit, Vm, VmConfig, VmExit, probe_kvm,
        };
    }

    /// Talking to the guest: dial, the agent's ttRPC client, stdio copies, a
    /// vhost-user vsock device.
    #[pymodule]
    mod vsock {
        #[pymodule_export]
        use crate::vsock::{AgentClient, IoThread, StdioCopy, VhostUserVsock};
    }

    /// Submodules are attributes; under their full names they can also be imported and checked
    /// against their stubs.
    #[pymodule_init]
    fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let modules = module.py().import("sys")?.getattr("modules")?;
        for name in ["events", "host", "vmm", "vsock"] {
            let full_name = format!("kata_hybrid._native.{name}");
            modules.set_item(full_name, module.getattr(name)?)?;
        }
        Ok(())
    }
}
