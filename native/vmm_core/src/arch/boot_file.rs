//! A file that a machine boots from: a kernel or an initrd.
//!
//! It is trusted configuration, yet may be missing, a directory, cut off, or change while it is
//! read. Headers are read by offset; contents go from the file straight into guest memory. Nothing
//! is mapped, so a file that shrinks is an error and not a signal. Used while a machine is built, by
//! one thread at a time.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// An open file, and its name for messages.
#[derive(Debug)]
pub struct BootFile {
    file: File,
    path: PathBuf,
    size_bytes: u64,
}

impl BootFile {
    /// Open the file at `path`.
    ///
    /// # Errors
    /// It can't be opened, or is not a regular file.
    pub fn open(path: &Path) -> io::Result<Self> {
        // A FIFO must not hold up the caller before it is seen not to be a file.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        Self::new(file, path.to_owned())
    }

    /// Use an open `file`; its position will be moved. `path` is for messages only.
    ///
    /// # Errors
    /// It is not a regular file.
    pub fn new(file: File, path: PathBuf) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            ));
        }
        Ok(Self {
            file,
            path,
            size_bytes: metadata.len(),
        })
    }

    /// Its name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size when it was opened.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Fill `buffer` with what is at `offset`.
    ///
    /// # Errors
    /// The file can't be read, or ends before.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    /// Copy `length` bytes at `offset` to `address`.
    ///
    /// # Errors
    /// The file can't be read or ends before, or there is no such memory.
    pub fn copy_to(
        &self,
        memory: &GuestMemoryMmap,
        address: GuestAddress,
        offset: u64,
        length: usize,
    ) -> Result<(), GuestMemoryError> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset))
            .map_err(GuestMemoryError::IOError)?;
        // A file system may give less at a time than was asked for.
        let mut done = 0;
        while done < length {
            let at = address.unchecked_add(done as u64);
            match memory.read_volatile_from(at, &mut file, length - done)? {
                0 => {
                    return Err(GuestMemoryError::PartialBuffer {
                        expected: length,
                        completed: done,
                    });
                }
                count => done += count,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_file_is_refused_without_waiting() {
        let error = BootFile::open(Path::new("/")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let error = BootFile::open(Path::new("/dev/zero")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let error = BootFile::open(Path::new("/nonexistent/kernel")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
