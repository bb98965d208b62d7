//! Descriptions of exits, from records made up and from a guest that really fails.

use virtio_core::ram::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::arch::x86_64::vcpu::tests::machine;
use crate::kvm::MappedVm;

fn described(run: &kvm_run) -> String {
    let mut text = String::new();
    describe_exit(run, &mut text);
    text
}

fn internal_error(suberror: u32, data: &[u64]) -> kvm_run {
    let mut run = kvm_run {
        exit_reason: KVM_EXIT_INTERNAL_ERROR,
        ..kvm_run::default()
    };
    let mut words = [0; 16];
    words[..data.len()].copy_from_slice(data);
    // Writing a member of a union is safe.
    run.__bindgen_anon_1.internal.suberror = suberror;
    run.__bindgen_anon_1.internal.ndata = u32::try_from(data.len()).unwrap();
    run.__bindgen_anon_1.internal.data = words;
    run
}

#[test]
fn an_emulation_failure_shows_the_instruction() {
    let bytes = u64::from_le_bytes([3, 0x0f, 0x01, 0xc1, 0xaa, 0xaa, 0xaa, 0xaa]);
    let run = internal_error(1, &[1, bytes, u64::MAX]);
    assert_eq!(
        described(&run),
        "suberror=1 (instruction emulation failed) ndata=3 instruction=0f:01:c1"
    );
    let run = internal_error(1, &[1, u64::MAX, u64::MAX]);
    assert!(described(&run).ends_with(&["ff"; 15].join(":")));
}

#[test]
fn without_instruction_bytes_the_words_are_shown() {
    let run = internal_error(1, &[0, 0x55]);
    assert!(described(&run).ends_with("ndata=2 0x0 0x55"));
    let run = internal_error(3, &[0x8000_0306, 7]);
    assert_eq!(
        described(&run),
        "suberror=3 (event delivery failed) ndata=2 0x80000306 0x7"
    );
    let mut run = internal_error(9, &[]);
    run.__bindgen_anon_1.internal.ndata = u32::MAX;
    assert!(described(&run).starts_with("suberror=9 ndata=4294967295 0x0"));
}

#[test]
fn a_refused_entry_shows_the_hardwares_reason() {
    let mut run = kvm_run {
        exit_reason: KVM_EXIT_FAIL_ENTRY,
        ..kvm_run::default()
    };
    run.__bindgen_anon_1
        .fail_entry
        .hardware_entry_failure_reason = 0x8000_0021;
    assert_eq!(described(&run), "hardware-reason=0x80000021");
}

#[test]
fn a_vcpu_that_can_not_run_is_described_in_one_line() {
    let Some((_kvm, vm)) = machine() else { return };
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    memory.write_slice(&[0xf4], GuestAddress(0x1000)).unwrap();
    let machine = MappedVm::new(vm, GuestRam::new(memory)).unwrap();
    let mut vcpu = machine.vm.create_vcpu(0).unwrap();
    let mut registers = vcpu.get_regs().unwrap();
    registers.rip = 0x1234;
    vcpu.set_regs(&registers).unwrap();
    let text = describe_failure(&mut vcpu);
    assert!(text.starts_with("rip=0x1234 cs=0xffff0000 cr0="), "{text}");
    assert!(text.contains(" efer=") && !text.contains('\n'), "{text}");
}
