use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use rustix::io::Errno;

use crate::virtio::fs::mock_guest::{Answer, Body, Folder, MockGuest};
use crate::virtio::fs::protocol::{ROOT_ID, opcode, set};

/// What a `SETATTR` sets.
#[derive(Clone, Copy, Default)]
struct Change {
    valid: u32,
    handle: u64,
    size: u64,
    access_s: u64,
    modified_s: u64,
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Change {
    fn body(self) -> Body {
        let body = Body::new()
            .u32(self.valid)
            .u32(0)
            .u64(self.handle)
            .u64(self.size);
        let body = body.u64(0).u64(self.access_s).u64(self.modified_s).u64(0);
        let body = body.u32(0).u32(0).u32(0).u32(self.mode).u32(0);
        body.u32(self.uid).u32(self.gid).u32(0)
    }
}

fn apply(guest: &mut MockGuest, node: u64, change: Change) -> Result<Answer, Errno> {
    guest.request(opcode::SETATTR, node, change.body())
}

#[test]
fn modes_owners_and_sizes_are_set_and_answered() {
    let folder = Folder::new();
    fs::write(folder.join("file"), "some text").unwrap();
    let mut guest = folder.mount();
    let node = guest.lookup(ROOT_ID, "file").unwrap().node;
    let mode = Change {
        valid: set::MODE,
        mode: libc::S_IFREG | 0o4711,
        ..Change::default()
    };
    let answer = apply(&mut guest, node, mode).unwrap().attributes();
    assert_eq!(answer.mode, libc::S_IFREG | 0o4711);
    assert_eq!(
        fs::metadata(folder.join("file"))
            .unwrap()
            .permissions()
            .mode()
            & 0o7777,
        0o4711
    );

    let size = Change {
        valid: set::SIZE,
        size: 4,
        ..Change::default()
    };
    assert_eq!(apply(&mut guest, node, size).unwrap().attributes().size, 4);
    assert_eq!(fs::read(folder.join("file")).unwrap(), b"some");
    let handle = guest.open(node, libc::O_RDWR).unwrap();
    let valid = set::SIZE | set::FH | set::KILL_SUIDGID;
    let size = Change {
        valid,
        size: 6,
        handle,
        ..Change::default()
    };
    let answer = apply(&mut guest, node, size).unwrap().attributes();
    assert_eq!((answer.size, answer.mode & 0o7777), (6, 0o711));
    assert_eq!(guest.read(handle, 0, 10).unwrap(), b"some\0\0");
    let reader = guest.open(node, libc::O_RDONLY).unwrap();
    let by_reader = Change {
        handle: reader,
        ..size
    };
    assert_eq!(apply(&mut guest, node, by_reader), Err(Errno::INVAL));
    let by_none = Change { handle: 99, ..size };
    assert_eq!(apply(&mut guest, node, by_none), Err(Errno::BADF));

    let ids = Change {
        valid: set::UID | set::GID,
        uid: 77,
        gid: 88,
        ..Change::default()
    };
    let changed = apply(&mut guest, node, ids).map(|answer| answer.attributes());
    if rustix::process::geteuid().is_root() {
        let changed = changed.unwrap();
        assert_eq!((changed.uid, changed.gid), (77, 88));
        // One without the other.
        let gid = Change {
            valid: set::GID,
            uid: 1,
            gid: 2,
            ..Change::default()
        };
        let changed = apply(&mut guest, node, gid).unwrap().attributes();
        assert_eq!((changed.uid, changed.gid), (77, 2));
    } else {
        assert_eq!(changed, Err(Errno::PERM));
    }
}

#[test]
fn times_are_set_now_or_left_alone() {
    let folder = Folder::new();
    fs::write(folder.join("file"), "").unwrap();
    let mut guest = folder.mount();
    let node = guest.lookup(ROOT_ID, "file").unwrap().node;
    let both = Change {
        valid: set::ATIME | set::MTIME,
        access_s: 1_000_000,
        modified_s: 2_000_000,
        ..Change::default()
    };
    let answer = apply(&mut guest, node, both).unwrap().attributes();
    assert_eq!((answer.access_s, answer.modified_s), (1_000_000, 2_000_000));
    let one = Change {
        valid: set::MTIME,
        modified_s: 3_000_000,
        ..Change::default()
    };
    let answer = apply(&mut guest, node, one).unwrap().attributes();
    assert_eq!((answer.access_s, answer.modified_s), (1_000_000, 3_000_000));
    let before_1970 = Change {
        modified_s: (-5i64).cast_unsigned(),
        ..one
    };
    let answer = apply(&mut guest, node, before_1970).unwrap().attributes();
    assert_eq!(answer.modified_s.cast_signed(), -5);
    let now = Change {
        valid: set::ATIME | set::ATIME_NOW,
        access_s: 5,
        ..Change::default()
    };
    let answer = apply(&mut guest, node, now).unwrap().attributes();
    assert!(answer.access_s > 1_700_000_000, "{answer:?}");
    assert_eq!(answer.modified_s.cast_signed(), -5);
}

#[test]
fn a_links_own_attributes_are_meant() {
    let folder = Folder::new();
    let canary = folder.outside().join("canary");
    symlink("../canary", folder.join("link")).unwrap();
    let before = fs::metadata(&canary).unwrap();
    let mut guest = folder.mount();
    let link = guest.lookup(ROOT_ID, "link").unwrap();
    assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK);
    let times = Change {
        valid: set::MTIME,
        modified_s: 7,
        ..Change::default()
    };
    let changed = apply(&mut guest, link.node, times).unwrap().attributes();
    assert_eq!((changed.modified_s, changed.inode), (7, link.inode));
    let mode = Change {
        valid: set::MODE,
        mode: 0o777,
        ..Change::default()
    };
    assert_eq!(apply(&mut guest, link.node, mode), Err(Errno::OPNOTSUPP));
    let size = Change {
        valid: set::SIZE,
        size: 0,
        ..Change::default()
    };
    assert_eq!(apply(&mut guest, link.node, size), Err(Errno::LOOP));
    let ids = Change {
        valid: set::UID,
        uid: 55,
        ..Change::default()
    };
    assert_eq!(
        apply(&mut guest, link.node, ids).is_ok(),
        rustix::process::geteuid().is_root()
    );
    let after = fs::metadata(&canary).unwrap();
    assert_eq!(after.modified().unwrap(), before.modified().unwrap());
    assert_eq!(after.permissions(), before.permissions());
    assert_eq!(
        std::os::unix::fs::MetadataExt::uid(&after),
        rustix::process::geteuid().as_raw()
    );
    assert_eq!(fs::read(&canary).unwrap(), b"secret");
}

