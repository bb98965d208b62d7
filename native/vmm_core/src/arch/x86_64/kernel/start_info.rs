//! `hvm_start_info`: what a kernel entered by the PVH protocol is told.
//!
//! Layouts are Xen's `public/arch-x86/hvm/start_info.h`. Called by [`super::write_parameters`].

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::memory_map::memory_map;
use super::{KernelError, LoadedInitrd};
use crate::arch::layout;

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;

/// Write the structure, the memory map, and the list of one module if there is an initrd.
pub(super) fn write(
    memory: &GuestMemoryMmap,
    initrd: Option<LoadedInitrd>,
) -> Result<(), KernelError> {
    let failed = |what| move |source| KernelError::Write { what, source };
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: layout::COMMAND_LINE.0,
        rsdp_paddr: layout::RSDP.0,
        memmap_paddr: layout::PVH_MEMORY_MAP.0,
        ..hvm_start_info::default()
    };
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.address.0,
            size: initrd.size_bytes,
            ..hvm_modlist_entry::default()
        };
        memory
            .write_obj(module, layout::PVH_MODULES)
            .map_err(failed("the list of modules"))?;
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_MODULES.0;
    }
    let mut address = layout::PVH_MEMORY_MAP.0;
    for entry in memory_map(memory)? {
        let entry = hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.size,
            type_: entry.kind as u32,
            reserved: 0,
        };
        memory
            .write_obj(entry, GuestAddress(address))
            .map_err(failed("the memory map"))?;
        address += size_of::<hvm_memmap_table_entry>() as u64;
        info.memmap_entries += 1;
    }
    memory
        .write_obj(info, layout::PVH_START_INFO)
        .map_err(failed("hvm_start_info"))
}
