//! Images of both formats, good and bad, and the structures that are written for them.

use proptest::prelude::*;

use super::test_images::{
    KERNEL_START, Part, bzimage, elf, file, memory, note, pvh_kernel, pvh_notes,
};
use super::*;

const MEMORY_MIB: usize = 64;

fn load_bytes(bytes: &[u8]) -> Result<LoadedKernel, KernelError> {
    load(&memory(MEMORY_MIB), &file("kernel", bytes))
}

fn read<T: vm_memory::ByteValued>(memory: &GuestMemoryMmap, address: u64) -> T {
    memory.read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn a_vmlinux_with_xens_note_is_entered_by_pvh() {
    let memory = memory(MEMORY_MIB);
    let kernel = load(&memory, &file("kernel", &pvh_kernel())).unwrap();
    assert_eq!(
        kernel.entry,
        Entry {
            address: GuestAddress(KERNEL_START + 0x10),
            protocol: BootProtocol::Pvh
        }
    );
    assert_eq!(kernel.end, KERNEL_START + 0x30_0000);
    assert_eq!(kernel.initrd_limit, 64 << 20);
    assert_eq!(kernel.command_line_limit, 2047);
    assert_eq!(read::<[u8; 2]>(&memory, KERNEL_START + 62), [0x90; 2]);
    let second = KERNEL_START + 0x20_0000;
    assert_eq!(read::<[u8; 4]>(&memory, second + 30), [0xcc, 0xcc, 0, 0]);
}

#[test]
fn a_vmlinux_without_the_note_is_entered_in_long_mode() {
    let parts = [
        Part::load(KERNEL_START, &[0x90; 8], 8),
        Part::notes(note(b"GNU\0", 18, &[0; 8])),
    ];
    let kernel = load_bytes(&elf(KERNEL_START + 4, &parts)).unwrap();
    assert_eq!(
        kernel.entry,
        Entry {
            address: GuestAddress(KERNEL_START + 4),
            protocol: BootProtocol::Linux64
        }
    );
}

#[test]
fn a_bzimage_is_entered_in_long_mode_at_its_preferred_address() {
    let memory = memory(MEMORY_MIB);
    let kernel = load(&memory, &file("kernel", &bzimage())).unwrap();
    assert_eq!(
        kernel.entry,
        Entry {
            address: GuestAddress(KERNEL_START + 0x200),
            protocol: BootProtocol::Linux64
        }
    );
    // The room it unpacks to, which is more than its size.
    assert_eq!(kernel.end, KERNEL_START + 0x20_0000);
    assert_eq!(read::<u8>(&memory, KERNEL_START + 0xfff), 0x90);
    assert_eq!(read::<u8>(&memory, KERNEL_START + 0x1000), 0);
}

#[test]
fn a_bzimage_limits_the_initrd_and_the_command_line() {
    let mut image = bzimage();
    image[0x22c..0x230].copy_from_slice(&0x17f_ffffu32.to_le_bytes());
    image[0x238..0x23c].copy_from_slice(&255u32.to_le_bytes());
    let kernel = load_bytes(&image).unwrap();
    assert_eq!(kernel.initrd_limit, 0x180_0000);
    assert_eq!(kernel.command_line_limit, 255);
}

#[test]
fn what_is_no_kernel_is_said_to_be_none() {
    for bytes in [&b""[..], b"\x7fEL", b"#!/bin/sh\n", &vec![0; 0x10_0000]] {
        let error = load_bytes(bytes).unwrap_err();
        assert!(matches!(error, KernelError::UnknownFormat), "{error}");
    }
}

#[test]
fn a_cut_vmlinux_is_refused_at_every_length() {
    let image = pvh_kernel();
    for length in 4..image.len() {
        let error = load_bytes(&image[..length]).unwrap_err();
        assert!(
            matches!(error, KernelError::Truncated { needed, size }
                if needed > size && size == length as u64),
            "{length}: {error}"
        );
    }
}

#[test]
fn a_cut_bzimage_is_refused_at_every_length() {
    let image = bzimage();
    for length in (0x206..image.len() - 15).step_by(7) {
        let error = load_bytes(&image[..length]).unwrap_err();
        assert!(
            matches!(error, KernelError::Truncated { .. }),
            "{length}: {error}"
        );
    }
}

#[test]
fn kernels_for_other_processors_are_refused() {
    for (offset, value, field) in [
        (4, 1, "EI_CLASS"),
        (5, 2, "EI_DATA"),
        (18, 183, "e_machine"),
        (54, 32, "e_phentsize"),
        (56, 65, "e_phnum"),
    ] {
        let mut image = pvh_kernel();
        image[offset] = value;
        let error = load_bytes(&image).unwrap_err();
        assert!(
            matches!(error, KernelError::BadHeader { field: found, .. } if found == field),
            "{error}"
        );
    }
}

#[test]
fn a_32_bit_or_old_bzimage_is_refused() {
    for (offset, value) in [(0x236, 0x7e), (0x206, 0x0b)] {
        let mut image = bzimage();
        image[offset] = value;
        let error = load_bytes(&image).unwrap_err();
        assert!(matches!(error, KernelError::No64BitEntry { .. }), "{error}");
    }
    let mut image = bzimage();
    image[0x211] = 0;
    let error = load_bytes(&image).unwrap_err();
    assert!(matches!(error, KernelError::BadHeader { .. }), "{error}");
}

#[test]
fn a_kernel_larger_than_memory_says_how_much_it_needs() {
    let image = elf(
        KERNEL_START,
        &[Part::load(KERNEL_START, &[0x90; 8], 100 << 20)],
    );
    let error = load_bytes(&image).unwrap_err();
    assert!(
        matches!(
            error,
            KernelError::OutsideMemory {
                needed_mib: 116,
                available_mib: 64
            }
        ),
        "{error}"
    );
    let mut image = bzimage();
    image[0x260..0x264].copy_from_slice(&(100u32 << 20).to_le_bytes());
    let error = load_bytes(&image).unwrap_err();
    assert!(
        matches!(error, KernelError::OutsideMemory { .. }),
        "{error}"
    );
}

#[test]
fn a_kernel_never_covers_the_boot_structures_or_the_gap() {
    let image = elf(0x9000, &[Part::load(0x9000, &[0x90; 8], 8)]);
    let error = load_bytes(&image).unwrap_err();
    assert!(
        matches!(error, KernelError::InLowMemory { address: 0x9000 }),
        "{error}"
    );
    for address in [layout::GAP_START - 4, layout::GAP_END, u64::MAX - 4] {
        let image = elf(address, &[Part::load(address, &[0x90; 8], 8)]);
        let error = load_bytes(&image).unwrap_err();
        assert!(
            matches!(error, KernelError::OutsideMemory { .. }),
            "{error}"
        );
    }
}

#[test]
fn an_entry_outside_of_the_kernel_is_refused() {
    let parts = [Part::load(KERNEL_START, &[0x90; 8], 8)];
    for entry in [0, KERNEL_START - 1, KERNEL_START + 8, 0xffff_ffff_8100_0000] {
        let error = load_bytes(&elf(entry, &parts)).unwrap_err();
        assert!(
            matches!(error, KernelError::EntryOutside { address } if address == entry),
            "{error}"
        );
    }
    let parts = [
        Part::load(KERNEL_START, &[0x90; 8], 8),
        pvh_notes(KERNEL_START + 8),
    ];
    let error = load_bytes(&elf(KERNEL_START, &parts)).unwrap_err();
    assert!(matches!(error, KernelError::EntryOutside { .. }), "{error}");
}

#[test]
fn an_elf_file_without_loadable_parts_is_refused() {
    let error = load_bytes(&elf(KERNEL_START, &[pvh_notes(0)])).unwrap_err();
    assert!(matches!(error, KernelError::BadHeader { .. }), "{error}");
}

#[test]
fn a_broken_pvh_note_is_refused_and_a_cut_list_of_notes_ends() {
    let kernel = |notes| elf(KERNEL_START, &[Part::load(KERNEL_START, &[0x90], 8), notes]);
    for descriptor in [&[][..], &[0; 3], &[0, 0, 0, 1, 1, 0, 0, 0]] {
        let image = kernel(Part::notes(note(b"Xen\0", 18, descriptor)));
        let error = load_bytes(&image).unwrap_err();
        assert!(matches!(error, KernelError::BadHeader { .. }), "{error}");
    }
    let short = note(b"Xen\0", 18, &KERNEL_START.to_le_bytes()[..4]);
    let loaded = load_bytes(&kernel(Part::notes(short))).unwrap();
    assert_eq!(loaded.entry.protocol, BootProtocol::Pvh);
    let mut endless = note(b"GNU\0", 3, &[0; 4]);
    endless[0..4].copy_from_slice(&u32::MAX.to_le_bytes());
    let loaded = load_bytes(&kernel(Part::notes(endless))).unwrap();
    assert_eq!(loaded.entry.protocol, BootProtocol::Linux64);
}

#[test]
fn a_file_that_shrinks_after_it_was_opened_is_an_error() {
    use rustix::fs::ftruncate;
    let descriptor = rustix::fs::memfd_create("kernel", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let image = bzimage();
    rustix::io::write(&descriptor, &image).unwrap();
    let copy = std::fs::File::from(descriptor.try_clone().unwrap());
    let kernel = BootFile::new(copy, "kernel".into()).unwrap();
    ftruncate(&descriptor, 0x800).unwrap();
    let error = load(&memory(MEMORY_MIB), &kernel).unwrap_err();
    assert!(matches!(error, KernelError::Copy(_)), "{error}");
    ftruncate(&descriptor, 0).unwrap();
    let error = load(&memory(MEMORY_MIB), &kernel).unwrap_err();
    assert!(matches!(error, KernelError::Read(_)), "{error}");
}

#[test]
fn pvh_parameters_are_where_xen_says() {
    let memory = memory(MEMORY_MIB);
    let kernel = load(&memory, &file("kernel", &pvh_kernel())).unwrap();
    let initrd = LoadedInitrd {
        address: GuestAddress(0x300_0000),
        size_bytes: 0x1234,
    };
    write_parameters(&memory, &kernel, "console=ttyS0", Some(initrd)).unwrap();

    let info = layout::PVH_START_INFO.0;
    assert_eq!(read::<u32>(&memory, info), 0x336e_c578);
    assert_eq!(read::<u32>(&memory, info + 4), 1);
    assert_eq!(read::<u32>(&memory, info + 12), 1);
    let modules: u64 = read(&memory, info + 16);
    assert_eq!(read::<u64>(&memory, modules), 0x300_0000);
    assert_eq!(read::<u64>(&memory, modules + 8), 0x1234);
    let command_line: u64 = read(&memory, info + 24);
    assert_eq!(read::<[u8; 14]>(&memory, command_line), *b"console=ttyS0\0");
    assert_eq!(read::<u64>(&memory, info + 32), layout::RSDP.0);
    let map: u64 = read(&memory, info + 40);
    assert_eq!(read::<u32>(&memory, info + 48), 3);
    let entry = |index: u64| {
        let at = map + index * 24;
        let words: [u64; 2] = [read(&memory, at), read(&memory, at + 8)];
        (words[0], words[1], read::<u32>(&memory, at + 16))
    };
    assert_eq!(entry(0), (0, 0x9_fc00, 1));
    assert_eq!(entry(1), (0x9_fc00, 0x6_0400, 2));
    assert_eq!(entry(2), (0x10_0000, 0x3f0_0000, 1));
    // Null, 32-bit code, data, task.
    let gdt: [u64; 4] = [0, 8, 16, 24].map(|at| read(&memory, layout::GDT.0 + at));
    assert_eq!(
        gdt,
        [
            0,
            0x00cf_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x0000_8b00_0000_0067
        ]
    );
}

#[test]
fn without_an_initrd_there_are_no_modules() {
    let memory = memory(MEMORY_MIB);
    let kernel = load(&memory, &file("kernel", &pvh_kernel())).unwrap();
    write_parameters(&memory, &kernel, "", None).unwrap();
    assert_eq!(read::<u32>(&memory, layout::PVH_START_INFO.0 + 12), 0);
    assert_eq!(read::<u64>(&memory, layout::PVH_START_INFO.0 + 16), 0);
}

#[test]
fn linux_parameters_keep_the_images_header() {
    let memory = memory(MEMORY_MIB);
    let kernel = load(&memory, &file("kernel", &bzimage())).unwrap();
    let initrd = LoadedInitrd {
        address: GuestAddress(0x300_0000),
        size_bytes: 0x1234,
    };
    write_parameters(&memory, &kernel, "quiet", Some(initrd)).unwrap();

    let page = layout::BOOT_PARAMS.0;
    assert_eq!(read::<u64>(&memory, page + 0x70), layout::RSDP.0);
    assert_eq!(read::<u8>(&memory, page + 0x1e8), 3);
    assert_eq!(read::<u16>(&memory, page + 0x1fe), 0xaa55);
    assert_eq!(read::<[u8; 4]>(&memory, page + 0x202), *b"HdrS");
    assert_eq!(read::<u16>(&memory, page + 0x206), 0x20f);
    assert_eq!(read::<u8>(&memory, page + 0x210), 0xff);
    assert_eq!(read::<u32>(&memory, page + 0x214), 0x100_0000);
    assert_eq!(read::<u32>(&memory, page + 0x218), 0x300_0000);
    assert_eq!(read::<u32>(&memory, page + 0x21c), 0x1234);
    assert_eq!(read::<u32>(&memory, page + 0x228), 0x2_0000);
    assert_eq!(read::<u16>(&memory, page + 0x236), 0x7f);
    assert_eq!(read::<u32>(&memory, page + 0x260), 2 << 20);
    let last = page + 0x2d0 + 2 * 20;
    assert_eq!(read::<u64>(&memory, last), 0x10_0000);
    assert_eq!(read::<u64>(&memory, last + 8), 0x3f0_0000);
    assert_eq!(read::<u32>(&memory, last + 16), 1);
}

#[test]
fn long_mode_tables_map_four_gib_to_themselves() {
    let memory = memory(MEMORY_MIB);
    let kernel = load(&memory, &file("kernel", &bzimage())).unwrap();
    write_parameters(&memory, &kernel, "", None).unwrap();
    assert_eq!(
        read::<u64>(&memory, layout::GDT.0 + 8),
        0x00af_9b00_0000_ffff
    );
    let walk = |address: u64| {
        let pointers: u64 = read(&memory, layout::PAGE_MAP_LEVEL_4.0);
        assert_eq!(pointers & 0xfff, 3);
        let directory: u64 = read(&memory, (pointers & !0xfff) + (address >> 30) * 8);
        assert_eq!(directory & 0xfff, 3);
        let index = address >> 21 & 0x1ff;
        read::<u64>(&memory, (directory & !0xfff) + index * 8)
    };
    for address in [0, 0x100_0000, 0x3fff_ffff, 0x4000_0000, 0xffff_ffff] {
        assert_eq!(walk(address), address & !0x1f_ffff | 0x83);
    }
}

#[test]
fn a_map_around_the_gap_has_memory_on_both_sides() {
    // Half a page below the gap stands for the other 3 GiB.
    let ranges = [
        (GuestAddress(0), 2 << 20),
        (GuestAddress(layout::GAP_START - 0x1000), 0x1000),
        (GuestAddress(layout::GAP_END), 1 << 20),
    ];
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let map = memory_map::memory_map(&memory).unwrap();
    let map: Vec<_> = map
        .iter()
        .map(|entry| (entry.start, entry.size, entry.kind as u32))
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x6_0400, 2),
            (0x10_0000, 0x10_0000, 1),
            (layout::GAP_START - 0x1000, 0x1000, 1),
            (layout::GAP_END, 0x10_0000, 1),
        ]
    );
    assert_eq!(low_memory_end(&memory), 2 << 20);
}

