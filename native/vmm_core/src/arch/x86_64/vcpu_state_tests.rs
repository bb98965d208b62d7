//! Registers of real vCPUs to text and back into another machine.

use kvm_bindings::{Msrs, kvm_msr_entry};
use vm_memory::GuestAddress;

use super::*;
use crate::arch::kernel::{BootProtocol, Entry};
use crate::arch::x86_64::vcpu::tests::machine;
use crate::arch::{ClockPolicy, HostFeatures, VmState, configure_vcpu, restore_vm, save_vm};

const STAR: u32 = 0xc000_0081;
const ENTRY: Entry = Entry {
    address: GuestAddress(0x100_0000),
    protocol: BootProtocol::Linux64,
};

fn set_msr(vcpu: &VcpuFd, index: u32, data: u64) {
    let entry = kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    };
    let msrs = Msrs::from_entries(&[entry]).unwrap();
    assert_eq!(vcpu.set_msrs(&msrs).unwrap(), 1);
}

fn through_json<T: Serialize + for<'a> Deserialize<'a>>(value: &T) -> T {
    serde_json::from_str(&serde_json::to_string(value).unwrap()).unwrap()
}

#[test]
fn a_vcpu_goes_on_in_another_machine() {
    let Some((kvm, vm)) = machine() else { return };
    let vcpu = vm.create_vcpu(0).unwrap();
    configure_vcpu(&HostFeatures::of(&kvm).unwrap(), &vcpu, 0, 2, Some(&ENTRY)).unwrap();
    let mut general = vcpu.get_regs().unwrap();
    (general.rax, general.r15) = (0x1122_3344_5566_7788, 0x99aa);
    vcpu.set_regs(&general).unwrap();
    // xmm3, and the bit that says that SSE state is not the initial one (Intel SDM, volume 1, 13.4).
    let mut xsave = save_xsave(&vm, &vcpu).unwrap();
    xsave[208 / 4] = 0x5a5a_5a5a;
    xsave[512 / 4] |= 2;
    restore_xsave(&vm, &vcpu, &xsave).unwrap();
    let mut debug = vcpu.get_debug_regs().unwrap();
    debug.db[0] = 0x1234_5000;
    vcpu.set_debug_regs(&debug).unwrap();
    set_msr(&vcpu, STAR, 0x0023_0010_0000_0000);

    let state = through_json(&save_vcpu(&kvm, &vm, &vcpu).unwrap());
    let (kvm, vm) = machine().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    restore_vcpu(&vm, &vcpu, &state).unwrap();

    assert_eq!(vcpu.get_regs().unwrap(), general);
    assert_eq!(
        vcpu.get_fpu().unwrap().xmm[3][..5],
        [0x5a, 0x5a, 0x5a, 0x5a, 0]
    );
    assert_eq!(vcpu.get_debug_regs().unwrap().db[0], 0x1234_5000);
    let again = save_vcpu(&kvm, &vm, &vcpu).unwrap();
    assert_eq!(again.special, state.special);
    assert_eq!(again.extended_control, state.extended_control);
    assert_eq!(again.lapic, state.lapic);
    assert_eq!(again.mp_state, state.mp_state);
    assert_eq!(again.events, state.events);
    assert_eq!(again.xsave, state.xsave);
    assert_eq!(again.cpuid, state.cpuid);
    let value = |state: &VcpuState, index| {
        let entry = state.msrs.iter().find(|entry| entry.index == index);
        entry.map(|entry| entry.data)
    };
    assert_eq!(value(&again, STAR), Some(0x0023_0010_0000_0000));
    // All but the clocks, which go on.
    let stable = |state: &VcpuState| -> Vec<_> {
        let moves = |index| matches!(index, 0x10 | 0x3b | 0x6e0 | 0xe7 | 0xe8);
        let entries = state.msrs.iter().filter(|entry| !moves(entry.index));
        entries.map(|entry| (entry.index, entry.data)).collect()
    };
    assert_eq!(stable(&again), stable(&state));
}

#[test]
fn a_waiting_vcpu_waits_again() {
    let Some((kvm, vm)) = machine() else { return };
    let _boot = vm.create_vcpu(0).unwrap();
    let vcpu = vm.create_vcpu(1).unwrap();
    configure_vcpu(&HostFeatures::of(&kvm).unwrap(), &vcpu, 1, 2, None).unwrap();
    let state = save_vcpu(&kvm, &vm, &vcpu).unwrap();
    let (_kvm, vm) = machine().unwrap();
    let _boot = vm.create_vcpu(0).unwrap();
    let vcpu = vm.create_vcpu(1).unwrap();
    restore_vcpu(&vm, &vcpu, &state).unwrap();
    assert_eq!(vcpu.get_mp_state().unwrap(), state.mp_state);
}

#[test]
fn a_state_with_another_xsave_area_is_refused() {
    let Some((kvm, vm)) = machine() else { return };
    let vcpu = vm.create_vcpu(0).unwrap();
    configure_vcpu(&HostFeatures::of(&kvm).unwrap(), &vcpu, 0, 1, Some(&ENTRY)).unwrap();
    let mut state = save_vcpu(&kvm, &vm, &vcpu).unwrap();
    let expected = state.xsave.len() * 4;
    for words in [0, 1, 1023, state.xsave.len() - 1, state.xsave.len() + 1] {
        state.xsave.resize(words, 0);
        let error = restore_vcpu(&vm, &vcpu, &state).unwrap_err();
        assert!(
            matches!(error, VcpuError::XsaveSize { saved, expected: found }
                if saved == words * 4 && found == expected),
            "{error}"
        );
    }
}

#[test]
fn an_msr_that_can_not_be_written_must_be_the_same() {
    let Some((kvm, vm)) = machine() else { return };
    let vcpu = vm.create_vcpu(0).unwrap();
    configure_vcpu(&HostFeatures::of(&kvm).unwrap(), &vcpu, 0, 1, Some(&ENTRY)).unwrap();
    let mut state = save_vcpu(&kvm, &vm, &vcpu).unwrap();
    // No processor has this one.
    state.msrs.insert(
        3,
        kvm_msr_entry {
            index: 0xdead_beef,
            data: 1,
            ..kvm_msr_entry::default()
        },
    );
    let error = restore_vcpu(&vm, &vcpu, &state).unwrap_err();
    assert!(
        matches!(
            error,
            VcpuError::MsrRefused {
                index: 0xdead_beef,
                value: 1
            }
        ),
        "{error}"
    );
}

#[test]
fn controllers_and_clock_go_on_in_another_machine() {
    let Some((_kvm, vm)) = machine() else { return };
    let _vcpu = vm.create_vcpu(0).unwrap();
    let mut pit = vm.get_pit2().unwrap();
    pit.channels[2].count = 0x1234;
    vm.set_pit2(&pit).unwrap();
    let state: VmState = through_json(&save_vm(&vm).unwrap());
    let before = vm.get_clock().unwrap().clock;

    for policy in [ClockPolicy::Continue, ClockPolicy::Advance] {
        let (_kvm, vm) = machine().unwrap();
        let _vcpu = vm.create_vcpu(0).unwrap();
        restore_vm(&vm, &state, policy).unwrap();
        assert_eq!(vm.get_pit2().unwrap().channels[2].count, 0x1234);
        let clock = vm.get_clock().unwrap().clock;
        // A new machine's clock begins at 0; this one goes on from the saved one.
        assert!(clock + 1_000_000_000 > before, "{clock} {before}");
        save_vm(&vm).unwrap();
    }
}
