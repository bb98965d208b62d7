//! Network card (virtio 1.2, 5.1) over a tap.
//!
//! ```text
//!   guest ─tx queue─► transmit.rs ─writev─► tap ─► host
//!   guest ◄─rx queue─ receive.rs  ◄─readv── tap ◄─ host      up to eight pairs of queues
//!   guest ◄─control─► control.rs            how many pairs are in use
//! ```
//!
//! Frames go straight between guest memory and the kernel; checksums and segmentation are left to
//! whoever is last, so frames of 64 KiB pass as one. The tap is made by somebody else, who also
//! says which network it is in: it is found by name, or given as open descriptors, one a pair.
//!
//! Everything here runs on the I/O thread, and stops watching a tap while the guest has no buffers
//! or its rate is used up.

mod active;
mod control;
mod device;
mod error;
mod features;
mod metrics;
mod receive;
mod state;
mod tap;
mod transmit;

use std::os::fd::OwnedFd;

pub use device::Net;
pub use error::{NetError, TapError};

use crate::rate_limiter::RateLimiterConfig;

/// Most queue pairs of a card: what its share of tokens and interrupts allows.
pub const MAX_QUEUE_PAIRS: u16 = 8;
/// The least MTU that IPv4 allows (RFC 791), and Linux takes.
pub const MIN_MTU: u16 = 68;

/// Where the frames go.
#[derive(Debug)]
pub enum TapSource {
    /// A tap in this network namespace. It has to be there already.
    Name(String),
    /// An open queue of a tap for each pair, of whichever namespace.
    Fds(Vec<OwnedFd>),
    /// Packet sockets in the place of taps, for tests and fuzz targets.
    #[cfg(any(test, feature = "mock"))]
    Packets(Vec<OwnedFd>),
}

/// A card.
#[derive(Debug)]
pub struct NetConfig {
    /// Its name in errors, events and metrics.
    pub id: String,
    /// Its other end.
    pub source: TapSource,
    /// The guest's address.
    pub mac: [u8; 6],
    /// Largest packet that the link takes, without the Ethernet header.
    pub mtu: u16,
    /// Pairs of queues, up to [`MAX_QUEUE_PAIRS`].
    pub queue_pairs: u16,
    /// Limits of what the guest receives; an operation is a frame.
    pub rx_limiter: RateLimiterConfig,
    /// Limits of what the guest sends.
    pub tx_limiter: RateLimiterConfig,
}
