//! Kernel images of any content, with and without an initrd, into a small machine's memory.
//!
//! Images are configuration, not a guest's; yet a broken download must give an error, and a kernel
//! that is accepted must lie inside of memory and beside the initrd. The first byte of the input
//! chooses the initrd's size, the rest is the kernel.

#![no_main]

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_core::boot::{BootFile, BootSource, load};

const MEMORY_SIZE: u64 = 32 << 20;
const PAGE: u64 = 0x1000;

fn file(bytes: &[u8]) -> BootFile {
    let mut file = File::from(memfd_create("image", MemfdFlags::CLOEXEC).expect("a descriptor"));
    file.write_all(bytes).expect("memory");
    BootFile::new(file, PathBuf::from("image")).expect("a regular file")
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, kernel)) = data.split_first() else {
        return;
    };
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_SIZE as usize)])
        .expect("address space");
    let initrd_size = usize::from(*choice) * 0x1234;
    let initrd = (initrd_size > 0).then(|| file(&vec![0xa5; initrd_size]));
    let result = load(
        &memory,
        &BootSource {
            kernel: &file(kernel),
            initrd: initrd.as_ref(),
            command_line: "console=ttyS0 panic=1",
        },
    );
    let Ok(entry) = result else {
        return;
    };
    assert!(entry.address.0 >= 0x10_0000 && entry.address.0 < MEMORY_SIZE);
    if initrd_size > 0 {
        // As high as the kernel lets it: whole, and on a page of its own.
        let pages = 0x10_0000 / PAGE..MEMORY_SIZE / PAGE;
        let is_start = |page: &u64| {
            let first: u8 = memory.read_obj(GuestAddress(page * PAGE)).expect("memory");
            let last = page * PAGE + initrd_size as u64 - 1;
            first == 0xa5 && memory.read_obj(GuestAddress(last)).ok() == Some(0xa5u8)
        };
        assert!(pages.rev().any(|page| is_start(&page)));
    }
});
