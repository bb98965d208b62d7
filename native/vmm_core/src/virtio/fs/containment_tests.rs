//! Nothing outside of the folder is reached: by names, links, renames under way, or nonsense.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::mock_guest::{Body, Folder, MockGuest};
use super::protocol::{ROOT_ID, opcode};

/// The canary and what is around the folder are as they were.
fn assert_untouched(folder: &Folder) {
    assert_eq!(
        fs::read(folder.outside().join("canary")).unwrap(),
        b"secret"
    );
    let mut names: Vec<_> = fs::read_dir(folder.outside())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["canary", "shared"]);
}

#[test]
fn names_that_are_paths_are_refused() {
    let folder = Folder::new();
    fs::create_dir(folder.join("directory")).unwrap();
    fs::write(folder.join("file"), "").unwrap();
    let mut guest = folder.mount();
    let directory = guest.lookup(ROOT_ID, "directory").unwrap().node;
    let file = guest.lookup(ROOT_ID, "file").unwrap().node;
    for parent in [ROOT_ID, directory] {
        for name in [
            "..",
            ".",
            "",
            "../canary",
            "/etc",
            "directory/..",
            "a/b",
            "../../canary",
        ] {
            let requests = [
                (opcode::LOOKUP, Body::new().text(name)),
                (
                    opcode::CREATE,
                    Body::new().u32(2).u32(0o600).u64(0).text(name),
                ),
                (opcode::MKDIR, Body::new().u64(0o755).text(name)),
                (opcode::MKNOD, Body::new().u64(0o10_0600).u64(0).text(name)),
                (opcode::SYMLINK, Body::new().text(name).text("target")),
                (opcode::LINK, Body::new().u64(file).text(name)),
                (opcode::UNLINK, Body::new().text(name)),
                (opcode::RMDIR, Body::new().text(name)),
                (
                    opcode::RENAME,
                    Body::new().u64(ROOT_ID).text(name).text("x"),
                ),
                (
                    opcode::RENAME,
                    Body::new().u64(ROOT_ID).text("file").text(name),
                ),
                (
                    opcode::RENAME2,
                    Body::new().u64(ROOT_ID).u64(0).text("file").text(name),
                ),
            ];
            for (opcode, body) in requests {
                let answer = guest.request(opcode, parent, body);
                assert_eq!(answer, Err(Errno::INVAL), "{opcode} {name:?}");
            }
        }
    }
    let unended = Body::new().bytes(b"file");
    assert_eq!(
        guest.request(opcode::LOOKUP, ROOT_ID, unended),
        Err(Errno::INVAL)
    );
    let long = Body::new().text("x".repeat(256));
    assert_eq!(
        guest.request(opcode::LOOKUP, ROOT_ID, long),
        Err(Errno::NAMETOOLONG)
    );
    assert_untouched(&folder);
}

#[test]
fn links_are_never_followed() {
    let folder = Folder::new();
    symlink("../canary", folder.join("file")).unwrap();
    symlink("..", folder.join("directory")).unwrap();
    symlink(folder.outside(), folder.join("absolute")).unwrap();
    symlink("/proc/self/root", folder.join("magic")).unwrap();
    symlink("../new", folder.join("dangling")).unwrap();
    let mut guest = folder.mount();
    for name in ["file", "directory", "absolute", "magic", "dangling"] {
        let link = guest.lookup(ROOT_ID, name).unwrap();
        assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK, "{name}");
        assert_eq!(guest.open(link.node, libc::O_RDONLY), Err(Errno::LOOP));
        assert_eq!(guest.lookup(link.node, "canary"), Err(Errno::NOTDIR));
        let opened = guest.request(opcode::OPENDIR, link.node, Body::new().u64(0));
        assert_eq!(opened, Err(Errno::NOTDIR));
        let created = guest.create(ROOT_ID, name, libc::O_RDWR, 0o600).map(drop);
        assert_eq!(created, Err(Errno::LOOP));
        let body = Body::new().u64(ROOT_ID).text("x").text("y");
        assert_eq!(
            guest.request(opcode::RENAME, link.node, body),
            Err(Errno::NOTDIR)
        );
    }
    assert_untouched(&folder);
}

/// Exchange two names for as long as it lives.
struct Exchanger {
    is_over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<u64>>,
}

impl Exchanger {
    fn start(folder: &Folder, one: &str, other: &str) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let (one, other) = (folder.join(one), folder.join(other));
        let thread = std::thread::spawn({
            let is_over = Arc::clone(&is_over);
            move || {
                let mut count = 0;
                while !is_over.load(Ordering::Relaxed) {
                    renameat_with(CWD, &one, CWD, &other, RenameFlags::EXCHANGE).unwrap();
                    count += 1;
                    // The lock of the directory is not only ours.
                    std::thread::yield_now();
                }
                count
            }
        });
        Self {
            is_over,
            thread: Some(thread),
        }
    }

    fn stop(&mut self) -> u64 {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread
            .take()
            .map_or(0, |thread| thread.join().unwrap())
    }
}

