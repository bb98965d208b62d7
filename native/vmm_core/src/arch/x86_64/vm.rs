//! Interrupt controllers, timers and clock of a whole machine: made before the first vCPU, saved
//! and restored when no vCPU runs.
//!
//! All are KVM's own: the two 8259, the IOAPIC, the 8254, and kvmclock's base. Called by the
//! machine's owner.

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::layout;
use crate::kvm::KvmError;

/// In the order they are saved in.
const IRQCHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// How the guest's monotonic clock goes on after a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClockPolicy {
    /// From the moment it was saved: for the guest no time has passed.
    Continue,
    /// As if it had run on meanwhile. Host kernels before 5.16 did not save what this needs; then
    /// it is the same as [`ClockPolicy::Continue`].
    Advance,
}

/// State of a machine's interrupt controllers and timers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
    irqchips: [kvm_irqchip; IRQCHIPS.len()],
}

/// Give `vm` what has to be there before its first vCPU.
///
/// # Errors
/// KVM refused one of the calls.
pub fn prepare_vm(vm: &VmFd) -> Result<(), KvmError> {
    // Before the first vCPU, and in this order (KVM API documentation, 4.93 and 4.36).
    vm.set_identity_map_address(layout::IDENTITY_MAP_ADDRESS)
        .map_err(KvmError::call("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(layout::TSS_ADDRESS)
        .map_err(KvmError::call("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip()
        .map_err(KvmError::call("KVM_CREATE_IRQCHIP"))?;
    // Port 0x61, which kernels poll while they measure clocks, is then KVM's own as well.
    let config = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..kvm_pit_config::default()
    };
    vm.create_pit2(config)
        .map_err(KvmError::call("KVM_CREATE_PIT2"))
}

/// Save what [`prepare_vm`] made. No vCPU may run, and their states are saved before.
///
/// # Errors
/// KVM refused one of the calls.
pub fn save_vm(vm: &VmFd) -> Result<VmState, KvmError> {
    let pit = vm.get_pit2().map_err(KvmError::call("KVM_GET_PIT2"))?;
    let clock = vm.get_clock().map_err(KvmError::call("KVM_GET_CLOCK"))?;
    let mut irqchips = IRQCHIPS.map(|chip_id| kvm_irqchip {
        chip_id,
        ..kvm_irqchip::default()
    });
    for irqchip in &mut irqchips {
        vm.get_irqchip(irqchip)
            .map_err(KvmError::call("KVM_GET_IRQCHIP"))?;
    }
    Ok(VmState {
        pit,
        clock,
        irqchips,
    })
}

/// Restore `state` into a machine that was made by [`prepare_vm`], after its vCPUs and before its
/// devices: an interrupt raised earlier would be lost.
///
/// # Errors
/// KVM refused one of the calls.
pub fn restore_vm(vm: &VmFd, state: &VmState, policy: ClockPolicy) -> Result<(), KvmError> {
    vm.set_pit2(&state.pit)
        .map_err(KvmError::call("KVM_SET_PIT2"))?;
    vm.set_clock(&clock_to_set(&state.clock, policy))
        .map_err(KvmError::call("KVM_SET_CLOCK"))?;
    for irqchip in &state.irqchips {
        vm.set_irqchip(irqchip)
            .map_err(KvmError::call("KVM_SET_IRQCHIP"))?;
    }
    Ok(())
}

/// The flags that are read say what was known; those that are written say what to do.
fn clock_to_set(saved: &kvm_clock_data, policy: ClockPolicy) -> kvm_clock_data {
    let flags = match policy {
        ClockPolicy::Continue => 0,
        ClockPolicy::Advance => saved.flags & KVM_CLOCK_REALTIME,
    };
    kvm_clock_data {
        clock: saved.clock,
        flags,
        realtime: if flags == 0 { 0 } else { saved.realtime },
        ..kvm_clock_data::default()
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_TSC_STABLE};

    use super::*;

    #[test]
    fn the_clock_advances_only_if_asked_and_known() {
        let saved = kvm_clock_data {
            clock: 7,
            flags: KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC,
            realtime: 9,
            host_tsc: 11,
            ..kvm_clock_data::default()
        };
        let set = clock_to_set(&saved, ClockPolicy::Continue);
        assert_eq!((set.clock, set.flags, set.realtime), (7, 0, 0));
        let set = clock_to_set(&saved, ClockPolicy::Advance);
        assert_eq!(
            (set.clock, set.flags, set.realtime),
            (7, KVM_CLOCK_REALTIME, 9)
        );
        let old = kvm_clock_data {
            flags: KVM_CLOCK_TSC_STABLE,
            ..saved
        };
        let set = clock_to_set(&old, ClockPolicy::Advance);
        assert_eq!((set.clock, set.flags, set.realtime), (7, 0, 0));
    }
}
