//! Locks that outlive a panic of their holder.
//!
//! Each holder in this crate leaves a consistent value between any two statements, and a panic in a
//! thread is reported as the machine's end, so a poisoned lock says nothing that is not known.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Lock, whether or not a holder panicked.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
