//! A stopped vCPU's registers, to and from a value that can be written to a file.
//!
//! ```text
//!   save:     MP state ► general ► special ► XSAVE ► XCR ► debug ► APIC ► TSC rate ► CPUID ► MSRs ► events
//!   restore:  CPUID ► MP state ► general ► special ► XSAVE ► XCR ► debug ► APIC ► TSC rate ► MSRs ► events
//! ```
//!
//! The order matters. Saved first, the MP state makes KVM process a pending start-up, which changes
//! registers; events are last since reading the others may queue one. Restored, general registers
//! drop pending exceptions, so they come before events; the APIC needs its base from the special
//! ones; the deadline timer needs the APIC's mode, so MSRs come after it.
//!
//! Before saving, the vCPU must have finished its last port or memory access: one more `KVM_RUN`
//! with `immediate_exit` set does it. Called by the machine's owner, on any thread.

#![expect(
    unsafe_code,
    reason = "the size of the XSAVE area is known only at run time"
)]

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::msr;
use super::vcpu::VcpuError;
use crate::kvm::KvmError;

/// TSC rates closer than this (parts per million) are the same: they are measured, not set.
const TSC_TOLERANCE_PPM: u64 = 250;

/// Everything that makes a vCPU go on where it was.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    general: kvm_regs,
    special: kvm_sregs,
    /// The XSAVE area in words, as long as KVM said.
    xsave: Vec<u32>,
    extended_control: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// Absent where the host's TSC is unstable.
    tsc_khz: Option<u32>,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// Save a vCPU that does not run.
///
/// # Errors
/// KVM refused one of the calls.
pub fn save_vcpu(kvm: &Kvm, vm: &VmFd, vcpu: &VcpuFd) -> Result<VcpuState, VcpuError> {
    let mp_state = vcpu
        .get_mp_state()
        .map_err(KvmError::call("KVM_GET_MP_STATE"))?;
    let general = vcpu.get_regs().map_err(KvmError::call("KVM_GET_REGS"))?;
    let special = vcpu.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))?;
    let xsave = save_xsave(vm, vcpu)?;
    let extended_control = vcpu.get_xcrs().map_err(KvmError::call("KVM_GET_XCRS"))?;
    let debug = vcpu
        .get_debug_regs()
        .map_err(KvmError::call("KVM_GET_DEBUGREGS"))?;
    let lapic = vcpu.get_lapic().map_err(KvmError::call("KVM_GET_LAPIC"))?;
    let tsc_khz = vcpu.get_tsc_khz().ok();
    let cpuid = vcpu
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::call("KVM_GET_CPUID2"))?;
    let msrs = msr::save_msrs(kvm, vcpu)?;
    let events = vcpu
        .get_vcpu_events()
        .map_err(KvmError::call("KVM_GET_VCPU_EVENTS"))?;
    Ok(VcpuState {
        cpuid: cpuid.as_slice().to_vec(),
        mp_state,
        general,
        special,
        xsave,
        extended_control,
        debug,
        lapic,
        tsc_khz,
        msrs,
        events,
    })
}

/// Restore `state` into a new vCPU of the same number, or one that does not run.
///
/// # Errors
/// KVM refused one of the calls or values, or the state is from another kind of host.
pub fn restore_vcpu(vm: &VmFd, vcpu: &VcpuFd, state: &VcpuState) -> Result<(), VcpuError> {
    let cpuid = CpuId::from_entries(&state.cpuid).map_err(|_| VcpuError::TooManyEntries {
        what: "CPUID leaves",
        count: state.cpuid.len(),
    })?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(KvmError::call("KVM_SET_CPUID2"))?;
    vcpu.set_mp_state(state.mp_state)
        .map_err(KvmError::call("KVM_SET_MP_STATE"))?;
    vcpu.set_regs(&state.general)
        .map_err(KvmError::call("KVM_SET_REGS"))?;
    vcpu.set_sregs(&state.special)
        .map_err(KvmError::call("KVM_SET_SREGS"))?;
    restore_xsave(vm, vcpu, &state.xsave)?;
    vcpu.set_xcrs(&state.extended_control)
        .map_err(KvmError::call("KVM_SET_XCRS"))?;
    vcpu.set_debug_regs(&state.debug)
        .map_err(KvmError::call("KVM_SET_DEBUGREGS"))?;
    vcpu.set_lapic(&state.lapic)
        .map_err(KvmError::call("KVM_SET_LAPIC"))?;
    restore_tsc_rate(vcpu, state.tsc_khz)?;
    msr::restore_msrs(vcpu, &state.msrs)?;
    vcpu.set_vcpu_events(&state.events)
        .map_err(KvmError::call("KVM_SET_VCPU_EVENTS"))?;
    tell_guest_it_stopped(vcpu)
}

