//! A whole machine in a folder: `state`, what processors and devices hold, and `memory`, the
//! guest's memory as it lay in its address space, zeros left out.
//!
//! `state` begins with a line of text that names format and version and ends with a checksum, so
//! that a file cut short or of another program is refused before anything is made from it. A
//! snapshot is trusted beyond that: whoever can write it owns the guest. Written by the machine's
//! thread while the machine is paused, read by the builder.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::arch::{self, VcpuError, VcpuState, VmState};
use crate::devices::serial::SerialState;
use crate::kvm::KvmError;
use crate::machine::Resources;
use crate::memory::{self, MemoryError};
use crate::virtio::device::DeviceError;
use crate::virtio::mmio::MmioState;
use crate::vm::VmConfig;

const STATE_FILE: &str = "state";
const MEMORY_FILE: &str = "memory";
/// Another version is another format: there is no reading of old ones.
const HEADER: &[u8] = b"kata-hybrid machine, version 2\n";
const CHECKSUM_SIZE: usize = 4;
/// Far more than the largest machine needs.
const MAX_STATE_BYTES: u64 = 64 << 20;

/// Why there is no snapshot.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// a file cannot be opened, read or written
    #[error("{operation} {}", path.display())]
    File {
        /// What was attempted.
        operation: &'static str,
        /// Which file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// the file is none of ours, or was cut or changed
    #[error("{} is not a snapshot of this version, or damaged", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
    },
    /// the machine described here is another than the snapshot's
    #[error("the snapshot has {name} {saved}, the machine {configured}")]
    Mismatch {
        /// Of what.
        name: &'static str,
        /// In the snapshot.
        saved: u64,
        /// In the configuration.
        configured: u64,
    },
    /// a device cannot be kept
    #[error("keep a device")]
    Device(#[from] DeviceError),
    /// a vCPU cannot be kept
    #[error("keep a vCPU")]
    Vcpu(#[from] VcpuError),
    /// KVM's own state cannot be kept
    #[error("keep the interrupt controllers")]
    Kvm(#[from] KvmError),
    /// the memory cannot be kept
    #[error("keep the memory")]
    Memory(#[from] MemoryError),
}

/// Everything but the memory's content.
#[derive(Serialize, Deserialize)]
pub(crate) struct MachineState {
    memory_bytes: u64,
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) vm: VmState,
    pub(crate) serial: SerialState,
    /// Bits of the devices that the guest knows of (`acpi_slots.rs`).
    pub(crate) shown: u32,
    pub(crate) devices: Vec<MmioState>,
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |source| SnapshotError::File {
        operation,
        path,
        source,
    }
}

/// Write the machine, which is paused. Files are made anew: one that a restored machine still has
/// mapped stays as it is for that machine.
pub(crate) fn write(folder: &Path, resources: &Resources) -> Result<(), SnapshotError> {
    let vm = &resources.vm;
    // vCPUs first: saving their state may still move interrupts (see the order in `arch`).
    let vcpus = resources
        .vcpus
        .iter()
        .map(|vcpu| arch::save_vcpu(&resources.kvm, &vm.vm, &vcpu.registers()))
        .collect::<Result<_, _>>()?;
    let devices = resources
        .devices
        .iter()
        .map(|device| device.save())
        .collect::<Result<_, _>>()?;
    let state = MachineState {
        memory_bytes: vm.ram().size(),
        vcpus,
        vm: arch::save_vm(&vm.vm)?,
        serial: resources.serial.save(),
        shown: resources.slots.shown(),
        devices,
    };
    let (memory, memory_path) = create(folder, MEMORY_FILE)?;
    memory::write_snapshot(vm.ram(), &memory)?;
    commit(folder, MEMORY_FILE, &memory_path)?;
    // Last: a folder with a state is whole.
    let (mut file, path) = create(folder, STATE_FILE)?;
    let bytes = encode(&state).ok_or_else(|| SnapshotError::Damaged { path: path.clone() })?;
    io::Write::write_all(&mut file, &bytes).map_err(failed("write", &path))?;
    file.sync_all().map_err(failed("sync", &path))?;
    commit(folder, STATE_FILE, &path)
}

/// A new file that only we can read, beside its place.
fn create(folder: &Path, name: &str) -> Result<(File, PathBuf), SnapshotError> {
    let path = folder.join(format!(".{name}.part"));
    let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR);
    let file = file.map_err(|errno| failed("create", &path)(errno.into()))?;
    Ok((file.into(), path))
}

fn commit(folder: &Path, name: &str, part: &Path) -> Result<(), SnapshotError> {
    rustix::fs::rename(part, folder.join(name))
        .map_err(|errno| failed("move into place", part)(errno.into()))
}

fn encode(state: &MachineState) -> Option<Vec<u8>> {
    let bytes = postcard::to_extend(state, HEADER.to_vec()).ok()?;
    let checksum = crc32fast::hash(&bytes);
    Some([bytes, checksum.to_le_bytes().to_vec()].concat())
}

fn decode(bytes: &[u8]) -> Option<MachineState> {
    let (content, checksum) = bytes.split_last_chunk::<CHECKSUM_SIZE>()?;
    if crc32fast::hash(content) != u32::from_le_bytes(*checksum) {
        return None;
    }
    let (state, rest) = postcard::take_from_bytes(content.strip_prefix(HEADER)?).ok()?;
    rest.is_empty().then_some(state)
}

/// A snapshot to be restored.
pub(crate) struct Snapshot {
    folder: PathBuf,
    pub(crate) state: MachineState,
}

impl Snapshot {
    /// Read `state`.
    pub(crate) fn open(folder: &Path) -> Result<Self, SnapshotError> {
        let path = folder.join(STATE_FILE);
        let file = open(&path)?;
        let mut bytes = Vec::new();
        let mut limited = io::Read::take(File::from(file), MAX_STATE_BYTES);
        io::Read::read_to_end(&mut limited, &mut bytes).map_err(failed("read", &path))?;
        let state = decode(&bytes).ok_or(SnapshotError::Damaged { path })?;
        Ok(Self {
            folder: folder.to_owned(),
            state,
        })
    }

    /// Whether a machine of this description can become what was saved.
    pub(crate) fn check(&self, config: &VmConfig, devices: usize) -> Result<(), SnapshotError> {
        let pairs = [
            (
                "vCPUs",
                self.state.vcpus.len() as u64,
                u64::from(config.vcpu_count),
            ),
            (
                "bytes of memory",
                self.state.memory_bytes,
                u64::from(config.memory_mib) << 20,
            ),
            ("devices", self.state.devices.len() as u64, devices as u64),
        ];
        for (name, saved, configured) in pairs {
            if saved != configured {
                return Err(SnapshotError::Mismatch {
                    name,
                    saved,
                    configured,
                });
            }
        }
        Ok(())
    }

    /// The memory's content.
    pub(crate) fn memory(&self) -> Result<OwnedFd, SnapshotError> {
        open(&self.folder.join(MEMORY_FILE))
    }
}

fn open(path: &Path) -> Result<OwnedFd, SnapshotError> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| failed("open", path)(errno.into()))
}
