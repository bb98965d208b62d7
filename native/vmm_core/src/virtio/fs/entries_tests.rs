use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use rustix::io::Errno;

use crate::virtio::fs::CacheMode;
use crate::virtio::fs::FsConfig;
use crate::virtio::fs::mock_guest::{Body, Folder, MockGuest};
use crate::virtio::fs::protocol::{ATTR_SUBMOUNT, ROOT_ID, opcode};

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn a_file_is_one_node_by_whatever_name() {
    let folder = Folder::new();
    fs::create_dir(folder.join("directory")).unwrap();
    fs::write(folder.join("directory/file"), "text").unwrap();
    let mut guest = folder.mount();
    let first = guest.walk("directory/file").unwrap();
    assert_eq!(first.size, 4);
    assert_eq!(
        first.inode,
        fs::metadata(folder.join("directory/file")).unwrap().ino()
    );
    let linked = guest
        .request(
            opcode::LINK,
            ROOT_ID,
            Body::new().u64(first.node).text("other"),
        )
        .unwrap()
        .entry();
    assert_eq!((linked.node, linked.links), (first.node, 2));
    assert_eq!(guest.lookup(ROOT_ID, "other").unwrap().node, first.node);
    assert_eq!(guest.lookup(ROOT_ID, "none"), Err(Errno::NOENT));
    assert_eq!(guest.lookup(first.node, "x"), Err(Errno::NOTDIR));
}

#[test]
fn nodes_go_when_all_lookups_are_forgotten() {
    let folder = Folder::new();
    fs::write(folder.join("file"), "text").unwrap();
    let mut guest = folder.mount();
    let node = guest.lookup(ROOT_ID, "file").unwrap().node;
    assert_eq!(guest.lookup(ROOT_ID, "file").unwrap().node, node);
    assert_eq!(guest.metric("current_nodes"), 2);
    guest.forget(node, 1);
    assert!(guest.attributes(node).is_ok());
    guest.forget(node, 1);
    assert_eq!(guest.attributes(node), Err(Errno::STALE));
    assert_eq!(guest.metric("current_nodes"), 1);
    let again = guest.lookup(ROOT_ID, "file").unwrap().node;
    assert_ne!(again, node, "an id is never used again");
    // More than there were, and what is no node.
    guest.forget(again, u64::MAX);
    guest.forget(again, 1);
    guest.forget(ROOT_ID, u64::MAX);
    guest.forget(0, 1);
    assert!(guest.attributes(ROOT_ID).is_ok());
}

#[test]
fn many_are_forgotten_at_once() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    let mut body = Body::new().u32(300).u32(0);
    for number in 0..300 {
        let name = format!("file{number}");
        fs::write(folder.join(&name), "").unwrap();
        let node = guest.lookup(ROOT_ID, &name).unwrap().node;
        body = body.u64(node).u64(1);
    }
    assert_eq!(guest.metric("current_nodes"), 301);
    // A count beyond the request's end is not followed.
    let cut = Body(body.0[..8 + 16 * 10].to_vec());
    let request = guest.header(opcode::BATCH_FORGET, 0, &cut);
    assert_eq!(guest.send(0, &request, 0).0.len, 0);
    assert_eq!(guest.metric("current_nodes"), 291);
    let request = guest.header(opcode::BATCH_FORGET, 0, &body);
    assert_eq!(guest.send(0, &request, 0).0.len, 0);
    assert_eq!(guest.metric("current_nodes"), 1);
}

#[test]
fn directories_pipes_sockets_and_devices_are_made() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    let made = guest
        .request(
            opcode::MKDIR,
            ROOT_ID,
            Body::new().u32(0o1770).u32(0).text("directory"),
        )
        .unwrap()
        .entry();
    assert_eq!(made.mode, libc::S_IFDIR | 0o1770);
    let again = Body::new().u32(0o755).u32(0).text("directory");
    assert_eq!(
        guest.request(opcode::MKDIR, ROOT_ID, again),
        Err(Errno::EXIST)
    );

    let node = |mode: u32, device: u32, name: &str| {
        Body::new().u32(mode).u32(device).u32(0).u32(0).text(name)
    };
    for (kind, name) in [
        (libc::S_IFREG, "file"),
        (libc::S_IFIFO, "fifo"),
        (libc::S_IFSOCK, "socket"),
    ] {
        let body = node(kind | 0o666, 0, name);
        let made = guest
            .request(opcode::MKNOD, made.node, body)
            .unwrap()
            .entry();
        assert_eq!(made.mode, kind | 0o666, "umask is the guest's");
    }
    let null = guest.request(
        opcode::MKNOD,
        ROOT_ID,
        node(libc::S_IFCHR | 0o600, 0x103, "null"),
    );
    if is_root() {
        let null = null.unwrap().entry();
        assert_eq!((null.mode, null.device), (libc::S_IFCHR | 0o600, 0x103));
        assert_eq!(guest.open(null.node, libc::O_RDWR), Err(Errno::NXIO));
    } else {
        assert_eq!(null, Err(Errno::PERM));
    }
    for kind in [libc::S_IFDIR, libc::S_IFLNK, 0] {
        let made = guest.request(opcode::MKNOD, ROOT_ID, node(kind | 0o600, 0, "nonsense"));
        assert_eq!(made, Err(Errno::INVAL));
    }
}

