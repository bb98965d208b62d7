//! ACPI tables: the machine described to its kernel, without any legacy hardware of ACPI's own.
//!
//! ```text
//!   RSDP ──► XSDT ─┬─► FADT ──► DSDT: serial port, virtio devices, how to switch off
//!                  └─► MADT: IOAPIC, one local APIC per vCPU
//! ```
//!
//! "Hardware-reduced" (ACPI 6.5, 4.1): no SCI, no PM timer, no SMI command port; power-off and reset
//! are single port writes. Written once, before the first vCPU runs; the kernel only reads them.

mod dsdt;
mod fixed;
mod slots;

use acpi_tables::Aml;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout;

const OEM_ID: [u8; 6] = *b"KATAHY";
const OEM_TABLE_ID: [u8; 8] = *b"KATAHYBR";
const OEM_REVISION: u32 = 1;
/// Tables begin on 16-byte boundaries.
const TABLE_ALIGNMENT: u64 = 16;

/// A virtio-mmio device: `LNRO0005` in the DSDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioNode {
    /// Its registers.
    pub address: u64,
    /// How many bytes of them.
    pub size: u64,
    /// Its interrupt line, edge-triggered.
    pub gsi: u32,
    /// The guest does not know of it before its bit of [`layout::SLOTS_PORT`] is set.
    pub is_hidden: bool,
}

/// Why the tables could not be written.
#[derive(Debug, Error)]
pub enum TablesError {
    /// a device is not below 4 GiB
    #[error("a device at {address:#x} of {size:#x} bytes is not below 4 GiB")]
    DeviceTooHigh {
        /// Its address.
        address: u64,
        /// Its size.
        size: u64,
    },
    /// more devices than names or space
    #[error("{count} devices do not fit into the ACPI tables")]
    TooManyDevices {
        /// How many.
        count: usize,
    },
    /// memory ends before the tables do
    #[error("write ACPI tables at {address:#x}")]
    Write {
        /// The table's address.
        address: u64,
        /// The cause.
        #[source]
        source: GuestMemoryError,
    },
}

/// Write the tables for `vcpu_count` vCPUs and `nodes` into `memory`; gives the address of the root
/// pointer, which is always [`layout::RSDP`].
///
/// # Errors
/// A device is above 4 GiB, there are too many of them, or memory ends below 1 MiB.
pub fn write_tables(
    memory: &GuestMemoryMmap,
    vcpu_count: u8,
    nodes: &[MmioNode],
) -> Result<GuestAddress, TablesError> {
    let mut area = TableArea {
        memory,
        next: layout::RSDP.0 + (Rsdp::len() as u64).next_multiple_of(TABLE_ALIGNMENT),
        device_count: nodes.len(),
    };
    let dsdt = area.append(&dsdt::build(nodes)?)?;
    let fadt = area.append(&fixed::build_fadt(dsdt))?;
    let madt = area.append(&fixed::build_madt(vcpu_count))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.append(&xsdt)?;
    area.write(&Rsdp::new(OEM_ID, xsdt), layout::RSDP.0)?;
    Ok(layout::RSDP)
}

fn encode(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

/// Where the next table goes.
struct TableArea<'a> {
    memory: &'a GuestMemoryMmap,
    next: u64,
    device_count: usize,
}

impl TableArea<'_> {
    /// Write `table` after the others; gives its address.
    fn append(&mut self, table: &dyn Aml) -> Result<u64, TablesError> {
        let address = self.next;
        let size = self.write(table, address)?;
        self.next = (address + size).next_multiple_of(TABLE_ALIGNMENT);
        Ok(address)
    }

    fn write(&self, table: &dyn Aml, address: u64) -> Result<u64, TablesError> {
        let bytes = encode(table);
        let size = bytes.len() as u64;
        if address + size > layout::ACPI_TABLES_END.0 {
            return Err(TablesError::TooManyDevices {
                count: self.device_count,
            });
        }
        self.memory
            .write_slice(&bytes, GuestAddress(address))
            .map_err(|source| TablesError::Write { address, source })?;
        Ok(size)
    }
}

#[cfg(test)]
#[path = "acpi_tests.rs"]
mod tests;
