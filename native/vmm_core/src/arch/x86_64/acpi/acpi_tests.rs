//! Tables as a kernel finds them: from the root pointer, by addresses and checksums.

use super::*;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap()
}

fn nodes(count: u64) -> Vec<MmioNode> {
    layout::MMIO_GSIS
        .zip(0..count)
        .map(|(gsi, number)| MmioNode {
            address: layout::MMIO_DEVICES_START + number * layout::MMIO_DEVICE_SIZE,
            size: layout::MMIO_DEVICE_SIZE,
            gsi,
            is_hidden: false,
        })
        .collect()
}

fn bytes(memory: &GuestMemoryMmap, address: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    memory
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    bytes
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn word(table: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(table[offset..offset + 4].try_into().unwrap())
}

fn quad(table: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(table[offset..offset + 8].try_into().unwrap())
}

/// A whole table with a correct checksum, inside of the reserved area.
fn table(memory: &GuestMemoryMmap, address: u64, signature: [u8; 4]) -> Vec<u8> {
    let header = bytes(memory, address, 36);
    assert_eq!(header[..4], signature);
    let size = word(&header, 4);
    assert!(address + u64::from(size) <= layout::ACPI_TABLES_END.0);
    assert_eq!(address % TABLE_ALIGNMENT, 0);
    let table = bytes(memory, address, size as usize);
    assert_eq!(sum(&table), 0, "{signature:?}");
    table
}

/// FADT, MADT and DSDT.
fn tables(memory: &GuestMemoryMmap) -> [Vec<u8>; 3] {
    let root = bytes(memory, layout::RSDP.0, 36);
    assert_eq!(&root[..8], b"RSD PTR ");
    assert_eq!(root[15], 2);
    assert_eq!((sum(&root[..20]), sum(&root)), (0, 0));
    let xsdt = table(memory, quad(&root, 24), *b"XSDT");
    assert_eq!(xsdt.len(), 36 + 2 * 8);
    let fadt = table(memory, quad(&xsdt, 36), *b"FACP");
    let madt = table(memory, quad(&xsdt, 44), *b"APIC");
    let dsdt = table(memory, quad(&fadt, 140), *b"DSDT");
    [fadt, madt, dsdt]
}

#[test]
fn all_tables_are_reached_from_the_root_and_add_up() {
    for count in [0, 1, 19] {
        let memory = memory();
        let root = write_tables(&memory, 8, &nodes(count)).unwrap();
        assert_eq!(root, layout::RSDP);
        tables(&memory);
    }
}

#[test]
fn the_fadt_has_reset_and_sleep_and_no_other_hardware() {
    let memory = memory();
    write_tables(&memory, 1, &[]).unwrap();
    let [fadt, ..] = tables(&memory);
    assert_eq!(fadt.len(), 276);
    // Revision 6.5.
    assert_eq!((fadt[8], fadt[131]), (6, 5));
    // Write-back, no buttons, reset register, hardware-reduced.
    assert_eq!(word(&fadt, 112), 1 | 1 << 4 | 1 << 5 | 1 << 10 | 1 << 20);
    // Nothing to enable, no event, control or timer blocks.
    assert!(fadt[46..112 - 3].iter().all(|byte| *byte == 0));
    // No keyboard controller, no real-time clock.
    assert_eq!(fadt[109] & 1 << 1, 0);
    assert_ne!(fadt[109] & 1 << 5, 0);
    let register = |offset: usize| (fadt[offset], fadt[offset + 1], quad(&fadt, offset + 4));
    assert_eq!(register(116), (1, 8, 0x602));
    assert_eq!(fadt[128], 1);
    assert_eq!(register(244), (1, 8, 0x600));
    assert_eq!(register(256), (1, 8, 0x601));
}

#[test]
fn the_madt_has_an_ioapic_and_every_vcpu() {
    for count in [1, 2, 8, layout::MAX_VCPUS] {
        let memory = memory();
        write_tables(&memory, count, &[]).unwrap();
        let [_, madt, _] = tables(&memory);
        assert_eq!(word(&madt, 36), layout::LOCAL_APIC_ADDRESS);
        let ioapic = &madt[44..56];
        assert_eq!(&ioapic[..3], [1, 12, 0]);
        assert_eq!(word(ioapic, 4), layout::IOAPIC_ADDRESS);
        assert_eq!(word(ioapic, 8), 0);
        let vcpus: Vec<_> = madt[56..].chunks(8).collect();
        assert_eq!(vcpus.len(), usize::from(count));
        for (vcpu, id) in vcpus.iter().zip(0..count) {
            assert_eq!(*vcpu, [0, 8, id, id, 1, 0, 0, 0]);
        }
    }
}

#[test]
fn the_dsdt_names_every_device_and_how_to_switch_off() {
    let memory = memory();
    let nodes = nodes(19);
    write_tables(&memory, 1, &nodes).unwrap();
    let [.., dsdt] = tables(&memory);
    let contains = |bytes: &[u8]| dsdt.windows(bytes.len()).any(|window| window == bytes);
    assert!(contains(b"VR12") && !contains(b"VR13"));
    for node in &nodes {
        let mut registers = vec![0x86, 9, 0, 1];
        registers.extend_from_slice(&u32::try_from(node.address).unwrap().to_le_bytes());
        registers.extend_from_slice(&0x2000u32.to_le_bytes());
        // Consumer, edge, active high, exclusive; one line.
        registers.extend_from_slice(&[0x89, 6, 0, 0x03, 1]);
        registers.extend_from_slice(&node.gsi.to_le_bytes());
        assert!(contains(&registers), "{node:?}");
    }
    let off = [
        0x08, b'\\', b'_', b'S', b'5', b'_', 0x12, 7, 4, 0x0a, 5, 0, 0, 0,
    ];
    assert!(contains(&off), "{dsdt:x?}");
}

#[test]
fn a_hidden_device_has_a_status_and_is_below_the_container() {
    let memory = memory();
    let mut nodes = nodes(7);
    write_tables(&memory, 1, &nodes).unwrap();
    let [.., plain] = tables(&memory);
    let contains = |table: &[u8], bytes: &[u8]| table.windows(bytes.len()).any(|at| at == bytes);
    assert!(!contains(&plain, b"_STA") && !contains(&plain, b"ACPI0013"));
    nodes[6].is_hidden = true;
    write_tables(&memory, 1, &nodes).unwrap();
    let [.., dsdt] = tables(&memory);
    // If (S006) { Return (0x0f) } Return (0)
    let status = [
        b"_STA\0\xa0\x08S006\xa4\x0a\x0f".as_slice(),
        b"\xa4\x00".as_slice(),
    ]
    .concat();
    assert!(contains(&dsdt, &status), "{dsdt:x?}");
    let at = |bytes: &[u8]| {
        dsdt.windows(bytes.len())
            .position(|at| at == bytes)
            .unwrap()
    };
    assert!(at(b"VR05") < at(b"ACPI0004") && at(b"ACPI0013") < at(b"VR06"));
    // The register: ports 0x608 to 0x60b.
    assert!(contains(&dsdt, b"SLTR\x01\x0b\x08\x06\x0a\x04"));
    // Notify (\_SB.SLTS, 0)
    assert!(contains(&dsdt, b"_EVT\x09\x86\\\x2e_SB_SLTS\x00"));
    let too_many = vec![nodes[6]; 33];
    assert!(write_tables(&memory, 1, &too_many).is_err());
}

#[test]
fn devices_out_of_reach_or_too_many_are_errors() {
    let memory = memory();
    for (address, size) in [
        (layout::GAP_END, 0x1000),
        (layout::GAP_END - 0x800, 0x1000),
        (0, u64::MAX),
    ] {
        let node = MmioNode {
            address,
            size,
            gsi: 5,
            is_hidden: false,
        };
        let error = write_tables(&memory, 1, &[node]).unwrap_err();
        assert!(
            matches!(error, TablesError::DeviceTooHigh { .. }),
            "{error}"
        );
    }
    let error = write_tables(&memory, 1, &vec![nodes(1)[0]; 257]).unwrap_err();
    assert!(
        matches!(error, TablesError::TooManyDevices { count: 257 }),
        "{error}"
    );
    write_tables(&memory, 1, &vec![nodes(1)[0]; 256]).unwrap();
}

#[test]
fn memory_without_the_reserved_area_is_an_error() {
    let ranges = [(GuestAddress(0), 0xe_0000)];
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let error = write_tables(&memory, 1, &[]).unwrap_err();
    assert!(matches!(error, TablesError::Write { .. }), "{error}");
}
