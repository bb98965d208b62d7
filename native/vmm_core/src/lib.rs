//! The machine as a library. It knows nothing of Python, containers or ttRPC.
//!
//! [`vm::Vm`] is a virtual machine: describe it ([`vm::VmConfig`]), add devices ([`virtio`]), start
//! it, and hear of its end ([`event`]). Inside, from the top down:
//!
//! - `builder` makes all parts in order; `machine` is the one thread that changes a running
//!   machine's state; `vcpu` runs the guest; `snapshot` writes and reads the whole of it;
//!   [`running_devices`] is what the owner asks of devices meanwhile;
//! - [`virtio`] has the devices behind the MMIO transport, [`devices`] those behind ports, [`bus`]
//!   finds them;
//! - [`boot`] puts a kernel into guest memory; [`arch`] is what differs between processors;
//!   [`memory`], [`register_page`], [`kvm`], `thread`, `seccomp` are what the host gives.
//!
//! [`probe`] says whether KVM on this host can run an ordinary kernel at all.
//!
//! Threads: `vcpu-N` and `vmm-io`, none of which ever waits for the owner of the machine.
//! `unsafe` is denied except where the kernel is handed raw memory, signals or registers; each
//! file that opens it says why.

#![deny(unsafe_code)]

pub mod arch;
#[cfg(target_arch = "x86_64")]
pub mod boot;
mod builder;
pub mod bus;
pub mod devices;
pub mod event;
pub mod interrupt;
pub mod kvm;
mod lock;
mod machine;
pub mod memory;
pub mod probe;
pub mod rate_limiter;
pub mod register_page;
pub mod running_devices;
mod seccomp;
pub mod snapshot;
mod thread;
mod vcpu;
pub mod virtio;
pub mod vm;
