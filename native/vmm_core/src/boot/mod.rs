//! Kernel and initrd into guest memory: everything between "the memory exists" and "the boot
//! processor can be given its entry".
//!
//! ```text
//!   kernel file ──► arch::kernel::load ──► initrd above it, as high as it goes ──► parameters ──► Entry
//! ```
//!
//! The formats and protocols are in `arch`; here is the order, and the place of the initrd. Called by
//! the machine's builder, before any vCPU exists or runs.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion};

pub use crate::arch::boot_file::BootFile;
use crate::arch::kernel::{self, LoadedInitrd, LoadedKernel};
pub use crate::arch::kernel::{BootProtocol, Entry, KernelError};

const PAGE_SIZE: u64 = 0x1000;
const MIB: u64 = 1 << 20;

/// What to boot.
#[derive(Debug)]
pub struct BootSource<'a> {
    /// The kernel image.
    pub kernel: &'a BootFile,
    /// The first root file system.
    pub initrd: Option<&'a BootFile>,
    /// What the kernel is told.
    pub command_line: &'a str,
}

/// Why a machine can't be booted.
#[derive(Debug, Error)]
pub enum BootError {
    /// a file is missing, unreadable, or a directory
    #[error("open {what} {}: check the path in the configuration", path.display())]
    Open {
        /// Kernel or initrd.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// the kernel can't be booted
    #[error("load kernel {}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: KernelError,
    },
    /// the initrd has no contents
    #[error("initrd {} is empty: build it again, or boot without it", path.display())]
    EmptyInitrd {
        /// The file.
        path: PathBuf,
    },
    /// there is no room beside the kernel
    #[error(
        "initrd {} of {size_mib} MiB does not fit into {memory_mib} MiB of memory beside the kernel ({free_mib} MiB free): raise default_memory",
        path.display()
    )]
    InitrdTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size, rounded up.
        size_mib: u64,
        /// Memory that the kernel leaves in reach, rounded down.
        free_mib: u64,
        /// All memory.
        memory_mib: u64,
    },
    /// the initrd can't be copied
    #[error("read initrd {} into guest memory", path.display())]
    Initrd {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: GuestMemoryError,
    },
}

/// Open `path` as the kernel of a machine.
///
/// # Errors
/// It can't be opened, or is not a regular file.
pub fn open_kernel(path: &Path) -> Result<BootFile, BootError> {
    open("kernel", path)
}

/// Open `path` as the initrd of a machine.
///
/// # Errors
/// It can't be opened, or is not a regular file.
pub fn open_initrd(path: &Path) -> Result<BootFile, BootError> {
    open("initrd", path)
}

fn open(what: &'static str, path: &Path) -> Result<BootFile, BootError> {
    BootFile::open(path).map_err(|source| BootError::Open {
        what,
        path: path.to_owned(),
        source,
    })
}

/// Put kernel, initrd and parameters into `memory`. The tables of the machine's devices are
/// [`crate::arch::write_tables`]'s, before or after.
///
/// # Errors
/// A file is not what it should be, or does not fit.
pub fn load(memory: &GuestMemoryMmap, source: &BootSource<'_>) -> Result<Entry, BootError> {
    let kernel_failed = |error| BootError::Kernel {
        path: source.kernel.path().to_owned(),
        source: error,
    };
    let loaded = kernel::load(memory, source.kernel).map_err(kernel_failed)?;
    let initrd = source
        .initrd
        .map(|file| load_initrd(memory, file, &loaded))
        .transpose()?;
    kernel::write_parameters(memory, &loaded, source.command_line, initrd)
        .map_err(kernel_failed)?;
    Ok(loaded.entry)
}

fn load_initrd(
    memory: &GuestMemoryMmap,
    file: &BootFile,
    loaded: &LoadedKernel,
) -> Result<LoadedInitrd, BootError> {
    let path = || file.path().to_owned();
    let size_bytes = file.size_bytes();
    if size_bytes == 0 {
        return Err(BootError::EmptyInitrd { path: path() });
    }
    let address = place_initrd(size_bytes, loaded.end, loaded.initrd_limit);
    let (Some(address), Ok(length)) = (address, usize::try_from(size_bytes)) else {
        let memory_bytes: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
        return Err(BootError::InitrdTooLarge {
            path: path(),
            size_mib: size_bytes.div_ceil(MIB),
            free_mib: loaded.initrd_limit.saturating_sub(loaded.end) / MIB,
            memory_mib: memory_bytes / MIB,
        });
    };
    file.copy_to(memory, address, 0, length)
        .map_err(|source| BootError::Initrd {
            path: path(),
            source,
        })?;
    Ok(LoadedInitrd {
        address,
        size_bytes,
    })
}

/// The highest page where `size_bytes` fit between `kernel_end` and `limit`.
fn place_initrd(size_bytes: u64, kernel_end: u64, limit: u64) -> Option<GuestAddress> {
    let start = limit.checked_sub(size_bytes)? / PAGE_SIZE * PAGE_SIZE;
    (start >= kernel_end).then_some(GuestAddress(start))
}

#[cfg(test)]
#[path = "boot_tests.rs"]
mod tests;
