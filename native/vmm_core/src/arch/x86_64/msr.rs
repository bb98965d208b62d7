//! Model-specific registers: those a kernel may count on at its entry, and all of them to and from
//! a saved state.
//!
//! `KVM_GET_MSRS` and `KVM_SET_MSRS` stop at the first register they can't handle and return how
//! many they did. Saving goes on after it; restoring compares it with what the vCPU has already.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::vcpu::VcpuError;
use crate::kvm::KvmError;

/// Numbers are those of Linux's `asm/msr-index.h`.
const TSC: u32 = 0x10;
const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;
const MISC_ENABLE: u32 = 0x1a0;
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const TSC_DEADLINE: u32 = 0x6e0;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SYSCALL_MASK: u32 = 0xc000_0084;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// Fast string operations.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs enabled, all memory write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Values at the entry of every vCPU.
const BOOT_VALUES: [(u32, u64); 11] = [
    (SYSENTER_CS, 0),
    (SYSENTER_ESP, 0),
    (SYSENTER_EIP, 0),
    (STAR, 0),
    (LSTAR, 0),
    (CSTAR, 0),
    (SYSCALL_MASK, 0),
    (KERNEL_GS_BASE, 0),
    (TSC, 0),
    (MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    (MTRR_DEFAULT_TYPE, MTRR_WRITE_BACK),
];

/// Set what a kernel may count on at its entry. CPUID must have been set.
pub(super) fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), VcpuError> {
    let entries = BOOT_VALUES.map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    });
    match set(vcpu, &entries)? {
        count if count == entries.len() => Ok(()),
        count => Err(refused(&entries, count)),
    }
}

/// All registers that can be read, the TSC deadline last.
pub(super) fn save_msrs(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, VcpuError> {
    let list = kvm
        .get_msr_index_list()
        .map_err(KvmError::call("KVM_GET_MSR_INDEX_LIST"))?;
    let wanted: Vec<kvm_msr_entry> = list
        .as_slice()
        .iter()
        .map(|index| kvm_msr_entry {
            index: *index,
            ..kvm_msr_entry::default()
        })
        .collect();
    let mut saved = Vec::with_capacity(wanted.len());
    let mut rest = &wanted[..];
    while !rest.is_empty() {
        let chunk = rest.len().min(KVM_MAX_MSR_ENTRIES);
        let (read, chunk_rest) = get(vcpu, &rest[..chunk])?;
        saved.extend_from_slice(&read);
        // What it stopped at is left out.
        let skipped = usize::from(chunk_rest > 0);
        rest = rest.get(read.len() + skipped..).unwrap_or_default();
    }
    order_deadline(&mut saved);
    Ok(saved)
}

/// Set saved registers. One that can't be written must have its value already.
pub(super) fn restore_msrs(vcpu: &VcpuFd, saved: &[kvm_msr_entry]) -> Result<(), VcpuError> {
    let mut rest = saved;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let done = set(vcpu, chunk)?;
        rest = rest.get(done..).unwrap_or_default();
        if done < chunk.len() {
            let (read, _) = get(vcpu, &chunk[done..=done])?;
            if read.first().map(|entry| entry.data) != Some(chunk[done].data) {
                return Err(refused(chunk, done));
            }
            rest = rest.get(1..).unwrap_or_default();
        }
    }
    Ok(())
}

/// Put the deadline after the counter it is compared with. A deadline that passed reads as 0 until
/// its interrupt is delivered; it is set to "now", so that the interrupt is not lost.
fn order_deadline(saved: &mut Vec<kvm_msr_entry>) {
    let value_of = |saved: &[kvm_msr_entry], index| {
        let entry = saved.iter().find(|entry| entry.index == index);
        entry.map(|entry| entry.data)
    };
    let Some(deadline) = value_of(saved, TSC_DEADLINE) else {
        return;
    };
    let now = value_of(saved, TSC).unwrap_or(0);
    saved.retain(|entry| entry.index != TSC_DEADLINE);
    saved.push(kvm_msr_entry {
        index: TSC_DEADLINE,
        data: if deadline == 0 { now } else { deadline },
        ..kvm_msr_entry::default()
    });
}

/// Read `entries`: those before the first that can't be read, and how many were not.
fn get(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(Vec<kvm_msr_entry>, usize), VcpuError> {
    let mut msrs = Msrs::from_entries(entries).map_err(|_| VcpuError::TooManyEntries {
        what: "MSRs",
        count: entries.len(),
    })?;
    let count = vcpu
        .get_msrs(&mut msrs)
        .map_err(KvmError::call("KVM_GET_MSRS"))?
        .min(entries.len());
    Ok((msrs.as_slice()[..count].to_vec(), entries.len() - count))
}

/// Write `entries`; gives how many before the first that can't be written.
fn set(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<usize, VcpuError> {
    let msrs = Msrs::from_entries(entries).map_err(|_| VcpuError::TooManyEntries {
        what: "MSRs",
        count: entries.len(),
    })?;
    let count = vcpu
        .set_msrs(&msrs)
        .map_err(KvmError::call("KVM_SET_MSRS"))?;
    Ok(count.min(entries.len()))
}

fn refused(entries: &[kvm_msr_entry], position: usize) -> VcpuError {
    let entry = entries.get(position).copied().unwrap_or_default();
    VcpuError::MsrRefused {
        index: entry.index,
        value: entry.data,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(values: &[(u32, u64)]) -> Vec<kvm_msr_entry> {
        let entry = |&(index, data)| kvm_msr_entry {
            index,
            data,
            ..kvm_msr_entry::default()
        };
        values.iter().map(entry).collect()
    }

    #[test]
    fn the_deadline_is_set_after_the_counter() {
        let mut saved = entries(&[(TSC_DEADLINE, 900), (STAR, 1), (TSC, 500)]);
        order_deadline(&mut saved);
        assert_eq!(
            saved,
            entries(&[(STAR, 1), (TSC, 500), (TSC_DEADLINE, 900)])
        );
    }

    #[test]
    fn a_deadline_that_passed_is_now() {
        let mut saved = entries(&[(TSC_DEADLINE, 0), (TSC, 500)]);
        order_deadline(&mut saved);
        assert_eq!(saved, entries(&[(TSC, 500), (TSC_DEADLINE, 500)]));
        let mut saved = entries(&[(TSC, 500)]);
        order_deadline(&mut saved);
        assert_eq!(saved, entries(&[(TSC, 500)]));
    }
}
