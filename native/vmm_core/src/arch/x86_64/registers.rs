//! The boot processor's state at a kernel's entry, for both boot protocols.
//!
//! Special registers are read and modified, never made from nothing: types of the task and local
//! descriptor registers and the APIC base must stay as KVM made them, or the processor refuses to
//! enter the guest. Other vCPUs wait for the kernel's start-up interrupt and need none of this.

use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::kernel::{BootProtocol, Entry};
use super::layout;
use crate::kvm::KvmError;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
/// Bit 1 is always set (Intel SDM, volume 1, 3.4.3).
const RFLAGS_RESERVED: u64 = 2;

/// Reset values of the floating-point control word and of MXCSR.
const FPU_CONTROL_WORD: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;

/// Page-table bits: present, writable; with page size, a leaf of 2 MiB.
const TABLE_FLAGS: u64 = 0x3;
const LEAF_FLAGS: u64 = 0x83;
const PAGE_SIZE: u64 = 0x1000;
const LARGE_PAGE_SIZE: u64 = 2 << 20;
const ENTRIES_PER_TABLE: u64 = 512;
/// A table of level 2 maps 1 GiB; four of them reach every entry point and structure.
const MAPPED_GIB: u64 = 4;

/// Last byte of a table of four descriptors, and of one.
const GDT_LIMIT: u16 = 4 * 8 - 1;
const IDT_LIMIT: u16 = 8 - 1;
const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;
const TASK_SELECTOR: u16 = 0x18;
/// Segment types (Intel SDM, volume 3, 3.4.5.1 and 3.5): code that was executed, data that was
/// written, a busy task.
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_TASK: u8 = 0xb;

/// Floating-point state after reset, for every vCPU.
pub(super) fn set_fpu(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let fpu = kvm_fpu {
        fcw: FPU_CONTROL_WORD,
        mxcsr: MXCSR,
        ..kvm_fpu::default()
    };
    vcpu.set_fpu(&fpu).map_err(KvmError::call("KVM_SET_FPU"))
}

/// Point the boot processor at `entry`.
pub(super) fn set_entry(vcpu: &VcpuFd, entry: &Entry) -> Result<(), KvmError> {
    let mut special = vcpu.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))?;
    match entry.protocol {
        BootProtocol::Pvh => set_protected_mode(&mut special),
        BootProtocol::Linux64 => set_long_mode(&mut special),
    }
    vcpu.set_sregs(&special)
        .map_err(KvmError::call("KVM_SET_SREGS"))?;
    vcpu.set_regs(&general_registers(entry))
        .map_err(KvmError::call("KVM_SET_REGS"))
}

fn general_registers(entry: &Entry) -> kvm_regs {
    let registers = kvm_regs {
        rip: entry.address.0,
        rflags: RFLAGS_RESERVED,
        ..kvm_regs::default()
    };
    match entry.protocol {
        BootProtocol::Pvh => kvm_regs {
            rbx: layout::PVH_START_INFO.0,
            ..registers
        },
        BootProtocol::Linux64 => kvm_regs {
            rsi: layout::BOOT_PARAMS.0,
            rsp: layout::BOOT_STACK.0,
            rbp: layout::BOOT_STACK.0,
            ..registers
        },
    }
}

/// 32 bits, flat segments, no paging.
fn set_protected_mode(special: &mut kvm_sregs) {
    let code = kvm_segment {
        l: 0,
        db: 1,
        ..flat_code()
    };
    set_segments(special, code);
    special.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    special.cr4 = 0;
    special.efer = 0;
}

/// 64 bits, the first 4 GiB mapped to themselves.
fn set_long_mode(special: &mut kvm_sregs) {
    set_segments(special, flat_code());
    special.cr0 |= CR0_PROTECTED | CR0_PAGING;
    special.cr3 = layout::PAGE_MAP_LEVEL_4.0;
    special.cr4 |= CR4_PAE;
    special.efer |= EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE;
}

