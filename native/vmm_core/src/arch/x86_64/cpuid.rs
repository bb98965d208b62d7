//! What a vCPU says it is: KVM's supported features, less what a light guest must not see, with the
//! topology of this machine: one package, one core per vCPU, one thread per core.
//!
//! Both vendors' leaves are written, each only where the processor has it, so that Linux's Intel
//! path (4, 0xb, 0x1f) and AMD path (0x80000008, 0x8000001d, 0x8000001e) come to the same answer.
//! A pure function of its arguments.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::vcpu::VcpuError;

/// Leaf 1, ECX.
const PERFORMANCE_CAPABILITIES: u32 = 1 << 15;
const VMX: u32 = 1 << 5;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX.
const HYPER_THREADING: u32 = 1 << 28;
/// Leaf 1, EBX: the cache line that CLFLUSH flushes, in units of 8 bytes.
const CLFLUSH_LINE: u32 = 8;
/// Leaf 6, EAX: the local APIC's timer runs in every sleep state.
const ALWAYS_RUNNING_APIC_TIMER: u32 = 1 << 2;
/// Leaf 0, EBX: the first four letters of vendors that number cores in leaf 0x80000008.
const VENDOR_AMD: u32 = u32::from_le_bytes(*b"Auth");
const VENDOR_HYGON: u32 = u32::from_le_bytes(*b"Hygo");
/// Leaf 0x80000001, ECX.
const LEGACY_MULTICORE: u32 = 1 << 1;
const SVM: u32 = 1 << 2;
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
const CORE_COUNTERS: u32 = 1 << 23;
const NORTHBRIDGE_COUNTERS: u32 = 1 << 24;
/// Leaves 0xb and 0x1f, ECX 15:8.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// Leaf 4's and 0x8000001d's cache level from which on all vCPUs share it.
const SHARED_CACHE_LEVEL: u32 = 3;

/// Which vCPU of how many.
#[derive(Clone, Copy, Debug)]
pub(super) struct CpuidRequest {
    /// Number of the vCPU, which is its APIC id.
    pub(super) vcpu_index: u8,
    /// All vCPUs of the machine.
    pub(super) vcpu_count: u8,
    /// KVM emulates the local APIC's deadline timer.
    pub(super) has_tsc_deadline_timer: bool,
}

impl CpuidRequest {
    fn apic_id(self) -> u32 {
        self.vcpu_index.into()
    }

    fn count(self) -> u32 {
        self.vcpu_count.max(1).into()
    }

    /// Bits of an APIC id.
    fn id_bits(self) -> u32 {
        self.count().next_power_of_two().trailing_zeros()
    }

    /// Size of the APIC id space.
    fn id_space(self) -> u32 {
        1 << self.id_bits()
    }
}

/// The leaves of one vCPU, from those that KVM supports on this host.
pub(super) fn cpuid_for(supported: &CpuId, request: CpuidRequest) -> Result<CpuId, VcpuError> {
    let supported = supported.as_slice();
    let max_of = |function| {
        let leaf = supported.iter().find(|entry| entry.function == function);
        leaf.map_or(0, |entry| entry.eax)
    };
    let (max_basic, max_extended) = (max_of(0), max_of(0x8000_0000));
    let is_amd = supported
        .iter()
        .any(|entry| entry.function == 0 && matches!(entry.ebx, VENDOR_AMD | VENDOR_HYGON));
    let has_topology_extensions = supported
        .iter()
        .any(|entry| entry.function == 0x8000_0001 && entry.ecx & TOPOLOGY_EXTENSIONS != 0);

    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .iter()
        .filter(|entry| !is_rewritten(entry.function))
        .copied()
        .collect();
    for entry in &mut entries {
        adapt(entry, request, is_amd);
    }
    for function in [0xb, 0x1f] {
        if function <= max_basic {
            entries.extend(extended_topology(function, request));
        }
    }
    if has_topology_extensions && 0x8000_001e <= max_extended {
        // One thread per core, one node: only the ids are not zero.
        entries.push(kvm_cpuid_entry2 {
            function: 0x8000_001e,
            eax: request.apic_id(),
            ebx: request.apic_id(),
            ..kvm_cpuid_entry2::default()
        });
    }
    let count = entries.len();
    CpuId::from_entries(&entries).map_err(|_| VcpuError::TooManyEntries {
        what: "CPUID leaves",
        count,
    })
}

/// Leaves that are made anew, or left out: 0x80000026 repeats the host's topology.
fn is_rewritten(function: u32) -> bool {
    matches!(function, 0xb | 0x1f | 0x8000_001e | 0x8000_0026)
}

fn adapt(entry: &mut kvm_cpuid_entry2, request: CpuidRequest, is_amd: bool) {
    match entry.function {
        0x1 => {
            entry.ebx = entry.ebx & 0xff
                | CLFLUSH_LINE << 8
                | request.id_space().min(0xff) << 16
                | request.apic_id() << 24;
            // No counters, and no guests in the guest: nested state could not be saved.
            entry.ecx &= !(PERFORMANCE_CAPABILITIES | VMX | TSC_DEADLINE);
            entry.ecx |= HYPERVISOR;
            set(&mut entry.ecx, TSC_DEADLINE, request.has_tsc_deadline_timer);
            set(&mut entry.edx, HYPER_THREADING, request.count() > 1);
        }
        0x4 if entry.eax & 0x1f != 0 => {
            let cores = (request.id_space() - 1).min(0x3f);
            entry.eax = entry.eax & 0x3fff | sharing(entry.eax, request) << 14 | cores << 26;
        }
        // Frequency and power are the host's.
        0x6 => {
            entry.eax &= ALWAYS_RUNNING_APIC_TIMER;
            (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0);
        }
        0xa | 0x8000_000a | 0x8000_0022 => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        0x8000_0001 => {
            entry.ecx &= !(SVM | CORE_COUNTERS | NORTHBRIDGE_COUNTERS);
            let is_multicore = is_amd && request.count() > 1;
            set(&mut entry.ecx, LEGACY_MULTICORE, is_multicore);
        }
        0x8000_0008 if is_amd => {
            entry.ecx = entry.ecx & !0xf0ff | (request.count() - 1) | request.id_bits() << 12;
        }
        0x8000_001d if entry.eax & 0x1f != 0 => {
            entry.eax = entry.eax & 0x3fff | sharing(entry.eax, request) << 14;
        }
        _ => {}
    }
}

fn set(register: &mut u32, bit: u32, is_set: bool) {
    if is_set {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

/// One less than the ids that share the cache in `eax` of leaf 4 or 0x8000001d.
fn sharing(eax: u32, request: CpuidRequest) -> u32 {
    match eax >> 5 & 7 {
        SHARED_CACHE_LEVEL.. => request.id_space() - 1,
        _ => 0,
    }
}

/// Leaf 0xb or 0x1f: threads of a core, cores of the package, end of list.
fn extended_topology(function: u32, request: CpuidRequest) -> [kvm_cpuid_entry2; 3] {
    let level = |index, shift, count, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | kind << 8,
        edx: request.apic_id(),
        ..kvm_cpuid_entry2::default()
    };
    [
        level(0, 0, 1, LEVEL_THREAD),
        level(1, request.id_bits(), request.count(), LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
#[path = "cpuid_tests.rs"]
mod tests;
