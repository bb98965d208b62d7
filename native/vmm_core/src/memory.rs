//! The guest's memory: made anew, or taken from a snapshot's file.
//!
//! Every mapping starts at a multiple of 2 MiB, as guest memory does, so that the kernel can back
//! both sides by huge pages. A snapshot's file is mapped privately: pages are read when the guest
//! touches them and copied when it writes them, so that restoring costs no copy and clones share
//! what they don't change. Called while a machine is built or snapshotted.

#![expect(unsafe_code, reason = "mappings are made and named to the kernel")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_core::ram::GuestRam;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::arch;

const HUGE_PAGE: usize = 2 << 20;
const MIB: u64 = 1 << 20;
/// What is looked at, and left out of a snapshot's file if it is all zeros.
const SNAPSHOT_BLOCK: usize = 64 << 10;

/// Where the memory comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryBacking {
    /// Anonymous memory of the process, with transparent huge pages: the fastest to touch.
    #[default]
    Anonymous,
    /// A memfd mapped shared: for devices served by other processes.
    Shared,
    /// A memfd of 2 MiB pages from the host's pool (`vm.nr_hugepages`), mapped shared.
    HugePages,
}

/// Why there is no memory.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// the pages are not to be had
    #[error("allocate {size_mib} MiB of guest memory ({backing:?}): lower default_memory, or free memory{}", pool_note(*.backing))]
    Allocate {
        /// MiB asked for.
        size_mib: u64,
        /// Of which kind.
        backing: MemoryBacking,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// a snapshot's memory file is another than the snapshot says
    #[error("memory file has {actual} bytes, the snapshot {expected}")]
    FileSize {
        /// Bytes the snapshot's machine has.
        expected: u64,
        /// Bytes of the file.
        actual: u64,
    },
    /// ranges that overlap: our own mistake
    #[error("lay out guest memory")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
    /// a mapping that vm-memory refuses: our own mistake
    #[error("describe guest memory")]
    Region(#[source] vm_memory::mmap::MmapRegionError),
    /// the file cannot be read or written
    #[error("{operation} the memory file")]
    File {
        /// What was attempted.
        operation: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn pool_note(backing: MemoryBacking) -> &'static str {
    match backing {
        MemoryBacking::HugePages => "; 2 MiB pages come from vm.nr_hugepages",
        MemoryBacking::Anonymous | MemoryBacking::Shared => "",
    }
}

/// A mapping of ours, unmapped when the last user of the guest's memory is gone.
struct Mapping {
    base: *mut libc::c_void,
    len: usize,
}

// SAFETY: an address and a length; the mapping is process-wide.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `map`, of this length, and dropped with the `GuestRam` that was the only
        // one to know addresses in it.
        let _unmapped = unsafe { rustix::mm::munmap(self.base, self.len) };
    }
}

/// What a mapping shows.
enum Content<'a> {
    Anonymous,
    File {
        file: &'a OwnedFd,
        offset: u64,
        flags: MapFlags,
    },
}

/// Map `len` bytes at a multiple of 2 MiB.
fn map(len: usize, content: &Content<'_>) -> io::Result<Mapping> {
    // Room to align in; what is too much is given back.
    let room = len
        .checked_add(HUGE_PAGE)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
    let reserve = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: no address is asked for, so nothing that exists is touched.
    let start =
        unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), room, ProtFlags::empty(), reserve) }?;
    let base = start.map_addr(|address| address.next_multiple_of(HUGE_PAGE));
    let before = base.addr() - start.addr();
    let after = HUGE_PAGE - before;
    if before > 0 {
        // SAFETY: the first bytes of the range just reserved, which nobody knows.
        unsafe { rustix::mm::munmap(start, before) }?;
    }
    // SAFETY: the last bytes of the range just reserved, which nobody knows.
    unsafe { rustix::mm::munmap(base.wrapping_byte_add(len), after) }?;
    let mapping = Mapping { base, len };
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let fixed = MapFlags::FIXED | MapFlags::NORESERVE;
    match content {
        Content::Anonymous => {
            // SAFETY: replaces our own reservation, and nothing else.
            unsafe { rustix::mm::mmap_anonymous(base, len, access, fixed | MapFlags::PRIVATE) }?;
        }
        Content::File {
            file,
            offset,
            flags,
        } => {
            // SAFETY: replaces our own reservation, and nothing else.
            unsafe { rustix::mm::mmap(base, len, access, fixed | *flags, file, *offset) }?;
        }
    }
    for advice in [Advice::LinuxHugepage, Advice::LinuxDontFork] {
        // SAFETY: advice that changes no content. Refused (no such kernel option): not needed.
        let _advised = unsafe { rustix::mm::madvise(base, len, advice) };
    }
    Ok(mapping)
}

