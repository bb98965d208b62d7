//! What a snapshot keeps of a disk: which one it was.
//!
//! Requests are drained before a snapshot and the content is the file's own, so nothing else is
//! left. The guest has cached the size and what the disk can do; a disk that differs in these is
//! refused rather than swapped in below a mounted file system.

use serde::{Deserialize, Serialize};

/// Identity of a disk, encoded with postcard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BlockState {
    /// Changes with the fields below.
    pub(super) version: u16,
    pub(super) id: String,
    pub(super) capacity_sectors: u64,
    pub(super) logical_block_size: u32,
    pub(super) is_read_only: bool,
}

/// The version written and read.
pub(super) const VERSION: u16 = 1;

impl BlockState {
    /// What of `self`, a snapshot's disk, `here` is not.
    pub(super) fn difference(&self, here: &Self) -> Option<String> {
        let differs = |what: &str, then: &dyn std::fmt::Display, now: &dyn std::fmt::Display| {
            Some(format!("{what} was {then}, is {now}"))
        };
        if self.version != here.version {
            return differs("version", &self.version, &here.version);
        }
        if self.id != here.id {
            return differs("id", &self.id, &here.id);
        }
        if self.capacity_sectors != here.capacity_sectors {
            let (then, now) = (self.capacity_sectors, here.capacity_sectors);
            return differs("capacity in sectors", &then, &now);
        }
        if self.logical_block_size != here.logical_block_size {
            let (then, now) = (self.logical_block_size, here.logical_block_size);
            return differs("block size", &then, &now);
        }
        if self.is_read_only != here.is_read_only {
            return differs("read-only", &self.is_read_only, &here.is_read_only);
        }
        None
    }
}
