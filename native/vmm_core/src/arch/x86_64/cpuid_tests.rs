//! Topology as Linux works it out, on both vendors, from hosts made up and from this one.

use super::*;

fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = registers;
    kvm_cpuid_entry2 {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
        ..kvm_cpuid_entry2::default()
    }
}

/// An Intel host of 16 threads, of which this is the tenth.
fn intel() -> CpuId {
    CpuId::from_entries(&[
        leaf(0, 0, [0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        leaf(1, 0, [0x806f8, 0x0910_0800, 0xfffa_3223, 0x1f8b_fbff]),
        leaf(4, 0, [0xfc00_4121, 0x2c0_003f, 0x3f, 0]),
        leaf(4, 2, [0xfc01_c143, 0x3c0_003f, 0x7ff, 0]),
        leaf(4, 3, [0xfc1f_c163, 0x380_003f, 0xffff, 4]),
        leaf(4, 4, [0, 0, 0, 0]),
        leaf(6, 0, [0x77, 2, 9, 1]),
        leaf(0xa, 0, [0x0730_0404, 0, 0, 0x603]),
        leaf(0xb, 0, [1, 2, 0x100, 9]),
        leaf(0xb, 1, [5, 32, 0x201, 9]),
        leaf(0x1f, 0, [1, 2, 0x100, 9]),
        leaf(
            0x4000_0000,
            0,
            [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d],
        ),
        leaf(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        leaf(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
        leaf(0x8000_0008, 0, [0x3934, 0, 0, 0]),
    ])
    .unwrap()
}

/// An AMD host with two threads per core.
fn amd() -> CpuId {
    CpuId::from_entries(&[
        leaf(0, 0, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        leaf(1, 0, [0xa0_0f11, 0x0210_0800, 0xfeda_3203, 0x178b_fbff]),
        leaf(0xb, 0, [1, 2, 0x100, 2]),
        leaf(0x8000_0000, 0, [0x8000_0026, 0, 0, 0]),
        leaf(0x8000_0001, 0, [0xa0_0f11, 0, 0x75c2_37ff, 0x2fd3_fbff]),
        leaf(0x8000_0008, 0, [0x3030, 0x111e_f657, 0x713f, 0x1_0007]),
        leaf(0x8000_000a, 0, [1, 0x8000, 0, 0x119b_9cff]),
        leaf(0x8000_001d, 0, [0x4121, 0x1c0_003f, 0x3f, 0]),
        leaf(0x8000_001d, 3, [0x3c163, 0x3c0_003f, 0x7fff, 1]),
        leaf(0x8000_001e, 0, [2, 0x101, 0x307, 0]),
        leaf(0x8000_0022, 0, [1, 6, 0, 0]),
        leaf(0x8000_0026, 0, [1, 2, 0x100, 2]),
    ])
    .unwrap()
}

fn request(vcpu_index: u8, vcpu_count: u8) -> CpuidRequest {
    CpuidRequest {
        vcpu_index,
        vcpu_count,
        has_tsc_deadline_timer: true,
    }
}

fn find(cpuid: &CpuId, function: u32, index: u32) -> [u32; 4] {
    let found: Vec<_> = cpuid
        .as_slice()
        .iter()
        .filter(|entry| entry.function == function && entry.index == index)
        .collect();
    assert_eq!(found.len(), 1, "{function:#x}.{index}");
    [found[0].eax, found[0].ebx, found[0].ecx, found[0].edx]
}

fn has(cpuid: &CpuId, function: u32) -> bool {
    cpuid
        .as_slice()
        .iter()
        .any(|entry| entry.function == function)
}

/// (vCPUs, bits of an APIC id).
const SIZES: [(u8, u32); 6] = [(1, 0), (2, 1), (3, 2), (8, 3), (9, 4), (254, 8)];

#[test]
fn every_vcpu_is_a_core_with_its_own_id() {
    for host in [intel(), amd()] {
        for (count, bits) in SIZES {
            for index in [0, count / 2, count - 1] {
                let cpuid = cpuid_for(&host, request(index, count)).unwrap();
                let (count, index) = (u32::from(count), u32::from(index));
                let [_, ebx, _, edx] = find(&cpuid, 1, 0);
                assert_eq!(ebx >> 24, index);
                assert_eq!(ebx >> 16 & 0xff, (1 << bits).min(0xff));
                assert_eq!(ebx >> 8 & 0xff, 8);
                assert_eq!(edx >> 28 & 1, u32::from(count > 1));
                assert_eq!(find(&cpuid, 0xb, 0), [0, 1, 0x100, index]);
                assert_eq!(find(&cpuid, 0xb, 1), [bits, count, 0x201, index]);
                assert_eq!(find(&cpuid, 0xb, 2), [0, 0, 2, index]);
            }
        }
    }
}

#[test]
fn levels_of_the_topology_are_told_apart_by_their_index() {
    let cpuid = cpuid_for(&amd(), request(0, 2)).unwrap();
    for entry in cpuid.as_slice().iter().filter(|leaf| leaf.function == 0xb) {
        assert_eq!(entry.flags, KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
    }
}

#[test]
fn intel_caches_are_per_core_up_to_the_third_level() {
    for (count, bits) in SIZES {
        let cpuid = cpuid_for(&intel(), request(0, count)).unwrap();
        let package = (1 << bits) - 1;
        let of = |index| find(&cpuid, 4, index)[0];
        for (index, sharing) in [(0, 0), (2, 0), (3, package)] {
            assert_eq!(of(index) >> 14 & 0xfff, sharing, "level of subleaf {index}");
            assert_eq!(of(index) >> 26, package.min(63));
        }
        assert_eq!(of(4), 0);
        // The kind, level and size stay the host's.
        assert_eq!(of(3) & 0x3fff, 0xc163 & 0x3fff);
        assert_eq!(find(&cpuid, 0x1f, 1), find(&cpuid, 0xb, 1));
        assert!(!has(&cpuid, 0x8000_001e));
        assert_eq!(find(&cpuid, 0x8000_0008, 0), [0x3934, 0, 0, 0]);
        assert_eq!(find(&cpuid, 0x8000_0001, 0)[2], 0x121);
    }
}

#[test]
fn amd_leaves_agree_with_the_common_ones() {
    for (count, bits) in SIZES {
        let index = count - 1;
        let cpuid = cpuid_for(&amd(), request(index, count)).unwrap();
        let [eax, _, ecx, _] = find(&cpuid, 0x8000_0008, 0);
        assert_eq!(eax, 0x3030);
        assert_eq!(ecx & 0xff, u32::from(count) - 1);
        assert_eq!(ecx >> 12 & 0xf, bits);
        let id = u32::from(index);
        assert_eq!(find(&cpuid, 0x8000_001e, 0), [id, id, 0, 0]);
        assert_eq!(find(&cpuid, 0x8000_001d, 0)[0] >> 14 & 0xfff, 0);
        assert_eq!(
            find(&cpuid, 0x8000_001d, 3)[0] >> 14 & 0xfff,
            (1 << bits) - 1
        );
        let legacy = find(&cpuid, 0x8000_0001, 0)[2] >> 1 & 1;
        assert_eq!(legacy, u32::from(count > 1));
        assert!(!has(&cpuid, 0x1f));
        assert!(!has(&cpuid, 0x8000_0026));
    }
}

#[test]
fn what_a_guest_must_not_see_is_gone() {
    let cpuid = cpuid_for(&intel(), request(0, 1)).unwrap();
    let ecx = find(&cpuid, 1, 0)[2];
    assert_eq!(ecx & (PERFORMANCE_CAPABILITIES | VMX), 0);
    assert_eq!(ecx & HYPERVISOR, HYPERVISOR);
    assert_eq!(find(&cpuid, 6, 0), [4, 0, 0, 0]);
    assert_eq!(find(&cpuid, 0xa, 0), [0; 4]);

    let cpuid = cpuid_for(&amd(), request(0, 1)).unwrap();
    let ecx = find(&cpuid, 0x8000_0001, 0)[2];
    assert_eq!(ecx & (SVM | CORE_COUNTERS | NORTHBRIDGE_COUNTERS), 0);
    assert_eq!(find(&cpuid, 0x8000_000a, 0), [0; 4]);
    assert_eq!(find(&cpuid, 0x8000_0022, 0), [0; 4]);
}

#[test]
fn kvms_own_leaves_stay() {
    let cpuid = cpuid_for(&intel(), request(1, 2)).unwrap();
    assert_eq!(find(&cpuid, 0x4000_0000, 0)[1], 0x4b4d_564b);
    assert_eq!(find(&cpuid, 0x4000_0001, 0)[0], 0x0100_7efb);
}

#[test]
fn the_deadline_timer_is_offered_only_if_kvm_has_it() {
    for has_tsc_deadline_timer in [false, true] {
        let request = CpuidRequest {
            has_tsc_deadline_timer,
            ..request(0, 1)
        };
        let cpuid = cpuid_for(&intel(), request).unwrap();
        let bit = find(&cpuid, 1, 0)[2] & TSC_DEADLINE;
        assert_eq!(bit != 0, has_tsc_deadline_timer);
    }
}

#[test]
fn a_host_that_says_little_is_no_reason_to_fail() {
    let empty = CpuId::from_entries(&[]).unwrap();
    assert!(
        cpuid_for(&empty, request(0, 1))
            .unwrap()
            .as_slice()
            .is_empty()
    );
    let full = CpuId::from_entries(&vec![leaf(7, 0, [0; 4]); 255]).unwrap();
    let mut entries = full.as_slice().to_vec();
    entries.push(leaf(0, 0, [0x1f, 0, 0, 0]));
    let error = cpuid_for(&CpuId::from_entries(&entries).unwrap(), request(0, 1)).unwrap_err();
    assert!(
        matches!(error, VcpuError::TooManyEntries { count: 262, .. }),
        "{error}"
    );
}
