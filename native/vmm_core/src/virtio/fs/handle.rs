//! What the guest has opened: files and directories, by handle.
//!
//! Only regular files and directories are ever opened, and those by way of their node's
//! descriptor: a name that changes in between changes nothing, and no device, pipe or socket of
//! the host is touched.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, FileType, Mode, OFlags, openat};
use rustix::io::Errno;

use super::attributes::change_mode;
use super::descriptor_path::DescriptorPath;
use super::node::{Place, attributes_of};
use super::table::Table;

/// Flags that the guest's open may have: the others are the guest kernel's business, are said
/// again with each write, or (direct I/O) ask for an alignment that guest buffers do not have.
const ALLOWED: OFlags = OFlags::RWMODE.union(OFlags::TRUNC).union(OFlags::NOATIME);

/// Something open.
#[derive(Debug)]
pub(super) struct Handle {
    /// None when a restore could not open it again.
    pub(super) descriptor: Option<OwnedFd>,
    /// Of a directory: where it is, to see which of its entries are other file systems.
    pub(super) directory: Option<Place>,
    /// To open it again.
    pub(super) flags: OFlags,
}

/// The handles of one session.
#[derive(Debug)]
pub(super) struct Handles(pub(super) Table<Handle>);

impl Handles {
    /// A file's descriptor.
    ///
    /// # Errors
    /// `EBADF`: no such handle, or of a directory. `ESTALE`: lost.
    pub(super) fn file(&self, id: u64) -> Result<BorrowedFd<'_>, Errno> {
        let handle = self.0.get(id).ok_or(Errno::BADF)?;
        match (&handle.descriptor, handle.directory) {
            (_, Some(_)) => Err(Errno::BADF),
            (None, None) => Err(Errno::STALE),
            (Some(descriptor), None) => Ok(descriptor.as_fd()),
        }
    }

    /// A directory's descriptor, and where it is.
    ///
    /// # Errors
    /// `EBADF`: no such handle, or of a file. `ESTALE`: lost.
    pub(super) fn directory(&self, id: u64) -> Result<(BorrowedFd<'_>, Place), Errno> {
        let handle = self.0.get(id).ok_or(Errno::BADF)?;
        let place = handle.directory.ok_or(Errno::BADF)?;
        let descriptor = handle.descriptor.as_ref().ok_or(Errno::STALE)?;
        Ok((descriptor.as_fd(), place))
    }
}

/// What an open of the guest means on the host.
pub(super) fn host_flags(flags: u32) -> OFlags {
    OFlags::from_bits_retain(flags) & ALLOWED
}

/// Whether these flags could change the file.
pub(super) fn is_writing(flags: OFlags) -> bool {
    (flags & OFlags::RWMODE) != OFlags::RDONLY || flags.contains(OFlags::TRUNC)
}

/// Open a node of a kind as a file, by its `O_PATH` descriptor.
///
/// # Errors
/// `EISDIR`, `ELOOP`: a link. `ENXIO`: a device, pipe or socket. Others as open(2).
pub(super) fn open_file(
    kind: FileType,
    descriptor: BorrowedFd<'_>,
    flags: OFlags,
) -> Result<OwnedFd, Errno> {
    match kind {
        FileType::RegularFile => open_again(descriptor, flags),
        FileType::Directory => Err(Errno::ISDIR),
        FileType::Symlink => Err(Errno::LOOP),
        _ => Err(Errno::NXIO),
    }
}

/// Open a directory by its `O_PATH` descriptor.
///
/// # Errors
/// `ENOTDIR`, others as open(2).
pub(super) fn open_directory(descriptor: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    open_again(descriptor, OFlags::RDONLY | OFlags::DIRECTORY)
}

fn open_again(descriptor: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = DescriptorPath::new(descriptor);
    // Not to wait for whoever has a lease on the file.
    let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    openat(CWD, path.as_c_str(), flags, Mode::empty())
}

/// Drop the set-user-id bit, and the set-group-id bit of a program, as a write by someone
/// without privilege does.
///
/// # Errors
/// As statx(2) and chmod(2).
pub(super) fn drop_set_ids(file: BorrowedFd<'_>) -> Result<(), Errno> {
    let mode = u32::from(attributes_of(file, c"")?.stx_mode);
    let mut kept = mode & !libc::S_ISUID;
    if mode & libc::S_IXGRP != 0 {
        kept &= !libc::S_ISGID;
    }
    if kept == mode {
        return Ok(());
    }
    change_mode(file, kept)
}
