//! Why a vCPU can't go on, in one line: registers, and what KVM says about an internal error.
//!
//! kvm-ioctls gives no more than the name of such an exit; the rest is read from the shared record.
//! Called on the vCPU's thread, after the `KVM_RUN` that failed.

#![expect(unsafe_code, reason = "the record of an exit is a union")]

use std::fmt::Write;

use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_DELIVERY_EV,
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, kvm_run,
};
use kvm_ioctls::VcpuFd;

/// The data words begin with flags, then instruction bytes (`linux/kvm.h`).
const HAS_INSTRUCTION_BYTES: u64 = 1;
/// Flags, then 16 bytes: that many data words are needed.
const WORDS_WITH_INSTRUCTION: u32 = 3;

/// Describe the vCPU and, if that was the exit, KVM's internal error. Never fails: what can't be
/// read is left out.
pub fn describe_failure(vcpu: &mut VcpuFd) -> String {
    let mut text = String::new();
    if let Ok(registers) = vcpu.get_regs() {
        append(&mut text, format_args!("rip={:#x}", registers.rip));
    }
    if let Ok(special) = vcpu.get_sregs() {
        append(
            &mut text,
            format_args!(
                "cs={:#x} cr0={:#x} cr3={:#x} cr4={:#x} efer={:#x}",
                special.cs.base, special.cr0, special.cr3, special.cr4, special.efer
            ),
        );
    }
    describe_exit(vcpu.get_kvm_run(), &mut text);
    text
}

fn append(text: &mut String, part: std::fmt::Arguments<'_>) {
    if !text.is_empty() {
        text.push(' ');
    }
    // Writing to a string does not fail.
    let _result = text.write_fmt(part);
}

fn describe_exit(run: &kvm_run, text: &mut String) {
    match run.exit_reason {
        KVM_EXIT_INTERNAL_ERROR => describe_internal_error(run, text),
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: every member of this union is plain old data, and after this exit the kernel
            // has filled in this one.
            let reason = unsafe {
                run.__bindgen_anon_1
                    .fail_entry
                    .hardware_entry_failure_reason
            };
            append(text, format_args!("hardware-reason={reason:#x}"));
        }
        _ => {}
    }
}

fn describe_internal_error(run: &kvm_run, text: &mut String) {
    // SAFETY: every member of this union is plain old data, and after this exit the kernel has
    // filled in this one.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let name = match internal.suberror {
        KVM_INTERNAL_ERROR_EMULATION => " (instruction emulation failed)",
        KVM_INTERNAL_ERROR_SIMUL_EX => " (simultaneous exceptions)",
        KVM_INTERNAL_ERROR_DELIVERY_EV => " (event delivery failed)",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => " (unexpected exit reason)",
        _ => "",
    };
    append(
        text,
        format_args!(
            "suberror={}{name} ndata={}",
            internal.suberror, internal.ndata
        ),
    );
    let [flags, first, second, ..] = internal.data;
    let is_emulation = internal.suberror == KVM_INTERNAL_ERROR_EMULATION;
    if is_emulation
        && internal.ndata >= WORDS_WITH_INSTRUCTION
        && flags & HAS_INSTRUCTION_BYTES != 0
    {
        let bytes = [first.to_le_bytes(), second.to_le_bytes()].concat();
        let (size, instruction) = bytes.split_first().unwrap_or((&0, &[]));
        let hex: Vec<String> = instruction
            .iter()
            .take(usize::from(*size))
            .map(|byte| format!("{byte:02x}"))
            .collect();
        append(text, format_args!("instruction={}", hex.join(":")));
    } else {
        let words = usize::try_from(internal.ndata).unwrap_or(usize::MAX);
        for word in internal.data.iter().take(words) {
            append(text, format_args!("{word:#x}"));
        }
    }
}

#[cfg(test)]
#[path = "failure_tests.rs"]
mod tests;
