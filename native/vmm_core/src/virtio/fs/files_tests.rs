use std::fs;
use std::os::unix::fs::PermissionsExt;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use virtio_core::mock::MockBuffer;

use crate::virtio::device::VirtioDevice;
use crate::virtio::fs::CacheMode;
use crate::virtio::fs::mock_guest::{Body, Folder, MockGuest};
use crate::virtio::fs::protocol::{ROOT_ID, opcode};

fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at * 7 + at / 251).to_le_bytes()[0])
        .collect()
}

fn open_by_name(guest: &mut MockGuest, name: &str, flags: i32) -> u64 {
    let node = guest.lookup(ROOT_ID, name).unwrap().node;
    guest.open(node, flags).unwrap()
}

#[test]
fn what_was_written_is_read_back() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    let (entry, handle) = guest.create(ROOT_ID, "file", libc::O_RDWR, 0o640).unwrap();
    assert_eq!(entry.mode, libc::S_IFREG | 0o640);
    let data = pattern(300_000);
    assert_eq!(guest.write(handle, 0, &data), Ok(300_000));
    assert_eq!(guest.write(handle, 300_000, b"end"), Ok(3));
    assert_eq!(guest.read(handle, 0, 300_000).unwrap(), data);
    assert_eq!(
        guest.read(handle, 299_999, 100).unwrap(),
        [data[299_999], b'e', b'n', b'd']
    );
    assert_eq!(guest.read(handle, 300_003, 100).unwrap(), b"");
    assert_eq!(guest.read(handle, 1 << 40, 100).unwrap(), b"");
    assert_eq!(fs::read(folder.join("file")).unwrap()[..300_000], data);
    guest.release(handle).unwrap();
    assert_eq!(guest.read(handle, 0, 1), Err(Errno::BADF));
    assert_eq!(guest.release(handle), Err(Errno::BADF));
    assert_eq!(guest.metric("written_bytes"), 300_003);
    assert_eq!(guest.metric("current_handles"), 0);
}

#[test]
fn a_megabyte_in_more_pieces_than_one_call_takes() {
    let folder = Folder::new();
    let data = pattern(1 << 20);
    fs::write(folder.join("file"), &data).unwrap();
    let mut guest = folder.mount();
    let handle = open_by_name(&mut guest, "file", libc::O_RDWR);
    // One indirect chain of 256 pages, as kernels send it.
    let body = Body::new()
        .u64(handle)
        .u64(0)
        .u32(1 << 20)
        .u32(0)
        .u64(0)
        .u64(0);
    let request = guest.header(opcode::READ, ROOT_ID, &body);
    let (at, table, answer) = (0x1_0000, 0x2_0000, 0x20_0000);
    guest.drivers[1].write(at, &request);
    let mut buffers = vec![
        MockBuffer::readable(at, 80),
        MockBuffer::writable(at + 0x1000, 16),
    ];
    buffers.extend((0..256).map(|page| MockBuffer::writable(answer + page * 0x1000, 0x1000)));
    guest.drivers[1].add_indirect(table, &buffers);
    guest.fs.handle(1, EventFlags::IN).unwrap();
    assert_eq!(guest.drivers[1].take_used()[0].len, (1 << 20) + 16);
    assert_eq!(guest.drivers[1].read(answer, 1 << 20), data);
}

#[test]
fn handles_do_what_they_were_opened_for() {
    let folder = Folder::new();
    fs::write(folder.join("file"), "text").unwrap();
    let mut guest = folder.mount();
    let reader = open_by_name(&mut guest, "file", libc::O_RDONLY);
    let writer = open_by_name(&mut guest, "file", libc::O_WRONLY);
    assert_eq!(guest.write(reader, 0, b"x"), Err(Errno::BADF));
    assert_eq!(guest.read(writer, 0, 1), Err(Errno::BADF));
    let truncating = open_by_name(&mut guest, "file", libc::O_WRONLY | libc::O_TRUNC);
    assert_eq!(guest.read(reader, 0, 10).unwrap(), b"");
    assert_eq!(guest.write(truncating, 2, b"x"), Ok(1));
    assert_eq!(guest.read(reader, 0, 10).unwrap(), b"\0\0x");
    for handle in [0, 99, u64::MAX, reader | 1 << 60] {
        assert_eq!(guest.read(handle, 0, 1), Err(Errno::BADF));
        assert_eq!(guest.write(handle, 0, b"x"), Err(Errno::BADF));
    }
}

