//! What a snapshot keeps of the device: whose it is, and whether the driver used it.
//!
//! Connections are not kept: their host ends are sockets of a process that will be gone. A guest
//! whose device was active is told so when it goes on. Until its programs close them it still has
//! its ends, and answers whoever comes with the same ports by a reset: so the ports go on.

use serde::{Deserialize, Serialize};

/// The device's part of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct VsockState {
    /// The guest's context id.
    pub(super) guest_cid: u64,
    /// The driver had set the device up, so it may have had connections.
    pub(super) was_active: bool,
    /// Where to go on with host ports.
    pub(super) next_host_port: u32,
}
