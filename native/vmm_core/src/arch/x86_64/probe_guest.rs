//! The probe's guest: long mode, identity-mapped, and a few instructions that every 64-bit
//! kernel executes but a KVM that emulates the guest's kernel mode has been seen to lack.
//!
//! Each step adds its own number to `r8d`; the guest leaves the sum at an I/O port. A step that
//! does nothing, or the wrong thing, changes the sum; one that KVM cannot run at all ends
//! `KVM_RUN` with another exit. Built and run by `probe.rs`, on its thread.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::layout;
use crate::kvm::KvmError;

/// Guest memory: everything below is inside of it.
pub(crate) const MEMORY_SIZE: usize = 0x1_0000;
/// Where the guest writes its sum, 32 bits at once.
pub(crate) const RESULT_PORT: u16 = 0x510;
/// What ran, for the report.
pub(crate) const INSTRUCTIONS: &str = "popcnt, cmpxchg16b, int3, iretq, xsave, xrstor";

const GDT: u64 = 0x500;
const IDT: u64 = 0x1000;
const PAGE_MAP_LEVEL_4: u64 = 0x2000;
const PAGE_DIRECTORY_POINTERS: u64 = 0x3000;
const PAGE_DIRECTORY: u64 = 0x4000;
const STACK_TOP: u64 = 0x8000;
const CODE: u64 = 0x8000;
/// Page-table bits: present, writable; with page size, a leaf of 2 MiB.
const TABLE_FLAGS: u64 = 0x3;
const LEAF_FLAGS: u64 = 0x83;

const BREAKPOINT_VECTOR: u64 = 3;
const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;

const CR0_PROTECTED: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXSAVE: u64 = 1 << 18;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;

/// CPUID leaf 1, ECX.
const CPUID_CMPXCHG16B: u32 = 1 << 13;
const CPUID_POPCNT: u32 = 1 << 23;
const CPUID_XSAVE: u32 = 1 << 26;

const PROLOGUE: &[u8] = &[0x45, 0x31, 0xc0]; // xor r8d, r8d
const POPCNT: &[u8] = &[
    0xb8, 0xf0, 0xf0, 0xf0, 0xf0, // mov eax, 0xf0f0f0f0
    0xf3, 0x0f, 0xb8, 0xc8, // popcnt ecx, eax
    0x41, 0x01, 0xc8, // add r8d, ecx
];
const POPCNT_SUM: u32 = 16;
const CMPXCHG16B: &[u8] = &[
    0xbf, 0x00, 0x9f, 0x00, 0x00, // mov edi, 0x9f00
    0x31, 0xc0, // xor eax, eax
    0x31, 0xd2, // xor edx, edx
    0xbb, 0x00, 0x01, 0x00, 0x00, // mov ebx, 0x100
    0x31, 0xc9, // xor ecx, ecx
    0xf0, 0x48, 0x0f, 0xc7, 0x0f, // lock cmpxchg16b [rdi]
    0x4c, 0x03, 0x07, // add r8, [rdi]
];
const CMPXCHG16B_SUM: u32 = 0x100;
const INT3: &[u8] = &[0xcc]; // int3: the handler adds 0x1000
const INT3_SUM: u32 = 0x1000;
const XSAVE: &[u8] = &[
    0xbf, 0x00, 0x90, 0x00, 0x00, // mov edi, 0x9000
    0xb8, 0x03, 0x00, 0x00, 0x00, // mov eax, 3 (x87 and SSE)
    0x31, 0xd2, // xor edx, edx
    0x0f, 0xae, 0x27, // xsave [rdi]
    0x0f, 0xae, 0x2f, // xrstor [rdi]
    0x41, 0x81, 0xc0, 0x00, 0x00, 0x01, 0x00, // add r8d, 0x10000
];
const XSAVE_SUM: u32 = 0x1_0000;
const EPILOGUE: &[u8] = &[
    0x44, 0x89, 0xc0, // mov eax, r8d
    0xba, 0x10, 0x05, 0x00, 0x00, // mov edx, RESULT_PORT
    0xef, // out dx, eax
    0xf4, // hlt
];
const BREAKPOINT_HANDLER: &[u8] = &[
    0x41, 0x81, 0xc0, 0x00, 0x10, 0x00, 0x00, // add r8d, 0x1000
    0x48, 0xcf, // iretq
];

/// A guest ready to run.
pub(crate) struct ProbeGuest {
    /// The processor; run it until it writes to [`RESULT_PORT`].
    pub(crate) vcpu: VcpuFd,
    /// The sum a real processor arrives at.
    pub(crate) expected: u32,
}

