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

use vm_memory::{GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, ReadVolatile};

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
        fill(memory, address, &mut file, length)
    }
}

/// Fill `length` bytes at `address` from `source`.
///
/// The memory's own `read_exact_volatile_from` reads once, and takes a short read for the end;
/// network and virtual file systems give a part of what was asked for at a time.
fn fill(
    memory: &GuestMemoryMmap,
    address: GuestAddress,
    source: &mut impl ReadVolatile,
    length: usize,
) -> Result<(), GuestMemoryError> {
    for slice in memory.get_slices(address, length) {
        source.read_exact_volatile(&mut slice?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::bitmap::BitmapSlice;
    use vm_memory::{Bytes, VolatileMemoryError, VolatileSlice};

    use super::*;

    /// A file system that gives five bytes at a time.
    struct Slow<'a>(&'a [u8]);

    impl ReadVolatile for Slow<'_> {
        fn read_volatile<B: BitmapSlice>(
            &mut self,
            buffer: &mut VolatileSlice<B>,
        ) -> Result<usize, VolatileMemoryError> {
            let length = buffer.len().min(5);
            self.0.read_volatile(&mut buffer.subslice(0, length)?)
        }
    }

    #[test]
    fn short_reads_are_gone_on_with_across_regions() {
        let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)];
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let bytes: Vec<u8> = (0..=255).collect();
        fill(&memory, GuestAddress(0xf83), &mut Slow(&bytes), 256).unwrap();
        let mut copied = vec![0; 256];
        memory.read_slice(&mut copied, GuestAddress(0xf83)).unwrap();
        assert_eq!(copied, bytes);
        let error = fill(&memory, GuestAddress(0), &mut Slow(&bytes), 257).unwrap_err();
        assert!(error.to_string().contains("fill"), "{error}");
        fill(&memory, GuestAddress(0x1f80), &mut Slow(&bytes), 256).unwrap_err();
    }

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