#[test]
fn appending_is_said_with_each_write() {
    let folder = Folder::new();
    fs::write(folder.join("file"), "abc").unwrap();
    let mut guest = folder.mount();
    let handle = open_by_name(&mut guest, "file", libc::O_RDWR | libc::O_APPEND);
    // The host's end counts, not where the guest believes it to be.
    fs::write(folder.join("file"), "abcdef").unwrap();
    let append = libc::O_RDWR | libc::O_APPEND;
    assert_eq!(guest.write_with(handle, 3, b"X", 0, append), Ok(1));
    assert_eq!(fs::read(folder.join("file")).unwrap(), b"abcdefX");
    // Pages written back go where they belong.
    assert_eq!(guest.write_with(handle, 0, b"Y", 1, append), Ok(1));
    // And the guest may have changed its mind with fcntl.
    assert_eq!(guest.write_with(handle, 1, b"Z", 0, libc::O_RDWR), Ok(1));
    assert_eq!(fs::read(folder.join("file")).unwrap(), b"YZcdefX");
    let sync = libc::O_RDWR | libc::O_SYNC;
    assert_eq!(guest.write_with(handle, 2, b"S", 0, sync), Ok(1));
    assert_eq!(guest.write_with(handle, 3, b"D", 0, libc::O_DSYNC), Ok(1));
    assert_eq!(fs::read(folder.join("file")).unwrap(), b"YZSDefX");
}

#[test]
fn a_file_unlinked_while_open_stays_usable() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    let (entry, handle) = guest.create(ROOT_ID, "file", libc::O_RDWR, 0o600).unwrap();
    guest.write(handle, 0, b"still here").unwrap();
    guest
        .request(opcode::UNLINK, ROOT_ID, Body::new().text("file"))
        .unwrap();
    assert_eq!(guest.lookup(ROOT_ID, "file"), Err(Errno::NOENT));
    assert_eq!(guest.read(handle, 0, 100).unwrap(), b"still here");
    assert_eq!(guest.attributes(entry.node).unwrap().links, 0);
    guest.write(handle, 10, b"!").unwrap();
    let again = guest.open(entry.node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(again, 0, 100).unwrap(), b"still here!");
}

#[test]
fn creating_what_exists_opens_it_unless_exclusively() {
    let folder = Folder::new();
    fs::write(folder.join("file"), "text").unwrap();
    let mut guest = folder.mount();
    let known = guest.lookup(ROOT_ID, "file").unwrap();
    let (entry, handle) = guest.create(ROOT_ID, "file", libc::O_RDWR, 0o600).unwrap();
    assert_eq!(entry.node, known.node);
    assert_eq!(guest.read(handle, 0, 10).unwrap(), b"text");
    let exclusively = guest.create(ROOT_ID, "file", libc::O_RDWR | libc::O_EXCL, 0o600);
    assert_eq!(exclusively, Err(Errno::EXIST));
    let (_, _) = guest
        .create(ROOT_ID, "file", libc::O_RDWR | libc::O_TRUNC, 0o600)
        .unwrap();
    assert_eq!(guest.read(handle, 0, 10).unwrap(), b"");
}

#[test]
fn nothing_but_files_is_opened() {
    let folder = Folder::new();
    fs::create_dir(folder.join("directory")).unwrap();
    let fifo = folder.join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(folder.join("socket")).unwrap();
    std::os::unix::fs::symlink("file", folder.join("link")).unwrap();
    let mut guest = folder.mount();
    // None of these may wait, either: there is nobody at the other end of the pipe.
    for (name, expected) in [
        ("directory", Errno::ISDIR),
        ("fifo", Errno::NXIO),
        ("socket", Errno::NXIO),
        ("link", Errno::LOOP),
    ] {
        let node = guest.lookup(ROOT_ID, name).unwrap().node;
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR | libc::O_TRUNC] {
            assert_eq!(guest.open(node, flags), Err(expected), "{name}");
            let created = guest.create(ROOT_ID, name, flags, 0o600);
            assert_eq!(created.map(drop), Err(expected), "{name}");
        }
    }
}

