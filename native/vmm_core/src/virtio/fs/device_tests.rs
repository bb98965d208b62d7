use std::path::PathBuf;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use super::*;
use crate::virtio::fs::mock_guest::{Body, Folder, MockGuest};
use crate::virtio::fs::protocol::{ROOT_ID, init, opcode};
use virtio_core::mock::MockBuffer;

impl Fs {
    /// Bounds as of a process that may open little.
    pub(in crate::virtio::fs) fn limit(&mut self, nodes: usize, handles: usize) {
        self.server.share.nodes.table.set_limit(nodes);
        self.server.share.handles.0.set_limit(handles);
    }

    /// What the guest may name.
    pub(in crate::virtio::fs) fn ids(&self) -> (Vec<u64>, Vec<u64>) {
        let nodes = self.server.share.nodes.table.iter().map(|(id, _)| id);
        let handles = self.server.share.handles.0.iter().map(|(id, _)| id);
        (nodes.collect(), handles.collect())
    }
}

#[test]
fn the_configuration_space_has_tag_and_queue_count() {
    let folder = Folder::new();
    let fs = Fs::new(FsConfig::new("kataShared", folder.path())).unwrap();
    let mut bytes = [0; 44];
    fs.read_config(0, &mut bytes);
    assert_eq!(&bytes[..11], b"kataShared\0");
    assert_eq!(bytes[11..36], [0; 25]);
    assert_eq!(bytes[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
    let mut word = [0; 4];
    fs.read_config(36, &mut word);
    assert_eq!(word, [1, 0, 0, 0]);
    let mut past = [0; 4];
    fs.read_config(usize::MAX, &mut past);
    assert_eq!(past, [0; 4]);
    assert_eq!(fs.queue_sizes(), [1024, 1024]);
    assert_eq!((fs.kind(), fs.name()), (DeviceKind::Fs, "kataShared"));
    // A tag that fills its field has no zero at its end.
    let full = Fs::new(FsConfig::new("x".repeat(36), folder.path())).unwrap();
    full.read_config(0, &mut bytes);
    assert_eq!(bytes[..40], *[&[b'x'; 36][..], &[1, 0, 0, 0]].concat());
}

#[test]
fn what_cannot_be_shared_is_said() {
    let folder = Folder::new();
    let error = |config| Fs::new(config).unwrap_err();
    let missing = error(FsConfig::new("shared", folder.join("none")));
    assert!(matches!(&missing, FsError::Folder { source, .. }
        if source.kind() == std::io::ErrorKind::NotFound));
    assert_eq!(
        missing.to_string(),
        format!("share folder {}", folder.join("none").display())
    );
    let file: PathBuf = folder.outside().join("canary");
    let not_directory = error(FsConfig::new("shared", &file));
    let expected = format!("share folder {}: not a directory", file.display());
    assert_eq!(not_directory.to_string(), expected);
    for tag in ["", "a\0b", &"x".repeat(37)] {
        assert!(matches!(
            error(FsConfig::new(tag, folder.path())),
            FsError::Tag(_)
        ));
    }
    for queue_size in [0, 3, 1 << 15 | 1] {
        let config = FsConfig {
            queue_size,
            ..folder.config()
        };
        assert!(matches!(error(config), FsError::QueueSize(size) if size == queue_size));
    }
}

#[test]
fn both_sides_agree_on_what_both_can() {
    let folder = Folder::new();
    let mut guest = MockGuest::boot(Fs::new(folder.config()).unwrap());
    assert_eq!(guest.attributes(ROOT_ID), Err(Errno::IO), "not before INIT");
    let answer = guest.init(u64::MAX).unwrap();
    assert_eq!(answer.0.len(), 64);
    assert_eq!((answer.u32(0), answer.u32(4)), (7, 39));
    let flags = u64::from(answer.u32(12)) | u64::from(answer.u32(32)) << 32;
    for wanted in [
        init::SUBMOUNTS,
        init::MAX_PAGES,
        init::DO_READDIRPLUS,
        init::HANDLE_KILLPRIV_V2,
    ] {
        assert_ne!(flags & wanted, 0);
    }
    let (posix_locks, writeback_cache) = (1 << 1, 1 << 16);
    assert_eq!(flags & (posix_locks | writeback_cache), 0);
    assert_eq!(answer.u32(20), 1 << 20, "max_write");
    assert_eq!(answer.u32(28), 256, "max_pages");
    // Nothing that the kernel does not have.
    let answer = guest.init(init::SUBMOUNTS | init::INIT_EXT).unwrap();
    assert_eq!(u64::from(answer.u32(12)), init::SUBMOUNTS | init::INIT_EXT);
    assert_eq!(answer.u32(32), 0);

    let mut with_version = |major: u32, minor: u32| {
        let body = Body::new().u32(major).u32(minor).u32(4096).u32(0);
        guest
            .request(opcode::INIT, 0, body)
            .map(|answer| answer.u32(0))
    };
    assert_eq!(with_version(7, 31), Ok(7), "the request was shorter then");
    assert_eq!(with_version(7, 30), Err(Errno::PROTO));
    assert_eq!(with_version(6, 99), Err(Errno::PROTO));
    assert_eq!(with_version(8, 0), Ok(7), "asks again with ours");
}

#[test]
fn a_session_ends_with_all_it_held() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    let (entry, handle) = guest.create(ROOT_ID, "file", libc::O_RDWR, 0o600).unwrap();
    guest.request(opcode::DESTROY, 0, Body::new()).unwrap();
    assert_eq!(guest.attributes(ROOT_ID), Err(Errno::IO));
    guest.init(u64::MAX).unwrap();
    assert_eq!(guest.attributes(entry.node), Err(Errno::STALE));
    assert_eq!(guest.read(handle, 0, 1), Err(Errno::BADF));
    let again = guest.lookup(ROOT_ID, "file").unwrap();
    assert_eq!(again.inode, entry.inode);

    guest.fs.reset();
    assert_eq!(guest.fs.ring_states(), [None, None]);
    assert_eq!(
        (
            guest.metric("current_nodes"),
            guest.metric("current_handles")
        ),
        (1, 0)
    );
    guest.fs.handle(1, EventFlags::IN).unwrap();
    guest.fs.reset();
}

#[test]
fn unknown_requests_are_not_implemented() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    // FLUSH, GETLK, BMAP, IOCTL, POLL, SETUPMAPPING, TMPFILE, STATX, and none at all.
    for opcode in [25, 31, 37, 39, 40, 48, 51, 52, 0, 7, 4096, u32::MAX] {
        let answer = guest.request(opcode, ROOT_ID, Body::new().bytes(&[0; 64]));
        assert_eq!(answer, Err(Errno::NOSYS), "{opcode}");
    }
}

