//! What a snapshot keeps of a balloon: its configuration space.

use serde::{Deserialize, Serialize};

/// The two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BalloonState {
    /// Pages the guest is to give up.
    pub(super) target_pages: u32,
    /// Pages it said it gave up.
    pub(super) actual_pages: u32,
}
