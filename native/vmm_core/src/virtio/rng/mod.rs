//! Entropy device (virtio 1.2, 5.4): the host's random bytes for the guest's generator.
//!
//! A guest that starts, or comes back from a snapshot that others come from too, has nothing
//! random of its own. Requests are capped and rate limited, since a guest may ask without end and
//! the host's time is what it is paid with. Made while the machine is built.

mod device;
mod metrics;

pub use device::Rng;