#[test]
fn what_is_made_belongs_to_who_made_it() {
    let folder = Folder::new();
    // Closed to others on the host: whether the guest's user may is the guest's decision.
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let mut guest = folder.mount();
    let ours = (guest.uid, guest.gid);
    (guest.uid, guest.gid) = (1234, 4321);
    let theirs = if is_root() { (1234, 4321) } else { ours };

    let (file, _) = guest.create(ROOT_ID, "file", libc::O_RDWR, 0o600).unwrap();
    assert_eq!((file.uid, file.gid), theirs);
    let body = Body::new().u32(0o755).u32(0).text("directory");
    let directory = guest.request(opcode::MKDIR, ROOT_ID, body).unwrap().entry();
    assert_eq!((directory.uid, directory.gid), theirs);
    let body = Body::new().text("link").text("target");
    let link = guest
        .request(opcode::SYMLINK, ROOT_ID, body)
        .unwrap()
        .entry();
    assert_eq!((link.uid, link.gid), theirs);
    let body = Body::new()
        .u32(libc::S_IFIFO | 0o600)
        .u32(0)
        .u64(0)
        .text("fifo");
    let fifo = guest.request(opcode::MKNOD, ROOT_ID, body).unwrap().entry();
    assert_eq!((fifo.uid, fifo.gid), theirs);

    // A set-group-id directory gives its group on, and directories the bit too.
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o2700)).unwrap();
    let (file, _) = guest
        .create(ROOT_ID, "grouped", libc::O_RDWR, 0o600)
        .unwrap();
    assert_eq!((file.uid, file.gid), (theirs.0, ours.1));
    let body = Body::new().u32(0o755).u32(0).text("grouped directory");
    let directory = guest.request(opcode::MKDIR, ROOT_ID, body).unwrap().entry();
    assert_eq!((directory.gid, directory.mode & 0o7777), (ours.1, 0o2755));

    (guest.uid, guest.gid) = (u32::MAX, 0);
    let nobody = guest
        .create(ROOT_ID, "nobody's", libc::O_RDWR, 0o600)
        .map(drop);
    assert_eq!(nobody, if is_root() { Err(Errno::INVAL) } else { Ok(()) });
}

#[test]
fn links_say_what_they_were_made_with() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    for target in ["/etc/passwd", "../canary", "a", &"x".repeat(4095)] {
        let body = Body::new().text("link").text(target);
        let link = guest
            .request(opcode::SYMLINK, ROOT_ID, body)
            .unwrap()
            .entry();
        assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK);
        let read = guest
            .request(opcode::READLINK, link.node, Body::new())
            .unwrap();
        assert_eq!(read.0, target.as_bytes());
        guest
            .request(opcode::UNLINK, ROOT_ID, Body::new().text("link"))
            .unwrap();
    }
    let too_long = Body::new().text("link").text("x".repeat(4096));
    assert_eq!(
        guest.request(opcode::SYMLINK, ROOT_ID, too_long),
        Err(Errno::NAMETOOLONG)
    );
    assert_eq!(
        guest.request(opcode::READLINK, ROOT_ID, Body::new()),
        Err(Errno::INVAL)
    );
    // A link can have a second name; it is not its target that gets one.
    symlink("../canary", folder.join("link")).unwrap();
    let link = guest.lookup(ROOT_ID, "link").unwrap().node;
    let body = Body::new().u64(link).text("second");
    let second = guest.request(opcode::LINK, ROOT_ID, body).unwrap().entry();
    assert_eq!(
        (second.node, second.mode & libc::S_IFMT),
        (link, libc::S_IFLNK)
    );
}

