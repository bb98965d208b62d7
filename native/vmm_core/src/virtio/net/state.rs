//! What a snapshot keeps of a card: what its driver knows of it. The tap may be another; which
//! offloads were agreed on is in the transport's features and is set up again with them.

use serde::{Deserialize, Serialize};

/// The card as its driver knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NetState {
    /// The guest's address.
    pub(super) mac: [u8; 6],
    /// What the link takes.
    pub(super) mtu: u16,
    /// Pairs of queues that there are.
    pub(super) queue_pairs: u16,
    /// Pairs that the driver uses.
    pub(super) used_pairs: u16,
}
