//! The memory of one step, as scatter-gather system calls want it.
//!
//! A list that is filled anew for each step and keeps its room. The ranges belong to the step's
//! request (guest memory, kept mapped by its chain) or to a constant block of zeros.

#![expect(unsafe_code, reason = "raw ranges are moved between threads")]

use crate::virtio::block::disk::DirectAlignment;
use crate::virtio::block::request::{Operation, Request};

/// `IOV_MAX`: ranges of one system call. What does not fit is left for the next step.
const MAX_RANGES: usize = 1024;
const ZEROS_LEN: usize = 1 << 14;

#[repr(align(4096))]
struct Zeros([u8; ZEROS_LEN]);

static ZEROS: Zeros = Zeros([0; ZEROS_LEN]);

/// Ranges for one call.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    entries: Vec<libc::iovec>,
}

// SAFETY: addresses and lengths; who gives them to the kernel argues that they are valid.
unsafe impl Send for Ranges {}

impl Ranges {
    /// List the memory of the request's step, the first [`MAX_RANGES`] ranges of it.
    pub(super) fn fill(&mut self, request: &Request) {
        self.entries.clear();
        let step = request.step();
        // At most MAX_STEP_BYTES.
        let len = usize::try_from(step.len).unwrap_or(usize::MAX);
        let buffers = match step.operation {
            Operation::Read => &request.chain.writable,
            Operation::Write => &request.chain.readable,
            Operation::WriteZeros => {
                let mut left = len;
                while left > 0 {
                    self.entries.push(libc::iovec {
                        iov_base: ZEROS.0.as_ptr().cast_mut().cast(),
                        iov_len: left.min(ZEROS_LEN),
                    });
                    left -= left.min(ZEROS_LEN);
                }
                return;
            }
            _ => return,
        };
        let mut done = 0;
        while done < len && self.entries.len() < MAX_RANGES {
            let iovecs = buffers.iovecs(step.offset + done, len - done);
            if iovecs.len == 0 {
                break;
            }
            done += iovecs.len;
            let room = MAX_RANGES - self.entries.len();
            let found = iovecs.as_slice();
            self.entries
                .extend_from_slice(found.get(..room).unwrap_or(found));
        }
    }

    /// Whether direct I/O at `position` takes them.
    pub(super) fn is_aligned(&self, position: u64, alignment: DirectAlignment) -> bool {
        let (memory, unit) = (alignment.memory as usize, alignment.position as usize);
        position.is_multiple_of(alignment.position.into())
            && self.entries.iter().all(|entry| {
                entry.iov_base.addr().is_multiple_of(memory) && entry.iov_len.is_multiple_of(unit)
            })
    }

    /// The entries, for the kernel.
    pub(super) fn as_slice(&self) -> &[libc::iovec] {
        &self.entries
    }
}