#[test]
fn what_is_no_request_is_given_back_unanswered() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    let whole = guest.header(opcode::GETATTR, ROOT_ID, &Body::new().u64(0).u64(0));
    for len in [0usize, 1, 39] {
        let head = guest.send(1, &whole[..len], 128).0;
        assert_eq!(head.len, 0);
    }
    for claimed in [0u32, 39, 57, 1 << 20, u32::MAX] {
        let mut lying = whole.clone();
        lying[..4].copy_from_slice(&claimed.to_le_bytes());
        assert_eq!(guest.send(1, &lying, 128).0.len, 0, "{claimed}");
    }
    assert_eq!(guest.metric("malformed_requests"), 8);
    // Shorter than its kind has to be.
    let mut short = guest.header(opcode::OPEN, ROOT_ID, &Body::new().u32(0));
    assert_eq!(guest.send(1, &short, 128).0.len, 16);
    // A body far longer than any.
    short = guest.header(
        opcode::LOOKUP,
        ROOT_ID,
        &Body::new().bytes(&vec![b'x'; 200_000]),
    );
    assert_eq!(guest.send(1, &short, 128).0.len, 0);
    // Room for no answer, and for less than was asked.
    assert_eq!(guest.send(1, &whole, 15).0.len, 0);
    let (used, answer) = guest.send(1, &whole, 64);
    assert_eq!((used.len, &answer[4..8]), (16, &(-22i32).to_le_bytes()[..]));
}

