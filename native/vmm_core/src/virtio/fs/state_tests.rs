use std::fs;
use std::os::unix::fs::symlink;

use rustix::io::Errno;

use crate::virtio::device::{DeviceError, VirtioDevice};
use crate::virtio::fs::Fs;
use crate::virtio::fs::mock_guest::{Body, Folder, MockGuest};
use crate::virtio::fs::protocol::{ROOT_ID, opcode};

#[test]
fn a_guest_goes_on_in_another_process() {
    let folder = Folder::new();
    fs::create_dir(folder.join("directory")).unwrap();
    symlink("target", folder.join("directory/link")).unwrap();
    let mut guest = folder.mount();
    let directory = guest.lookup(ROOT_ID, "directory").unwrap().node;
    let link = guest.lookup(directory, "link").unwrap().node;
    let flags = libc::O_RDWR | libc::O_TRUNC;
    let (file, handle) = guest.create(directory, "file", flags, 0o600).unwrap();
    guest.write(handle, 0, b"before").unwrap();
    let forgotten = guest
        .create(ROOT_ID, "forgotten", libc::O_RDWR, 0o600)
        .unwrap()
        .0
        .node;
    guest.forget(forgotten, 1);
    let opened = guest.request(opcode::OPENDIR, directory, Body::new().u64(0));
    let listing = opened.unwrap().u64(0);
    let opened = guest.request(opcode::OPENDIR, ROOT_ID, Body::new().u64(0));
    let root_listing = opened.unwrap().u64(0);

    let mut guest = guest.restore_elsewhere(folder.config());
    assert_eq!(
        guest.read(handle, 0, 10).unwrap(),
        b"before",
        "not truncated again"
    );
    guest.write(handle, 6, b" and after").unwrap();
    assert_eq!(guest.attributes(file.node).unwrap().size, 16);
    assert_eq!(guest.lookup(directory, "file").unwrap().node, file.node);
    let target = guest.request(opcode::READLINK, link, Body::new()).unwrap();
    assert_eq!(target.0, b"target");
    for handle in [listing, root_listing] {
        let body = Body::new().u64(handle).u64(0).u32(4096).u32(0).u64(0);
        let listed = guest.request(opcode::READDIR, ROOT_ID, body.u64(0));
        assert!(!listed.unwrap().0.is_empty());
    }
    assert_eq!(
        (guest.metric("lost_nodes"), guest.metric("lost_handles")),
        (0, 0)
    );
    // Forgets are counted from where they were; new ids are new.
    guest.forget(file.node, 1);
    assert!(guest.attributes(file.node).is_ok());
    guest.forget(file.node, 1);
    assert_eq!(guest.attributes(file.node), Err(Errno::STALE));
    let again = guest.lookup(ROOT_ID, "forgotten").unwrap().node;
    assert!(![directory, link, file.node, forgotten].contains(&again));
    assert_ne!(guest.open(again, libc::O_RDONLY).unwrap(), handle);
}