/// 64-bit code, 4 GiB from address 0.
fn flat_code() -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: CODE_SELECTOR,
        type_: TYPE_CODE,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    }
}

fn set_segments(special: &mut kvm_sregs, code: kvm_segment) {
    let data = kvm_segment {
        selector: DATA_SELECTOR,
        type_: TYPE_DATA,
        l: 0,
        db: 1,
        ..code
    };
    let task = kvm_segment {
        limit: 0x67,
        selector: TASK_SELECTOR,
        type_: TYPE_TASK,
        s: 0,
        l: 0,
        db: 0,
        g: 0,
        ..code
    };
    special.cs = code;
    (special.ds, special.es, special.ss) = (data, data, data);
    (special.fs, special.gs) = (data, data);
    special.tr = task;
    special.gdt = kvm_dtable {
        base: layout::GDT.0,
        limit: GDT_LIMIT,
        ..kvm_dtable::default()
    };
    // One empty entry: an exception before the kernel's own table is a triple fault, which ends
    // the guest.
    special.idt = kvm_dtable {
        base: layout::IDT.0,
        limit: IDT_LIMIT,
        ..kvm_dtable::default()
    };
}

/// The descriptor table, null first, at the selectors' places.
fn descriptors(code: kvm_segment, data: kvm_segment, task: kvm_segment) -> [u64; 4] {
    [0, descriptor(code), descriptor(data), descriptor(task)]
}

/// A segment as the eight bytes of its table entry (Intel SDM, volume 3, 3.4.5).
fn descriptor(segment: kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let flag = |value: u8, bit: u32| u64::from(value) << bit;
    limit & 0xffff
        | (segment.base & 0xff_ffff) << 16
        | flag(segment.type_, 40)
        | flag(segment.s, 44)
        | flag(segment.dpl, 45)
        | flag(segment.present, 47)
        | (limit >> 16 & 0xf) << 48
        | flag(segment.avl, 52)
        | flag(segment.l, 53)
        | flag(segment.db, 54)
        | flag(segment.g, 55)
        | (segment.base >> 24 & 0xff) << 56
}

/// Write descriptor table and page tables that [`set_entry`] makes the vCPU use.
pub(super) fn write_tables(
    memory: &GuestMemoryMmap,
    protocol: BootProtocol,
) -> Result<(), GuestMemoryError> {
    let mut special = kvm_sregs::default();
    match protocol {
        BootProtocol::Pvh => set_protected_mode(&mut special),
        BootProtocol::Linux64 => set_long_mode(&mut special),
    }
    let gdt = descriptors(special.cs, special.ds, special.tr);
    for (slot, entry) in (0..).zip(gdt) {
        memory.write_obj(entry, GuestAddress(layout::GDT.0 + slot * 8))?;
    }
    memory.write_obj(0u64, layout::IDT)?;
    match protocol {
        BootProtocol::Pvh => Ok(()),
        BootProtocol::Linux64 => write_page_tables(memory),
    }
}

fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let pointers = layout::PAGE_DIRECTORY_POINTERS;
    memory.write_obj(pointers.0 | TABLE_FLAGS, layout::PAGE_MAP_LEVEL_4)?;
    for gib in 0..MAPPED_GIB {
        let directory = layout::PAGE_DIRECTORIES.0 + gib * PAGE_SIZE;
        memory.write_obj(directory | TABLE_FLAGS, GuestAddress(pointers.0 + gib * 8))?;
        let mut entries = Vec::new();
        for entry in 0..ENTRIES_PER_TABLE {
            let address = (gib * ENTRIES_PER_TABLE + entry) * LARGE_PAGE_SIZE;
            entries.extend_from_slice(&(address | LEAF_FLAGS).to_le_bytes());
        }
        memory.write_slice(&entries, GuestAddress(directory))?;
    }
    Ok(())
}
