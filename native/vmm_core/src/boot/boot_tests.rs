//! Kernel and initrd side by side in memory, and what is said when they don't fit.

use std::error::Error;

use vm_memory::Bytes;

use super::*;
use crate::arch::kernel::test_images::{KERNEL_START, bzimage, file, memory, pvh_kernel};

fn boot(
    memory: &GuestMemoryMmap,
    kernel: &[u8],
    initrd: Option<&[u8]>,
) -> Result<Entry, BootError> {
    let kernel = file("vmlinux", kernel);
    let initrd = initrd.map(|bytes| file("initrd.img", bytes));
    load(
        memory,
        &BootSource {
            kernel: &kernel,
            initrd: initrd.as_ref(),
            command_line: "console=ttyS0",
        },
    )
}

#[test]
fn the_initrd_is_at_the_top_of_memory() {
    for kernel in [pvh_kernel(), bzimage()] {
        let memory = memory(64);
        boot(&memory, &kernel, Some(&[7; 0x1001])).unwrap();
        let start = (64 << 20) - 0x2000;
        let read = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!(read(start - 1), 0);
        assert_eq!(read(start), 7);
        assert_eq!(read(start + 0x1000), 7);
        assert_eq!(read(start + 0x1001), 0);
    }
}

#[test]
fn an_initrd_fits_exactly_or_not_at_all() {
    let kernel_end = 0x120_0000;
    let limit = 0x200_0000;
    let free = limit - kernel_end;
    assert_eq!(
        place_initrd(free, kernel_end, limit),
        Some(GuestAddress(kernel_end))
    );
    assert_eq!(place_initrd(free + 1, kernel_end, limit), None);
    assert_eq!(place_initrd(limit + 1, kernel_end, limit), None);
    assert_eq!(place_initrd(u64::MAX, kernel_end, limit), None);
    assert_eq!(
        place_initrd(1, kernel_end, 0xc000_0000),
        Some(GuestAddress(0xbfff_f000))
    );
    assert_eq!(place_initrd(1, limit, kernel_end), None);
}

#[test]
fn an_initrd_that_does_not_fit_says_what_to_raise() {
    let memory = memory(32);
    let error = boot(&memory, &bzimage(), Some(&vec![1; 15 << 20])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "initrd initrd.img of 15 MiB does not fit into 32 MiB of memory beside the kernel \
         (14 MiB free): raise default_memory"
    );
    boot(&memory, &bzimage(), Some(&vec![1; 14 << 20])).unwrap();
}

#[test]
fn an_empty_initrd_is_refused() {
    let error = boot(&memory(32), &bzimage(), Some(&[])).unwrap_err();
    assert!(matches!(error, BootError::EmptyInitrd { .. }), "{error}");
}

#[test]
fn errors_name_the_file_and_keep_their_cause() {
    let error = boot(&memory(32), b"garbage", None).unwrap_err();
    assert_eq!(error.to_string(), "load kernel vmlinux");
    let cause = error.source().unwrap().to_string();
    assert_eq!(
        cause,
        "it is not an ELF or bzImage file: name an x86-64 vmlinux or vmlinuz"
    );

    let error = open_kernel(Path::new("/nonexistent/vmlinux")).unwrap_err();
    assert!(
        error.to_string().contains("kernel /nonexistent/vmlinux"),
        "{error}"
    );
    assert!(error.source().is_some());
    let error = open_initrd(Path::new("/")).unwrap_err();
    assert!(error.to_string().contains("initrd /"), "{error}");
}

#[test]
fn a_machine_smaller_than_the_boot_structures_is_an_error() {
    let ranges = [(GuestAddress(0), 0x8000)];
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let error = boot(&memory, &pvh_kernel(), None).unwrap_err();
    assert!(matches!(error, BootError::Kernel { .. }), "{error}");
}

#[test]
fn the_entry_is_the_kernels() {
    let entry = boot(&memory(64), &pvh_kernel(), None).unwrap();
    assert_eq!(entry.address, GuestAddress(KERNEL_START + 0x10));
    assert_eq!(entry.protocol, BootProtocol::Pvh);
}
