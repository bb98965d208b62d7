//! bzImage kernels (`vmlinuz`): a setup header and a program that unpacks the kernel.
//!
//! The real-mode part is skipped: the 64-bit entry of the unpacking program is used, which every
//! x86-64 kernel since Linux 3.8 has (`Documentation/arch/x86/boot.rst`, 64-bit boot protocol).
//! Called by [`super::load`].

use linux_loader::loader::bootparam::setup_header;
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap};

use super::{BootProtocol, Entry, KernelError, LoadedKernel, check_range};
use crate::arch::boot_file::BootFile;
use crate::arch::layout;

/// Where the setup header begins in the file, and in `boot_params`.
const HEADER_OFFSET: u64 = 0x1f1;
/// `jump`, whose second byte tells where the header ends: relative to [`MAGIC_OFFSET`].
const HEADER_LENGTH_OFFSET: u64 = 0x201;
const MAGIC_OFFSET: usize = 0x202;
const MAGIC: &[u8] = b"HdrS";
/// The first protocol version with `xloadflags`.
const MIN_VERSION: u16 = 0x20c;
/// `xloadflags`: there is a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// `loadflags`: the protected-mode part belongs above 1 MiB.
const LOADED_HIGH: u8 = 1;
const SECTOR_SIZE: u64 = 512;
const SYSSIZE_UNIT: u64 = 16;
/// A header from before the count existed means this many.
const DEFAULT_SETUP_SECTORS: u64 = 4;
const ENTRY_64_OFFSET: u64 = 0x200;

/// Does the file have a setup header?
pub(super) fn has_magic(prefix: &[u8]) -> bool {
    prefix
        .get(MAGIC_OFFSET..)
        .is_some_and(|rest| rest.starts_with(MAGIC))
}

/// Read a bzImage kernel.
pub(super) fn load(memory: &GuestMemoryMmap, file: &BootFile) -> Result<LoadedKernel, KernelError> {
    let header = read_header(file)?;
    let (version, xloadflags) = (header.version, header.xloadflags);
    if version < MIN_VERSION || xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::No64BitEntry {
            version,
            xloadflags,
        });
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(KernelError::BadHeader {
            field: "loadflags",
            value: header.loadflags.into(),
        });
    }

    let setup_sectors = match header.setup_sects {
        0 => DEFAULT_SETUP_SECTORS,
        count => count.into(),
    };
    let offset = (setup_sectors + 1) * SECTOR_SIZE;
    let size = file.size_bytes();
    // `syssize` counts the protected-mode part in units of 16 bytes; the last need not be whole.
    let smallest = (u64::from(header.syssize) * SYSSIZE_UNIT)
        .saturating_sub(SYSSIZE_UNIT - 1)
        .max(ENTRY_64_OFFSET + 1);
    let needed = offset + smallest;
    if needed > size {
        return Err(KernelError::Truncated { needed, size });
    }
    let length = size - offset;

    // At the address it was built for it need not move itself.
    let start = match header.pref_address {
        0 => layout::HIGH_MEMORY_START,
        address => address,
    };
    let end = start.saturating_add(length.max(header.init_size.into()));
    let memory_end = check_range(memory, start, end)?;
    let length = usize::try_from(length).map_err(|_| KernelError::BadHeader {
        field: "the file's size",
        value: length,
    })?;
    file.copy_to(memory, GuestAddress(start), offset, length)
        .map_err(KernelError::Copy)?;

    let initrd_limit = match header.initrd_addr_max {
        0 => memory_end,
        last => memory_end.min(u64::from(last) + 1),
    };
    Ok(LoadedKernel {
        entry: Entry {
            address: GuestAddress(start + ENTRY_64_OFFSET),
            protocol: BootProtocol::Linux64,
        },
        end,
        initrd_limit,
        // u32 to usize: 64 bits here.
        command_line_limit: header.cmdline_size as usize,
        setup_header: Some(setup_header {
            // Below 3 GiB: it was checked against memory.
            code32_start: u32::try_from(start).unwrap_or_default(),
            ..header
        }),
    })
}

/// The header, as much of it as this kernel's version has; the rest is zero.
fn read_header(file: &BootFile) -> Result<setup_header, KernelError> {
    let size = file.size_bytes();
    let largest = size_of::<setup_header>() as u64;
    let mut length = [0];
    file.read_at(&mut length, HEADER_LENGTH_OFFSET)
        .map_err(KernelError::Read)?;
    let end = MAGIC_OFFSET as u64 + u64::from(length[0]);
    let length = end.saturating_sub(HEADER_OFFSET).min(largest);
    let needed = HEADER_OFFSET + length;
    if needed > size {
        return Err(KernelError::Truncated { needed, size });
    }
    let mut header = setup_header::default();
    let bytes = header.as_mut_slice();
    // Not above the structure's size, by the minimum above.
    let bytes = bytes.split_at_mut(usize::try_from(length).unwrap_or(0)).0;
    file.read_at(bytes, HEADER_OFFSET)
        .map_err(KernelError::Read)?;
    Ok(header)
}
