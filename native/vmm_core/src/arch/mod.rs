//! What differs between processors; nothing outside of this folder is per-architecture.
//!
//! Each architecture's folder provides one set of names, and this file exports it:
//!
//! | name | what it does |
//! |---|---|
//! | [`layout`] | the guest's physical addresses; on every architecture `ram_ranges`, `MMIO_DEVICES_START`, `MMIO_DEVICE_SIZE`, `MMIO_GSIS`, `MAX_VCPUS` |
//! | [`MmioNode`], [`write_tables`], [`TablesError`] | tell the guest's kernel what the machine has (ACPI; a device tree elsewhere) |
//! | [`prepare_vm`] | interrupt controllers and timers, before the first vCPU |
//! | [`VmState`], [`save_vm`], [`restore_vm`], [`ClockPolicy`] | their state |
//! | [`HostFeatures`], [`configure_vcpu`], [`VcpuError`] | a new vCPU's features and first registers |
//! | [`VcpuState`], [`save_vcpu`], [`restore_vcpu`] | a stopped vCPU's registers |
//! | [`describe_failure`] | one line on why a vCPU can't go on |
//! | [`kernel`] | `load` reads a kernel image into memory, `write_parameters` what it is told; [`Entry`], [`BootProtocol`] |
//! | `syscalls` | `OLDER_CALLS`, which `seccomp.rs` lets through too |
//! | `probe_guest` | the guest that `probe.rs` runs |
//!
//! [`boot_file`] is not per-architecture: every loader of kernels reads its files through it.

pub mod boot_file;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::{
    acpi::{MmioNode, TablesError, write_tables},
    failure::describe_failure,
    kernel::{self, BootProtocol, Entry},
    layout,
    vcpu::{HostFeatures, VcpuError, configure_vcpu},
    vcpu_state::{VcpuState, restore_vcpu, save_vcpu},
    vm::{ClockPolicy, VmState, prepare_vm, restore_vm, save_vm},
};
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::{probe_guest, syscalls};
