//! The engine that never waits: submissions and completions through rings shared with the kernel.
//!
//! One ring a disk, made when the machine is configured, before any filter on system calls. It is
//! restricted to the few operations a disk needs and to its own registered files, so it cannot be
//! turned against the process later. All submissions of a turn go in with one `io_uring_enter`;
//! completions are found by looking, and epoll watches the ring itself (readable while there are
//! some), which spares an eventfd and its reads.
//!
//! - `IORING_SETUP_COOP_TASKRUN` where the kernel has it: completions do not interrupt the I/O
//!   thread, which enters the kernel soon enough. `SINGLE_ISSUER` and `DEFER_TASKRUN` would tie
//!   the ring to one thread, but a reset comes from a vCPU and drains the ring there.
//! - What would block (buffered writes, syncs, discards) is done by kernel threads of the
//!   I/O thread's, [`MAX_WORKERS`] at most for all disks of the machine; idle ones leave after
//!   seconds.

#![expect(unsafe_code, reason = "submissions name guest memory")]

use std::fmt;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use io_uring::{IoUring, Probe, opcode, register::Restriction, squeue, types};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::ranges::Ranges;
use super::{Finished, MAX_IN_FLIGHT, needs_cache};
use crate::virtio::block::disk::Disk;
use crate::virtio::block::request::{Operation, Request, Step};

/// Kernel threads for what would block. Buffered writes to one file take turns anyway.
const MAX_WORKERS: u32 = 4;
/// Registered files: the disk, and the same through the page cache.
const DISK_FILE: types::Fixed = types::Fixed(0);
const CACHED_FILE: types::Fixed = types::Fixed(1);
/// `IOSQE_FIXED_FILE` (`linux/io_uring.h`).
const FIXED_FILE: u8 = 1;
/// How long a ring that is dropped waits for what is under way.
const DROP_TIMEOUT: Duration = Duration::from_secs(5);

const OPERATIONS: [u8; 6] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];

/// A place for a request under way; its number is the submission's `user_data`.
#[derive(Debug, Default)]
struct Slot {
    request: Option<Box<Request>>,
    /// The list the kernel was given: stays as it is until the completion.
    ranges: Ranges,
}

/// `IORING_UNREGISTER_FILES` (`linux/io_uring.h`).
const UNREGISTER_FILES: u8 = 3;

/// A ring and what is under way in it.
pub(in crate::virtio::block) struct UringEngine {
    ring: IoUring,
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// [`DROP_TIMEOUT`], but in tests of a disk that never answers.
    pub(in crate::virtio::block) drop_timeout: Duration,
}

impl fmt::Debug for UringEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UringEngine")
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

impl UringEngine {
    /// A ring for this disk.
    ///
    /// # Errors
    /// This process may not, or the kernel cannot do all that is needed.
    pub(super) fn new(disk: &Disk) -> io::Result<Self> {
        let ring = build(true).or_else(|error| match error.raw_os_error() {
            // A kernel before 5.19.
            Some(libc::EINVAL) => build(false),
            _ => Err(error),
        })?;
        let submitter = ring.submitter();
        let mut probe = Probe::new();
        submitter.register_probe(&mut probe)?;
        if !OPERATIONS.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let files = [disk.file().as_raw_fd(), disk.cached_file().as_raw_fd()];
        submitter.register_files(&files)?;
        // Before 5.15 the limit cannot be set; the kernel's own then holds.
        let _limited = submitter.register_iowq_max_workers(&mut [MAX_WORKERS, 1]);
        let mut restrictions = Vec::from(OPERATIONS.map(Restriction::sqe_op));
        restrictions.push(Restriction::sqe_flags_required(FIXED_FILE));
        restrictions.push(Restriction::register_op(UNREGISTER_FILES));
        submitter.register_restrictions(&mut restrictions)?;
        submitter.register_enable_rings()?;
        let mut slots = Vec::new();
        slots.resize_with(usize::from(MAX_IN_FLIGHT), Slot::default);
        Ok(Self {
            ring,
            slots,
            free: (0..MAX_IN_FLIGHT).rev().collect(),
            drop_timeout: DROP_TIMEOUT,
        })
    }

