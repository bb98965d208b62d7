//! ELF kernels (`vmlinux`): program headers, and Xen's note with the PVH entry point.
//!
//! Every header is read once and checked against the file's size and the guest's memory before
//! anything is copied, so a kernel that is cut off is never started. Called by [`super::load`].

use linux_loader::elf::{Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap};

use super::{BootProtocol, Entry, KernelError, LoadedKernel, check_range, low_memory_end};
use crate::arch::boot_file::BootFile;

/// ELF identification (System V ABI, chapter 4).
const MAGIC: [u8; 4] = *b"\x7fELF";
const IDENT_CLASS: usize = 4;
const CLASS_64: u8 = 2;
const IDENT_DATA: usize = 5;
const DATA_LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
/// Linux has five; this is for a file that is not a kernel.
const MAX_PROGRAM_HEADERS: u16 = 64;
/// Linux's notes are about 500 bytes.
const MAX_NOTES_SIZE: u64 = 0x1_0000;
/// Note type and owner of the PVH entry (Xen, `public/elfnote.h`).
const XEN_PHYS32_ENTRY: u32 = 18;
const XEN_OWNER: &[u8] = b"Xen\0";
/// Linux's `COMMAND_LINE_SIZE` on x86, without the final zero.
const COMMAND_LINE_LIMIT: usize = 2047;

/// Is this the beginning of an ELF file?
pub(super) fn has_magic(prefix: &[u8]) -> bool {
    prefix.starts_with(&MAGIC)
}

/// A loadable part that is inside of the file and of memory.
struct Segment {
    offset: u64,
    address: u64,
    file_size: usize,
    end: u64,
}

/// Read an ELF kernel.
pub(super) fn load(memory: &GuestMemoryMmap, file: &BootFile) -> Result<LoadedKernel, KernelError> {
    let header: Elf64_Ehdr = read(file, 0)?;
    check_header(&header)?;
    let mut segments = Vec::new();
    let mut pvh_entry = None;
    for index in 0..u64::from(header.e_phnum) {
        let offset = index * size_of::<Elf64_Phdr>() as u64;
        let program: Elf64_Phdr = read(file, header.e_phoff.saturating_add(offset))?;
        match program.p_type {
            PT_LOAD if program.p_memsz > 0 => segments.push(check_segment(memory, file, &program)?),
            PT_NOTE if pvh_entry.is_none() => pvh_entry = find_pvh_entry(file, &program)?,
            _ => {}
        }
    }
    let end = segments.iter().map(|segment| segment.end).max();
    let end = end.ok_or(KernelError::BadHeader {
        field: "the number of loadable segments",
        value: 0,
    })?;

    let (address, protocol) = match pvh_entry {
        Some(address) => (address, BootProtocol::Pvh),
        None => (header.e_entry, BootProtocol::Linux64),
    };
    let is_inside = |segment: &Segment| (segment.address..segment.end).contains(&address);
    if !segments.iter().any(is_inside) {
        return Err(KernelError::EntryOutside { address });
    }
    for segment in &segments {
        file.copy_to(
            memory,
            GuestAddress(segment.address),
            segment.offset,
            segment.file_size,
        )
        .map_err(KernelError::Copy)?;
    }
    Ok(LoadedKernel {
        entry: Entry {
            address: GuestAddress(address),
            protocol,
        },
        end,
        initrd_limit: low_memory_end(memory),
        command_line_limit: COMMAND_LINE_LIMIT,
        setup_header: None,
    })
}

fn check_header(header: &Elf64_Ehdr) -> Result<(), KernelError> {
    let entry_size = size_of::<Elf64_Phdr>() as u64;
    let check = |is_good: bool, field, value| {
        is_good
            .then_some(())
            .ok_or(KernelError::BadHeader { field, value })
    };
    let class = header.e_ident[IDENT_CLASS];
    check(class == CLASS_64, "EI_CLASS", class.into())?;
    let data = header.e_ident[IDENT_DATA];
    check(data == DATA_LITTLE_ENDIAN, "EI_DATA", data.into())?;
    let machine = header.e_machine;
    check(machine == MACHINE_X86_64, "e_machine", machine.into())?;
    let size = u64::from(header.e_phentsize);
    check(size == entry_size, "e_phentsize", size)?;
    let count = header.e_phnum;
    check(count <= MAX_PROGRAM_HEADERS, "e_phnum", count.into())
}

