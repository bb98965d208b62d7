//! The engine for where `io_uring` is refused: one system call after the other, on the thread of
//! the caller.
//!
//! While it waits for the disk, so does every other device of the machine; that is the price of
//! doing without threads, and why it is the second choice. It is bounded: no call is begun after
//! the turn's deadline, none moves more than a step, and what is left is done in the next turn.

#![expect(
    unsafe_code,
    reason = "system calls on guest memory, and one that rustix lacks"
)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Instant;

use rustix::fs::FallocateFlags;

use super::ranges::Ranges;
use super::{Finished, needs_cache};
use crate::virtio::block::disk::Disk;
use crate::virtio::block::request::{Operation, Request, Step};

/// `BLKDISCARD`, `_IO(0x12, 119)` (linux/fs.h).
const BLKDISCARD: libc::c_ulong = 0x1277;

/// Requests in the order they came.
#[derive(Debug, Default)]
pub(in crate::virtio::block) struct SyncEngine {
    queued: VecDeque<Box<Request>>,
    ranges: Ranges,
}

impl SyncEngine {
    pub(super) fn in_flight(&self) -> usize {
        self.queued.len()
    }

    pub(super) fn submit(&mut self, request: Box<Request>) {
        self.queued.push_back(request);
    }

    /// Do steps until the deadline, but one at least.
    pub(super) fn run(&mut self, disk: &Disk, deadline: Instant, finished: &mut Vec<Finished>) {
        while let Some(request) = self.queued.pop_front() {
            let result = perform(&request, &mut self.ranges, disk);
            finished.push((request, result));
            if Instant::now() >= deadline {
                break;
            }
        }
    }
}

fn perform(request: &Request, ranges: &mut Ranges, disk: &Disk) -> io::Result<usize> {
    let Step {
        operation,
        position,
        len,
        ..
    } = *request.step();
    let allocate = |mode: FallocateFlags| {
        rustix::fs::fallocate(disk.file(), mode | FallocateFlags::KEEP_SIZE, position, len)
            .map(|()| 0)
            .map_err(io::Error::from)
    };
    match operation {
        Operation::Read | Operation::Write | Operation::WriteZeros => {
            ranges.fill(request);
            let file = if needs_cache(request, ranges, disk) {
                disk.cached_file()
            } else {
                disk.file()
            };
            transfer(operation, file, ranges, position)
        }
        Operation::ZeroRange => allocate(FallocateFlags::ZERO_RANGE),
        Operation::Discard if disk.is_block_device() => discard(disk.file(), position, len),
        Operation::PunchHole | Operation::Discard => allocate(FallocateFlags::PUNCH_HOLE),
        Operation::Sync => rustix::fs::fdatasync(disk.file())
            .map(|()| 0)
            .map_err(io::Error::from),
    }
}

/// Move the bytes of `ranges`, which are those of the request's step.
fn transfer(
    operation: Operation,
    file: BorrowedFd<'_>,
    ranges: &Ranges,
    position: u64,
) -> io::Result<usize> {
    let entries = ranges.as_slice();
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let count = libc::c_int::try_from(entries.len()).map_err(invalid)?;
    let position = i64::try_from(position).map_err(invalid)?;
    let moved = if operation == Operation::Read {
        // SAFETY: the entries are `count` ranges of guest memory, writable and kept mapped by the
        // request's chain, which the caller holds; no Rust reference points into guest memory, so
        // the kernel may write it. The descriptor is open.
        unsafe { libc::preadv64(file.as_raw_fd(), entries.as_ptr(), count, position) }
    } else {
        // SAFETY: as above, or a constant block of zeros; the kernel only reads them.
        unsafe { libc::pwritev64(file.as_raw_fd(), entries.as_ptr(), count, position) }
    };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

/// Tell a block device that a range is not needed any more.
fn discard(file: BorrowedFd<'_>, position: u64, len: u64) -> io::Result<usize> {
    let range = [position, len];
    // SAFETY: BLKDISCARD reads two 64-bit numbers, a position and a length in bytes, which `range`
    // holds for the whole call; it touches no memory of ours. The descriptor is open.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(0)
}
