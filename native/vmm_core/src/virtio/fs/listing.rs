//! What the kernel listed of one directory and the guest has not had yet.
//!
//! The guest takes a page at a time, a few dozen names; the kernel gives hundreds, and to seek in
//! a directory it may have to sort a part of it anew. So the rest is kept, of the directory listed
//! last and no other: the guest decides how many it opens. A listing that begins, or that goes on
//! elsewhere than it stopped, is made anew.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, RawDir, SeekFrom};
use rustix::io::Errno;

/// What the kernel lists at a time.
const SIZE: usize = 32 << 10;
/// The same where a listing goes on after another came in between: that may happen again.
const SIZE_ELSEWHERE: usize = 4 << 10;

/// An entry as the kernel gave it.
#[derive(Debug)]
struct Entry {
    inode: u64,
    /// Position of what comes after it.
    next: u64,
    kind: FileType,
    /// In `names`, with its zero.
    name: Range<usize>,
}

/// An entry that was not taken yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Listed<'a> {
    pub(super) inode: u64,
    pub(super) next: u64,
    pub(super) kind: FileType,
    pub(super) name: &'a CStr,
}

/// Entries of one directory from some position on.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// By which the directory was opened; 0 is none.
    handle: u64,
    /// Where the first entry that is left is.
    position: u64,
    entries: Vec<Entry>,
    names: Vec<u8>,
    /// The first entry that is left.
    first: usize,
    /// Bytes to list next.
    size: usize,
    buffer: Box<[MaybeUninit<u8>]>,
}

impl Listing {
    /// Of no directory.
    pub(super) fn new() -> Self {
        Self {
            buffer: Box::new_uninit_slice(SIZE),
            ..Self::default()
        }
    }

    /// Go to a position of the directory that `handle` is, of which nothing is kept if it is not
    /// where the last listing stopped.
    ///
    /// # Errors
    /// As lseek(2).
    pub(super) fn go_to(
        &mut self,
        directory: BorrowedFd<'_>,
        handle: u64,
        position: u64,
    ) -> Result<(), Errno> {
        // From the start a guest wants to see the directory as it is now.
        if position != 0 && (self.handle, self.position) == (handle, position) {
            return Ok(());
        }
        self.clear();
        rustix::fs::seek(directory, SeekFrom::Start(position))?;
        (self.handle, self.position) = (handle, position);
        self.size = if position == 0 { SIZE } else { SIZE_ELSEWHERE };
        Ok(())
    }

    /// The first entry that is left; none at the end.
    ///
    /// # Errors
    /// As getdents(2).
    pub(super) fn first(&mut self, directory: BorrowedFd<'_>) -> Result<Option<Listed<'_>>, Errno> {
        if self.first == self.entries.len()
            && let Err(errno) = self.fill(directory)
        {
            self.clear();
            return Err(errno);
        }
        let Some(entry) = self.entries.get(self.first) else {
            return Ok(None);
        };
        let name = self.names.get(entry.name.clone()).unwrap_or_default();
        Ok(Some(Listed {
            inode: entry.inode,
            next: entry.next,
            kind: entry.kind,
            name: CStr::from_bytes_with_nul(name).unwrap_or_default(),
        }))
    }

    /// Take it.
    pub(super) fn advance(&mut self) {
        if let Some(entry) = self.entries.get(self.first) {
            self.position = entry.next;
            self.first += 1;
        }
    }

    fn clear(&mut self) {
        self.handle = 0;
        self.entries.clear();
        self.names.clear();
        self.first = 0;
    }

    /// The directory's descriptor is where the entries end.
    fn fill(&mut self, directory: BorrowedFd<'_>) -> Result<(), Errno> {
        self.entries.clear();
        self.names.clear();
        self.first = 0;
        let size = std::mem::replace(&mut self.size, SIZE);
        let buffer = self.buffer.get_mut(..size).ok_or(Errno::NOMEM)?;
        let mut listed = RawDir::new(directory, buffer);
        while let Some(entry) = listed.next() {
            let entry = entry?;
            let start = self.names.len();
            self.names.extend(entry.file_name().to_bytes_with_nul());
            self.entries.push(Entry {
                inode: entry.ino(),
                next: entry.next_entry_cookie(),
                kind: entry.file_type(),
                name: start..self.names.len(),
            });
            if listed.is_buffer_empty() {
                break;
            }
        }
        Ok(())
    }
}