#[test]
fn command_lines_that_the_kernel_would_cut_are_refused() {
    let memory = memory(MEMORY_MIB);
    let kernel = load(&memory, &file("kernel", &pvh_kernel())).unwrap();
    write_parameters(&memory, &kernel, &"x".repeat(2047), None).unwrap();
    let error = write_parameters(&memory, &kernel, &"x".repeat(2048), None).unwrap_err();
    assert!(
        matches!(
            error,
            KernelError::CommandLineTooLong {
                length: 2048,
                limit: 2047
            }
        ),
        "{error}"
    );
    let error = write_parameters(&memory, &kernel, "a\0b", None).unwrap_err();
    assert!(matches!(error, KernelError::CommandLineZero), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever the headers say: an error, or a kernel inside of memory and outside of ours.
    #[test]
    fn loading_mutated_headers_never_panics(
        is_elf in any::<bool>(),
        changes in prop::collection::vec((0usize..0x280, any::<u8>()), 1..12),
        length in prop::option::of(0usize..0x1800),
    ) {
        let mut image = if is_elf { pvh_kernel() } else { bzimage() };
        for (offset, value) in changes {
            if let Some(byte) = image.get_mut(offset) {
                *byte = value;
            }
        }
        image.truncate(length.unwrap_or(usize::MAX));
        let memory = memory(MEMORY_MIB);
        if let Ok(kernel) = load(&memory, &file("kernel", &image)) {
            prop_assert!(kernel.end <= 64 << 20);
            prop_assert!(kernel.initrd_limit <= 64 << 20);
            prop_assert!(kernel.entry.address.0 >= layout::HIGH_MEMORY_START);
            // Below 1 MiB nothing was written.
            let mut low = vec![0u8; 0x10_0000];
            memory.read_slice(&mut low, GuestAddress(0)).unwrap();
            prop_assert!(low.iter().all(|byte| *byte == 0));
            let _result = write_parameters(&memory, &kernel, "quiet", None);
        }
    }

    /// Likewise for whole words of the fields that addresses and sizes come from.
    #[test]
    fn loading_hostile_addresses_never_panics(
        which in 0usize..6,
        value in prop_oneof![
            any::<u64>(),
            Just(u64::MAX),
            Just(u64::MAX - 0xfff),
            0u64..0x1000,
            0u64..0x400_0000,
        ],
    ) {
        // Entry, program header offset; then offset, address, sizes of the first segment.
        let offset = [24, 32, 72, 88, 96, 104][which];
        let mut image = pvh_kernel();
        image[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
        if let Ok(kernel) = load_bytes(&image) {
            prop_assert!(kernel.end <= 64 << 20);
        }
    }
}