/// Give `vm` a processor and put the guest into `memory`, which is mapped at address 0.
pub(crate) fn build(
    kvm: &Kvm,
    vm: &VmFd,
    memory: &GuestMemoryMmap,
) -> Result<ProbeGuest, KvmError> {
    // Before the first vCPU, and in this order (KVM API documentation, 4.93 and 4.36).
    vm.set_identity_map_address(layout::IDENTITY_MAP_ADDRESS)
        .map_err(KvmError::call("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(layout::TSS_ADDRESS)
        .map_err(KvmError::call("KVM_SET_TSS_ADDR"))?;
    let vcpu = vm
        .create_vcpu(0)
        .map_err(KvmError::call("KVM_CREATE_VCPU"))?;
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::call("KVM_GET_SUPPORTED_CPUID"))?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(KvmError::call("KVM_SET_CPUID2"))?;
    let features = cpuid
        .as_slice()
        .iter()
        .find(|entry| entry.function == 1)
        .map_or(0, |entry| entry.ecx);

    let (code, expected) = assemble(features);
    write_memory(memory, &code).map_err(KvmError::Memory)?;
    set_registers(&vcpu, features & CPUID_XSAVE != 0)?;
    Ok(ProbeGuest { vcpu, expected })
}

/// The steps this processor has, and their sum.
fn assemble(features: u32) -> (Vec<u8>, u32) {
    let mut code = PROLOGUE.to_vec();
    let mut expected = 0;
    let steps = [
        (CPUID_POPCNT, POPCNT, POPCNT_SUM),
        (CPUID_CMPXCHG16B, CMPXCHG16B, CMPXCHG16B_SUM),
        (0, INT3, INT3_SUM),
        (CPUID_XSAVE, XSAVE, XSAVE_SUM),
    ];
    for (needed, bytes, sum) in steps {
        if features & needed == needed {
            code.extend_from_slice(bytes);
            expected += sum;
        }
    }
    code.extend_from_slice(EPILOGUE);
    (code, expected)
}

fn write_memory(memory: &GuestMemoryMmap, code: &[u8]) -> Result<(), vm_memory::GuestMemoryError> {
    let put = |value: u64, at: u64| memory.write_obj(value, GuestAddress(at));
    // 64-bit code, flat data: present, ring 0, 4 GiB.
    put(0x00af_9b00_0000_ffff, GDT + u64::from(CODE_SELECTOR))?;
    put(0x00cf_9300_0000_ffff, GDT + u64::from(DATA_SELECTOR))?;
    put(PAGE_DIRECTORY_POINTERS | TABLE_FLAGS, PAGE_MAP_LEVEL_4)?;
    put(PAGE_DIRECTORY | TABLE_FLAGS, PAGE_DIRECTORY_POINTERS)?;
    put(LEAF_FLAGS, PAGE_DIRECTORY)?;
    memory.write_slice(code, GuestAddress(CODE))?;
    let handler = CODE + code.len() as u64;
    memory.write_slice(BREAKPOINT_HANDLER, GuestAddress(handler))?;
    // An interrupt gate: offset 15..0, selector, present | 64-bit interrupt gate, offset 31..16.
    let gate = handler & 0xffff
        | u64::from(CODE_SELECTOR) << 16
        | 0x8e00 << 32
        | (handler >> 16 & 0xffff) << 48;
    put(gate, IDT + BREAKPOINT_VECTOR * 16)?;
    put(0, IDT + BREAKPOINT_VECTOR * 16 + 8)
}

fn set_registers(vcpu: &VcpuFd, has_xsave: bool) -> Result<(), KvmError> {
    // Read and modify: types of the task register and the APIC base must stay as KVM made them.
    let mut special = vcpu.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))?;
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: CODE_SELECTOR,
        type_: 0xb,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment {
        selector: DATA_SELECTOR,
        type_: 0x3,
        db: 1,
        l: 0,
        ..code
    };
    special.cs = code;
    (special.ds, special.es, special.ss) = (data, data, data);
    (special.fs, special.gs) = (data, data);
    special.gdt.base = GDT;
    special.gdt.limit = 23;
    special.idt.base = IDT;
    special.idt.limit = 16 * 4 - 1;
    special.cr0 |= CR0_PROTECTED | CR0_PAGING;
    special.cr3 = PAGE_MAP_LEVEL_4;
    special.cr4 |= CR4_PAE | CR4_OSFXSR | if has_xsave { CR4_OSXSAVE } else { 0 };
    special.efer |= EFER_LONG_MODE;
    vcpu.set_sregs(&special)
        .map_err(KvmError::call("KVM_SET_SREGS"))?;
    let general = kvm_regs {
        rip: CODE,
        rsp: STACK_TOP,
        // Bit 1 is always set (Intel SDM, volume 1, 3.4.3).
        rflags: 2,
        ..kvm_regs::default()
    };
    vcpu.set_regs(&general)
        .map_err(KvmError::call("KVM_SET_REGS"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_adds_its_step() {
        let all = CPUID_POPCNT | CPUID_CMPXCHG16B | CPUID_XSAVE;
        let (code, expected) = assemble(all);
        assert_eq!(expected, 0x1_1110);
        assert_eq!(code.len(), 0x4b);
        assert_eq!(assemble(0).1, INT3_SUM);
    }

    #[test]
    fn the_guest_fits_into_its_memory() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).unwrap();
        let (code, _) = assemble(u32::MAX);
        write_memory(&memory, &code).unwrap();
        let gate: u64 = memory.read_obj(GuestAddress(IDT + 48)).unwrap();
        let handler: u8 = memory.read_obj(GuestAddress(gate & 0xffff)).unwrap();
        assert_eq!(handler, BREAKPOINT_HANDLER[0]);
    }
}
