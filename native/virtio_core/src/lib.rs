//! What any virtio device needs, whoever runs the machine: the guest's memory, its split rings,
//! and the buffers its descriptors name.
//!
//! - [`ram::GuestRam`]: the guest's memory as devices see it; translates guest addresses.
//! - [`ring::Ring`]: one split virtqueue (virtio 1.2, section 2.7), device side.
//! - [`chain::Chain`]: one request of the driver, checked, as readable and writable buffers.
//! - [`buffers::GuestBuffers`]: moving bytes between guest memory and files, sockets or slices.
//! - [`vsock`]: the socket device itself, which two transports share.
//!
//! The guest changes its memory at any time. Rings and descriptors are therefore copied out once,
//! checked, and used from the copy; payload is touched only by volatile copies and by the kernel,
//! never through Rust references. Nothing here knows KVM or vhost-user.

#![deny(unsafe_code)]

mod area;
pub mod buffers;
pub mod chain;
pub mod discard;
mod host_range;
mod index;
#[cfg(any(test, feature = "mock"))]
pub mod mock;
pub mod ram;
pub mod ring;
pub mod vsock;

/// Feature bits every device built on this crate offers (virtio 1.2, section 6).
pub mod features {
    /// `VIRTIO_F_INDIRECT_DESC`: a descriptor may name a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`: both sides say at which index they want to hear.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VIRTIO_F_VERSION_1`: not the legacy interface.
    pub const VERSION_1: u64 = 1 << 32;
    /// What rings here can do.
    pub const RING: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}
