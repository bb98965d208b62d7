//! An answer under construction, in memory that is used again for the next.
//!
//! Bounded by the room the guest left; what does not fit is remembered and becomes an error, so
//! that whoever builds an answer need not check each step.

use std::time::Duration;

use rustix::fs::Statx;
use rustix::io::Errno;

use super::protocol::OUT_HEADER_SIZE;

/// `struct fuse_attr`.
const ATTR_SIZE: usize = 88;
/// `struct fuse_entry_out`.
pub(super) const ENTRY_SIZE: usize = 40 + ATTR_SIZE;

/// The answer so far.
#[derive(Debug)]
pub(super) struct Reply {
    /// Room for the header, then the fields.
    bytes: Vec<u8>,
    room: usize,
    is_overfull: bool,
}

impl Reply {
    /// With memory for most answers.
    pub(super) fn new() -> Self {
        Self {
            bytes: Vec::with_capacity(4096),
            room: 0,
            is_overfull: false,
        }
    }

    /// Start anew, with `room` bytes in all.
    pub(super) fn begin(&mut self, room: usize) {
        self.bytes.clear();
        self.bytes.resize(OUT_HEADER_SIZE, 0);
        self.room = room;
        self.is_overfull = false;
    }

    /// Leave room for no more than `len` bytes of fields.
    pub(super) fn limit(&mut self, len: usize) {
        self.room = self.room.min(OUT_HEADER_SIZE + len);
    }

    /// Bytes that still fit.
    pub(super) fn room_left(&self) -> usize {
        self.room.saturating_sub(self.bytes.len())
    }

    /// Nothing but the header so far.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.len() <= OUT_HEADER_SIZE
    }

    /// The answer with its header. `in_place` bytes of data are in the guest's memory already.
    ///
    /// # Errors
    /// The guest left too little room.
    pub(super) fn finish(
        &mut self,
        unique: u64,
        error: Option<Errno>,
        in_place: usize,
    ) -> Result<&[u8], Errno> {
        if self.is_overfull {
            return Err(Errno::INVAL);
        }
        if error.is_some() {
            self.bytes.truncate(OUT_HEADER_SIZE);
        }
        let len = u32::try_from(self.bytes.len() + in_place).map_err(|_| Errno::INVAL)?;
        let code = error.map_or(0, |errno| -errno.raw_os_error());
        let header =
            u128::from(len) | u128::from(code.cast_unsigned()) << 32 | u128::from(unique) << 64;
        let (place, _fields) = self
            .bytes
            .split_first_chunk_mut::<OUT_HEADER_SIZE>()
            .ok_or(Errno::INVAL)?;
        *place = header.to_le_bytes();
        Ok(&self.bytes)
    }

    /// Some bytes.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        if bytes.len() > self.room_left() {
            self.is_overfull = true;
        } else {
            self.bytes.extend_from_slice(bytes);
        }
    }

    /// At most `len` bytes that `fill` writes; it gives how many.
    ///
    /// # Errors
    /// `ERANGE` without room, or what `fill` gives.
    pub(super) fn fill(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
    ) -> Result<(), Errno> {
        if len > self.room_left() {
            return Err(Errno::RANGE);
        }
        let start = self.bytes.len();
        self.bytes.resize(start + len, 0);
        let filled = fill(self.bytes.get_mut(start..).unwrap_or_default());
        self.bytes.truncate(start + *filled.as_ref().unwrap_or(&0));
        filled.map(drop)
    }

    /// A 32-bit field.
    pub(super) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    /// A 64-bit field.
    pub(super) fn u64(&mut self, value: u64) {
        self.words([value]);
    }

    /// Fields that make up so many words of 64 bits; [`pair`] has two of 32.
    pub(super) fn words<const N: usize>(&mut self, words: [u64; N]) {
        self.bytes(words.map(u64::to_le_bytes).as_flattened());
    }

    /// `struct fuse_attr_out`.
    pub(super) fn attributes(&mut self, stat: &Statx, timeout: Duration) {
        self.words([timeout.as_secs(), pair(timeout.subsec_nanos(), 0)]);
        self.words(attr(stat, 0));
    }

    /// `struct fuse_entry_out`.
    pub(super) fn entry(&mut self, node: u64, stat: &Statx, timeout: Duration, attr_flags: u32) {
        let (seconds, nanoseconds) = (timeout.as_secs(), timeout.subsec_nanos());
        // The generation is 0: ids are never used again.
        let times = pair(nanoseconds, nanoseconds);
        self.words([node, 0, seconds, seconds, times]);
        self.words(attr(stat, attr_flags));
    }

    /// A `struct fuse_entry_out` that says nothing.
    pub(super) fn no_entry(&mut self) {
        self.bytes(&[0; ENTRY_SIZE]);
    }
}

