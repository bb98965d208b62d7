//! The tables with fixed layouts: FADT (what ACPI hardware there is: none but reset and sleep), and
//! MADT (interrupt controllers).

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::arch::layout;

/// `IAPC_BOOT_ARCH` (ACPI 6.5, table 5.11): no VGA, no MSI, no real-time clock. Without bit 1 there
/// is no keyboard controller to look for, which saves the kernel tens of milliseconds; the reset
/// line of it works all the same. Without a real-time clock, interrupt 8 is free for a device.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 3 | 1 << 5;
/// Shown to the guest as the hypervisor's name.
const HYPERVISOR_VENDOR: [u8; 8] = *b"KATAHYBR";
/// The IOAPIC's id in its own register after reset.
const IOAPIC_ID: u8 = 0;

/// The FADT, which points to the DSDT.
pub(super) fn build_fadt(dsdt: u64) -> FADT {
    let mut table = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        // Set means "not fixed hardware": there are no such buttons.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    table.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    table.reset_reg = port(layout::RESET_PORT);
    table.reset_value = layout::RESET_VALUE;
    table.sleep_control_reg = port(layout::SLEEP_CONTROL_PORT);
    table.sleep_status_reg = port(layout::SLEEP_STATUS_PORT);
    table.hypervisor_vendor_identity = u64::from_le_bytes(HYPERVISOR_VENDOR).into();
    table.finalize()
}

/// A register of one byte.
fn port(number: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        number.into(),
    )
}

/// The MADT: local APIC ids are vCPU numbers, all present from the start.
pub(super) fn build_madt(vcpu_count: u8) -> MADT {
    let local = LocalInterruptController::Address(layout::LOCAL_APIC_ADDRESS);
    let mut table = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local);
    table.add_structure(IoApic::new(IOAPIC_ID, layout::IOAPIC_ADDRESS, 0));
    for vcpu in 0..vcpu_count {
        table.add_structure(ProcessorLocalApic::new(vcpu, vcpu, EnabledStatus::Enabled));
    }
    table
}
