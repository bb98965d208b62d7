//! Giving pages of guest memory back to the host.
//!
//! How depends on what is under a mapping, and the wrong way is worse than none: a hole punched
//! under a private mapping would destroy the image that other machines are started from, and
//! `MADV_DONTNEED` of shared pages frees nothing. `GuestRam::discard` finds the mapping and checks
//! the range; here is what each kind takes. Called by the balloon, on the I/O thread.

#![expect(unsafe_code, reason = "madvise(2) and fallocate(2)")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use crate::host_range::HostRange;

/// The unit in which memory can be given back to the host.
pub const PAGE_SIZE: u64 = 4096;

/// Why memory was not given back to the host.
#[derive(Debug, Error)]
pub enum DiscardError {
    /// not whole pages
    #[error("{len} bytes at {address:#x} are not whole pages")]
    Alignment {
        /// Guest address.
        address: u64,
        /// Bytes.
        len: u64,
    },
    /// not all of it is memory
    #[error("{len} bytes at {address:#x} are not all guest memory")]
    NotMemory {
        /// Guest address.
        address: u64,
        /// Bytes.
        len: u64,
    },
    /// the host refused: huge pages have larger units, for one
    #[error("discard {len} bytes at {address:#x}")]
    System {
        /// Guest address.
        address: u64,
        /// Bytes.
        len: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What is under a mapping, and so how pages of it are given back.
#[derive(Clone, Debug)]
pub(crate) enum Backing {
    /// Pages of this process alone, copies of a file's included: `MADV_DONTNEED` frees them. A
    /// copy reads as the file again, which stays as it is.
    Private,
    /// Anonymous pages that others may have: only `MADV_REMOVE` frees them.
    SharedAnonymous,
    /// A shared file, a memfd mostly: pages are holes punched into it, seen by all who map it.
    SharedFile {
        file: Arc<File>,
        /// Where in the file the mapping starts.
        start: u64,
    },
}

impl Backing {
    /// Of a region as it was mapped.
    pub(crate) fn of(region: &GuestRegionMmap) -> Self {
        let is_shared = region.flags() & libc::MAP_SHARED != 0;
        match region.file_offset() {
            Some(offset) if is_shared => Self::SharedFile {
                file: Arc::clone(offset.arc()),
                start: offset.start(),
            },
            None if is_shared => Self::SharedAnonymous,
            _ => Self::Private,
        }
    }

    /// Give back whole pages: `range` is inside of the mapping, `offset` bytes into it.
    pub(crate) fn discard(&self, range: HostRange, offset: u64) -> io::Result<()> {
        let status = match self {
            Self::Private => {
                // SAFETY: whole pages (`GuestRam::discard`, and mappings start at one) inside of a
                // mapping that lives as long as its `GuestRam`; no Rust object is in guest memory,
                // so nothing depends on what the pages hold.
                unsafe { libc::madvise(range.base.cast(), range.len, libc::MADV_DONTNEED) }
            }
            Self::SharedAnonymous => {
                // SAFETY: as above.
                unsafe { libc::madvise(range.base.cast(), range.len, libc::MADV_REMOVE) }
            }
            Self::SharedFile { file, start } => {
                let out_of_range = || io::Error::from_raw_os_error(libc::EINVAL);
                let position = start.checked_add(offset).ok_or_else(out_of_range)?;
                let position = libc::off64_t::try_from(position).map_err(|_| out_of_range())?;
                let len = libc::off64_t::try_from(range.len).map_err(|_| out_of_range())?;
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                // SAFETY: an open descriptor and numbers; no memory is given.
                unsafe { libc::fallocate64(file.as_raw_fd(), mode, position, len) }
            }
        };
        if status == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, MmapRegion};

    use super::*;
    use crate::ram::GuestRam;

    const PAGE: u64 = PAGE_SIZE;

    fn memfd(len: u64) -> File {
        // SAFETY: a name that ends in zero, and flags.
        let fd = unsafe { libc::memfd_create(c"ram".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: a descriptor that nobody else has.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(len).unwrap();
        file
    }

    /// Four pages at 0x10000, mapped from the second page of the file on if there is one.
    fn four_pages(flags: libc::c_int, file: Option<File>) -> Arc<GuestRam> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let file = file.map(|file| FileOffset::new(file, PAGE));
        let region = MmapRegion::build(file, 4 * 4096, protection, flags).unwrap();
        let region = GuestRegionMmap::new(region, GuestAddress(0x1_0000)).unwrap();
        GuestRam::new(GuestMemoryMmap::from_regions(vec![region]).unwrap())
    }

    fn fill(ram: &GuestRam, page: u64) {
        let bytes = [0xaa; 4096];
        let at = GuestAddress(0x1_0000 + page * PAGE);
        ram.mappings().write_slice(&bytes, at).unwrap();
    }

    fn first_bytes(ram: &GuestRam) -> [u8; 4] {
        [0, 1, 2, 3].map(|page| {
            let at = GuestAddress(0x1_0000 + page * PAGE);
            ram.mappings().read_obj(at).unwrap()
        })
    }

    /// Pages of the mapping that have memory under them.
    fn resident(ram: &GuestRam) -> usize {
        let mut pages = [0u8; 4];
        let base = ram.prefix(0x1_0000, 1).unwrap().base;
        // SAFETY: a mapping of four pages, and room for four answers.
        let status = unsafe { libc::mincore(base.cast(), 4 * 4096, pages.as_mut_ptr()) };
        assert_eq!(status, 0);
        pages.iter().filter(|page| **page & 1 != 0).count()
    }

    #[test]
    fn discarded_pages_are_the_hosts_again() {
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let rams = [
            four_pages(private, None),
            four_pages(shared, None),
            four_pages(libc::MAP_SHARED, Some(memfd(6 * PAGE))),
        ];
        for ram in rams {
            (0..4).for_each(|page| fill(&ram, page));
            assert_eq!(resident(&ram), 4);
            ram.discard(0x1_1000, 2 * PAGE).unwrap();
            assert_eq!(resident(&ram), 2);
            assert_eq!(first_bytes(&ram), [0xaa, 0, 0, 0xaa]);
        }
    }

    #[test]
    fn a_shared_file_gets_the_hole_where_the_mapping_is() {
        let file = memfd(6 * PAGE);
        let other = file.try_clone().unwrap();
        let ram = four_pages(libc::MAP_SHARED, Some(file));
        (0..4).for_each(|page| fill(&ram, page));
        ram.discard(0x1_3000, PAGE).unwrap();
        let metadata = other.metadata().unwrap();
        // Units of 512 bytes: three pages of six.
        let blocks = metadata.blocks();
        assert_eq!((metadata.len(), blocks), (6 * PAGE, 3 * 8));
        let mut bytes = [0; 1];
        other.read_exact_at(&mut bytes, 3 * PAGE).unwrap();
        assert_eq!(bytes, [0xaa]);
        other.read_exact_at(&mut bytes, 4 * PAGE).unwrap();
        assert_eq!(bytes, [0]);
    }

    #[test]
    fn a_file_under_a_private_mapping_stays_as_it_is() {
        let file = memfd(6 * PAGE);
        file.write_all_at(&vec![7; 6 * 4096], 0).unwrap();
        let other = file.try_clone().unwrap();
        let ram = four_pages(libc::MAP_PRIVATE, Some(file));
        fill(&ram, 0);
        fill(&ram, 1);
        ram.discard(0x1_0000, PAGE).unwrap();
        assert_eq!(first_bytes(&ram), [7, 0xaa, 7, 7]);
        let mut bytes = vec![0; 6 * 4096];
        other.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 7));
    }
}
