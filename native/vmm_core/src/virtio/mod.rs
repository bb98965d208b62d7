//! Virtio devices and the MMIO transport they sit behind.
//!
//! [`device`] is what every device implements and is given; [`mmio`] is the transport. Each device
//! has a folder with the same file names: `device.rs` (the device), `metrics.rs` (its counters),
//! `state.rs` (what a snapshot keeps), and files of its own for what is its own.

pub mod balloon;
pub mod block;
pub mod device;
pub mod fs;
pub mod mmio;
#[cfg(any(test, feature = "mock"))]
pub mod mock;
pub mod net;
mod registers;
pub mod rng;
mod saved;
pub mod throttle;
mod timer;
mod turn;
pub mod vsock;
