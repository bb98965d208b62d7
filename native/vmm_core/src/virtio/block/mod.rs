//! The block device (virtio 1.2, section 5.2): a raw file or a host block device as a disk.
//!
//! ```text
//!   ring ─► Request ─► limiter ─► Engine ─► kernel ─► Request ─┬─► status ─► used ring, one signal
//!             ▲                     ▲                          │
//!             └─ reused boxes       └────── next step ◄────────┘   (short transfer, zeros, sync)
//! ```
//!
//! - [`disk`]: the file or device, its size, alignment and what it can do.
//! - `request`: what one chain asks for, as a sequence of steps of one system call each.
//! - `engine`: who runs the steps: `io_uring`, or plain system calls where that is refused.
//! - `pump`: from the ring to the engine and back, turn by turn.
//! - [`device`]: activation, pause, reset, snapshots.
//! - `slot`: disks that come and go while the guest runs.
//!
//! Everything runs on the I/O thread, but for `activate` and `reset`, which the driver's vCPU
//! calls under the transport's lock. A request is owned by the engine while it is under way, and
//! with it the guest memory it names.

mod config;
mod config_space;
pub mod device;
pub mod disk;
mod engine;
mod metrics;
#[cfg(test)]
mod model_tests;
mod pump;
mod request;
#[cfg(test)]
mod rig;
mod slot;
mod state;

pub use config::{BlockConfig, BlockError};
pub use device::Block;
pub use engine::EngineChoice;
pub use slot::Ejected;

/// Bytes of a sector: the unit of all positions and capacities (virtio 1.2, 5.2.4).
pub const SECTOR_SIZE: u64 = 512;
/// `VIRTIO_BLK_ID_BYTES`: the answer to a request for the serial.
pub const SERIAL_LEN: usize = 20;