    pub(super) fn completions(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn has_queued(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Own the request, and put its step into the submission ring.
    pub(super) fn submit(&mut self, request: Box<Request>, disk: &Disk) {
        let index = self.free.pop().expect("the device stops at MAX_IN_FLIGHT");
        let slot = &mut self.slots[usize::from(index)];
        slot.ranges.fill(&request);
        let file = if needs_cache(&request, &slot.ranges, disk) {
            CACHED_FILE
        } else {
            DISK_FILE
        };
        let entry = entry(request.step(), &slot.ranges, file).user_data(index.into());
        slot.request = Some(request);
        // SAFETY: the memory the entry names stays valid and unmoved until its completion: the
        // list of ranges is the slot's and is not touched while the slot is taken; the ranges are
        // guest memory that the request's chain keeps mapped, and the slot owns the request, or a
        // constant block of zeros. A slot is given up only when its completion was seen; a ring
        // dropped with some taken waits for them or leaks them (`drop`). The files are registered.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("as many entries as slots, and one a slot");
    }

    /// Give the kernel everything submitted, and take what it has finished.
    pub(super) fn run(&mut self, finished: &mut Vec<Finished>) -> io::Result<()> {
        while self.has_queued() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // Out of memory for now, or completions to be taken first: the caller comes
                    // back while something is queued.
                    Some(libc::EAGAIN | libc::EBUSY) => break,
                    _ => return Err(error),
                },
            }
        }
        self.collect(finished);
        Ok(())
    }

    fn collect(&mut self, finished: &mut Vec<Finished>) {
        for completion in self.ring.completion() {
            // Numbers come back as they were given.
            let Ok(index) = u16::try_from(completion.user_data()) else {
                continue;
            };
            let slot = self.slots.get_mut(usize::from(index));
            let Some(request) = slot.and_then(|slot| slot.request.take()) else {
                continue;
            };
            self.free.push(index);
            let result = usize::try_from(completion.result())
                .map_err(|_| io::Error::from_raw_os_error(completion.result().wrapping_neg()));
            finished.push((request, result));
        }
    }

    pub(super) fn wait(&self, deadline: Instant) -> io::Result<()> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            match poll(
                &mut [PollFd::new(&self.ring, PollFlags::IN)],
                Some(&timeout),
            ) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Drop for UringEngine {
    /// The kernel writes into guest memory until the last completion: wait for it, or never free.
    fn drop(&mut self) {
        let deadline = Instant::now() + self.drop_timeout;
        let mut finished = Vec::new();
        while self.in_flight() > 0 && self.run(&mut finished).is_ok() {
            let is_over = Instant::now() >= deadline;
            if is_over || self.in_flight() > 0 && self.wait(deadline).is_err() {
                break;
            }
        }
        if self.in_flight() > 0 {
            mem::forget(mem::take(&mut self.slots));
            return;
        }
        // Else a worker of the kernel's would close the disk's file some time after this.
        let _unregistered = self.ring.submitter().unregister_files();
    }
}

fn build(is_cooperative: bool) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.dontfork().setup_r_disabled();
    if is_cooperative {
        builder.setup_coop_taskrun();
    }
    // The completion ring is twice this: it cannot overflow.
    builder.build(MAX_IN_FLIGHT.into())
}

fn entry(step: &Step, ranges: &Ranges, file: types::Fixed) -> squeue::Entry {
    let Step {
        operation,
        position,
        len,
        ..
    } = *step;
    let allocate = |mode: FallocateFlags| {
        let mode = (mode | FallocateFlags::KEEP_SIZE).bits();
        opcode::Fallocate::new(DISK_FILE, len)
            .offset(position)
            .mode(mode.cast_signed())
            .build()
    };
    match operation {
        Operation::Read | Operation::Write | Operation::WriteZeros => {
            transfer_entry(operation == Operation::Read, ranges, file, position)
        }
        Operation::ZeroRange => allocate(FallocateFlags::ZERO_RANGE),
        // On a block device: zeros without writing any, so the room is given up too.
        Operation::PunchHole | Operation::Discard => allocate(FallocateFlags::PUNCH_HOLE),
        Operation::Sync => opcode::Fsync::new(DISK_FILE)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
    }
}

/// One range, as most requests have, is spared the list.
fn transfer_entry(
    is_read: bool,
    ranges: &Ranges,
    file: types::Fixed,
    position: u64,
) -> squeue::Entry {
    let entries = ranges.as_slice();
    // At most IOV_MAX entries, and MAX_STEP_BYTES in each.
    #[expect(clippy::cast_possible_truncation, reason = "see above")]
    match (entries, is_read) {
        ([one], true) => opcode::Read::new(file, one.iov_base.cast(), one.iov_len as u32)
            .offset(position)
            .build(),
        ([one], false) => opcode::Write::new(file, one.iov_base.cast(), one.iov_len as u32)
            .offset(position)
            .build(),
        (_, true) => opcode::Readv::new(file, entries.as_ptr(), entries.len() as u32)
            .offset(position)
            .build(),
        (_, false) => opcode::Writev::new(file, entries.as_ptr(), entries.len() as u32)
            .offset(position)
            .build(),
    }
}