/// Make memory of `size_mib`, all zeros.
///
/// # Errors
/// The host has not so much of this kind.
pub fn allocate(size_mib: u32, backing: MemoryBacking) -> Result<Arc<GuestRam>, MemoryError> {
    let size = u64::from(size_mib) * MIB;
    let failed = |source: io::Error| MemoryError::Allocate {
        size_mib: u64::from(size_mib),
        backing,
        source,
    };
    let file = match backing {
        MemoryBacking::Anonymous => None,
        MemoryBacking::Shared => Some(make_memfd(size, MemfdFlags::empty()).map_err(failed)?),
        MemoryBacking::HugePages => {
            Some(make_memfd(size, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB).map_err(failed)?)
        }
    };
    if backing == MemoryBacking::HugePages
        && let Some(file) = &file
    {
        // The pool is asked now: later the guest would die of a page that is not there.
        rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, size)
            .map_err(|errno| failed(errno.into()))?;
    }
    let file = file.as_ref().map(|file| (file, MapFlags::SHARED));
    assemble(size, file).map_err(|error| match error {
        Assembly::Map(source) => failed(source),
        Assembly::Layout(error) => error,
    })
}

/// Memory whose pages come from a snapshot's `file` as they are touched. The file must stay as it
/// is while the machine lives: it is the host's to keep.
///
/// # Errors
/// It has another size, or cannot be mapped.
pub fn from_snapshot(size_mib: u32, file: &OwnedFd) -> Result<Arc<GuestRam>, MemoryError> {
    let expected = u64::from(size_mib) * MIB;
    let stat = rustix::fs::fstat(file).map_err(|errno| MemoryError::File {
        operation: "examine",
        source: errno.into(),
    })?;
    // A mapping past the end of its file would fault on access.
    let actual = u64::try_from(stat.st_size).unwrap_or(0);
    if actual != expected {
        return Err(MemoryError::FileSize { expected, actual });
    }
    assemble(expected, Some((file, MapFlags::PRIVATE))).map_err(|error| match error {
        Assembly::Map(source) => MemoryError::File {
            operation: "map",
            source,
        },
        Assembly::Layout(error) => error,
    })
}

enum Assembly {
    Map(io::Error),
    Layout(MemoryError),
}

impl From<io::Error> for Assembly {
    fn from(error: io::Error) -> Self {
        Self::Map(error)
    }
}

fn make_memfd(size: u64, flags: MemfdFlags) -> io::Result<OwnedFd> {
    let flags = flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("guest-memory", flags)?;
    rustix::fs::ftruncate(&file, size)?;
    // Whoever gets the descriptor cannot make our mapping fault.
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// Map each range of the machine's layout and hand the mappings over.
fn assemble(size: u64, file: Option<(&OwnedFd, MapFlags)>) -> Result<Arc<GuestRam>, Assembly> {
    let is_shared = matches!(&file, Some((_, flags)) if flags.contains(MapFlags::SHARED));
    let shared_file = match &file {
        Some((file, _)) if is_shared => Some(Arc::new(File::from(file.try_clone()?))),
        _ => None,
    };
    let mut mappings = Vec::new();
    let mut regions = Vec::new();
    let mut offset = 0;
    for (address, len) in arch::layout::ram_ranges(size) {
        let content = match &file {
            None => Content::Anonymous,
            Some((file, flags)) => Content::File {
                file,
                offset,
                flags: *flags,
            },
        };
        let mapping = map(len, &content)?;
        regions.push(describe(&mapping, address, shared_file.as_ref(), offset)?);
        mappings.push(mapping);
        offset += len as u64;
    }
    let memory = GuestMemoryMmap::from_regions(regions)
        .map_err(|error| Assembly::Layout(MemoryError::Layout(error)))?;
    Ok(GuestRam::with_owner(memory, Box::new(mappings)))
}

fn describe(
    mapping: &Mapping,
    address: GuestAddress,
    shared_file: Option<&Arc<File>>,
    offset: u64,
) -> Result<GuestRegionMmap, Assembly> {
    let flags = if shared_file.is_some() {
        libc::MAP_SHARED
    } else {
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS
    };
    let mut builder = MmapRegionBuilder::new(mapping.len)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags | libc::MAP_NORESERVE);
    if let Some(file) = shared_file {
        builder = builder.with_file_offset(FileOffset::from_arc(Arc::clone(file), offset));
    }
    // SAFETY: the mapping is readable, writable, of this length, and outlives the region: both
    // are owned by the same `GuestRam`, which drops its regions first.
    let builder = unsafe { builder.with_raw_mmap_pointer(mapping.base.cast()) };
    let region = builder
        .build()
        .map_err(|error| Assembly::Layout(MemoryError::Region(error)))?;
    GuestRegionMmap::new(region, address).ok_or(Assembly::Layout(MemoryError::Layout(
        vm_memory::GuestRegionCollectionError::NoMemoryRegion,
    )))
}

