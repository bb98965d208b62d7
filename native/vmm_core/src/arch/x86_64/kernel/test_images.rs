//! Kernel images for tests, made field by field, and the files and memory they go through.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::arch::boot_file::BootFile;

/// Where the synthetic kernels begin.
pub(crate) const KERNEL_START: u64 = 0x100_0000;
const PROGRAM_HEADERS: u8 = 64;
const PROGRAM_HEADER_SIZE: u8 = 56;

/// Memory of `size_mib`, in one piece from address 0. Untouched pages cost nothing.
pub(crate) fn memory(size_mib: usize) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size_mib << 20)]).unwrap()
}

/// A file with `bytes`, called `name` in messages.
pub(crate) fn file(name: &str, bytes: &[u8]) -> BootFile {
    let mut file = File::from(memfd_create(name, MemfdFlags::CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    BootFile::new(file, PathBuf::from(name)).unwrap()
}

/// A part of an ELF file.
pub(crate) struct Part {
    pub(crate) kind: u32,
    pub(crate) address: u64,
    pub(crate) bytes: Vec<u8>,
    pub(crate) memory_size: u64,
}

impl Part {
    /// Loadable, with `bytes` and some zeroed memory after them.
    pub(crate) fn load(address: u64, bytes: &[u8], memory_size: u64) -> Self {
        Self {
            kind: 1,
            address,
            bytes: bytes.to_vec(),
            memory_size,
        }
    }

    /// Notes.
    pub(crate) fn notes(bytes: Vec<u8>) -> Self {
        Self {
            kind: 4,
            address: 0,
            memory_size: bytes.len() as u64,
            bytes,
        }
    }
}

/// An ELF note, padded.
pub(crate) fn note(owner: &[u8], kind: u32, descriptor: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let size = |part: &[u8]| u32::try_from(part.len()).unwrap();
    for word in [size(owner), size(descriptor), kind] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    for part in [owner, descriptor] {
        bytes.extend_from_slice(part);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// Notes as Linux has them: another one of Xen's first, then the PVH entry in eight bytes.
pub(crate) fn pvh_notes(entry: u64) -> Part {
    let mut bytes = note(b"Linux\0", 257, &[0]);
    bytes.extend(note(b"Xen\0", 6, b"linux\0"));
    bytes.extend(note(b"Xen\0", 18, &entry.to_le_bytes()));
    Part::notes(bytes)
}

/// An x86-64 ELF file.
pub(crate) fn elf(entry: u64, parts: &[Part]) -> Vec<u8> {
    let count = u8::try_from(parts.len()).unwrap();
    let mut bytes = vec![0; PROGRAM_HEADERS.into()];
    bytes[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\x00");
    bytes[16..18].copy_from_slice(&2u16.to_le_bytes());
    bytes[18..20].copy_from_slice(&62u16.to_le_bytes());
    bytes[24..32].copy_from_slice(&entry.to_le_bytes());
    (bytes[32], bytes[54], bytes[56]) = (PROGRAM_HEADERS, PROGRAM_HEADER_SIZE, count);
    let mut offset = u64::from(PROGRAM_HEADERS) + u64::from(count) * u64::from(PROGRAM_HEADER_SIZE);
    for part in parts {
        bytes.extend_from_slice(&part.kind.to_le_bytes());
        bytes.extend_from_slice(&7u32.to_le_bytes());
        let size = part.bytes.len() as u64;
        for value in [offset, 0, part.address, size, part.memory_size, 1] {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        offset += size;
    }
    for part in parts {
        bytes.extend_from_slice(&part.bytes);
    }
    bytes
}

/// A kernel with two segments, entered by PVH.
pub(crate) fn pvh_kernel() -> Vec<u8> {
    let parts = [
        Part::load(KERNEL_START, &[0x90; 64], 0x1000),
        Part::load(KERNEL_START + 0x20_0000, &[0xcc; 32], 0x10_0000),
        pvh_notes(KERNEL_START + 0x10),
    ];
    elf(KERNEL_START, &parts)
}

/// A bzImage: one setup sector after the first, `init_size` of 2 MiB.
pub(crate) fn bzimage() -> Vec<u8> {
    const PAYLOAD_SIZE: u32 = 0x1000;
    let mut bytes = vec![0; 1024];
    let mut put = |offset: usize, value: &[u8]| {
        bytes[offset..offset + value.len()].copy_from_slice(value);
    };
    put(0x1f1, &[1]);
    put(0x1f4, &(PAYLOAD_SIZE / 16).to_le_bytes());
    put(0x1fe, &[0x55, 0xaa]);
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &0x7fu16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &KERNEL_START.to_le_bytes());
    put(0x260, &(2u32 << 20).to_le_bytes());
    bytes.resize(bytes.len() + PAYLOAD_SIZE as usize, 0x90);
    bytes
}
