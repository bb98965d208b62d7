//! The machine as a library. It knows nothing of Python, containers or ttRPC.
//!
//! What is here so far answers one question: can KVM on this host run an ordinary kernel?
//! [`probe::probe_kvm`] finds out by running a tiny guest, on a thread of its own, in
//! milliseconds. [`kvm`] holds the system-level calls that any machine needs.
//!
//! [`boot`] puts a kernel into guest memory; [`arch`] holds what differs between processors.
//!
//! `unsafe` is denied except in `kvm.rs`, where the kernel is handed raw memory and signals, and
//! where `arch` reads KVM's unions and areas of variable size.

#![deny(unsafe_code)]

pub mod arch;
#[cfg(target_arch = "x86_64")]
pub mod boot;
pub mod kvm;
pub mod probe;