#[test]
fn ranges_are_allocated_punched_and_found() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    let (entry, handle) = guest.create(ROOT_ID, "file", libc::O_RDWR, 0o600).unwrap();
    let allocate = |mode: i32, position: u64, len: u64| {
        let body = Body::new().u64(handle).u64(position).u64(len);
        body.u32(mode.cast_unsigned()).u32(0)
    };
    guest
        .request(opcode::FALLOCATE, entry.node, allocate(0, 0, 1 << 20))
        .unwrap();
    assert_eq!(guest.attributes(entry.node).unwrap().size, 1 << 20);
    guest.write(handle, 0, &[1; 4096]).unwrap();
    guest.write(handle, 1 << 19, &[1; 4096]).unwrap();
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    guest
        .request(
            opcode::FALLOCATE,
            entry.node,
            allocate(punch, 4096, (1 << 19) - 4096),
        )
        .unwrap();
    let seek = |whence: i32, position: u64| {
        Body::new()
            .u64(handle)
            .u64(position)
            .u32(whence.cast_unsigned())
            .u32(0)
    };
    let mut at = |whence, position| {
        let answer = guest.request(opcode::LSEEK, entry.node, seek(whence, position));
        answer.map(|answer| answer.u64(0))
    };
    assert_eq!(at(libc::SEEK_HOLE, 0), Ok(4096));
    assert_eq!(at(libc::SEEK_DATA, 4096), Ok(1 << 19));
    assert_eq!(at(libc::SEEK_DATA, 1 << 30), Err(Errno::NXIO));
    assert_eq!(at(libc::SEEK_SET, 0), Err(Errno::INVAL));
    let nonsense = guest.request(opcode::FALLOCATE, entry.node, allocate(-1, 0, 1));
    assert_eq!(nonsense, Err(Errno::OPNOTSUPP));
}

#[test]
fn ranges_are_copied_between_files() {
    let folder = Folder::new();
    let data = pattern(100_000);
    fs::write(folder.join("source"), &data).unwrap();
    let mut guest = folder.mount();
    let source = open_by_name(&mut guest, "source", libc::O_RDONLY);
    let (entry, target) = guest
        .create(ROOT_ID, "target", libc::O_RDWR, 0o600)
        .unwrap();
    let mut copied = 0;
    while copied < 90_000 {
        let body = Body::new().u64(source).u64(10_000 + copied).u64(entry.node);
        let body = body.u64(target).u64(copied).u64(90_000 - copied).u64(0);
        let answer = guest
            .request(opcode::COPY_FILE_RANGE, ROOT_ID, body)
            .unwrap();
        assert_ne!(answer.u32(0), 0);
        copied += u64::from(answer.u32(0));
    }
    assert_eq!(fs::read(folder.join("target")).unwrap(), data[10_000..]);
}

#[test]
fn syncing_is_passed_on() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    let (_, handle) = guest.create(ROOT_ID, "file", libc::O_RDWR, 0o600).unwrap();
    for flags in [0, 1] {
        let body = Body::new().u64(handle).u32(flags).u32(0);
        guest.request(opcode::FSYNC, ROOT_ID, body).unwrap();
        let body = Body::new().u64(handle).u32(flags).u32(0);
        let wrong_kind = guest.request(opcode::FSYNCDIR, ROOT_ID, body);
        assert_eq!(wrong_kind, Err(Errno::BADF));
    }
    let directory = guest
        .request(opcode::OPENDIR, ROOT_ID, Body::new().u64(0))
        .unwrap()
        .u64(0);
    let body = Body::new().u64(directory).u32(0).u32(0);
    guest.request(opcode::FSYNCDIR, ROOT_ID, body).unwrap();
}

