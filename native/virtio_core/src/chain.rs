//! One request of the driver: the buffers of a descriptor chain, checked.
//!
//! A chain is what the driver readied for the device: first the bytes it wrote (`readable`), then
//! the room it left for an answer (`writable`). [`crate::ring::Ring::pop`] fills one in; devices
//! keep and reuse them, so that a request costs no allocation. A chain that is kept while a
//! request is under way keeps the guest's memory mapped.

use std::sync::Arc;

use thiserror::Error;

use crate::buffers::GuestBuffers;
use crate::ram::GuestRam;

/// What makes a chain unusable. The driver's mistake; it costs the driver that chain.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ChainError {
    /// a descriptor's index is past its table
    #[error("descriptor {index} of a table of {table_len}")]
    Index {
        /// The index.
        index: u16,
        /// Entries of the table.
        table_len: u32,
    },
    /// more descriptors than entries, so a loop; or than any driver has use for
    #[error("chain of more than {limit} descriptors")]
    TooLong {
        /// Entries of the ring or of the indirect table, at most what is followed.
        limit: u32,
    },
    /// a range that is not memory
    #[error("{len} bytes at {address:#x} are not all guest memory")]
    NotMemory {
        /// Guest address in the descriptor.
        address: u64,
        /// Length in the descriptor.
        len: u32,
    },
    /// a buffer to read after one to write
    #[error("readable buffer at {address:#x} follows a writable one")]
    Order {
        /// Guest address in the descriptor.
        address: u64,
    },
    /// an indirect descriptor where none may be
    #[error("indirect descriptor inside of an indirect table, or followed by another")]
    Nested,
    /// an indirect table of no whole number of entries, none, or more than 65536
    #[error("indirect table of {len} bytes")]
    TableSize {
        /// Length in the descriptor.
        len: u32,
    },
    /// lengths add up to more than the used ring can say
    #[error("chain of 4 GiB or more")]
    TooLarge,
}

/// A request's buffers.
#[derive(Clone, Debug)]
pub struct Chain {
    /// Index of the first descriptor: what the request is given back by.
    pub head: u16,
    /// What the driver wrote.
    pub readable: GuestBuffers,
    /// Where the device writes.
    pub writable: GuestBuffers,
    /// A descriptor was writable, be it of no bytes: all that follow have to be.
    has_writable: bool,
}

impl Chain {
    /// An empty chain, to be filled in by a ring.
    pub fn new(ram: &Arc<GuestRam>) -> Self {
        Self {
            head: 0,
            readable: GuestBuffers::new(Arc::clone(ram)),
            writable: GuestBuffers::new(Arc::clone(ram)),
            has_writable: false,
        }
    }

    /// Start anew with another head.
    #[inline]
    pub(crate) fn reset(&mut self, ram: &Arc<GuestRam>, head: u16) {
        self.head = head;
        self.readable.reset(ram);
        self.writable.reset(ram);
        self.has_writable = false;
    }

    /// Add a descriptor's range. One of no bytes adds nothing, wherever it is.
    #[inline]
    pub(crate) fn push(
        &mut self,
        address: u64,
        len: u32,
        is_writable: bool,
    ) -> Result<(), ChainError> {
        let buffers = if is_writable {
            self.has_writable = true;
            &mut self.writable
        } else if self.has_writable {
            return Err(ChainError::Order { address });
        } else {
            &mut self.readable
        };
        if !buffers.push(address, len as usize) {
            return Err(ChainError::NotMemory { address, len });
        }
        let total = self.readable.len() as u64 + self.writable.len() as u64;
        if total > u64::from(u32::MAX) {
            return Err(ChainError::TooLarge);
        }
        Ok(())
    }
}
