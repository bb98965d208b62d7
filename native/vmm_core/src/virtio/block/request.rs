//! What one chain asks of the disk, worked through in steps.
//!
//! ```text
//!   begin ──► Step ──► (engine) ──► advance ──► Step … ──► Finished(status)
//!     └───────────────────────────────────────────────────────▲   (bad, refused, or no I/O at all)
//! ```
//!
//! A step is one system call's worth. The header and the segments of a discard are copied out of
//! guest memory once, in `begin`, and checked there; data is never looked at. Short transfers go
//! on where they ended, what the file cannot do is done another way, and a write for a driver
//! that knows no flush ends with a sync. Called by the device on the I/O thread.

use std::io;
use std::sync::Arc;

use virtio_core::chain::Chain;
use virtio_core::ram::GuestRam;

use super::disk::Disk;
use super::{SECTOR_SIZE, SERIAL_LEN};

/// Bytes of `struct virtio_blk_req` before the data: type, reserved, sector.
const HEADER_LEN: usize = 16;
/// Bytes of `struct virtio_blk_discard_write_zeroes`: sector, sectors, flags.
const SEGMENT_LEN: usize = 16;
/// `VIRTIO_BLK_T_*` (virtio 1.2, 5.2.6).
const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;
/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`.
const FLAG_UNMAP: u32 = 1;

/// Segments of one discard or write-zeroes request (`max_discard_seg`).
pub(super) const MAX_SEGMENTS: usize = 32;
/// Sectors of one segment (`max_discard_sectors`): 1 GiB.
pub(super) const MAX_SEGMENT_SECTORS: u32 = 1 << 21;
/// Bytes moved by one step. A Linux guest's requests are hardly larger, and one that is must not
/// keep the other devices waiting.
pub(super) const MAX_STEP_BYTES: u64 = 1 << 20;
/// Ranges a chain may have: no driver may make one longer than the ring's 256, and mappings
/// split few of them. More would let a driver make us keep long lists.
const MAX_RANGES: usize = 1024;
/// How often a step is tried again after `EAGAIN` or `EINTR`.
const MAX_RETRIES: u8 = 16;

/// The last byte of the answer (virtio 1.2, 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    /// `VIRTIO_BLK_S_OK`
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`
    IoError = 1,
    /// `VIRTIO_BLK_S_UNSUPP`
    Unsupported = 2,
}

/// What kind of request it is; metrics count by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    /// Too short, unknown or not negotiated.
    Unknown,
}

/// One system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// From the file into the chain's writable buffers.
    Read,
    /// From the chain's readable buffers into the file.
    Write,
    /// Zeros of ours into the file.
    WriteZeros,
    /// Zeros by `FALLOC_FL_ZERO_RANGE`.
    ZeroRange,
    /// Zeros by `FALLOC_FL_PUNCH_HOLE`.
    PunchHole,
    /// The range's content does not matter any more.
    Discard,
    /// `fdatasync(2)`.
    Sync,
}

/// The system call to make next for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) operation: Operation,
    /// Where in the file.
    pub(super) position: u64,
    /// Bytes; at most [`MAX_STEP_BYTES`] where any move.
    pub(super) len: u64,
    /// Where in the chain's buffers.
    pub(super) offset: usize,
}

/// How a request goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// With [`Request::step`].
    Step,
    /// Not at all: give it back.
    Finished(Status),
}

/// What a device and its driver agreed on, as far as requests depend on it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub(super) serial: [u8; SERIAL_LEN],
    /// The driver flushes when it wants to be sure; else every write has to be durable.
    pub(super) has_flush: bool,
    pub(super) has_discard: bool,
    pub(super) has_write_zeroes: bool,
}

/// A range of the disk to discard or zero.
#[derive(Clone, Copy, Debug)]
struct Segment {
    position: u64,
    len: u64,
    may_unmap: bool,
}

