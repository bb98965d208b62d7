//! The machine as a library. It knows nothing of Python, containers or ttRPC.
//!
//! `unsafe` is denied except where the kernel is handed raw memory, signals or registers; each
//! file that opens it says why.

#![deny(unsafe_code)]

mod arch;
pub mod interrupt;
pub mod kvm;
pub mod probe;
pub mod rate_limiter;
pub mod virtio;
