//! Sockets between host and guest (virtio 1.2, section 5.10), without a kernel module on the host.
//!
//! A host process reaches port P of the guest by connecting to the device's Unix socket and
//! sending `CONNECT P`; the guest reaches the host's port P at the Unix socket `<path>_P`. The
//! device proper is [`virtio_core::vsock`]; here is what makes it a device of this machine:
//!
//! - [`device`]: registers, queues, turns on the I/O thread;
//! - `transport_reset`: telling a restored guest that its connections are gone;
//! - `state`: what a snapshot keeps; `metrics`: counters.

pub mod device;
mod metrics;
#[cfg(test)]
mod mock_machine;
mod state;
#[cfg(test)]
mod stream_tests;
mod transport_reset;

pub use device::{Vsock, VsockConfig, VsockError};