#[test]
fn a_write_by_another_drops_set_ids_when_asked() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    let mode = |name: &str| {
        fs::metadata(folder.join(name))
            .unwrap()
            .permissions()
            .mode()
            & 0o7777
    };
    let set_mode = |mode: u32| {
        fs::set_permissions(folder.join("file"), fs::Permissions::from_mode(mode)).unwrap();
    };
    let (entry, handle) = guest.create(ROOT_ID, "file", libc::O_RDWR, 0o755).unwrap();
    set_mode(0o6755);
    guest.write_with(handle, 0, b"x", 1 << 2, 0).unwrap();
    assert_eq!(mode("file"), 0o755);
    // Without group execution it is not a program's bit.
    set_mode(0o6745);
    guest.write_with(handle, 0, b"x", 1 << 2, 0).unwrap();
    assert_eq!(mode("file"), 0o2745);
    set_mode(0o4755);
    let truncate = (libc::O_WRONLY | libc::O_TRUNC).cast_unsigned();
    guest
        .request(opcode::OPEN, entry.node, Body::new().u32(truncate).u32(1))
        .unwrap();
    assert_eq!(mode("file"), 0o755);
}

#[test]
fn caching_is_as_configured() {
    let folder = Folder::new();
    fs::write(folder.join("file"), "text").unwrap();
    for (cache, seconds, file, directory) in [
        (CacheMode::Never, 0, 1 | 1 << 6, 0),
        (CacheMode::Auto, 1, 0, 0),
        (CacheMode::Always, 86_400, 1 << 1, 1 << 1 | 1 << 3),
    ] {
        let mut guest = folder.mount_cached(cache);
        let entry = guest
            .request(opcode::LOOKUP, ROOT_ID, Body::new().text("file"))
            .unwrap();
        assert_eq!(
            (entry.u64(16), entry.u64(24)),
            (seconds, seconds),
            "{cache:?}"
        );
        let opened = guest
            .request(opcode::OPEN, entry.u64(0), Body::new().u64(0))
            .unwrap();
        assert_eq!(opened.u32(8), file, "{cache:?}");
        let opened = guest
            .request(opcode::OPENDIR, ROOT_ID, Body::new().u64(0))
            .unwrap();
        assert_eq!(opened.u32(8), directory, "{cache:?}");
    }
}

#[test]
fn a_read_only_folder_stays_as_it_is() {
    let folder = Folder::new();
    fs::write(folder.join("file"), "text").unwrap();
    let mut guest = folder.mount_read_only();
    let file = guest.lookup(ROOT_ID, "file").unwrap().node;
    let handle = guest.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(handle, 0, 10).unwrap(), b"text");
    assert_eq!(guest.write(handle, 0, b"x"), Err(Errno::BADF));
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(guest.open(file, flags), Err(Errno::ROFS));
    }
    for (request, body) in [
        (opcode::CREATE, Body::new().u64(0).u64(0).text("new")),
        (opcode::MKDIR, Body::new().u64(0o755).text("new")),
        (opcode::MKNOD, Body::new().u64(0).u64(0).text("new")),
        (opcode::SYMLINK, Body::new().text("new").text("file")),
        (opcode::LINK, Body::new().u64(file).text("new")),
        (opcode::UNLINK, Body::new().text("file")),
        (opcode::RMDIR, Body::new().text("file")),
        (
            opcode::RENAME,
            Body::new().u64(ROOT_ID).text("file").text("new"),
        ),
        (
            opcode::RENAME2,
            Body::new().u64(ROOT_ID).u64(0).text("file").text("new"),
        ),
    ] {
        assert_eq!(
            guest.request(request, ROOT_ID, body),
            Err(Errno::ROFS),
            "{request}"
        );
    }
    for (request, body) in [
        (opcode::SETATTR, Body::new().bytes(&[0; 88])),
        (
            opcode::SETXATTR,
            Body::new().u32(1).u32(0).text("user.a").bytes(b"x"),
        ),
        (opcode::REMOVEXATTR, Body::new().text("user.a")),
    ] {
        assert_eq!(
            guest.request(request, file, body),
            Err(Errno::ROFS),
            "{request}"
        );
    }
    let names: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(names.len(), 1);
    assert_eq!(fs::read(folder.join("file")).unwrap(), b"text");
}
