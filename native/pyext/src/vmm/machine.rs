//! A machine for Python: its states and requests, each a call of `vmm_core`.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use vmm_core::event::VmEvents;
use vmm_core::virtio::balloon::BalloonConfig;
use vmm_core::virtio::net::NetConfig;
use vmm_core::vm::{VmError, VmState};

use super::devices::{self, Device, Tap};
use super::limit::{limits, limits_of};
use super::reports::Reports;
use super::{Balloon, DeviceMetrics, Limit, VmConfig, VmExit};
use crate::convert::take_fd;
use crate::detach::detached;
use crate::errors::{MachineError, NativeError};
use crate::events::EventPort;

/// A virtual machine in this process. Dropping it stops it.
#[pyclass(frozen, module = "kata_hybrid._native.vmm")]
pub(crate) struct Vm {
    vm: vmm_core::vm::Vm,
    reports: Arc<Reports>,
}

#[pymethods]
impl Vm {
    #[new]
    #[pyo3(signature = (config, port, *, exited_token, log_token = None, console_fd = None))]
    fn new(
        config: &VmConfig,
        port: &EventPort,
        exited_token: u64,
        log_token: Option<u64>,
        console_fd: Option<RawFd>,
    ) -> Result<Self, NativeError> {
        let console = console_fd.map(take_fd).transpose()?;
        let reports = Arc::new(Reports::new(port.queue(), exited_token, log_token));
        let events = Arc::clone(&reports) as Arc<dyn VmEvents>;
        let vm = vmm_core::vm::Vm::new(config.inner.clone(), console, events)?;
        Ok(Self { vm, reports })
    }

