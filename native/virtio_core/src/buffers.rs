//! The memory a driver named in its descriptors, and moving bytes between it and the host.
//!
//! Each range was checked against the guest's mappings once, when it was added, and the mappings
//! are kept alive by the buffers themselves. The guest changes the bytes at any time, so they are
//! touched only by raw copies and by the kernel (`preadv`, `sendmsg`, …), never through Rust
//! references. Used on whichever thread runs the device.

#![expect(
    unsafe_code,
    reason = "guest memory may not be lent as Rust slices: raw copies and system calls"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::Arc;

use crate::host_range::HostRange;
use crate::ram::GuestRam;

/// Ranges given to one system call; what does not fit takes another.
pub const MAX_RANGES_PER_CALL: usize = 64;

/// Checked guest memory, in order.
#[derive(Clone, Debug)]
pub struct GuestBuffers {
    /// Keeps the mappings under `ranges`.
    ram: Arc<GuestRam>,
    /// Keeps those under ranges that were appended from before the memory grew.
    also: Vec<Arc<GuestRam>>,
    ranges: Vec<HostRange>,
    len: usize,
}

/// Ranges for one system call that does scatter or gather.
pub struct Iovecs<'a> {
    entries: [libc::iovec; MAX_RANGES_PER_CALL],
    count: usize,
    /// Bytes the entries name.
    pub len: usize,
    _buffers: &'a GuestBuffers,
}

impl Iovecs<'_> {
    /// The entries: valid for reads and writes by the kernel while the buffers live.
    pub fn as_slice(&self) -> &[libc::iovec] {
        self.entries.get(..self.count).unwrap_or(&[])
    }
}

impl GuestBuffers {
    /// No bytes, of this memory.
    pub fn new(ram: Arc<GuestRam>) -> Self {
        Self {
            ram,
            also: Vec::new(),
            ranges: Vec::new(),
            len: 0,
        }
    }

    /// The memory the bytes are in.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Forget all ranges; the room for them is kept.
    #[inline]
    pub fn clear(&mut self) {
        self.ranges.clear();
        self.also.clear();
        self.len = 0;
    }

    /// Forget all ranges and go on in other memory.
    #[inline]
    pub fn reset(&mut self, ram: &Arc<GuestRam>) {
        self.clear();
        if !Arc::ptr_eq(&self.ram, ram) {
            self.ram = Arc::clone(ram);
        }
    }

    /// Add `len` bytes at guest `address`. False: not all of them are memory; nothing was added.
    #[inline]
    pub fn push(&mut self, address: u64, len: usize) -> bool {
        match self.ram.prefix(address, len) {
            _ if len == 0 => true,
            Some(range) if range.len == len => {
                self.ranges.push(range);
                self.len += len;
                true
            }
            _ => self.push_pieces(address, len),
        }
    }

    /// As `push`, over as many mappings as it takes. `len` is not 0.
    #[cold]
    fn push_pieces(&mut self, address: u64, len: usize) -> bool {
        if address.checked_add(len as u64 - 1).is_none() {
            return false;
        }
        let before = self.ranges.len();
        let (mut address, mut rest) = (address, len);
        while rest > 0 {
            let Some(range) = self.ram.prefix(address, rest) else {
                self.ranges.truncate(before);
                return false;
            };
            self.ranges.push(range);
            rest -= range.len;
            // Wraps only when nothing is left.
            address = address.wrapping_add(range.len as u64);
        }
        self.len += len;
        true
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No bytes at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Ranges of host memory; more than [`MAX_RANGES_PER_CALL`] take several system calls.
    pub fn range_count(&self) -> usize {
        self.ranges.len()
    }

    /// Forget all but the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        let mut rest = len;
        self.ranges.retain_mut(|range| {
            range.len = range.len.min(rest);
            rest -= range.len;
            range.len > 0
        });
        self.len -= self.len.saturating_sub(len);
    }

    /// The `len` bytes from `offset`; fewer if the buffers end before.
    #[must_use]
    pub fn range(&self, offset: usize, len: usize) -> Self {
        let ranges: Vec<_> = self.pieces(offset, len).collect();
        Self {
            ram: Arc::clone(&self.ram),
            also: self.also.clone(),
            len: ranges.iter().map(|range| range.len).sum(),
            ranges,
        }
    }

    /// Append `len` bytes of `other` from `offset` on; fewer if it ends before.
    pub fn append_range(&mut self, other: &Self, offset: usize, len: usize) {
        if !Arc::ptr_eq(&self.ram, &other.ram) {
            self.also.push(Arc::clone(&other.ram));
        }
        self.also.extend(other.also.iter().cloned());
        for piece in other.pieces(offset, len) {
            self.len += piece.len;
            self.ranges.push(piece);
        }
    }

    /// Append the memory of `other`.
    pub fn append(&mut self, mut other: Self) {
        if !other.ranges.is_empty() && !Arc::ptr_eq(&self.ram, &other.ram) {
            self.also.push(other.ram);
        }
        self.also.append(&mut other.also);
        self.len += other.len;
        self.ranges.append(&mut other.ranges);
    }

