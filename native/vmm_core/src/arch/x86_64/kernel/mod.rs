//! Kernel images into guest memory, and what the kernel is told: the boot protocols of Linux.
//!
//! ```text
//!   ELF vmlinux ─┬─ with Xen's PVH note ──► PVH: 32-bit entry, hvm_start_info
//!                └─ without ─────────────► Linux 64-bit entry, boot_params
//!   bzImage ─────────────────────────────► Linux 64-bit entry at load address + 0x200, boot_params
//! ```
//!
//! [`load`] reads the image, the caller finds a place for the initrd, [`write_parameters`] does the
//! rest. Called by `boot`, once per machine, before the first vCPU runs.

mod boot_params;
mod bzimage;
mod elf;
mod memory_map;
mod start_info;
#[cfg(test)]
pub(crate) mod test_images;

use std::io;

use linux_loader::loader::bootparam::setup_header;
use thiserror::Error;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
};

use super::{layout, registers};
use crate::arch::boot_file::BootFile;

/// Bytes of the file that tell its format: an ELF header, and the bzImage's magic number.
const PREFIX_SIZE: usize = 0x206;
const MIB: u64 = 1 << 20;

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootProtocol {
    /// 32-bit protected mode without paging; `ebx` points to `hvm_start_info`.
    Pvh,
    /// Long mode, memory mapped to itself; `rsi` points to `boot_params`.
    Linux64,
}

/// Where the boot processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The first instruction.
    pub address: GuestAddress,
    /// The state it expects.
    pub protocol: BootProtocol,
}

/// A kernel that is in memory, and what it leaves free.
#[derive(Debug)]
pub struct LoadedKernel {
    /// Where it starts.
    pub entry: Entry,
    /// First address after it, including what it needs to unpack itself.
    pub end: u64,
    /// First address that an initrd may not reach.
    pub initrd_limit: u64,
    /// Most bytes of command line that it takes, without the final zero.
    pub command_line_limit: usize,
    /// The image's own header, if it has one.
    setup_header: Option<setup_header>,
}

/// Where the initrd is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadedInitrd {
    /// Its first byte.
    pub address: GuestAddress,
    /// Its size.
    pub size_bytes: u64,
}

/// Why a kernel image can't be booted. The caller knows the file's name.
#[derive(Debug, Error)]
pub enum KernelError {
    /// the file can't be read
    #[error("its header can't be read")]
    Read(#[source] io::Error),
    /// neither magic number is there
    #[error("it is not an ELF or bzImage file: name an x86-64 vmlinux or vmlinuz")]
    UnknownFormat,
    /// the headers speak of more than there is
    #[error("it is cut off: {size} bytes of at least {needed}: copy or build it again")]
    Truncated {
        /// What the headers speak of.
        needed: u64,
        /// What there is.
        size: u64,
    },
    /// a header field that no x86-64 kernel has
    #[error("it is not an x86-64 kernel: {field} is {value:#x}")]
    BadHeader {
        /// The field, as the format's specification calls it.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// no 64-bit entry, or older than Linux 3.8
    #[error(
        "it has no 64-bit entry point (boot protocol {version:#x}, flags {xloadflags:#x}): use a 64-bit kernel"
    )]
    No64BitEntry {
        /// Version of the boot protocol.
        version: u16,
        /// Its `xloadflags`.
        xloadflags: u16,
    },
    /// it wants memory that holds the boot structures
    #[error("it would be loaded to {address:#x}, below 1 MiB: use another kernel")]
    InLowMemory {
        /// Where it would begin.
        address: u64,
    },
    /// it wants more memory than there is in one piece
    #[error(
        "it needs memory up to {needed_mib} MiB, and the guest has {available_mib} MiB below 4 GiB: raise default_memory"
    )]
    OutsideMemory {
        /// End of what it needs, rounded up.
        needed_mib: u64,
        /// Size of the memory from address 0.
        available_mib: u64,
    },
    /// the entry point is not inside of what was loaded
    #[error("its entry point {address:#x} is outside of it")]
    EntryOutside {
        /// The entry point.
        address: u64,
    },
    /// its contents could not be copied
    #[error("it can't be copied into guest memory")]
    Copy(#[source] GuestMemoryError),
    /// the command line does not fit
    #[error(
        "the command line has {length} bytes and the kernel takes {limit}: shorten kernel_params"
    )]
    CommandLineTooLong {
        /// Without the final zero.
        length: usize,
        /// The kernel's limit.
        limit: usize,
    },
    /// the command line would end early
    #[error("the command line contains a zero byte")]
    CommandLineZero,
    /// more ranges than the kernel takes
    #[error("guest memory has more than {limit} ranges")]
    TooManyRanges {
        /// Entries of the table.
        limit: usize,
    },
    /// a boot structure could not be written
    #[error("write {what}")]
    Write {
        /// The structure.
        what: &'static str,
        /// The cause.
        #[source]
        source: GuestMemoryError,
    },
}