#[test]
fn directories_are_not_resized() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    let size = Change {
        valid: set::SIZE,
        ..Change::default()
    };
    assert_eq!(apply(&mut guest, ROOT_ID, size), Err(Errno::ISDIR));
}

#[test]
fn a_file_system_gives_its_figures() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    let answer = guest.request(opcode::STATFS, ROOT_ID, Body::new()).unwrap();
    assert_eq!(answer.0.len(), 80);
    let expected = rustix::fs::statvfs(folder.path()).unwrap();
    assert_eq!(answer.u64(0), expected.f_blocks);
    assert_eq!(u64::from(answer.u32(40)), expected.f_bsize);
    assert_eq!(u64::from(answer.u32(44)), expected.f_namemax);
    assert_eq!(u64::from(answer.u32(48)), expected.f_frsize);
}

#[test]
fn access_is_what_the_mode_says() {
    let folder = Folder::new();
    fs::write(folder.join("file"), "").unwrap();
    fs::set_permissions(folder.join("file"), fs::Permissions::from_mode(0o640)).unwrap();
    let mut guest = folder.mount();
    let file = guest.lookup(ROOT_ID, "file").unwrap();
    let mut may = |uid, gid, mask: u32| {
        (guest.uid, guest.gid) = (uid, gid);
        let body = Body::new().u32(mask).u32(0);
        guest.request(opcode::ACCESS, file.node, body).map(drop)
    };
    for (uid, gid, allowed) in [
        (file.uid, 9999, 0o6),
        (9999, file.gid, 0o4),
        (9999, 9999, 0o0),
        (0, 0, 0o6),
    ] {
        for mask in 0..8 {
            let expected = if mask & !allowed == 0 {
                Ok(())
            } else {
                Err(Errno::ACCESS)
            };
            assert_eq!(may(uid, gid, mask), expected, "{uid} {gid} {mask}");
        }
    }
    assert_eq!(may(0, 0, 8), Err(Errno::INVAL));
}

#[test]
fn what_is_no_node_has_no_attributes() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    for node in [0, 2, u64::MAX, 1 << 32 | 1] {
        assert_eq!(guest.attributes(node), Err(Errno::STALE));
        assert_eq!(guest.lookup(node, "x"), Err(Errno::STALE));
        assert_eq!(guest.open(node, 0), Err(Errno::STALE));
    }
}
