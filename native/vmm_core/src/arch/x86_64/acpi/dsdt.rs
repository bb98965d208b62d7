//! The DSDT: devices that the kernel can't find by itself, in AML.
//!
//! Drivers: `8250_pnp` for PNP0501, `virtio_mmio` for LNRO0005, ACPI's own for
//! what hot-plug needs (`slots.rs`). Distribution kernels are built
//! without `virtio_mmio.device=` on the command line, so this is the only way to name the devices.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ONE, Package, Path, ResourceTemplate,
    Scope, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{MmioNode, OEM_ID, OEM_REVISION, OEM_TABLE_ID, TablesError, encode, slots};
use crate::arch::layout;

/// Two hexadecimal digits in a device's name.
const MAX_NODES: usize = 256;
/// Size of a table's header.
const HEADER_SIZE: u32 = 36;
/// From this on integers have 64 bits.
const REVISION: u8 = 2;

/// The table for `nodes`.
pub(super) fn build(nodes: &[MmioNode]) -> Result<Sdt, TablesError> {
    if nodes.len() > MAX_NODES {
        return Err(TablesError::TooManyDevices { count: nodes.len() });
    }
    let mut devices = serial_port();
    let mut hidden = Vec::new();
    for (number, node) in nodes.iter().enumerate() {
        let mut device = virtio_device(number, node)?;
        if node.is_hidden {
            hidden.append(&mut device);
        } else {
            devices.append(&mut device);
        }
    }
    if !hidden.is_empty() {
        devices.append(&mut slots::build(hidden));
    }
    let mut table = Sdt::new(
        *b"DSDT",
        HEADER_SIZE,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(&Scope::raw(Path::new("\\_SB_"), devices));
    // The second value is for machines with two control registers; the others are reserved.
    let off = Package::new(vec![&layout::SLEEP_TYPE_OFF, &ZERO, &ZERO, &ZERO]);
    table.append_slice(&encode(&Name::new(Path::new("\\_S5_"), &off)));
    Ok(table)
}

/// COM1, for a console.
fn serial_port() -> Vec<u8> {
    encode(&Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &IO::new(
                        layout::SERIAL_PORT,
                        layout::SERIAL_PORT,
                        1,
                        layout::SERIAL_PORT_COUNT,
                    ),
                    &Interrupt::new(true, true, false, false, layout::SERIAL_GSI),
                ]),
            ),
        ],
    ))
}

/// A virtio-mmio device: registers, and an edge-triggered, active-high line of its own.
fn virtio_device(number: usize, node: &MmioNode) -> Result<Vec<u8>, TablesError> {
    let too_high = || TablesError::DeviceTooHigh {
        address: node.address,
        size: node.size,
    };
    let address = u32::try_from(node.address).map_err(|_| too_high())?;
    let size = u32::try_from(node.size).map_err(|_| too_high())?;
    if node.address.saturating_add(node.size) > layout::GAP_END {
        return Err(too_high());
    }
    let status = if !node.is_hidden {
        Encoded(Vec::new())
    } else if number < slots::BITS {
        Encoded(slots::status(number))
    } else {
        return Err(TablesError::TooManyDevices { count: number + 1 });
    };
    Ok(encode(&Device::new(
        Path::new(&format!("VR{number:02X}")),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &number),
            // Its accesses to memory are coherent; x86 kernels ask too.
            &Name::new(Path::new("_CCA"), &ONE),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, address, size),
                    &Interrupt::new(true, true, false, false, node.gsi),
                ]),
            ),
            &status,
        ],
    )))
}

/// AML that is there already.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}
