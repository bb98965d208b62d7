//! A range of this process's memory that the guest reads and writes at the same time, and copying
//! it.
//!
//! Neither side waits for the other, so what is copied may be torn between two writes of the
//! guest; that is the guest's business. Ours is that it is copied once: a compiler that sees a
//! copy of a copy may go back to the original, which by then says something else than what was
//! checked. Guest memory therefore never becomes a Rust reference, and after each copy the
//! compiler is told that it may have changed.

#![expect(unsafe_code, reason = "copies to and from raw memory")]

use std::ptr;
use std::sync::atomic::{Ordering, compiler_fence};

/// A range of a mapping of guest memory.
///
/// Only made by `GuestRam`, for ranges inside of its mappings: whoever holds one also holds the
/// `Arc<GuestRam>` it came from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostRange {
    /// First byte, in this process.
    pub(crate) base: *mut u8,
    /// Bytes.
    pub(crate) len: usize,
}

// SAFETY: a pair of numbers; access through it is unsafe and argued where it happens.
unsafe impl Send for HostRange {}
// SAFETY: as above.
unsafe impl Sync for HostRange {}

impl HostRange {
    /// The `len` bytes from `offset` on, or as many as there are; `None` if there are none.
    #[inline]
    pub(crate) fn part(&self, offset: usize, len: usize) -> Option<Self> {
        let rest = self.len.checked_sub(offset).filter(|rest| *rest > 0)?;
        Some(Self {
            base: self.base.wrapping_add(offset),
            len: len.min(rest),
        })
    }

    /// Copy the bytes out, each once.
    ///
    /// # Safety
    /// The `Arc<GuestRam>` that the range came from is alive, and `target` is memory of this
    /// process, not the guest's, with room for `self.len` bytes.
    #[inline]
    pub(crate) unsafe fn copy_to(&self, target: *mut u8) {
        // SAFETY: the range is readable, the target has room (the caller says so); they don't
        // overlap, since one is the guest's memory and the other not. Bytes have no invariant that
        // a write of the guest in between could break.
        unsafe { ptr::copy_nonoverlapping(self.base.cast_const(), target, self.len) };
        compiler_fence(Ordering::SeqCst);
    }

    /// Copy bytes in.
    ///
    /// # Safety
    /// The `Arc<GuestRam>` that the range came from is alive, and `source` is `self.len` readable
    /// bytes of this process, not the guest's.
    #[inline]
    pub(crate) unsafe fn copy_from(&self, source: *const u8) {
        // SAFETY: as in `copy_to`, with the directions exchanged; devices only get ranges of
        // memory that may be written.
        unsafe { ptr::copy_nonoverlapping(source, self.base, self.len) };
        // Nor may it think that it knows what is there now.
        compiler_fence(Ordering::SeqCst);
    }

    /// Set the bytes to zero.
    ///
    /// # Safety
    /// The `Arc<GuestRam>` that the range came from is alive.
    #[inline]
    pub(crate) unsafe fn fill_zero(&self) {
        // SAFETY: the range may be written, and is mapped (the caller says so).
        unsafe { ptr::write_bytes(self.base, 0, self.len) };
        compiler_fence(Ordering::SeqCst);
    }
}
