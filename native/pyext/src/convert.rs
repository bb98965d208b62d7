//! Values that cross the border in another form than Python's own. Called with the interpreter
//! attached, on whatever thread Python is on.

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::errors::NativeError;

/// Take over a descriptor number that Python gives away.
///
/// # Errors
/// EBADF: no such descriptor is open; nothing was taken.
pub(crate) fn take_fd(fd: RawFd) -> Result<OwnedFd, NativeError> {
    if fd < 0 {
        return Err(NativeError::Descriptor(rustix::io::Errno::BADF.into()));
    }
    #[expect(unsafe_code, reason = "a number from Python becomes a descriptor here")]
    // SAFETY: `fd` is not negative; whether it is open is what the call below finds out, and
    // nothing else is done with the borrow.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_getfd(borrowed).map_err(|errno| NativeError::Descriptor(errno.into()))?;
    #[expect(unsafe_code, reason = "a number from Python becomes a descriptor here")]
    // SAFETY: `fd` is open, and the stub's contract is that Python gives up its ownership.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(owned)
}
