//! The guest's physical memory and its I/O ports: every fixed address of the machine, in one place.
//!
//! ```text
//!   0x0000_0500  GDT, IDT                        0x000e_0000  RSDP and the other ACPI tables
//!   0x0000_6000  PVH start info, module list     0x0010_0000  kernel, free memory, initrd on top
//!   0x0000_7000  boot_params, or the PVH map     0xc000_0000  gap: virtio devices, 8 KiB each
//!   0x0000_8ff0  boot stack (grows down)         0xfec0_0000  IOAPIC      0xfee0_0000  local APIC
//!   0x0000_9000  page tables, 24 KiB             0xfffb_c000  identity map page, TSS pages
//!   0x0002_0000  command line, 64 KiB            0x1_0000_0000  the rest of the memory
//!   0x0009_fc00  reserved up to 1 MiB
//! ```
//!
//! The low addresses are those that Linux's own loaders have used for decades; the kernel reserves
//! or copies what is there before it frees the memory.

use std::ops::RangeInclusive;

use vm_memory::GuestAddress;

/// Most vCPUs of a machine: their APIC ids fit into the 8 bits of xAPIC, 255 being broadcast.
pub const MAX_VCPUS: u8 = 254;

/// First address that is never memory: devices are from here to 4 GiB.
pub const GAP_START: u64 = 0xc000_0000;
/// Memory goes on here.
pub const GAP_END: u64 = 0x1_0000_0000;

/// The first virtio-mmio device's pages: one that ends with its registers, and one with its
/// configuration space (`register_page.rs`).
pub const MMIO_DEVICES_START: u64 = GAP_START;
/// Address space of each virtio-mmio device.
pub const MMIO_DEVICE_SIZE: u64 = 0x2000;
/// Interrupt lines of the virtio-mmio devices: what is left of the IOAPIC's 24 pins after the
/// timer (0), keyboard (1), cascade (2), hot-plug (3) and serial port (4).
pub const MMIO_GSIS: RangeInclusive<u32> = 5..=23;

/// The first serial port (COM1), eight registers.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Registers of a 16550.
pub const SERIAL_PORT_COUNT: u8 = 8;
/// COM1's interrupt line.
pub const SERIAL_GSI: u32 = 4;
/// The keyboard controller's data port.
pub const I8042_DATA_PORT: u16 = 0x60;
/// The keyboard controller's command port: `0xfe` here resets the machine.
pub const I8042_COMMAND_PORT: u16 = 0x64;

/// ACPI's sleep control register (ACPI 6.5, 4.8.3.7): the guest writes [`SLEEP_CONTROL_OFF`] here
/// to switch itself off. The port block is the one that Cloud Hypervisor's guests know as well.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI's sleep status register: writes clear the wake bit and may be ignored; reads give 0.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI's reset register: writing [`RESET_VALUE`] here restarts the machine.
pub const RESET_PORT: u16 = 0x602;
/// What the reset register takes.
pub const RESET_VALUE: u8 = 1;
/// The sleep type that `\_S5_` names for "off".
pub const SLEEP_TYPE_OFF: u8 = 5;
/// Which of the virtio devices the guest is to know of: a bit each (`acpi_slots.rs`).
pub const SLOTS_PORT: u16 = 0x608;
/// The line of its changes: COM2's, which no machine here has.
pub const SLOTS_GSI: u32 = 3;
/// Sleep type 5 in bits 4:2, sleep enable in bit 5.
pub const SLEEP_CONTROL_OFF: u8 = SLEEP_TYPE_OFF << 2 | 1 << 5;