/// Tell the guest's kvmclock, if it uses it, that it stood still: its watchdogs then don't bark.
fn tell_guest_it_stopped(vcpu: &VcpuFd) -> Result<(), VcpuError> {
    match vcpu.kvmclock_ctrl() {
        Err(error) if error.errno() != libc::EINVAL => {
            Err(KvmError::call("KVM_KVMCLOCK_CTRL")(error).into())
        }
        _ => Ok(()),
    }
}

fn restore_tsc_rate(vcpu: &VcpuFd, saved_khz: Option<u32>) -> Result<(), VcpuError> {
    let (Some(saved), Ok(current)) = (saved_khz, vcpu.get_tsc_khz()) else {
        return Ok(());
    };
    let difference = u64::from(saved.abs_diff(current));
    if difference * 1_000_000 > u64::from(current) * TSC_TOLERANCE_PPM {
        vcpu.set_tsc_khz(saved)
            .map_err(KvmError::call("KVM_SET_TSC_KHZ"))?;
    }
    Ok(())
}

/// Words of the XSAVE area after the 4096 bytes that it has on every host.
fn xsave_extra_words(vm: &VmFd) -> usize {
    // Hosts before 5.17 know no more than the 4096 bytes, and say 0.
    let size = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    size.saturating_sub(size_of::<kvm_xsave>())
        .div_ceil(size_of::<u32>())
}

fn new_xsave(extra_words: usize) -> Result<Xsave, VcpuError> {
    Xsave::new(extra_words).map_err(|_| VcpuError::TooManyEntries {
        what: "words of the XSAVE area",
        count: extra_words,
    })
}

fn save_xsave(vm: &VmFd, vcpu: &VcpuFd) -> Result<Vec<u32>, VcpuError> {
    let extra_words = xsave_extra_words(vm);
    if extra_words == 0 {
        let xsave = vcpu.get_xsave().map_err(KvmError::call("KVM_GET_XSAVE"))?;
        return Ok(xsave.region.to_vec());
    }
    let mut xsave = new_xsave(extra_words)?;
    // SAFETY: the area is as large as KVM_CAP_XSAVE2 of this machine says, which changes only with
    // arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM), which this process never calls.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(KvmError::call("KVM_GET_XSAVE2"))?;
    let mut words = xsave.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(xsave.as_slice());
    Ok(words)
}

fn restore_xsave(vm: &VmFd, vcpu: &VcpuFd, words: &[u32]) -> Result<(), VcpuError> {
    let extra_words = xsave_extra_words(vm);
    let mut xsave = new_xsave(extra_words)?;
    let region_words = xsave.as_fam_struct_ref().xsave.region.len();
    let (Some((region, extra)), true) = (
        words.split_at_checked(region_words),
        words.len() == region_words + extra_words,
    ) else {
        return Err(VcpuError::XsaveSize {
            saved: size_of_val(words),
            expected: (region_words + extra_words) * size_of::<u32>(),
        });
    };
    xsave.as_mut_slice().copy_from_slice(extra);
    // SAFETY: the length of the flexible part, which is the field that must not change, is not
    // touched.
    let area = unsafe { xsave.as_mut_fam_struct() };
    area.xsave.region.copy_from_slice(region);
    // SAFETY: the area is as large as KVM_CAP_XSAVE2 of this machine says; see `save_xsave`.
    unsafe { vcpu.set_xsave2(&xsave) }.map_err(KvmError::call("KVM_SET_XSAVE"))?;
    Ok(())
}

#[cfg(test)]
#[path = "vcpu_state_tests.rs"]
mod tests;
