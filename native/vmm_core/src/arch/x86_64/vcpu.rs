//! A new vCPU: what it can do, and its first registers.
//!
//! CPUID comes before any MSR: KVM hides registers of features that the vCPU was not given. Called by
//! the machine's owner, before the vCPU's thread runs it.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use thiserror::Error;

use super::cpuid::{CpuidRequest, cpuid_for};
use super::kernel::Entry;
use super::{msr, registers};
use crate::kvm::KvmError;

/// Local vector table entries of the local APIC (Intel SDM, volume 3, 11.5.1).
const APIC_LINT0: usize = 0x350;
const APIC_LINT1: usize = 0x360;
/// Delivery modes, in bits 10:8.
const DELIVERY_MODE_MASK: u32 = 0x700;
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_EXTERNAL: u32 = 7 << 8;

/// Why a vCPU could not be set up, saved or restored.
#[derive(Debug, Error)]
pub enum VcpuError {
    /// a call failed
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// KVM does not take a value
    #[error("KVM does not take {value:#x} for MSR {index:#x}")]
    MsrRefused {
        /// The register.
        index: u32,
        /// The value.
        value: u64,
    },
    /// a list is longer than KVM's limit
    #[error("{count} {what} are more than KVM takes")]
    TooManyEntries {
        /// CPUID leaves or MSRs.
        what: &'static str,
        /// How many.
        count: usize,
    },
    /// the state was saved on a host with other processor features
    #[error(
        "the saved XSAVE area has {saved} bytes and this host's has {expected}: restore it on the kind of host it was saved on"
    )]
    XsaveSize {
        /// Of the saved state.
        saved: usize,
        /// Of this host.
        expected: usize,
    },
}

/// What KVM lets a vCPU of this host have.
#[derive(Debug)]
pub struct HostFeatures {
    cpuid: CpuId,
    has_tsc_deadline_timer: bool,
}

impl HostFeatures {
    /// Ask KVM: once a machine, since the answer is the same for each vCPU.
    ///
    /// # Errors
    /// KVM refused the call.
    pub fn of(kvm: &Kvm) -> Result<Self, KvmError> {
        Ok(Self {
            cpuid: kvm
                .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
                .map_err(KvmError::call("KVM_GET_SUPPORTED_CPUID"))?,
            has_tsc_deadline_timer: kvm.check_extension(Cap::TscDeadlineTimer),
        })
    }
}

/// Set up vCPU `index` of `count`. With `entry` it is the boot processor and starts there; without,
/// it waits for the kernel to start it.
///
/// # Errors
/// KVM refused one of the calls or values.
pub fn configure_vcpu(
    features: &HostFeatures,
    vcpu: &VcpuFd,
    index: u8,
    count: u8,
    entry: Option<&Entry>,
) -> Result<(), VcpuError> {
    let request = CpuidRequest {
        vcpu_index: index,
        vcpu_count: count,
        has_tsc_deadline_timer: features.has_tsc_deadline_timer,
    };
    vcpu.set_cpuid2(&cpuid_for(&features.cpuid, request)?)
        .map_err(KvmError::call("KVM_SET_CPUID2"))?;
    msr::set_boot_msrs(vcpu)?;
    registers::set_fpu(vcpu)?;
    if let Some(entry) = entry {
        registers::set_entry(vcpu, entry)?;
    }
    Ok(set_interrupt_pins(vcpu)?)
}

/// The local APIC's two pins, as firmware would leave them: the 8259's interrupt, and NMI.
fn set_interrupt_pins(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let mut lapic = vcpu.get_lapic().map_err(KvmError::call("KVM_GET_LAPIC"))?;
    for (register, mode) in [(APIC_LINT0, DELIVERY_EXTERNAL), (APIC_LINT1, DELIVERY_NMI)] {
        let bytes = &mut lapic.regs[register..register + 4];
        let mut value = [0; 4];
        for (byte, raw) in value.iter_mut().zip(bytes.iter()) {
            *byte = raw.cast_unsigned();
        }
        let value = u32::from_le_bytes(value) & !DELIVERY_MODE_MASK | mode;
        for (raw, byte) in bytes.iter_mut().zip(value.to_le_bytes()) {
            *raw = byte.cast_signed();
        }
    }
    vcpu.set_lapic(&lapic)
        .map_err(KvmError::call("KVM_SET_LAPIC"))
}

#[cfg(test)]
#[path = "vcpu_tests.rs"]
pub(in crate::arch) mod tests;