#[test]
fn renames_under_way_lead_nowhere() {
    let folder = Folder::new_in("/dev/shm");
    // A directory changes places with a link to the outside, which has the same names.
    fs::create_dir(folder.join("directory")).unwrap();
    fs::write(folder.join("directory/canary"), "inside").unwrap();
    symlink("..", folder.join("link")).unwrap();
    // And a file with a link to the canary.
    fs::write(folder.join("file"), "inside").unwrap();
    symlink("../canary", folder.join("file link")).unwrap();
    let mut guest = folder.mount();
    let mut directories = Exchanger::start(&folder, "directory", "link");
    let mut files = Exchanger::start(&folder, "file", "file link");
    let (mut reached, mut refused) = (0, 0);
    let is_enough = |round, reached, refused| round > 200 && reached > 0 && refused > 0;
    for round in 0..10_000 {
        if is_enough(round, reached, refused) {
            break;
        }
        match guest.walk("directory/canary") {
            Ok(entry) => {
                assert_eq!(entry.size, 6);
                let handle = guest.open(entry.node, libc::O_RDONLY).unwrap();
                assert_eq!(guest.read(handle, 0, 100).unwrap(), b"inside");
                guest.release(handle).unwrap();
                reached += 1;
            }
            Err(errno) => {
                assert_eq!(errno, Errno::NOTDIR);
                refused += 1;
            }
        }
        match guest.create(ROOT_ID, "file", libc::O_RDWR, 0o600) {
            Ok((_, handle)) => {
                assert_eq!(guest.read(handle, 0, 100).unwrap(), b"inside");
                guest.release(handle).unwrap();
                reached += 1;
            }
            Err(errno) => {
                assert_eq!(errno, Errno::LOOP);
                refused += 1;
            }
        }
    }
    assert!(directories.stop() > 0 && files.stop() > 0);
    assert!(
        reached > 0 && refused > 0,
        "both were met: {reached}, {refused}"
    );
    assert_untouched(&folder);
}

#[test]
fn a_directory_moved_out_gives_nothing_new() {
    let folder = Folder::new();
    fs::create_dir_all(folder.join("directory/inner")).unwrap();
    let mut guest = folder.mount();
    let inner = guest.walk("directory/inner").unwrap().node;
    // The host's own doing: what is below goes along, what is above stays out of reach.
    fs::rename(folder.join("directory"), folder.outside().join("moved")).unwrap();
    assert_eq!(guest.lookup(inner, ".."), Err(Errno::INVAL));
    assert_eq!(guest.lookup(inner, "canary"), Err(Errno::NOENT));
    fs::rename(folder.outside().join("moved"), folder.join("directory")).unwrap();
    assert_untouched(&folder);
}

#[test]
fn the_guest_cannot_hold_more_than_it_may() {
    let folder = Folder::new();
    fs::write(folder.join("file"), "").unwrap();
    let mut guest = folder.mount();
    let node = guest.lookup(ROOT_ID, "file").unwrap().node;
    // As with a process that may open little.
    guest.fs.limit(4, 3);
    let mut handles: Vec<u64> = Vec::new();
    let refusal = loop {
        match guest.open(node, libc::O_RDONLY) {
            Ok(handle) => handles.push(handle),
            Err(errno) => break errno,
        }
    };
    assert_eq!((refusal, handles.len()), (Errno::NFILE, 3));
    let create = guest.create(ROOT_ID, "new", libc::O_RDWR, 0o600);
    assert_eq!(create, Err(Errno::NFILE));
    assert!(
        !folder.join("new").exists(),
        "nothing is made that cannot be given"
    );
    guest.release(handles[0]).unwrap();
    assert!(guest.open(node, libc::O_RDONLY).is_ok());

    for name in ["a", "b", "c"] {
        fs::write(folder.join(name), "").unwrap();
    }
    assert!(guest.lookup(ROOT_ID, "a").is_ok());
    let b = guest.lookup(ROOT_ID, "b").unwrap().node;
    assert_eq!(guest.lookup(ROOT_ID, "c"), Err(Errno::NFILE));
    assert_eq!(guest.lookup(ROOT_ID, "b").unwrap().node, b, "known already");
    let body = Body::new().u64(0o755).text("new");
    assert_eq!(
        guest.request(opcode::MKDIR, ROOT_ID, body),
        Err(Errno::NFILE)
    );
    assert!(!folder.join("new").exists());
    guest.forget(b, 2);
    assert!(guest.lookup(ROOT_ID, "c").is_ok());
}

