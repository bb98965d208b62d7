//! How a disk is configured, and what can be wrong with that.
//!
//! Plain values, filled in by whoever configures the machine; [`super::Block::new`] turns them into
//! a device or says which disk cannot be had, and why.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::disk::DiskError;
use super::engine::EngineChoice;
use crate::rate_limiter::RateLimiterConfig;
use crate::virtio::throttle::ThrottleError;

/// How a disk is to be.
#[derive(Clone, Debug)]
pub struct BlockConfig {
    /// Its name here; the first 20 bytes are the serial that the guest sees.
    pub id: String,
    /// A raw image or a block device.
    pub path: PathBuf,
    /// Refuse writes.
    pub is_read_only: bool,
    /// Go past the host's page cache.
    pub is_direct: bool,
    /// Who does the I/O.
    pub engine: EngineChoice,
    /// Limits on reads and writes together.
    pub rate_limiter: Option<RateLimiterConfig>,
}

/// Why a disk cannot be used.
#[derive(Debug, Error)]
pub enum BlockError {
    /// the file or device is not usable
    #[error("disk {id}")]
    Disk {
        /// The disk's name.
        id: String,
        /// The cause.
        #[source]
        source: DiskError,
    },
    /// `io_uring` was demanded, and this process may not use it
    #[error(
        "set up io_uring for disk {id}; choose the engine `auto` or `sync` where it is refused"
    )]
    Uring {
        /// The disk's name.
        id: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// the limits make no sense, or there is no timer
    #[error("limit disk {id}")]
    Throttle {
        /// The disk's name.
        id: String,
        /// The cause.
        #[source]
        source: ThrottleError,
    },
}