#[test]
fn a_write_whose_outcome_has_no_room_is_not_done() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    let (_, handle) = guest.create(ROOT_ID, "file", libc::O_RDWR, 0o600).unwrap();
    let body = Body::new()
        .u64(handle)
        .u64(0)
        .u32(4)
        .u32(0)
        .u64(0)
        .u64(0)
        .bytes(b"data");
    let answer = guest.request_with_room(opcode::WRITE, ROOT_ID, &body, 23);
    assert_eq!(answer, Err(Errno::INVAL));
    // Fewer bytes than it says, more than any request has.
    for size in [5u32, (1 << 20) + 1, u32::MAX] {
        let body = Body::new()
            .u64(handle)
            .u64(0)
            .u32(size)
            .u32(0)
            .u64(0)
            .u64(0);
        let answer = guest.request(opcode::WRITE, ROOT_ID, body.bytes(b"data"));
        assert_eq!(answer, Err(Errno::INVAL));
    }
    assert_eq!(std::fs::read(folder.join("file")).unwrap(), b"");
}

#[test]
fn turns_are_bounded_and_ask_for_another() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    let request = guest.header(opcode::GETATTR, ROOT_ID, &Body::new().u64(0).u64(0));
    let one = [
        MockBuffer::readable(0x1_0000, 56),
        MockBuffer::writable(0x2_0000, 120),
    ];
    guest.drivers[1].write(0x1_0000, &request);
    for _ in 0..32 {
        guest.drivers[1].add(&one);
    }
    guest.fs.handle(1, EventFlags::IN).unwrap();
    assert_eq!(guest.drivers[1].take_used().len(), 32);
    assert!(!guest.transport.is_kicked(1));
    // Eight reads of a megabyte are two turns.
    let (_, handle) = guest.create(ROOT_ID, "file", libc::O_RDWR, 0o600).unwrap();
    std::fs::write(folder.join("file"), vec![1; 1 << 20]).unwrap();
    let body = Body::new().u64(handle).u64(0).u32(1 << 20).u32(0);
    let request = guest.header(opcode::READ, ROOT_ID, &body.u64(0).u64(0));
    guest.drivers[1].write(0x1_0000, &request);
    let one = [
        MockBuffer::readable(0x1_0000, 80),
        MockBuffer::writable(0x20_0000, 16 + (1 << 20)),
    ];
    for _ in 0..8 {
        guest.drivers[1].add(&one);
    }
    for _ in 0..2 {
        guest.fs.handle(1, EventFlags::IN).unwrap();
        let used = guest.drivers[1].take_used();
        assert_eq!(used.len(), 4);
        assert!(used.iter().all(|used| used.len == 16 + (1 << 20)));
    }
    assert!(guest.transport.is_kicked(1));
}

#[test]
fn a_paused_device_looks_at_its_queues_when_it_goes_on() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    guest.fs.pause().unwrap();
    let states = guest.fs.ring_states();
    assert_eq!(states.len(), 2);
    assert_eq!(states[1].unwrap().next_available, 1, "INIT was taken");
    guest.fs.resume();
    assert!(guest.transport.is_kicked(0) && guest.transport.is_kicked(1));
}

