//! A virtual machine, as its owner sees it.
//!
//! ```text
//!   created ──start──▶ booting ─────────▶ running ◀──pause, resume──▶ paused
//!      │  ──restore──▶ booting ─────────▶ paused                        │
//!      │                  │ (something failed)  │                       │
//!      └───── stop ───────┴──────▶ stopped ◀────┴───────────────────────┘
//! ```
//!
//! Created: devices are added, nothing of KVM exists. Booting: memory, vCPUs and devices are made
//! and the kernel loaded, by the caller of `start` (`builder.rs`); what was made is released if a
//! step fails. From running on, the machine's thread owns it (`machine.rs`); calls here are
//! requests to it and wait for its answer, with a deadline. Any thread may call.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use thiserror::Error;

use crate::arch::{TablesError, VcpuError};
use crate::boot::BootError;
use crate::builder::{self, Part};
use crate::devices::acpi_slots::AcpiSlots;
use crate::devices::console::Console;
use crate::devices::serial::SerialError;
use crate::event::VmEvents;
use crate::kvm::KvmError;
use crate::lock::lock;
use crate::machine::{Mailbox, Request, StateCell};
use crate::memory::{MemoryBacking, MemoryError};
use crate::snapshot::SnapshotError;
use crate::virtio::device::{DeviceError, VirtioDevice};
use crate::virtio::mmio::MmioTransport;

/// For a request to be answered; a snapshot of much memory takes as long as the disk does.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(600);

/// Most vCPUs of a machine here.
pub const MAX_VCPUS: u8 = 32;
/// Least and most memory of a machine, MiB.
pub const MEMORY_MIB: std::ops::RangeInclusive<u32> = 64..=1 << 20;
/// What the kernel reads of its command line (`COMMAND_LINE_SIZE` of x86), with the final zero.
pub const COMMAND_LINE_BYTES: usize = 2048;

/// Where a machine is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmState {
    /// Described.
    Created,
    /// Being made.
    Booting,
    /// The guest runs.
    Running,
    /// The guest's time stands still.
    Paused,
    /// It is no more.
    Stopped,
}

impl VmState {
    /// The state in one word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Booting => "booting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// What a machine is made of, besides its devices.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// A Linux kernel: bzImage or ELF.
    pub kernel: PathBuf,
    /// Its initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub command_line: String,
    /// Virtual processors, 1 to [`MAX_VCPUS`].
    pub vcpu_count: u8,
    /// Memory, within [`MEMORY_MIB`].
    pub memory_mib: u32,
    /// Where the memory comes from.
    pub memory_backing: MemoryBacking,
}

