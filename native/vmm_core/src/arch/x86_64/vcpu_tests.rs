//! vCPUs of a real machine, as they are before their first instruction.

use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;

use super::*;
use crate::arch::kernel::BootProtocol;
use crate::arch::{layout, prepare_vm};
use crate::kvm;

/// A machine without memory, if there is KVM here.
pub(in crate::arch) fn machine() -> Option<(Kvm, VmFd)> {
    let kvm = kvm::open().ok()?;
    let vm = kvm::create_vm(&kvm).unwrap();
    prepare_vm(&vm).unwrap();
    Some((kvm, vm))
}

fn entry(protocol: BootProtocol) -> Entry {
    Entry {
        address: GuestAddress(0x100_0000),
        protocol,
    }
}

#[test]
fn the_boot_vcpu_is_at_the_pvh_entry() {
    let Some((kvm, vm)) = machine() else { return };
    let vcpu = vm.create_vcpu(0).unwrap();
    configure_vcpu(
        &HostFeatures::of(&kvm).unwrap(),
        &vcpu,
        0,
        1,
        Some(&entry(BootProtocol::Pvh)),
    )
    .unwrap();
    let general = vcpu.get_regs().unwrap();
    assert_eq!(
        (general.rip, general.rbx, general.rflags),
        (0x100_0000, layout::PVH_START_INFO.0, 2)
    );
    let special = vcpu.get_sregs().unwrap();
    assert_eq!(
        (special.cr0 & !0x20, special.cr4, special.efer),
        (0x11, 0, 0)
    );
    assert_eq!(
        (special.cs.db, special.cs.l, special.cs.limit),
        (1, 0, u32::MAX)
    );
    assert_eq!((special.ds.base, special.ds.limit), (0, u32::MAX));
    assert_eq!((special.tr.type_, special.tr.limit), (0xb, 0x67));
    assert_eq!(special.gdt.base, layout::GDT.0);
}

#[test]
fn the_boot_vcpu_is_in_long_mode_at_the_linux_entry() {
    let Some((kvm, vm)) = machine() else { return };
    let vcpu = vm.create_vcpu(0).unwrap();
    configure_vcpu(
        &HostFeatures::of(&kvm).unwrap(),
        &vcpu,
        0,
        1,
        Some(&entry(BootProtocol::Linux64)),
    )
    .unwrap();
    let general = vcpu.get_regs().unwrap();
    assert_eq!(
        (general.rip, general.rsi, general.rsp, general.rbp),
        (
            0x100_0000,
            layout::BOOT_PARAMS.0,
            layout::BOOT_STACK.0,
            layout::BOOT_STACK.0
        )
    );
    let special = vcpu.get_sregs().unwrap();
    assert_eq!(special.cr0 & 0x8000_0001, 0x8000_0001);
    assert_eq!(special.cr3, layout::PAGE_MAP_LEVEL_4.0);
    assert_eq!((special.cr4 & 0x20, special.efer & 0x500), (0x20, 0x500));
    assert_eq!((special.cs.db, special.cs.l), (0, 1));
}

#[test]
fn other_vcpus_stay_where_the_start_up_interrupt_finds_them() {
    let Some((kvm, vm)) = machine() else { return };
    let _boot = vm.create_vcpu(0).unwrap();
    let vcpu = vm.create_vcpu(1).unwrap();
    let before = vcpu.get_regs().unwrap();
    configure_vcpu(&HostFeatures::of(&kvm).unwrap(), &vcpu, 1, 2, None).unwrap();
    assert_eq!(vcpu.get_regs().unwrap(), before);
    let state = vcpu.get_mp_state().unwrap().mp_state;
    assert_eq!(state, kvm_bindings::KVM_MP_STATE_UNINITIALIZED);
}

#[test]
fn every_vcpu_gets_its_features_pins_and_floating_point_state() {
    let Some((kvm, vm)) = machine() else { return };
    for index in 0..3 {
        let vcpu = vm.create_vcpu(index.into()).unwrap();
        configure_vcpu(&HostFeatures::of(&kvm).unwrap(), &vcpu, index, 3, None).unwrap();
        let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
        let leaf = cpuid.as_slice().iter().find(|leaf| leaf.function == 1);
        assert_eq!(leaf.unwrap().ebx >> 24, u32::from(index));
        let lapic = vcpu.get_lapic().unwrap();
        let mode = |register: usize| lapic.regs[register + 1].cast_unsigned() & 7;
        assert_eq!((mode(APIC_LINT0), mode(APIC_LINT1)), (7, 4));
        assert_eq!(vcpu.get_fpu().unwrap().fcw, 0x37f);
    }
}