#[test]
fn the_filter_of_the_io_thread_lets_everything_through() {
    let folder = Folder::new();
    let path = folder.path();
    std::thread::spawn(move || {
        prepare_thread().unwrap();
        let mut guest = MockGuest::boot(Fs::new(FsConfig::new("shared", &path)).unwrap());
        let mut restored = Fs::new(FsConfig::new("shared", path)).unwrap();
        if rustix::process::geteuid().is_root() {
            (guest.uid, guest.gid) = (1234, 4321);
        }
        crate::seccomp::confine(crate::thread::Kind::Io).unwrap();
        guest.init(u64::MAX).unwrap();
        let (file, handle) = guest.create(ROOT_ID, "file", libc::O_RDWR, 0o4755).unwrap();
        guest.write_with(handle, 0, b"data", 1 << 2, 0).unwrap();
        guest
            .write_with(handle, 0, b"data", 0, libc::O_APPEND | libc::O_SYNC)
            .unwrap();
        assert_eq!(guest.read(handle, 0, 10).unwrap(), b"datadata");
        let set_all = Body::new().u32(0b1_1100_1111).u32(0).u64(handle).u64(4);
        let set_all = set_all
            .bytes(&[0; 44])
            .u32(0o4755)
            .u32(0)
            .u32(1)
            .u32(1)
            .u32(0);
        let u64s = |values: &[u64]| {
            values
                .iter()
                .fold(Body::new(), |body, value| body.u64(*value))
        };
        let requests = [
            (opcode::MKDIR, Body::new().u64(0o755).text("directory")),
            (
                opcode::MKNOD,
                Body::new().u64(0o01_0600).u64(0).text("fifo"),
            ),
            (opcode::SYMLINK, Body::new().text("link").text("target")),
            (opcode::LINK, Body::new().u64(file.node).text("second")),
            (opcode::LOOKUP, Body::new().text("link")),
            (
                opcode::RENAME,
                Body::new().u64(ROOT_ID).text("second").text("third"),
            ),
            (
                opcode::RENAME2,
                u64s(&[ROOT_ID, 1]).text("third").text("fourth"),
            ),
            (opcode::UNLINK, Body::new().text("fourth")),
            (opcode::RMDIR, Body::new().text("directory")),
            (opcode::GETATTR, u64s(&[0, 0])),
            (opcode::STATFS, Body::new()),
            (opcode::ACCESS, u64s(&[4])),
            (
                opcode::SETXATTR,
                Body::new().u32(1).u32(0).text("user.a").bytes(b"x"),
            ),
            (opcode::GETXATTR, u64s(&[10]).text("user.a")),
            (opcode::GETXATTR, u64s(&[0]).text("user.a")),
            (opcode::LISTXATTR, u64s(&[100])),
            (opcode::LISTXATTR, u64s(&[0])),
            (opcode::REMOVEXATTR, Body::new().text("user.a")),
            (opcode::FSYNC, u64s(&[handle, 0])),
            (opcode::FSYNC, u64s(&[handle, 1])),
            (opcode::FALLOCATE, u64s(&[handle, 0, 8192, 0])),
            (opcode::LSEEK, u64s(&[handle, 0, 3])),
            (
                opcode::COPY_FILE_RANGE,
                u64s(&[handle, 0, 0, handle, 4096, 4, 0]),
            ),
            (opcode::SYNCFS, u64s(&[0])),
        ];
        for (opcode, body) in requests {
            let answer = guest.request(opcode, ROOT_ID, body);
            assert!(answer.is_ok(), "{opcode}: {answer:?}");
        }
        guest.request(opcode::SETATTR, file.node, set_all).unwrap();
        guest
            .open(file.node, libc::O_RDONLY | libc::O_TRUNC)
            .unwrap();
        let link = guest.lookup(ROOT_ID, "link").unwrap().node;
        guest.request(opcode::READLINK, link, Body::new()).unwrap();
        let opened = guest.request(opcode::OPENDIR, ROOT_ID, Body::new().u64(0));
        let listing = opened.unwrap().u64(0);
        let list = u64s(&[listing, 0, 4096, 0, 0]);
        guest.request(opcode::READDIRPLUS, ROOT_ID, list).unwrap();
        guest
            .request(opcode::FSYNCDIR, ROOT_ID, u64s(&[listing, 0]))
            .unwrap();
        restored.restore(&guest.fs.save().unwrap()).unwrap();
        assert_eq!(restored.ids(), guest.fs.ids());
        let metrics = restored.metrics();
        for expected in [("lost_nodes", 1), ("lost_handles", 0)] {
            assert!(metrics.contains(&expected), "the removed one: {metrics:?}");
        }
    })
    .join()
    .unwrap();
}

#[test]
fn a_broken_ring_is_the_devices_end() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    guest.drivers[1].set_available_index(500);
    let broken = guest.fs.handle(1, EventFlags::IN);
    assert!(
        matches!(broken, Err(DeviceError::Ring { index: 1, .. })),
        "{broken:?}"
    );
    // Tokens that mean nothing.
    guest.fs.handle(2, EventFlags::IN).unwrap();
    guest.fs.handle(u32::MAX, EventFlags::IN).unwrap();
}
