//! `boot_params`, the "zero page": what a kernel entered by the Linux 64-bit protocol is told.
//!
//! Fields are those of `Documentation/arch/x86/zero-page.rst`. Called by [`super::write_parameters`].

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::memory_map::memory_map;
use super::{KernelError, LoadedInitrd};
use crate::arch::layout;

/// End of the boot sector.
const BOOT_FLAG: u16 = 0xaa55;
/// "`HdrS`".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Given for kernels that bring no header: the first version with a 64-bit entry.
const VERSION: u16 = 0x20c;
/// `type_of_loader` of loaders without a number of their own.
const LOADER_UNDEFINED: u8 = 0xff;

/// Write the page. `header` is the image's own, if it had one.
pub(super) fn write(
    memory: &GuestMemoryMmap,
    header: Option<&setup_header>,
    initrd: Option<LoadedInitrd>,
) -> Result<(), KernelError> {
    let own_header = setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: VERSION,
        ..setup_header::default()
    };
    let mut params = boot_params {
        hdr: *header.unwrap_or(&own_header),
        acpi_rsdp_addr: layout::RSDP.0,
        ..boot_params::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    // All of these are below 3 GiB: the halves above 32 bits (`ext_*`) stay zero.
    let low = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    params.hdr.cmd_line_ptr = low(layout::COMMAND_LINE.0);
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = low(initrd.address.0);
        params.hdr.ramdisk_size = low(initrd.size_bytes);
    }
    let map = memory_map(memory)?;
    for (slot, entry) in params.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.size,
            type_: entry.kind as u32,
        };
    }
    // At most 128, which the table was checked for.
    params.e820_entries = u8::try_from(map.len()).unwrap_or(u8::MAX);
    memory
        .write_obj(params, layout::BOOT_PARAMS)
        .map_err(|source| KernelError::Write {
            what: "boot_params",
            source,
        })
}