#[test]
fn names_are_removed_by_the_right_request() {
    let folder = Folder::new();
    fs::create_dir(folder.join("directory")).unwrap();
    fs::write(folder.join("directory/file"), "").unwrap();
    fs::write(folder.join("file"), "").unwrap();
    let mut guest = folder.mount();
    let mut remove = |opcode, name: &str| {
        guest
            .request(opcode, ROOT_ID, Body::new().text(name))
            .map(drop)
    };
    assert_eq!(remove(opcode::UNLINK, "directory"), Err(Errno::ISDIR));
    assert_eq!(remove(opcode::RMDIR, "file"), Err(Errno::NOTDIR));
    assert_eq!(remove(opcode::RMDIR, "directory"), Err(Errno::NOTEMPTY));
    assert_eq!(remove(opcode::UNLINK, "none"), Err(Errno::NOENT));
    assert_eq!(remove(opcode::UNLINK, "file"), Ok(()));
    fs::remove_file(folder.join("directory/file")).unwrap();
    assert_eq!(remove(opcode::RMDIR, "directory"), Ok(()));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn renaming_replaces_refuses_or_exchanges() {
    let folder = Folder::new();
    fs::create_dir(folder.join("directory")).unwrap();
    let mut guest = folder.mount();
    let directory = guest.lookup(ROOT_ID, "directory").unwrap().node;
    let content = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let reset = || {
        fs::write(folder.join("a"), "a").unwrap();
        fs::write(folder.join("directory/b"), "b").unwrap();
    };
    let rename2 = |flags: u32| {
        Body::new()
            .u64(directory)
            .u32(flags)
            .u32(0)
            .text("a")
            .text("b")
    };

    reset();
    let node = guest.lookup(ROOT_ID, "a").unwrap().node;
    let body = Body::new().u64(directory).text("a").text("b");
    guest.request(opcode::RENAME, ROOT_ID, body).unwrap();
    assert_eq!(
        (content("a"), content("directory/b")),
        (None, Some("a".into()))
    );
    assert_eq!(
        guest.lookup(directory, "b").unwrap().node,
        node,
        "it is the same file"
    );

    reset();
    let refused = guest.request(opcode::RENAME2, ROOT_ID, rename2(libc::RENAME_NOREPLACE));
    assert_eq!(refused, Err(Errno::EXIST));
    guest
        .request(opcode::RENAME2, ROOT_ID, rename2(libc::RENAME_EXCHANGE))
        .unwrap();
    assert_eq!(content("a"), Some("b".into()));
    assert_eq!(content("directory/b"), Some("a".into()));
    assert_eq!(
        guest.request(opcode::RENAME2, ROOT_ID, rename2(1 << 9)),
        Err(Errno::INVAL)
    );
    let elsewhere = Body::new().u64(77).text("a").text("b");
    assert_eq!(
        guest.request(opcode::RENAME, ROOT_ID, elsewhere),
        Err(Errno::STALE)
    );
}

#[test]
fn other_file_systems_are_announced() {
    // Any Linux has one here.
    let mut config = FsConfig::new("root", "/");
    config.is_read_only = true;
    let mut guest = MockGuest::mount_with(config);
    assert_eq!(guest.lookup(ROOT_ID, "proc").unwrap().flags, ATTR_SUBMOUNT);
    let inner = guest.walk("proc/sys").unwrap();
    assert_eq!(inner.flags, 0, "part of the same");

    // Not to a kernel that does not know of them.
    guest.init(0).unwrap();
    assert_eq!(guest.lookup(ROOT_ID, "proc").unwrap().flags, 0);
}

#[test]
fn what_is_mounted_later_is_seen() {
    if !is_root() {
        // Mounting is for root; the test above sees a mount that is there already.
        return;
    }
    let folder = Folder::new();
    let path = folder.path();
    std::thread::spawn(move || {
        // SAFETY: only CLONE_FILES takes descriptors from other threads.
        #[expect(unsafe_code, reason = "mounts of this thread's own")]
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
        let private = rustix::mount::MountPropagationFlags::PRIVATE;
        let recursively = private | rustix::mount::MountPropagationFlags::REC;
        rustix::mount::mount_change("/", recursively).unwrap();
        fs::create_dir_all(path.join("container/rootfs")).unwrap();
        let mut guest = MockGuest::mount_with(FsConfig {
            cache: CacheMode::Auto,
            ..FsConfig::new("shared", &path)
        });
        let before = guest.walk("container/rootfs").unwrap();
        assert_eq!(before.flags, 0);
        let target = path.join("container/rootfs");
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", &target, "tmpfs", flags, None).unwrap();
        fs::write(target.join("file"), "inside").unwrap();

        let after = guest.walk("container/rootfs").unwrap();
        assert_ne!(after.node, before.node);
        assert_eq!(after.flags, ATTR_SUBMOUNT);
        let file = guest.lookup(after.node, "file").unwrap().node;
        let handle = guest.open(file, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(handle, 0, 100).unwrap(), b"inside");
        assert_eq!(guest.lookup(before.node, "file"), Err(Errno::NOENT));
        // The same file system mounted twice is two places with the same numbers.
        fs::create_dir(path.join("bound")).unwrap();
        rustix::mount::mount_bind(&target, path.join("bound")).unwrap();
        let bound = guest.lookup(ROOT_ID, "bound").unwrap();
        assert_eq!((bound.inode, bound.flags), (after.inode, ATTR_SUBMOUNT));
        assert_ne!(bound.node, after.node);
    })
    .join()
    .unwrap();
}
