//! The file or block device behind a disk: opened, measured, and what it can do.
//!
//! With direct I/O a second description of the same file goes through the page cache: it serves
//! the requests whose memory or position are not aligned as the file system wants. The kernel
//! keeps the two coherent. Made when the machine is configured; used by the engines on the I/O
//! thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, SeekFrom, StatxFlags};
use thiserror::Error;

use super::SECTOR_SIZE;

/// Alignment assumed for direct I/O where the kernel does not say (before Linux 6.1). Too large
/// an assumption costs a pass through the page cache; too small a one as well, after an `EINVAL`.
const ASSUMED_ALIGNMENT: u32 = 4096;
/// Blocks larger than this are described to the guest as this large.
const MAX_BLOCK_SIZE: u32 = 1 << 16;

/// Why something is not usable as a disk.
#[derive(Debug, Error)]
pub enum DiskError {
    /// it cannot be opened
    #[error("open disk {path} {access}; check that it exists and this process may use it so")]
    Open {
        /// The disk.
        path: PathBuf,
        /// What for.
        access: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// it cannot be opened for direct I/O
    #[error("open disk {path} for direct I/O; turn direct I/O off if its file system has none")]
    OpenDirect {
        /// The disk.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// it cannot be asked for its size
    #[error("measure disk {path}")]
    Measure {
        /// The disk.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// a folder, a pipe, ...
    #[error("disk {path} is neither a file nor a block device; give the path of a raw image")]
    Kind {
        /// The disk.
        path: PathBuf,
    },
    /// less than a sector
    #[error("disk {path} has {size} bytes, not even a sector of 512; grow it first")]
    TooSmall {
        /// The disk.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
}

/// What direct I/O needs to be multiples of; powers of two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DirectAlignment {
    /// Host addresses.
    pub(crate) memory: u32,
    /// Positions and lengths.
    pub(crate) position: u32,
}

/// Which ways of making zeros the file is not known to lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Zeroing {
    /// `FALLOC_FL_ZERO_RANGE`.
    pub(crate) has_zero_range: bool,
    /// `FALLOC_FL_PUNCH_HOLE`.
    pub(crate) has_punch_hole: bool,
}

/// A disk.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    file: OwnedFd,
    /// Through the page cache, where `file` is direct.
    cached: Option<OwnedFd>,
    alignment: Option<DirectAlignment>,
    /// Changes when the file turns out to lack one.
    pub(crate) zeroing: Zeroing,
    is_block_device: bool,
    is_read_only: bool,
    size: u64,
    logical_block_size: u32,
    physical_block_size: u32,
}

impl Disk {
    /// Open and measure.
    ///
    /// # Errors
    /// It is not there, not a disk, or not to be used as asked.
    pub fn open(path: &Path, is_read_only: bool, is_direct: bool) -> Result<Self, DiskError> {
        let cached = open(path, is_read_only)?;
        let measure = |source: rustix::io::Errno| DiskError::Measure {
            path: path.to_owned(),
            source: source.into(),
        };
        let stat = fs::fstat(&cached).map_err(measure)?;
        let is_block_device = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            _ => {
                return Err(DiskError::Kind {
                    path: path.to_owned(),
                });
            }
        };
        // The end of a block device is its size, as a file's is. Every access names its position.
        let size = fs::seek(&cached, SeekFrom::End(0)).map_err(measure)?;
        if size < SECTOR_SIZE {
            return Err(DiskError::TooSmall {
                path: path.to_owned(),
                size,
            });
        }
        let (logical, physical) = if is_block_device {
            let logical = fs::ioctl_blksszget(&cached).map_err(measure)?;
            (logical, fs::ioctl_blkpbszget(&cached).map_err(measure)?)
        } else {
            // An image is portable: what is on it was made for sectors. The file system's block
            // is only where writes are cheap.
            let sector = 512;
            (sector, u32::try_from(stat.st_blksize).unwrap_or(sector))
        };
        let logical_block_size = block_size(logical, 512);
        let (file, cached, alignment) = if is_direct {
            let direct = open_direct(path, is_read_only)?;
            let other = fs::fstat(&direct).map_err(measure)?;
            if (other.st_dev, other.st_ino) != (stat.st_dev, stat.st_ino) {
                // Replaced between the two opens.
                return Err(measure(rustix::io::Errno::STALE));
            }
            let alignment = direct_alignment(&direct);
            (direct, Some(cached), Some(alignment))
        } else {
            (cached, None, None)
        };
        Ok(Self {
            path: path.to_owned(),
            file,
            cached,
            alignment,
            zeroing: Zeroing {
                has_zero_range: true,
                has_punch_hole: true,
            },
            is_block_device,
            is_read_only,
            size,
            logical_block_size,
            physical_block_size: block_size(physical, logical_block_size),
        })
    }