/// One chain, and how far it is.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) chain: Chain,
    kind: Kind,
    /// What is left to transfer (reads and writes).
    position: u64,
    left: u64,
    offset: usize,
    /// What is left to discard or zero, the next one last.
    segments: Vec<Segment>,
    /// Writes need a sync at the end, which is not done yet.
    needs_sync: bool,
    step: Step,
    retries: u8,
    /// Direct I/O was refused: use the page cache.
    is_cached: bool,
    /// Bytes written into guest memory.
    written: u32,
}

/// A sync; also of a request that has made no call yet.
const SYNC: Step = Step {
    operation: Operation::Sync,
    position: 0,
    len: 0,
    offset: 0,
};

impl Request {
    /// A box to be filled in by a ring.
    pub(super) fn new(ram: &Arc<GuestRam>) -> Self {
        Self {
            chain: Chain::new(ram),
            kind: Kind::Unknown,
            position: 0,
            left: 0,
            offset: 0,
            segments: Vec::new(),
            needs_sync: false,
            step: SYNC,
            retries: 0,
            is_cached: false,
            written: 0,
        }
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// The system call to make now.
    pub(super) fn step(&self) -> &Step {
        &self.step
    }

    /// Direct I/O was refused for this one.
    pub(super) fn is_cached(&self) -> bool {
        self.is_cached
    }

    /// Whether the box is worth keeping for another request.
    pub(super) fn is_reusable(&self) -> bool {
        self.chain.readable.range_count() + self.chain.writable.range_count() <= MAX_RANGES
    }

    /// Bytes the rate limiter counts: what moves through the disk's driver.
    pub(super) fn cost_bytes(&self, disk: &Disk) -> u64 {
        let zeros_are_written = !disk.zeroing.has_zero_range && !disk.zeroing.has_punch_hole;
        match self.kind {
            Kind::Read | Kind::Write => self.left,
            Kind::WriteZeroes if zeros_are_written => {
                self.segments.iter().map(|segment| segment.len).sum()
            }
            _ => 0,
        }
    }

    // --- from the chain ------------------------------------------------------------------------

    /// Look at what the ring put into the chain.
    pub(super) fn begin(&mut self, disk: &Disk, terms: &Terms) -> Next {
        (self.kind, self.step) = (Kind::Unknown, SYNC);
        (self.position, self.left, self.offset) = (0, 0, 0);
        self.segments.clear();
        (self.needs_sync, self.is_cached) = (false, false);
        (self.retries, self.written) = (0, 0);
        match self.parse(disk, terms) {
            Ok(()) => self.next(disk),
            Err(status) => Next::Finished(status),
        }
    }

    fn parse(&mut self, disk: &Disk, terms: &Terms) -> Result<(), Status> {
        let header: [u8; HEADER_LEN] = self.chain.readable.read_array(0).ok_or(Status::IoError)?;
        // Without room for a status there is no telling whether it was done: it is not.
        if self.chain.writable.is_empty() || !self.is_reusable() {
            return Err(Status::IoError);
        }
        let header = u128::from_le_bytes(header);
        #[expect(clippy::cast_possible_truncation, reason = "fields of the header")]
        let (kind, sector) = (header as u32, (header >> 64) as u64);
        self.kind = match kind {
            TYPE_IN => Kind::Read,
            TYPE_OUT => Kind::Write,
            TYPE_FLUSH => Kind::Flush,
            TYPE_GET_ID => Kind::GetId,
            TYPE_DISCARD if terms.has_discard => Kind::Discard,
            TYPE_WRITE_ZEROES if terms.has_write_zeroes => Kind::WriteZeroes,
            _ => return Err(Status::Unsupported),
        };
        let is_change = matches!(self.kind, Kind::Write | Kind::Discard | Kind::WriteZeroes);
        if is_change && disk.is_read_only() {
            return Err(Status::IoError);
        }
        // The status is the last writable byte; there is one.
        let room = self.chain.writable.len() - 1;
        let data = self.chain.readable.len() - HEADER_LEN;
        match self.kind {
            Kind::Read => self.parse_transfer(disk, sector, room, 0)?,
            Kind::Write => self.parse_transfer(disk, sector, data, HEADER_LEN)?,
            Kind::Discard | Kind::WriteZeroes => self.parse_segments(disk, data)?,
            Kind::GetId => {
                if room < SERIAL_LEN {
                    return Err(Status::IoError);
                }
                self.chain.writable.copy_from(0, &terms.serial);
                self.written = 20;
            }
            Kind::Flush => self.needs_sync = true,
            Kind::Unknown => {}
        }
        if matches!(self.kind, Kind::Write | Kind::WriteZeroes) {
            self.needs_sync = !terms.has_flush;
        }
        Ok(())
    }

    fn parse_transfer(
        &mut self,
        disk: &Disk,
        sector: u64,
        len: usize,
        offset: usize,
    ) -> Result<(), Status> {
        let len = len as u64;
        if !len.is_multiple_of(SECTOR_SIZE) {
            return Err(Status::IoError);
        }
        self.position = position_on(disk, sector, len / SECTOR_SIZE)?;
        (self.left, self.offset) = (len, offset);
        Ok(())
    }

    fn parse_segments(&mut self, disk: &Disk, len: usize) -> Result<(), Status> {
        let count = len / SEGMENT_LEN;
        if !len.is_multiple_of(SEGMENT_LEN) || count == 0 || count > MAX_SEGMENTS {
            return Err(Status::IoError);
        }
        for index in (0..count).rev() {
            let at = HEADER_LEN + index * SEGMENT_LEN;
            let bytes: [u8; SEGMENT_LEN] =
                self.chain.readable.read_array(at).ok_or(Status::IoError)?;
            let word = u128::from_le_bytes(bytes);
            #[expect(clippy::cast_possible_truncation, reason = "fields of the segment")]
            let (sector, sectors, flags) = (word as u64, (word >> 64) as u32, (word >> 96) as u32);
            let allowed = if self.kind == Kind::WriteZeroes {
                FLAG_UNMAP
            } else {
                0
            };
            if flags & !allowed != 0 {
                return Err(Status::Unsupported);
            }
            if sectors > MAX_SEGMENT_SECTORS {
                return Err(Status::IoError);
            }
            let position = position_on(disk, sector, sectors.into())?;
            if sectors > 0 {
                self.segments.push(Segment {
                    position,
                    len: u64::from(sectors) * SECTOR_SIZE,
                    may_unmap: flags & FLAG_UNMAP != 0,
                });
            }
        }
        Ok(())
    }

    // --- from step to step ---------------------------------------------------------------------

    /// Find the next step, or that there is none.
    fn next(&mut self, disk: &Disk) -> Next {
        let transfer = |operation| Step {
            operation,
            position: self.position,
            len: self.left.min(MAX_STEP_BYTES),
            offset: self.offset,
        };
        let segment = self.segments.last().copied();
        let ranged = |operation, segment: Segment| Step {
            operation,
            position: segment.position,
            len: segment.len,
            offset: 0,
        };
        self.step = match (self.kind, segment) {
            (Kind::Read, _) if self.left > 0 => transfer(Operation::Read),
            (Kind::Write, _) if self.left > 0 => transfer(Operation::Write),
            (Kind::Discard, Some(segment)) => ranged(Operation::Discard, segment),
            (_, Some(segment)) => match zeroing(disk, segment.may_unmap) {
                Operation::WriteZeros => Step {
                    operation: Operation::WriteZeros,
                    position: segment.position,
                    len: segment.len.min(MAX_STEP_BYTES),
                    offset: 0,
                },
                operation => ranged(operation, segment),
            },
            _ if self.needs_sync => SYNC,
            _ => return Next::Finished(Status::Ok),
        };
        Next::Step
    }

    /// Take in what the step's system call gave: bytes moved, or 0 where none move.
    pub(super) fn advance(&mut self, result: io::Result<usize>, disk: &mut Disk) -> Next {
        match result {
            Ok(count) => self.succeed(count as u64, disk),
            Err(error) => self.fail(&error, disk),
        }
    }

    fn succeed(&mut self, count: u64, disk: &Disk) -> Next {
        self.retries = 0;
        let Step { operation, len, .. } = self.step;
        match operation {
            Operation::Read | Operation::Write | Operation::WriteZeros if count == 0 => {
                // The file ends before the disk does: it was cut while we use it.
                return Next::Finished(Status::IoError);
            }
            Operation::Read | Operation::Write => {
                let count = count.min(len);
                self.position += count;
                self.left -= count;
                // A step is at most `MAX_STEP_BYTES`, a chain less than 4 GiB.
                #[expect(clippy::cast_possible_truncation, reason = "see above")]
                let moved = count as u32;
                self.offset += moved as usize;
                if operation == Operation::Read {
                    self.written += moved;
                }
            }
            Operation::WriteZeros => {
                let count = count.min(len);
                if let Some(segment) = self.segments.last_mut() {
                    segment.position += count;
                    segment.len -= count;
                    if segment.len == 0 {
                        self.segments.pop();
                    }
                }
            }
            Operation::ZeroRange | Operation::PunchHole | Operation::Discard => {
                self.segments.pop();
            }
            Operation::Sync => self.needs_sync = false,
        }
        self.next(disk)
    }

    fn fail(&mut self, error: &io::Error, disk: &mut Disk) -> Next {
        let is_transfer = matches!(self.step.operation, Operation::Read | Operation::Write);
        match (error.raw_os_error(), self.step.operation) {
            (Some(libc::EINTR | libc::EAGAIN), _) if self.retries < MAX_RETRIES => {
                self.retries += 1;
                Next::Step
            }
            (Some(libc::EINVAL), _)
                if is_transfer && disk.direct_alignment().is_some() && !self.is_cached =>
            {
                self.is_cached = true;
                Next::Step
            }
            (Some(libc::EOPNOTSUPP | libc::ENOSYS), Operation::ZeroRange) => {
                disk.zeroing.has_zero_range = false;
                self.next(disk)
            }
            (Some(libc::EOPNOTSUPP | libc::ENOSYS), Operation::PunchHole) => {
                disk.zeroing.has_punch_hole = false;
                self.next(disk)
            }
            (Some(libc::EOPNOTSUPP | libc::ENOSYS), Operation::Discard) => {
                Next::Finished(Status::Unsupported)
            }
            _ => Next::Finished(Status::IoError),
        }
    }

    // --- back to the driver --------------------------------------------------------------------

    /// Write the status; gives what the used ring is to say: bytes written, the status included.
    pub(super) fn answer(&self, status: Status) -> u32 {
        let Some(last) = self.chain.writable.len().checked_sub(1) else {
            return 0;
        };
        self.chain.writable.copy_from(last, &[status as u8]);
        // Less than 4 GiB in all, so this cannot wrap.
        self.written.saturating_add(1)
    }
}

/// The byte position of sectors that are all on the disk.
fn position_on(disk: &Disk, sector: u64, sectors: u64) -> Result<u64, Status> {
    let end = sector.checked_add(sectors).ok_or(Status::IoError)?;
    if end > disk.capacity_sectors() {
        return Err(Status::IoError);
    }
    // A capacity is a file's size divided by this.
    sector.checked_mul(SECTOR_SIZE).ok_or(Status::IoError)
}

/// How to make zeros. Room that may be given up is; where it may not be but the file can do
/// nothing else, giving it up still reads as zeros.
fn zeroing(disk: &Disk, may_unmap: bool) -> Operation {
    let known = disk.zeroing;
    match (known.has_zero_range, known.has_punch_hole) {
        (_, true) if may_unmap => Operation::PunchHole,
        (true, _) => Operation::ZeroRange,
        (false, true) => Operation::PunchHole,
        (false, false) => Operation::WriteZeros,
    }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