    /// The ranges that make up `len` bytes from `offset`, or as many bytes as there are.
    #[inline]
    fn pieces(&self, offset: usize, len: usize) -> impl Iterator<Item = HostRange> + '_ {
        let (mut skip, mut rest) = (offset, len);
        let mut ranges = self.ranges.iter();
        std::iter::from_fn(move || {
            while rest > 0 {
                let range = ranges.next()?;
                if let Some(piece) = range.part(skip, rest) {
                    skip = 0;
                    rest -= piece.len;
                    return Some(piece);
                }
                // The range is no longer than what is to be skipped.
                skip -= range.len;
            }
            None
        })
    }

    /// Copy bytes from `offset` on out; gives how many there were.
    pub fn copy_to(&self, offset: usize, target: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in self.pieces(offset, target.len()) {
            let at = target.as_mut_ptr().wrapping_add(done);
            // SAFETY: `self` keeps the memory that the piece is of; the pieces are at most
            // `target.len()` bytes in all, so there is room for this one after the `done` before
            // it; the target is a Rust slice, which no guest memory is.
            unsafe { piece.copy_to(at) };
            done += piece.len;
        }
        done
    }

    /// Copy `source` in from `offset` on; gives how many bytes fitted.
    pub fn copy_from(&self, offset: usize, source: &[u8]) -> usize {
        let mut done = 0;
        for piece in self.pieces(offset, source.len()) {
            let at = source.as_ptr().wrapping_add(done);
            // SAFETY: as in `copy_to`, with the directions exchanged.
            unsafe { piece.copy_from(at) };
            done += piece.len;
        }
        done
    }

    /// Set `len` bytes from `offset` on to zero; gives how many there were.
    pub fn fill_zero(&self, offset: usize, len: usize) -> usize {
        let mut done = 0;
        for piece in self.pieces(offset, len) {
            // SAFETY: `self` keeps the memory that the piece is of.
            unsafe { piece.fill_zero() };
            done += piece.len;
        }
        done
    }

    /// Copy a plain value out, if there are bytes enough from `offset` on.
    #[inline]
    pub fn read_array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        // Nearly always a header that a driver put into one range.
        let first = self.ranges.first().and_then(|range| range.part(offset, N));
        if let Some(HostRange { base, len }) = first
            && len == N
        {
            let piece = HostRange { base, len: N };
            // SAFETY: `self` keeps the memory that the piece is of, and the array has N bytes.
            unsafe { piece.copy_to(bytes.as_mut_ptr()) };
            return Some(bytes);
        }
        (self.copy_to(offset, &mut bytes) == N).then_some(bytes)
    }

    /// Guest address and length of each range, as the driver named them where no mapping ended.
    pub fn guest_ranges(&self) -> impl Iterator<Item = (u64, usize)> {
        let address = |range: &HostRange| self.ram.guest_address(range);
        self.ranges
            .iter()
            .filter_map(move |range| Some((address(range)?, range.len)))
    }

    /// The first ranges of `len` bytes from `offset` on, for one system call.
    pub fn iovecs(&self, offset: usize, len: usize) -> Iovecs<'_> {
        let empty = libc::iovec {
            iov_base: ptr::null_mut(),
            iov_len: 0,
        };
        let mut iovecs = Iovecs {
            entries: [empty; MAX_RANGES_PER_CALL],
            count: 0,
            len: 0,
            _buffers: self,
        };
        for piece in self.pieces(offset, len) {
            // Drivers describe pages one by one that are often neighbours.
            let last = iovecs.count.checked_sub(1);
            match last.and_then(|last| iovecs.entries.get_mut(last)) {
                Some(last) if last.iov_base.addr() + last.iov_len == piece.base.addr() => {
                    last.iov_len += piece.len;
                }
                _ => {
                    let Some(entry) = iovecs.entries.get_mut(iovecs.count) else {
                        break;
                    };
                    *entry = libc::iovec {
                        iov_base: piece.base.cast(),
                        iov_len: piece.len,
                    };
                    iovecs.count += 1;
                }
            }
            iovecs.len += piece.len;
        }
        iovecs
    }

    /// Give bytes from `offset` on to a stream socket: as many as one call takes.
    ///
    /// # Errors
    /// As sendmsg(2); EPIPE comes without a signal.
    pub fn send(&self, socket: BorrowedFd<'_>, offset: usize) -> io::Result<usize> {
        let iovecs = self.iovecs(offset, self.len.saturating_sub(offset));
        let message = libc::msghdr {
            msg_name: ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: iovecs.entries.as_ptr().cast_mut(),
            msg_iovlen: iovecs.count,
            msg_control: ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        };
        retry(|| {
            // SAFETY: `message` names `count` valid entries that the kernel only reads; each is a
            // range of a mapping that `self.ram` keeps. Guest writes only change the bytes sent.
            unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) }
        })
    }

    /// Fill from a descriptor that has no position: as many bytes as one call gives, 0 at the end.
    ///
    /// # Errors
    /// As readv(2).
    pub fn receive(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let iovecs = self.iovecs(0, self.len);
        retry(|| {
            // SAFETY: the entries are valid (see `send`) and name writable mappings that no Rust
            // reference points into, so the kernel may write them.
            unsafe { libc::readv(fd.as_raw_fd(), iovecs.entries.as_ptr(), iovecs.count_c()) }
        })
    }

    /// Take one packet from a descriptor that gives packets: into `parts`, in order, and what has
    /// no room there into `overflow`. Gives the packet's length, and how much room `parts` had:
    /// only their first [`MAX_RANGES_PER_CALL`] ranges are used.
    ///
    /// # Errors
    /// As readv(2).
    pub fn receive_packet<'a>(
        parts: impl IntoIterator<Item = &'a Self>,
        overflow: &mut [u8],
        fd: BorrowedFd<'_>,
    ) -> io::Result<(usize, usize)> {
        let overflow = libc::iovec {
            iov_base: overflow.as_mut_ptr().cast(),
            iov_len: overflow.len(),
        };
        let mut entries = [overflow; MAX_RANGES_PER_CALL + 1];
        let ranges = parts.into_iter().flat_map(|part| &part.ranges);
        let (mut room, mut count) = (0, 1);
        // The last entry stays the overflow's, wherever the guest's ranges end.
        for (entry, range) in entries.iter_mut().zip(ranges.take(MAX_RANGES_PER_CALL)) {
            *entry = libc::iovec {
                iov_base: range.base.cast(),
                iov_len: range.len,
            };
            room += range.len;
            count += 1;
        }
        // SAFETY: at most 65 valid entries: ranges of mappings that the parts keep and that no Rust
        // reference points into, then a slice that is ours alone until this returns.
        let len = retry(|| unsafe { libc::readv(fd.as_raw_fd(), entries.as_ptr(), count) })?;
        Ok((len, room))
    }

    /// Write bytes from `offset` on to a descriptor that has no position, in one call.
    ///
    /// # Errors
    /// As writev(2).
    pub fn write_to(&self, fd: BorrowedFd<'_>, offset: usize) -> io::Result<usize> {
        let iovecs = self.iovecs(offset, self.len.saturating_sub(offset));
        retry(|| {
            // SAFETY: the entries are valid (see `send`); the kernel only reads the memory.
            unsafe { libc::writev(fd.as_raw_fd(), iovecs.entries.as_ptr(), iovecs.count_c()) }
        })
    }

    /// Fill bytes from `offset` on with what a file has at `position`; short as preadv(2) is.
    ///
    /// # Errors
    /// As preadv(2).
    pub fn read_at(&self, file: BorrowedFd<'_>, offset: usize, position: u64) -> io::Result<usize> {
        let iovecs = self.iovecs(offset, self.len.saturating_sub(offset));
        let position = file_position(position)?;
        retry(|| {
            // SAFETY: as in `receive`.
            unsafe {
                libc::preadv64(
                    file.as_raw_fd(),
                    iovecs.entries.as_ptr(),
                    iovecs.count_c(),
                    position,
                )
            }
        })
    }

    /// Write bytes from `offset` on into a file at `position`; short as pwritev(2) is.
    ///
    /// # Errors
    /// As pwritev(2).
    pub fn write_at(
        &self,
        file: BorrowedFd<'_>,
        offset: usize,
        position: u64,
    ) -> io::Result<usize> {
        let iovecs = self.iovecs(offset, self.len.saturating_sub(offset));
        let position = file_position(position)?;
        retry(|| {
            // SAFETY: as in `write_to`.
            unsafe {
                libc::pwritev64(
                    file.as_raw_fd(),
                    iovecs.entries.as_ptr(),
                    iovecs.count_c(),
                    position,
                )
            }
        })
    }

    /// [`Self::write_at`] with `RWF_*` flags, such as to append.
    ///
    /// # Errors
    /// As pwritev2(2).
    pub fn write_at_with(
        &self,
        file: BorrowedFd<'_>,
        offset: usize,
        position: u64,
        flags: libc::c_int,
    ) -> io::Result<usize> {
        let iovecs = self.iovecs(offset, self.len.saturating_sub(offset));
        let position = file_position(position)?;
        retry(|| {
            // SAFETY: as in `write_to`.
            unsafe {
                libc::pwritev2(
                    file.as_raw_fd(),
                    iovecs.entries.as_ptr(),
                    iovecs.count_c(),
                    position,
                    flags,
                )
            }
        })
    }
}

impl Iovecs<'_> {
    fn count_c(&self) -> libc::c_int {
        // At most MAX_RANGES_PER_CALL.
        libc::c_int::try_from(self.count).unwrap_or(libc::c_int::MAX)
    }
}

fn file_position(position: u64) -> io::Result<i64> {
    i64::try_from(position).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(count) = usize::try_from(call()) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
#[path = "buffers_tests.rs"]
mod tests;