    /// Add a disk; gives the node it has in a Linux guest. Before the start.
    #[pyo3(signature = (
        *,
        id,
        path,
        is_read_only = false,
        is_direct = false,
        engine = "auto",
        bandwidth = None,
        operations = None,
    ))]
    #[expect(
        clippy::too_many_arguments,
        reason = "one keyword for each property of a disk"
    )]
    fn add_disk(
        &self,
        py: Python<'_>,
        id: String,
        path: PathBuf,
        is_read_only: bool,
        is_direct: bool,
        engine: &str,
        bandwidth: Option<Limit>,
        operations: Option<Limit>,
    ) -> PyResult<String> {
        let limit = limits_of(bandwidth, operations);
        let config = devices::disk_config(id, path, is_read_only, is_direct, engine, limit)?;
        let before = self.add(py, || devices::disk(config))?;
        Ok(devices::disk_node(before))
    }

    /// Add a device that disks come into while the guest runs; gives the node that those have,
    /// if slots are filled in their order for the first time. Before the start.
    #[pyo3(signature = (*, name))]
    fn add_disk_slot(&self, py: Python<'_>, name: String) -> PyResult<String> {
        let before = detached(py, || {
            Ok::<_, MachineError>(self.vm.add_hidden_device(devices::disk_slot(name)?)?)
        })?;
        Ok(devices::disk_node(before))
    }

    /// Put a disk into a slot.
    #[pyo3(signature = (
        *,
        slot,
        id,
        path,
        is_read_only = false,
        is_direct = false,
        engine = "auto",
        bandwidth = None,
        operations = None,
    ))]
    #[expect(
        clippy::too_many_arguments,
        reason = "one keyword for each property of a disk"
    )]
    fn plug_disk(
        &self,
        py: Python<'_>,
        slot: &str,
        id: String,
        path: PathBuf,
        is_read_only: bool,
        is_direct: bool,
        engine: &str,
        bandwidth: Option<Limit>,
        operations: Option<Limit>,
    ) -> PyResult<()> {
        let limit = limits_of(bandwidth, operations);
        let config = devices::disk_config(id, path, is_read_only, is_direct, engine, limit)?;
        detached(py, || self.vm.plug_disk(slot, config))
    }

    /// Take the disk out of a slot. Idempotent.
    #[pyo3(signature = (*, slot))]
    fn unplug_disk(&self, py: Python<'_>, slot: &str) -> PyResult<()> {
        detached(py, || self.vm.unplug_disk(slot))
    }

    /// Share a folder. Before the start.
    #[pyo3(signature = (*, tag, folder, cache = "auto", is_read_only = false))]
    fn add_folder(
        &self,
        py: Python<'_>,
        tag: String,
        folder: PathBuf,
        cache: &str,
        is_read_only: bool,
    ) -> PyResult<()> {
        let cache = devices::cache_mode(cache)?;
        self.add(py, || devices::folder(tag, folder, cache, is_read_only))?;
        Ok(())
    }

    /// Let host and guest connect to each other. Before the start.
    #[pyo3(signature = (*, socket_path, guest_cid = 3))]
    fn add_vsock(&self, py: Python<'_>, socket_path: PathBuf, guest_cid: u64) -> PyResult<()> {
        self.add(py, || devices::vsock(socket_path, guest_cid))?;
        Ok(())
    }

    /// Add a network card. Before the start.
    #[pyo3(signature = (
        *,
        id,
        tap,
        mac,
        mtu = 1500,
        queue_pairs = 1,
        rx_bandwidth = None,
        rx_frames = None,
        tx_bandwidth = None,
        tx_frames = None,
    ))]
    #[expect(
        clippy::too_many_arguments,
        reason = "one keyword for each property of a card"
    )]
    fn add_net(
        &self,
        py: Python<'_>,
        id: String,
        tap: Tap,
        mac: [u8; 6],
        mtu: u16,
        queue_pairs: u16,
        rx_bandwidth: Option<Limit>,
        rx_frames: Option<Limit>,
        tx_bandwidth: Option<Limit>,
        tx_frames: Option<Limit>,
    ) -> PyResult<()> {
        let config = NetConfig {
            id,
            source: tap.take()?,
            mac,
            mtu,
            queue_pairs,
            rx_limiter: limits(rx_bandwidth, rx_frames),
            tx_limiter: limits(tx_bandwidth, tx_frames),
        };
        self.add(py, || devices::net(config))?;
        Ok(())
    }

    /// Give the guest random bytes. Before the start.
    #[pyo3(signature = (*, bandwidth = None, operations = None))]
    fn add_rng(
        &self,
        py: Python<'_>,
        bandwidth: Option<Limit>,
        operations: Option<Limit>,
    ) -> PyResult<()> {
        let limits = limits(bandwidth, operations);
        self.add(py, || devices::rng(&limits))?;
        Ok(())
    }

    /// Let the guest give memory back. Before the start.
    #[pyo3(signature = (*, target_pages = 0, deflates_on_oom = true, reports_free_pages = false))]
    fn add_balloon(
        &self,
        py: Python<'_>,
        target_pages: u32,
        deflates_on_oom: bool,
        reports_free_pages: bool,
    ) -> PyResult<Balloon> {
        let (device, control) = devices::balloon(BalloonConfig {
            target_pages,
            deflates_on_oom,
            reports_free_pages,
        });
        self.add(py, || Ok(device))?;
        Ok(control.into())
    }

    /// Make the machine and let the guest run.
    fn start(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.launched(self.vm.start()))
    }

    /// Make the machine as a snapshot says, and leave it paused.
    #[expect(clippy::needless_pass_by_value, reason = "paths arrive as PathBuf")]
    fn restore(&self, py: Python<'_>, folder: PathBuf) -> PyResult<()> {
        detached(py, || self.launched(self.vm.restore(&folder)))
    }

    /// Stop the guest's time.
    fn pause(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.vm.pause())
    }

    /// Let the guest's time go on.
    fn resume(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.vm.resume())
    }

    /// Write the whole machine, which has to be paused, into a folder.
    #[expect(clippy::needless_pass_by_value, reason = "paths arrive as PathBuf")]
    fn snapshot(&self, py: Python<'_>, folder: PathBuf) -> PyResult<()> {
        detached(py, || self.vm.snapshot(&folder))
    }

    /// End the machine now and wait until all of it is released. Idempotent.
    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.stopped())
    }

    /// Where it is in its life.
    #[getter]
    fn state(&self) -> &'static str {
        self.vm.state().name()
    }

    /// How it ended; nothing before that, and for a machine that never ran.
    #[getter]
    fn exit(&self) -> Option<VmExit> {
        self.reports.exit().map(VmExit::from)
    }

    /// What the guest printed last.
    fn console_tail<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.vm.console_tail())
    }

    /// The kernel's ids of the machine's threads, by name.
    fn thread_ids(&self, py: Python<'_>) -> BTreeMap<String, i32> {
        // Waits for a start that is under way.
        py.detach(|| self.vm.thread_ids()).into_iter().collect()
    }

    /// Counters of each device.
    fn metrics(&self, py: Python<'_>) -> Vec<DeviceMetrics> {
        let metrics = py.detach(|| self.vm.metrics());
        metrics.into_iter().map(DeviceMetrics::from).collect()
    }

    fn __repr__(&self) -> String {
        format!("<Vm {}>", self.state())
    }
}

impl Vm {
    /// Make a device and add it; gives how many of its kind there were before.
    fn add(
        &self,
        py: Python<'_>,
        make: impl FnOnce() -> Result<Device, MachineError> + Send,
    ) -> PyResult<usize> {
        detached(py, || Ok::<_, MachineError>(self.vm.add_device(make()?)?))
    }

    fn launched(&self, result: Result<(), VmError>) -> Result<(), VmError> {
        // Refused in its present state: then the end of what was launched before is still to come.
        if let Err(error) = &result
            && !matches!(error, VmError::State { .. })
        {
            self.reports.never_ran("the machine did not start");
        }
        result
    }

    fn stopped(&self) -> Result<(), VmError> {
        let result = self.vm.stop();
        if result.is_ok() {
            // One that ran has told by now.
            self.reports.never_ran("the machine was never started");
        }
        result
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if matches!(self.vm.state(), VmState::Created | VmState::Stopped) {
            return;
        }
        // It waits for threads: not while nobody else may run Python.
        let _result = Python::attach(|py| py.detach(|| self.vm.stop()));
    }
}