    /// No disk: `path` is a file that has nothing and takes nothing, and its size counts as 0.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(super) fn absent(path: &Path) -> Result<Self, DiskError> {
        Ok(Self {
            path: path.to_owned(),
            file: open(path, true)?,
            cached: None,
            alignment: None,
            zeroing: Zeroing {
                has_zero_range: false,
                has_punch_hole: false,
            },
            is_block_device: false,
            is_read_only: true,
            size: 0,
            logical_block_size: 512,
            physical_block_size: 512,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whole sectors; bytes after the last are out of reach.
    pub fn capacity_sectors(&self) -> u64 {
        self.size / SECTOR_SIZE
    }

    /// Writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// A device of the host's rather than a file.
    pub fn is_block_device(&self) -> bool {
        self.is_block_device
    }

    /// The smallest unit the guest may address.
    pub fn logical_block_size(&self) -> u32 {
        self.logical_block_size
    }

    /// The unit in which writes need no reading; a multiple of the logical block.
    pub fn physical_block_size(&self) -> u32 {
        self.physical_block_size
    }

    /// What direct I/O needs, if it is on.
    pub(crate) fn direct_alignment(&self) -> Option<DirectAlignment> {
        self.alignment
    }

    /// The file: direct, if direct I/O is on.
    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The file through the page cache.
    pub(crate) fn cached_file(&self) -> BorrowedFd<'_> {
        self.cached.as_ref().unwrap_or(&self.file).as_fd()
    }
}

fn open(path: &Path, is_read_only: bool) -> Result<OwnedFd, DiskError> {
    let (flags, access) = if is_read_only {
        (OFlags::RDONLY, "for reading")
    } else {
        (OFlags::RDWR, "for reading and writing")
    };
    // Without O_NONBLOCK a pipe given by mistake would be waited for; a disk does not mind.
    let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = fs::open(path, flags, Mode::empty()).map_err(|errno| DiskError::Open {
        path: path.to_owned(),
        access,
        source: errno.into(),
    })?;
    // ... but io_uring would give EAGAIN instead of waiting for the disk.
    let flags =
        fs::fcntl_getfl(&file).and_then(|flags| fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK));
    flags.map_err(|errno| DiskError::Open {
        path: path.to_owned(),
        access,
        source: errno.into(),
    })?;
    Ok(file)
}

fn open_direct(path: &Path, is_read_only: bool) -> Result<OwnedFd, DiskError> {
    let access = if is_read_only {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    let flags = access | OFlags::CLOEXEC | OFlags::DIRECT;
    fs::open(path, flags, Mode::empty()).map_err(|errno| DiskError::OpenDirect {
        path: path.to_owned(),
        source: errno.into(),
    })
}

/// What the kernel says of a file open for direct I/O, or a safe guess.
fn direct_alignment(file: &OwnedFd) -> DirectAlignment {
    let wanted = StatxFlags::DIOALIGN;
    let said = fs::statx(file, "", AtFlags::EMPTY_PATH, wanted)
        .ok()
        .filter(|stat| stat.stx_mask & wanted.bits() != 0)
        .map(|stat| (stat.stx_dio_mem_align, stat.stx_dio_offset_align));
    let valid =
        said.filter(|(memory, position)| memory.is_power_of_two() && position.is_power_of_two());
    let (memory, position) = valid.unwrap_or((ASSUMED_ALIGNMENT, ASSUMED_ALIGNMENT));
    DirectAlignment { memory, position }
}

/// A power of two between `least` and the most we tell a guest of.
fn block_size(said: u32, least: u32) -> u32 {
    if said.is_power_of_two() {
        said.clamp(least, MAX_BLOCK_SIZE.max(least))
    } else {
        least
    }
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