fn check_segment(
    memory: &GuestMemoryMmap,
    file: &BootFile,
    program: &Elf64_Phdr,
) -> Result<Segment, KernelError> {
    check_in_file(file, program.p_offset, program.p_filesz)?;
    let bad_size = KernelError::BadHeader {
        field: "p_filesz",
        value: program.p_filesz,
    };
    if program.p_filesz > program.p_memsz {
        return Err(bad_size);
    }
    let end = program.p_paddr.saturating_add(program.p_memsz);
    check_range(memory, program.p_paddr, end)?;
    Ok(Segment {
        offset: program.p_offset,
        address: program.p_paddr,
        file_size: usize::try_from(program.p_filesz).map_err(|_| bad_size)?,
        end,
    })
}

/// The entry point in Xen's note, if it is among the notes of `program`.
fn find_pvh_entry(file: &BootFile, program: &Elf64_Phdr) -> Result<Option<u64>, KernelError> {
    check_in_file(file, program.p_offset, program.p_filesz)?;
    if program.p_filesz > MAX_NOTES_SIZE {
        return Err(KernelError::BadHeader {
            field: "p_filesz of the notes",
            value: program.p_filesz,
        });
    }
    // Fits: it was just bounded.
    let mut notes = vec![0; usize::try_from(program.p_filesz).unwrap_or(0)];
    file.read_at(&mut notes, program.p_offset)
        .map_err(KernelError::Read)?;
    parse_notes(&notes)
}

/// Walk the notes: a header, then name and descriptor, each padded to four bytes.
fn parse_notes(mut notes: &[u8]) -> Result<Option<u64>, KernelError> {
    while let Some((header, rest)) = notes.split_at_checked(size_of::<Elf64_Nhdr>()) {
        let mut note = Elf64_Nhdr::default();
        note.as_mut_slice().copy_from_slice(header);
        let padded = |size: u32| (size as usize).next_multiple_of(4);
        let Some((name, rest)) = rest.split_at_checked(padded(note.n_namesz)) else {
            break;
        };
        // The last descriptor's padding may be missing.
        let (descriptor, rest) = rest
            .split_at_checked(padded(note.n_descsz))
            .unwrap_or((rest, &[]));
        if note.n_type == XEN_PHYS32_ENTRY && name == XEN_OWNER {
            let entry = match *descriptor {
                [a, b, c, d] if note.n_descsz == 4 => Some([a, b, c, d]),
                // 64-bit kernels write eight bytes; the entry is a 32-bit one all the same.
                [a, b, c, d, 0, 0, 0, 0] if note.n_descsz == 8 => Some([a, b, c, d]),
                _ => None,
            };
            return match entry {
                Some(bytes) => Ok(Some(u32::from_le_bytes(bytes).into())),
                None => Err(KernelError::BadHeader {
                    field: "the size of Xen's PHYS32_ENTRY note",
                    value: note.n_descsz.into(),
                }),
            };
        }
        notes = rest;
    }
    Ok(None)
}

/// Read one header.
fn read<T: ByteValued + Default>(file: &BootFile, offset: u64) -> Result<T, KernelError> {
    check_in_file(file, offset, size_of::<T>() as u64)?;
    let mut value = T::default();
    file.read_at(value.as_mut_slice(), offset)
        .map_err(KernelError::Read)?;
    Ok(value)
}

fn check_in_file(file: &BootFile, offset: u64, length: u64) -> Result<(), KernelError> {
    let needed = offset.saturating_add(length);
    let size = file.size_bytes();
    if needed > size {
        return Err(KernelError::Truncated { needed, size });
    }
    Ok(())
}
