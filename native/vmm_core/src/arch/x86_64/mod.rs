//! Intel and AMD, 64 bit.

pub(crate) mod acpi;
mod cpuid;
pub(crate) mod failure;
pub mod kernel;
pub mod layout;
mod msr;
pub(crate) mod probe_guest;
mod registers;
pub(crate) mod syscalls;
pub(crate) mod vcpu;
pub(crate) mod vcpu_state;
pub(crate) mod vm;
