//! The machine's port devices: what a PC kernel needs and virtio does not give.
//!
//! A serial port for the console, the keyboard controller's reset line, and the registers that
//! ACPI switches off and restarts with. Each is a [`crate::bus::BusDevice`] and is used from
//! whichever vCPU accesses it; none blocks.

pub mod acpi_power;
pub mod acpi_slots;
pub mod console;
pub mod i8042;
pub mod serial;