#[test]
fn what_is_not_found_again_is_stale_and_counted() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    let mut handles = Vec::new();
    let mut nodes = Vec::new();
    for name in ["unlinked", "replaced", "moved", "kept"] {
        let (entry, handle) = guest.create(ROOT_ID, name, libc::O_RDWR, 0o600).unwrap();
        guest.write(handle, 0, name.as_bytes()).unwrap();
        handles.push(handle);
        nodes.push(entry.node);
    }
    guest
        .request(opcode::UNLINK, ROOT_ID, Body::new().text("unlinked"))
        .unwrap();
    let state = guest.fs.save().unwrap();
    // Replaced by another file while the old one still takes its inode.
    let old = fs::File::open(folder.join("replaced")).unwrap();
    fs::write(folder.join("new"), "another").unwrap();
    fs::rename(folder.join("new"), folder.join("replaced")).unwrap();
    fs::rename(folder.join("moved"), folder.join("elsewhere")).unwrap();

    let mut fs = Fs::new(folder.config()).unwrap();
    fs.restore(&state).unwrap();
    let mut guest = MockGuest::boot(fs);
    drop(old);
    for index in 0..3 {
        assert_eq!(guest.read(handles[index], 0, 10), Err(Errno::STALE));
        assert_eq!(guest.write(handles[index], 0, b"x"), Err(Errno::STALE));
        assert_eq!(guest.attributes(nodes[index]), Err(Errno::STALE));
        assert_eq!(guest.open(nodes[index], 0), Err(Errno::STALE));
        assert_eq!(guest.release(handles[index]), Ok(()));
        guest.forget(nodes[index], 1);
    }
    assert_eq!(guest.read(handles[3], 0, 10).unwrap(), b"kept");
    assert_eq!(guest.metric("lost_nodes"), 3);
    assert_eq!(guest.metric("lost_handles"), 3);
    assert_eq!(guest.metric("current_nodes"), 2);
    assert_eq!(guest.metric("current_handles"), 1);
    // Looked up anew, they are what they are now.
    let replaced = guest.lookup(ROOT_ID, "replaced").unwrap().node;
    let handle = guest.open(replaced, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(handle, 0, 10).unwrap(), b"another");
}

#[test]
fn a_saved_path_does_not_lead_outside() {
    let folder = Folder::new();
    fs::create_dir(folder.join("directory")).unwrap();
    fs::write(folder.join("directory/canary"), "").unwrap();
    let mut guest = folder.mount();
    let node = guest.walk("directory/canary").unwrap().node;
    let state = guest.fs.save().unwrap();
    drop(guest);
    // The directory becomes a link to where the canary is.
    fs::remove_dir_all(folder.join("directory")).unwrap();
    symlink("..", folder.join("directory")).unwrap();
    let mut fs = Fs::new(folder.config()).unwrap();
    fs.restore(&state).unwrap();
    let mut guest = MockGuest::boot(fs);
    assert_eq!(guest.attributes(node), Err(Errno::STALE));
    assert_eq!(guest.open(node, libc::O_RDONLY), Err(Errno::STALE));
}

#[test]
fn a_state_of_something_else_is_refused() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    guest.create(ROOT_ID, "file", libc::O_RDWR, 0o600).unwrap();
    let state = guest.fs.save().unwrap();
    let refused = |config, state: &[u8]| match Fs::new(config).unwrap().restore(state) {
        Err(DeviceError::State { kind, reason }) => {
            assert_eq!(kind, "fs");
            reason
        }
        other => panic!("{other:?}"),
    };
    let mut config = folder.config();
    config.tag = "other".into();
    assert_eq!(refused(config, &state), "of folder \"shared\", writable");
    let mut config = folder.config();
    config.is_read_only = true;
    assert_eq!(refused(config, &state), "of folder \"shared\", writable");
    for len in 0..state.len() {
        refused(folder.config(), &state[..len]);
    }
    let mut newer = state.clone();
    newer[0] = 2;
    assert_eq!(refused(folder.config(), &newer), "version 2, not 1");
    // Whatever it says, it is taken or refused.
    for position in 0..state.len() {
        for bit in 0..8 {
            let mut changed = state.clone();
            changed[position] ^= 1 << bit;
            let _outcome = Fs::new(folder.config()).unwrap().restore(&changed);
        }
    }
}

#[test]
fn paths_are_relative_to_the_folder() {
    let relative = |root: &str, path: &str| {
        let path = super::below(root.as_bytes(), path.as_bytes());
        path.map(|path| String::from_utf8(path).unwrap())
    };
    assert_eq!(relative("/a", "/a/b/c").as_deref(), Some("b/c"));
    assert_eq!(relative("/a", "/a").as_deref(), Some(""));
    assert_eq!(relative("/", "/a/b").as_deref(), Some("a/b"));
    assert_eq!(relative("/", "/").as_deref(), Some(""));
    assert_eq!(relative("/a", "/ab/c"), None);
    assert_eq!(relative("/a", "/b"), None);
}
