//! The devices of a running machine, as its owner reaches them: counters, what the host asks of
//! one, and disks that come and go.
//!
//! Calls come from any thread and take the lock of the one transport they are about, as a vCPU
//! does; the machine's thread has no part in them. What opens files is done before.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use crate::lock::lock;
use crate::virtio::block::{Block, BlockConfig, BlockError};
use crate::virtio::device::{DeviceError, DeviceKind, VirtioDevice};
use crate::virtio::mmio::MmioTransport;
use crate::vm::{Stage, Vm, VmError, VmState};

/// How long a guest is waited for to look at a disk that came: its driver's work of microseconds,
/// or of the kernel's search for new devices. One that has not by then is told all the same.
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);

/// Counters of one device.
#[derive(Clone, Debug)]
pub struct DeviceMetrics {
    /// What it is.
    pub kind: DeviceKind,
    /// Which of its kind.
    pub name: String,
    /// Names and values.
    pub counters: Vec<(&'static str, u64)>,
}

/// Why a disk is not in the machine.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// the disk is not usable
    #[error(transparent)]
    Disk(#[from] BlockError),
    /// the machine is not able to
    #[error(transparent)]
    Vm(#[from] VmError),
}

impl Vm {
    fn devices(&self) -> Option<Vec<Arc<MmioTransport>>> {
        match &*lock(&self.stage) {
            Stage::Started(running) => Some(running.devices.clone()),
            Stage::Created(_) | Stage::Over => None,
        }
    }

    /// Each device's kind, name and counters. Empty before `start` and after `stop`.
    pub fn metrics(&self) -> Vec<DeviceMetrics> {
        let devices = self.devices().unwrap_or_default();
        devices
            .iter()
            .map(|device| DeviceMetrics {
                kind: device.kind(),
                name: device.name().to_owned(),
                counters: device.metrics(),
            })
            .collect()
    }

    /// Use a device of this type and name, whatever thread this is.
    ///
    /// # Errors
    /// There is none, or the machine is not started.
    pub fn with_device<D: VirtioDevice, R>(
        &self,
        name: &str,
        work: impl FnOnce(&mut D) -> R,
    ) -> Result<R, VmError> {
        let devices = self.devices();
        let devices = devices.ok_or_else(|| self.refuse("use a device of"))?;
        let mut work = Some(work);
        for device in devices.iter().filter(|device| device.name() == name) {
            let done = device.with_device(|device| {
                let device = (device as &mut dyn Any).downcast_mut::<D>()?;
                work.take().map(|work| work(device))
            });
            if let Some(result) = done {
                return Ok(result);
            }
        }
        Err(no_device(name))
    }

    /// Let the guest know of a device that was hidden.
    ///
    /// # Errors
    /// There is none of this name, or the machine is not started.
    pub fn show_device(&self, name: &str) -> Result<(), VmError> {
        let stage = lock(&self.stage);
        let Stage::Started(running) = &*stage else {
            return Err(self.refuse("show a device of"));
        };
        let mut numbered = (0u32..).zip(&running.devices);
        let found = numbered.find(|(_, device)| device.name() == name);
        let (number, _) = found.ok_or_else(|| no_device(name))?;
        running.slots.show(number);
        Ok(())
    }

    /// Put a disk into a slot ([`Block::slot`]), and wait a moment until the guest has seen it.
    ///
    /// # Errors
    /// The disk cannot be used, the slot is none or occupied, or the machine does not run.
    pub fn plug_disk(&self, slot: &str, disk: BlockConfig) -> Result<(), PlugError> {
        self.refuse_unless_running("plug a disk into")?;
        let disk = Block::new(disk)?;
        let inserted = self.with_device(slot, |device: &mut Block| device.insert(disk))?;
        let seen = inserted.map_err(VmError::Device)?;
        self.show_device(slot)?;
        let _timeout = seen.recv_timeout(LOOK_TIMEOUT);
        Ok(())
    }

    /// Take the disk out of a slot. What the guest still asks of it fails. Idempotent.
    ///
    /// # Errors
    /// The slot is none, the disk does not answer, or the machine does not run.
    pub fn unplug_disk(&self, slot: &str) -> Result<(), PlugError> {
        self.refuse_unless_running("unplug a disk from")?;
        let ejected = self.with_device(slot, Block::eject)?;
        // Here, where no device waits for it.
        drop(ejected.map_err(VmError::Device)?);
        Ok(())
    }

    /// A paused machine's devices are as a snapshot is to find them.
    fn refuse_unless_running(&self, request: &'static str) -> Result<(), VmError> {
        match self.state() {
            VmState::Running => Ok(()),
            _ => Err(self.refuse(request)),
        }
    }
}

fn no_device(name: &str) -> VmError {
    VmError::Device(DeviceError::State {
        kind: "device",
        reason: format!("none is called {name}"),
    })
}
