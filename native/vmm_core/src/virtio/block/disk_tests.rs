use std::os::unix::fs::symlink;

use super::*;
use crate::virtio::block::rig::disk_file;

impl Disk {
    /// A disk that answers a read only when there is something in the pipe.
    pub(in crate::virtio::block) fn of_pipe() -> (Self, OwnedFd) {
        let (file, writer) = rustix::pipe::pipe().unwrap();
        let disk = Self {
            path: "pipe".into(),
            file,
            cached: None,
            alignment: None,
            zeroing: Zeroing {
                has_zero_range: true,
                has_punch_hole: true,
            },
            is_block_device: false,
            is_read_only: true,
            size: 1 << 20,
            logical_block_size: 512,
            physical_block_size: 512,
        };
        (disk, writer)
    }
}

#[test]
fn a_file_is_measured_in_whole_sectors() {
    let file = disk_file(4096 + 700);
    let disk = Disk::open(file.path(), false, false).unwrap();
    assert_eq!(disk.capacity_sectors(), 9);
    assert_eq!(disk.logical_block_size(), 512);
    assert!(disk.physical_block_size().is_power_of_two());
    assert!(!disk.is_block_device() && !disk.is_read_only());
    assert!(disk.direct_alignment().is_none());
}

#[test]
fn a_direct_disk_knows_its_alignment() {
    let file = disk_file(4096);
    let disk = Disk::open(file.path(), true, true).unwrap();
    let alignment = disk.direct_alignment().unwrap();
    assert!(alignment.memory.is_power_of_two() && alignment.position >= 512);
    let flags = rustix::fs::fcntl_getfl(disk.file()).unwrap();
    assert!(flags.contains(OFlags::DIRECT));
    assert!(
        !rustix::fs::fcntl_getfl(disk.cached_file())
            .unwrap()
            .contains(OFlags::DIRECT)
    );
    let closes = rustix::io::fcntl_getfd(disk.file()).unwrap();
    assert!(closes.contains(rustix::io::FdFlags::CLOEXEC));
}

#[test]
fn no_descriptor_is_left_not_blocking() {
    let file = disk_file(4096);
    let disk = Disk::open(file.path(), true, true).unwrap();
    for file in [disk.file(), disk.cached_file()] {
        let flags = rustix::fs::fcntl_getfl(file).unwrap();
        assert!(!flags.contains(OFlags::NONBLOCK));
    }
}

#[test]
fn what_is_no_disk_is_refused_with_its_path() {
    let folder = tempfile::tempdir().unwrap();
    let short = disk_file(511);
    let pipe = folder.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let dangling = folder.path().join("dangling");
    symlink("nowhere", &dangling).unwrap();

    let open = |path: &Path| Disk::open(path, true, false).unwrap_err();
    for (path, error) in [
        (folder.path(), open(folder.path())),
        (&pipe, open(&pipe)),
        (Path::new("/dev/null"), open(Path::new("/dev/null"))),
    ] {
        assert!(matches!(error, DiskError::Kind { .. }), "{error:?}");
        assert!(error.to_string().contains(path.to_str().unwrap()));
    }
    assert!(matches!(
        open(short.path()),
        DiskError::TooSmall { size: 511, .. }
    ));
    assert!(matches!(open(&dangling), DiskError::Open { .. }));
    let error = Disk::open(folder.path(), false, false).unwrap_err();
    assert!(error.to_string().contains("for reading and writing"));
}

#[test]
fn block_sizes_that_are_none_are_not_passed_on() {
    assert_eq!(block_size(4096, 512), 4096);
    assert_eq!(block_size(0, 512), 512);
    assert_eq!(block_size(1000, 512), 512);
    assert_eq!(block_size(256, 512), 512);
    assert_eq!(block_size(1 << 30, 512), 1 << 16);
    assert_eq!(block_size(4096, 1 << 17), 1 << 17);
}
