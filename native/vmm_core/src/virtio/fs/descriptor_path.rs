//! The path of an open descriptor, for the many calls that do not take an `O_PATH` one itself.
//!
//! The kernel goes from `/proc/self/fd/N` straight to what the descriptor has open, even if that is
//! a symbolic link, and no name on the way is the guest's.

use std::ffi::CStr;
use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd};

/// "/proc/self/fd/" and ten digits, and the end.
const SIZE: usize = 32;

/// A path built on the stack.
#[derive(Debug)]
pub(super) struct DescriptorPath([u8; SIZE]);

impl DescriptorPath {
    /// The path of `fd`, good while it is open.
    pub(super) fn new(fd: BorrowedFd<'_>) -> Self {
        let mut path = [0; SIZE];
        let mut rest = &mut path[..SIZE - 1];
        // 14 bytes and at most ten digits fit.
        let _written = write!(rest, "/proc/self/fd/{}", fd.as_raw_fd());
        Self(path)
    }

    /// For a system call.
    pub(super) fn as_c_str(&self) -> &CStr {
        // The last byte is zero.
        CStr::from_bytes_until_nul(&self.0).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn it_names_the_descriptor() {
        let file = tempfile::tempfile().unwrap();
        let path = DescriptorPath::new(file.as_fd());
        let expected = format!("/proc/self/fd/{}", file.as_raw_fd());
        assert_eq!(path.as_c_str().to_str(), Ok(expected.as_str()));
        assert!("/proc/self/fd/".len() + i32::MAX.to_string().len() < SIZE);
    }
}