/// Two fields of 32 bits in a word.
pub(super) fn pair(first: u32, second: u32) -> u64 {
    u64::from(first) | u64::from(second) << 32
}

/// `struct fuse_attr`.
fn attr(stat: &Statx, flags: u32) -> [u64; ATTR_SIZE / 8] {
    let device = encode_device(stat.stx_rdev_major, stat.stx_rdev_minor);
    let (atime, mtime, ctime) = (&stat.stx_atime, &stat.stx_mtime, &stat.stx_ctime);
    [
        stat.stx_ino,
        stat.stx_size,
        stat.stx_blocks,
        atime.tv_sec.cast_unsigned(),
        mtime.tv_sec.cast_unsigned(),
        ctime.tv_sec.cast_unsigned(),
        pair(atime.tv_nsec, mtime.tv_nsec),
        pair(ctime.tv_nsec, u32::from(stat.stx_mode)),
        pair(stat.stx_nlink, stat.stx_uid),
        pair(stat.stx_gid, device),
        pair(stat.stx_blksize, flags),
    ]
}

/// A device number as the kernel's `new_encode_dev` does it.
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}

/// And back.
pub(super) fn decode_device(device: u32) -> (u32, u32) {
    (
        device >> 8 & 0xfff,
        (device & 0xff) | (device >> 12 & 0xf_ff00),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_says_length_error_and_whose_answer_it_is() {
        let mut reply = Reply::new();
        reply.begin(64);
        reply.u64(7);
        let bytes = reply.finish(0x1122, None, 100).unwrap();
        assert_eq!(bytes.len(), 24);
        assert_eq!(
            bytes[..16],
            [124, 0, 0, 0, 0, 0, 0, 0, 0x22, 0x11, 0, 0, 0, 0, 0, 0]
        );
        let bytes = reply.finish(1, Some(Errno::NOENT), 0).unwrap();
        assert_eq!(bytes[..8], [16, 0, 0, 0, 0xfe, 0xff, 0xff, 0xff]);
        assert_eq!(bytes.len(), 16, "an error has no fields");
    }

    #[test]
    fn what_does_not_fit_is_an_error_at_the_end() {
        let mut reply = Reply::new();
        reply.begin(20);
        reply.u32(1);
        reply.u32(2);
        assert_eq!(reply.finish(1, None, 0), Err(Errno::INVAL));
        reply.begin(20);
        assert_eq!(reply.fill(5, |_| Ok(5)), Err(Errno::RANGE));
        assert_eq!(reply.fill(4, |_| Err(Errno::IO)), Err(Errno::IO));
        assert!(reply.is_empty());
        assert_eq!(reply.fill(4, |_| Ok(2)), Ok(()));
        assert_eq!(reply.finish(1, None, 0).map(<[u8]>::len), Ok(18));
    }

    #[test]
    fn device_numbers_go_round() {
        for (major, minor) in [(1, 3), (0xfff, 0xf_ffff), (8, 0x1234)] {
            assert_eq!(decode_device(encode_device(major, minor)), (major, minor));
        }
    }
}