/// Where every PC has its IOAPIC.
pub const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
/// Where every PC has its local APICs.
pub const LOCAL_APIC_ADDRESS: u32 = 0xfee0_0000;
/// Three unused pages below 4 GiB for Intel's real-mode TSS (`KVM_SET_TSS_ADDR`).
pub const TSS_ADDRESS: usize = 0xfffb_d000;
/// One page before them for its page table (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// First descriptor table of the boot processor.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// Its interrupt table, which is empty.
pub const IDT: GuestAddress = GuestAddress(0x520);
/// `hvm_start_info` of the PVH protocol.
pub const PVH_START_INFO: GuestAddress = GuestAddress(0x6000);
/// Its module list: the initrd.
pub const PVH_MODULES: GuestAddress = GuestAddress(0x6040);
/// Its memory map.
pub const PVH_MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
/// `boot_params` of the Linux protocol; never together with the PVH memory map.
pub const BOOT_PARAMS: GuestAddress = GuestAddress(0x7000);
/// The boot processor's first stack pointer.
pub const BOOT_STACK: GuestAddress = GuestAddress(0x8ff0);
/// Page tables that map the first 4 GiB to themselves: level 4, level 3, four of level 2.
pub const PAGE_MAP_LEVEL_4: GuestAddress = GuestAddress(0x9000);
/// Level 3.
pub const PAGE_DIRECTORY_POINTERS: GuestAddress = GuestAddress(0xa000);
/// Level 2, the first of four pages.
pub const PAGE_DIRECTORIES: GuestAddress = GuestAddress(0xb000);
/// The kernel's command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Room for the command line and its final zero.
pub const COMMAND_LINE_SIZE: usize = 0x1_0000;
/// End of conventional memory: from here to 1 MiB is reserved, as the extended BIOS data area and
/// ROMs are on a PC.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// ACPI's root pointer. 0xe0000 to 1 MiB is where a kernel that was told nothing searches it.
pub const RSDP: GuestAddress = GuestAddress(0xe_0000);
/// End of the ACPI tables, which follow the root pointer.
pub const ACPI_TABLES_END: GuestAddress = GuestAddress(HIGH_MEMORY_START);
/// Start of the memory a kernel is loaded to.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;

/// Guest memory of `size_bytes`: below the gap, then from 4 GiB on.
pub fn ram_ranges(size_bytes: u64) -> Vec<(GuestAddress, usize)> {
    let low = size_bytes.min(GAP_START);
    let high = size_bytes - low;
    [(0, low), (GAP_END, high)]
        .into_iter()
        .filter(|(_, size)| *size > 0)
        .map(|(start, size)| {
            // usize is 64 bits wide here.
            let size = usize::try_from(size).unwrap_or(usize::MAX);
            (GuestAddress(start), size)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn ranges(size_bytes: u64) -> Vec<(u64, u64)> {
        ram_ranges(size_bytes)
            .into_iter()
            .map(|(start, size)| (start.0, size as u64))
            .collect()
    }

    #[test]
    fn memory_is_split_around_the_gap() {
        assert_eq!(ranges(0), []);
        assert_eq!(ranges(128 << 20), [(0, 128 << 20)]);
        assert_eq!(ranges(2 * GIB), [(0, 2 * GIB)]);
        assert_eq!(ranges(3 * GIB), [(0, 3 * GIB)]);
        assert_eq!(ranges(3 * GIB + 4096), [(0, 3 * GIB), (4 * GIB, 4096)]);
        assert_eq!(ranges(4 * GIB), [(0, 3 * GIB), (4 * GIB, GIB)]);
        assert_eq!(ranges(16 * GIB), [(0, 3 * GIB), (4 * GIB, 13 * GIB)]);
    }

    #[test]
    fn every_device_has_its_pages_below_the_interrupt_controllers() {
        let devices = MMIO_GSIS.count() as u64;
        assert_eq!(devices, 19);
        assert!(MMIO_DEVICES_START + devices * MMIO_DEVICE_SIZE <= u64::from(IOAPIC_ADDRESS));
        let tss = TSS_ADDRESS as u64;
        assert!(tss + 3 * 0x1000 <= GAP_END);
        assert_eq!(IDENTITY_MAP_ADDRESS + 0x1000, tss);
    }

    #[test]
    fn switching_off_is_the_value_linux_writes() {
        assert_eq!(SLEEP_CONTROL_OFF, 0x34);
    }

    #[test]
    fn boot_structures_do_not_overlap() {
        let areas = [
            (GDT.0, 32),
            (IDT.0, 8),
            (PVH_START_INFO.0, 56),
            (PVH_MODULES.0, 32),
            (BOOT_PARAMS.0, 0x1000),
            (BOOT_STACK.0 - 0xff0, 0xff0),
            (PAGE_MAP_LEVEL_4.0, 0x1000),
            (PAGE_DIRECTORY_POINTERS.0, 0x1000),
            (PAGE_DIRECTORIES.0, 0x4000),
            (COMMAND_LINE.0, COMMAND_LINE_SIZE as u64),
            (LOW_MEMORY_END, 0x400),
            (RSDP.0, ACPI_TABLES_END.0 - RSDP.0),
            (HIGH_MEMORY_START, 1),
        ];
        for pair in areas.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }
}