/// Why a machine could not be made, or not do what was asked.
#[derive(Debug, Error)]
pub enum VmError {
    /// a number is out of range
    #[error("{name} is {value}: from {min} to {max} is possible")]
    OutOfRange {
        /// Of what.
        name: &'static str,
        /// The value.
        value: u64,
        /// Least.
        min: u64,
        /// Most.
        max: u64,
    },
    /// not in this state
    #[error("cannot {request} a machine that is {}", .state.name())]
    State {
        /// Where it is.
        state: VmState,
        /// What was asked.
        request: &'static str,
    },
    /// the machine ended before it could answer
    #[error("the machine has ended")]
    Gone,
    /// the machine did not answer
    #[error("the machine did not {0} in time")]
    Timeout(&'static str),
    /// a vCPU does not leave the kernel
    #[error("vCPU {0} does not come to rest")]
    VcpuStuck(u8),
    /// more devices than interrupt lines
    #[error("more than {max} devices: each needs an interrupt line of its own")]
    TooManyDevices {
        /// Lines there are.
        max: usize,
    },
    /// KVM failed
    #[error("use KVM")]
    Kvm(#[from] KvmError),
    /// no memory
    #[error("make guest memory")]
    Memory(#[from] MemoryError),
    /// the kernel cannot be booted
    #[error("load the kernel")]
    Boot(#[from] BootError),
    /// a vCPU could not be given its registers
    #[error("set up a vCPU")]
    Vcpu(#[from] VcpuError),
    /// the guest could not be told of its devices
    #[error("write the machine's tables")]
    Tables(#[from] TablesError),
    /// the serial port of a snapshot cannot be
    #[error("restore the serial port")]
    Serial(#[from] SerialError),
    /// the console's descriptor cannot be used
    #[error("use the console's descriptor")]
    Console(#[source] io::Error),
    /// a device failed
    #[error("device")]
    Device(#[source] DeviceError),
    /// two devices in one place: our own mistake
    #[error("lay out devices")]
    Bus(#[from] crate::bus::BusError),
    /// no snapshot
    #[error("snapshot")]
    Snapshot(#[from] SnapshotError),
    /// a thread or descriptor could not be made
    #[error("{operation}")]
    System {
        /// What was attempted.
        operation: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What a started machine is known by.
pub(crate) struct Running {
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) thread: JoinHandle<()>,
    pub(crate) thread_ids: Vec<(String, i32)>,
    pub(crate) devices: Vec<Arc<MmioTransport>>,
    pub(crate) slots: Arc<AcpiSlots>,
}

pub(crate) enum Stage {
    Created(Vec<Part>),
    /// Also once it has stopped by itself.
    Started(Running),
    /// Stopped by us, or never started.
    Over,
}

/// A virtual machine. Dropping it stops it.
pub struct Vm {
    config: VmConfig,
    console: Arc<Console>,
    events: Arc<dyn VmEvents>,
    state: Arc<StateCell>,
    pub(crate) stage: Mutex<Stage>,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm")
            .field("config", &self.config)
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

impl Vm {
    /// Describe a machine. `console` gets a copy of what the guest prints; it must not block, and
    /// is closed when the machine is over.
    ///
    /// # Errors
    /// A number is out of range.
    pub fn new(
        config: VmConfig,
        console: Option<OwnedFd>,
        events: Arc<dyn VmEvents>,
    ) -> Result<Self, VmError> {
        check("vcpu_count", config.vcpu_count.into(), 1, MAX_VCPUS.into())?;
        let (least, most) = MEMORY_MIB.into_inner();
        check(
            "memory_mib",
            config.memory_mib.into(),
            least.into(),
            most.into(),
        )?;
        let length = config.command_line.len() as u64;
        let most = COMMAND_LINE_BYTES as u64 - 1;
        check("command line bytes", length, 0, most)?;
        let console = Console::new(console).map_err(|errno| VmError::Console(errno.into()))?;
        Ok(Self {
            config,
            console: Arc::new(console),
            events,
            state: Arc::new(Mutex::new(VmState::Created)),
            stage: Mutex::new(Stage::Created(Vec::new())),
        })
    }

    /// What it is made of.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Where it is in its life.
    pub fn state(&self) -> VmState {
        *lock(&self.state)
    }

    /// What the guest printed last.
    pub fn console_tail(&self) -> Vec<u8> {
        self.console.tail()
    }

    /// Add a device; gives how many of its kind were there before, which is how a guest numbers
    /// disks (`vda`, `vdb`, …). Before `start`.
    ///
    /// # Errors
    /// It was started, or has too many.
    pub fn add_device(&self, device: Box<dyn VirtioDevice>) -> Result<usize, VmError> {
        self.add(device, false)
    }

    /// Add a device that the guest does not know of before [`Vm::show_device`]; gives the same.
    ///
    /// # Errors
    /// As [`Vm::add_device`].
    pub fn add_hidden_device(&self, device: Box<dyn VirtioDevice>) -> Result<usize, VmError> {
        self.add(device, true)
    }

    fn add(&self, device: Box<dyn VirtioDevice>, is_hidden: bool) -> Result<usize, VmError> {
        let mut stage = lock(&self.stage);
        let Stage::Created(devices) = &mut *stage else {
            return Err(self.refuse("add a device to"));
        };
        if devices.len() >= builder::MAX_DEVICES {
            return Err(VmError::TooManyDevices {
                max: builder::MAX_DEVICES,
            });
        }
        let kind = device.kind();
        let is_same = |part: &&Part| part.device.kind() == kind;
        let before = devices.iter().filter(is_same).count();
        devices.push(Part { device, is_hidden });
        Ok(before)
    }

    pub(crate) fn refuse(&self, request: &'static str) -> VmError {
        VmError::State {
            state: self.state(),
            request,
        }
    }

    /// Make the machine and let the guest run. Returns when its vCPUs run.
    ///
    /// # Errors
    /// A part could not be made; nothing is left of it.
    pub fn start(&self) -> Result<(), VmError> {
        self.launch(None)
    }

    /// Make the machine as a snapshot in `folder` says, with the devices added here in the same
    /// order, and leave it paused. The folder's memory file must stay as it is from now on.
    ///
    /// # Errors
    /// The snapshot does not fit, or a part could not be made; nothing is left of it.
    pub fn restore(&self, folder: &Path) -> Result<(), VmError> {
        self.launch(Some(folder))
    }

    fn launch(&self, snapshot: Option<&Path>) -> Result<(), VmError> {
        let mut stage = lock(&self.stage);
        let devices = match std::mem::replace(&mut *stage, Stage::Over) {
            Stage::Created(devices) => devices,
            other => {
                *stage = other;
                return Err(self.refuse("start"));
            }
        };
        *lock(&self.state) = VmState::Booting;
        let parts = builder::Parts {
            config: &self.config,
            devices,
            console: &self.console,
            events: &self.events,
            state: &self.state,
        };
        match builder::launch(parts, snapshot) {
            Ok(running) => {
                *stage = Stage::Started(running);
                Ok(())
            }
            Err(error) => {
                *lock(&self.state) = VmState::Stopped;
                self.console.close();
                Err(error)
            }
        }
    }

    /// Stop the guest's time. Returns when no vCPU runs and no device works.
    ///
    /// # Errors
    /// It does not run, or does not come to rest.
    pub fn pause(&self) -> Result<(), VmError> {
        self.request(Request::Pause, "pause", REQUEST_TIMEOUT)
    }

    /// Let the guest's time go on.
    ///
    /// # Errors
    /// It is not paused.
    pub fn resume(&self) -> Result<(), VmError> {
        self.request(Request::Resume, "resume", REQUEST_TIMEOUT)
    }

    /// Write the whole machine, which has to be paused, into `folder`.
    ///
    /// # Errors
    /// A device cannot be kept, or the folder not written.
    pub fn snapshot(&self, folder: &Path) -> Result<(), VmError> {
        let request = Request::Snapshot(folder.to_owned());
        self.request(request, "write its snapshot", SNAPSHOT_TIMEOUT)
    }

    /// End the machine now, without the guest's help, and wait until all of it is released.
    /// Idempotent, in every state.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn stop(&self) -> Result<(), VmError> {
        let mut stage = lock(&self.stage);
        let running = match std::mem::replace(&mut *stage, Stage::Over) {
            Stage::Started(running) => running,
            Stage::Created(_) => {
                *lock(&self.state) = VmState::Stopped;
                self.console.close();
                return Ok(());
            }
            Stage::Over => return Ok(()),
        };
        let (sender, receiver) = sync_channel(1);
        running.mailbox.request(Request::Stop, sender);
        // An answer, or the end of the thread: both mean it is on its way out.
        let _answer = receiver.recv_timeout(REQUEST_TIMEOUT);
        let Running {
            thread, devices, ..
        } = running;
        drop(devices);
        let _panicked = thread.join();
        Ok(())
    }

    fn request(
        &self,
        request: Request,
        name: &'static str,
        timeout: Duration,
    ) -> Result<(), VmError> {
        let (sender, receiver) = sync_channel(1);
        {
            let stage = lock(&self.stage);
            let Stage::Started(running) = &*stage else {
                return Err(self.refuse(name));
            };
            if self.state() == VmState::Stopped {
                return Err(VmError::Gone);
            }
            running.mailbox.request(request, sender);
        }
        match receiver.recv_timeout(timeout) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => Err(VmError::Timeout(name)),
            Err(RecvTimeoutError::Disconnected) => Err(VmError::Gone),
        }
    }

    /// Names of the machine's threads and the kernel's ids of them, for cgroups and affinity.
    /// Empty before `start` and after `stop`.
    pub fn thread_ids(&self) -> Vec<(String, i32)> {
        match &*lock(&self.stage) {
            Stage::Started(running) => running.thread_ids.clone(),
            Stage::Created(_) | Stage::Over => Vec::new(),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _result = self.stop();
    }
}

fn check(name: &'static str, value: u64, min: u64, max: u64) -> Result<(), VmError> {
    if (min..=max).contains(&value) {
        Ok(())
    } else {
        Err(VmError::OutOfRange {
            name,
            value,
            min,
            max,
        })
    }
}