/// Read the kernel in `file` into `memory`.
///
/// # Errors
/// It is no kernel for this processor, is cut off, or does not fit.
pub fn load(memory: &GuestMemoryMmap, file: &BootFile) -> Result<LoadedKernel, KernelError> {
    let mut prefix = [0; PREFIX_SIZE];
    let available = usize::try_from(file.size_bytes())
        .unwrap_or(usize::MAX)
        .min(PREFIX_SIZE);
    file.read_at(&mut prefix[..available], 0)
        .map_err(KernelError::Read)?;
    if elf::has_magic(&prefix) {
        elf::load(memory, file)
    } else if bzimage::has_magic(&prefix) {
        bzimage::load(memory, file)
    } else {
        Err(KernelError::UnknownFormat)
    }
}

/// Tell `kernel` its command line, its memory, where its initrd and the ACPI tables are.
///
/// # Errors
/// The command line is too long, or a structure can't be written.
pub fn write_parameters(
    memory: &GuestMemoryMmap,
    kernel: &LoadedKernel,
    command_line: &str,
    initrd: Option<LoadedInitrd>,
) -> Result<(), KernelError> {
    write_command_line(memory, command_line, kernel.command_line_limit)?;
    registers::write_tables(memory, kernel.entry.protocol).map_err(|source| {
        KernelError::Write {
            what: "descriptor and page tables",
            source,
        }
    })?;
    match kernel.entry.protocol {
        BootProtocol::Pvh => start_info::write(memory, initrd),
        BootProtocol::Linux64 => boot_params::write(memory, kernel.setup_header.as_ref(), initrd),
    }
}

fn write_command_line(
    memory: &GuestMemoryMmap,
    command_line: &str,
    limit: usize,
) -> Result<(), KernelError> {
    let limit = limit.min(layout::COMMAND_LINE_SIZE - 1);
    let length = command_line.len();
    if length > limit {
        return Err(KernelError::CommandLineTooLong { length, limit });
    }
    if command_line.contains('\0') {
        return Err(KernelError::CommandLineZero);
    }
    let bytes = [command_line.as_bytes(), b"\0"].concat();
    memory
        .write_slice(&bytes, layout::COMMAND_LINE)
        .map_err(|source| KernelError::Write {
            what: "the command line",
            source,
        })
}

/// End of the memory that begins at address 0 and has no hole, as far as the gap.
fn low_memory_end(memory: &GuestMemoryMmap) -> u64 {
    let mut end = 0;
    for region in memory.iter() {
        if region.start_addr().0 != end {
            break;
        }
        end += region.len();
    }
    end.min(layout::GAP_START)
}

/// Check that a kernel may have the memory from `start` to `end`, which gives the end of all of it.
fn check_range(memory: &GuestMemoryMmap, start: u64, end: u64) -> Result<u64, KernelError> {
    if start < layout::HIGH_MEMORY_START {
        return Err(KernelError::InLowMemory { address: start });
    }
    let available = low_memory_end(memory);
    if end > available {
        return Err(KernelError::OutsideMemory {
            needed_mib: end.div_ceil(MIB),
            available_mib: available / MIB,
        });
    }
    Ok(available)
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;