/// Requests that mean something, to be spoilt.
fn plausible(guest: &mut MockGuest, choice: u32, node: u64, handle: u64) -> Vec<u8> {
    let name = ["file", "directory", "new", "link", "..", "../canary"][choice as usize % 6];
    let transfer = |body: Body| body.u32(16).u32(0).u64(0).u64(0);
    let (opcode, body) = match choice % 23 {
        0 => (opcode::LOOKUP, Body::new().text(name)),
        1 => (opcode::GETATTR, Body::new().u64(0).u64(handle)),
        2 => (
            opcode::SETATTR,
            Body::new()
                .u32(choice >> 8)
                .u32(0)
                .u64(handle)
                .bytes(&[1; 72]),
        ),
        3 => (opcode::READLINK, Body::new()),
        4 => (opcode::SYMLINK, Body::new().text(name).text("../canary")),
        5 => (opcode::MKNOD, Body::new().u64(0o10_0600).u64(0).text(name)),
        6 => (opcode::MKDIR, Body::new().u64(0o755).text(name)),
        7 => (opcode::UNLINK, Body::new().text(name)),
        8 => (opcode::RMDIR, Body::new().text(name)),
        9 => (
            opcode::RENAME2,
            Body::new().u64(ROOT_ID).u64(0).text(name).text("file"),
        ),
        10 => (opcode::LINK, Body::new().u64(node).text(name)),
        11 => (opcode::OPEN, Body::new().u32(2).u32(1)),
        12 => (opcode::READ, transfer(Body::new().u64(handle).u64(0))),
        13 => (
            opcode::WRITE,
            transfer(Body::new().u64(handle).u64(0)).bytes(&[9; 16]),
        ),
        14 => (
            opcode::CREATE,
            Body::new().u32(2).u32(0o600).u64(0).text(name),
        ),
        15 => (opcode::OPENDIR, Body::new().u64(0)),
        16 => (
            opcode::READDIRPLUS,
            Body::new()
                .u64(handle)
                .u64(0)
                .u32(4096)
                .u32(0)
                .u64(0)
                .u64(0),
        ),
        17 => (
            opcode::SETXATTR,
            Body::new().u32(4).u32(0).text("user.a").bytes(b"four"),
        ),
        18 => (opcode::GETXATTR, Body::new().u64(100).text("user.a")),
        19 => (
            opcode::BATCH_FORGET,
            Body::new().u64(2).u64(node).u64(1).u64(9).u64(1),
        ),
        20 => (
            opcode::COPY_FILE_RANGE,
            Body::new()
                .u64(handle)
                .u64(0)
                .u64(0)
                .u64(handle)
                .bytes(&[0; 24]),
        ),
        21 => (opcode::LSEEK, Body::new().u64(handle).u64(0).u64(3)),
        _ => (opcode::INIT, Body::new().u32(7).u32(39).bytes(&[0xff; 56])),
    };
    guest.header(opcode, node, &body)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn nonsense_is_answered_and_reaches_nothing(
        requests in prop::collection::vec(
            (
                any::<u32>(),
                prop_oneof![Just(ROOT_ID), 1u64..6, any::<u64>()],
                prop_oneof![1u64..6, any::<u64>()],
                prop::collection::vec((0usize..200, any::<u8>()), 0..4),
                prop_oneof![Just(4096u32), 0u32..200],
            ),
            1..60,
        )
    ) {
        let folder = Folder::new();
        fs::create_dir(folder.join("directory")).unwrap();
        fs::write(folder.join("file"), "text").unwrap();
        symlink("../canary", folder.join("link")).unwrap();
        let mut guest = folder.mount();
        for (choice, node, handle, spoilt, room) in requests {
            // Ids have a count in their upper half: find one that is likely to be taken.
            let pick = |ids: Vec<u64>, id: u64| {
                let index = usize::try_from(id).unwrap();
                ids.get(index).copied().unwrap_or(id)
            };
            let (nodes, handles) = guest.fs.ids();
            let (node, handle) = (pick(nodes, node), pick(handles, handle));
            let mut request = plausible(&mut guest, choice, node, handle);
            for (at, value) in spoilt {
                if let Some(byte) = request.get_mut(at) {
                    *byte = value;
                }
            }
            // One that is spoilt into allocating fills the disk.
            if request.get(4..8) == Some(&opcode::FALLOCATE.to_le_bytes()) {
                continue;
            }
            guest.send((choice >> 31) as usize, &request, room);
            assert_untouched(&folder);
        }
        let (nodes, handles) = guest.fs.ids();
        prop_assert_eq!(nodes.len() as u64, guest.metric("current_nodes"));
        prop_assert_eq!(handles.len() as u64, guest.metric("current_handles"));
    }
}