/// Write all memory to `file`, in the order of its ranges; zeros become holes. The guest must not
/// run.
///
/// # Errors
/// As write(2): the disk is full, say.
pub fn write_snapshot(ram: &GuestRam, file: &File) -> Result<(), MemoryError> {
    let failed = |operation| move |source| MemoryError::File { operation, source };
    file.set_len(ram.size()).map_err(failed("make room in"))?;
    let mut block = vec![0; SNAPSHOT_BLOCK];
    let mut position = 0;
    for (address, len) in ram.ranges() {
        let mut done = 0;
        while done < len {
            let count = ram.copy_out(address + done, &mut block);
            if count == 0 {
                break;
            }
            let bytes = block.get(..count).unwrap_or(&[]);
            if bytes.iter().any(|byte| *byte != 0) {
                file.write_all_at(bytes, position)
                    .map_err(failed("write"))?;
            }
            done += count as u64;
            position += count as u64;
        }
    }
    file.sync_all().map_err(failed("sync"))
}

/// The descriptor other processes map the memory by, if it is shared.
pub fn shared_file(ram: &GuestRam) -> Option<std::os::fd::BorrowedFd<'_>> {
    use vm_memory::{GuestMemory, GuestMemoryRegion};
    let region = ram.mappings().iter().next()?;
    region.file_offset().map(|offset| offset.file().as_fd())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn memory_is_aligned_for_huge_pages_and_zero() {
        for backing in [MemoryBacking::Anonymous, MemoryBacking::Shared] {
            let ram = allocate(8, backing).unwrap();
            assert_eq!(ram.size(), 8 << 20);
            assert_eq!(ram.host_address(0).unwrap() % HUGE_PAGE, 0);
            let mut byte = [1];
            ram.mappings()
                .read_slice(&mut byte, GuestAddress((8 << 20) - 1))
                .unwrap();
            assert_eq!(byte, [0]);
            assert_eq!(
                shared_file(&ram).is_some(),
                backing == MemoryBacking::Shared
            );
        }
    }

    #[test]
    fn a_snapshot_comes_back_and_its_file_stays_as_it_was() {
        let ram = allocate(4, MemoryBacking::Anonymous).unwrap();
        let at = GuestAddress(0x12_3456);
        ram.mappings().write_slice(b"kept", at).unwrap();
        let file = tempfile::tempfile().unwrap();
        write_snapshot(&ram, &file).unwrap();

        let again = from_snapshot(4, &file.try_clone().unwrap().into()).unwrap();
        let mut bytes = [0; 4];
        again.mappings().read_slice(&mut bytes, at).unwrap();
        assert_eq!(&bytes, b"kept");
        again.mappings().write_slice(b"gone", at).unwrap();
        file.read_exact_at(&mut bytes, at.0).unwrap();
        assert_eq!(&bytes, b"kept");
    }

    #[test]
    fn a_file_of_another_size_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100).unwrap();
        let error = from_snapshot(4, &file.into()).unwrap_err();
        assert!(matches!(error, MemoryError::FileSize { actual: 100, .. }));
    }

    #[test]
    fn too_much_is_an_error_that_says_how_much() {
        // A pool that no test machine has.
        let error = allocate(u32::MAX, MemoryBacking::HugePages).unwrap_err();
        assert!(error.to_string().contains("4294967295 MiB"), "{error}");
    }
}
