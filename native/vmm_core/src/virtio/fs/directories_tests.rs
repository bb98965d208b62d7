use std::collections::BTreeSet;
use std::fs;

use rustix::io::Errno;

use crate::virtio::fs::mock_guest::{Body, Folder, MockGuest};
use crate::virtio::fs::protocol::{ROOT_ID, opcode};
use crate::virtio::fs::reply::ENTRY_SIZE;

/// An entry of a listing.
#[derive(Debug, PartialEq, Eq)]
struct Listed {
    node: u64,
    inode: u64,
    position: u64,
    kind: u32,
    name: String,
}

fn open(guest: &mut MockGuest, node: u64) -> u64 {
    let opened = guest.request(opcode::OPENDIR, node, Body::new().u64(0));
    opened.unwrap().u64(0)
}

fn list(
    guest: &mut MockGuest,
    handle: u64,
    position: u64,
    size: u32,
    is_plus: bool,
) -> Result<Vec<Listed>, Errno> {
    let opcode = if is_plus {
        opcode::READDIRPLUS
    } else {
        opcode::READDIR
    };
    let body = Body::new().u64(handle).u64(position).u32(size).u32(0);
    let body = body.u64(0).u64(0);
    let answer = guest.request_with_room(opcode, ROOT_ID, &body, size + 16)?;
    let (mut at, mut listed) = (0, Vec::new());
    while at < answer.0.len() {
        let node = if is_plus { answer.u64(at) } else { 0 };
        let entry = at + if is_plus { ENTRY_SIZE } else { 0 };
        let len = answer.u32(entry + 16) as usize;
        let name = &answer.0[entry + 24..entry + 24 + len];
        listed.push(Listed {
            node,
            inode: answer.u64(entry),
            position: answer.u64(entry + 8),
            kind: answer.u32(entry + 20),
            name: String::from_utf8(name.to_vec()).unwrap(),
        });
        at = (entry + 24 + len).next_multiple_of(8);
    }
    assert_eq!(at, answer.0.len());
    Ok(listed)
}

fn list_all(guest: &mut MockGuest, handle: u64, size: u32, is_plus: bool) -> Vec<Listed> {
    let mut all: Vec<Listed> = Vec::new();
    loop {
        let position = all.last().map_or(0, |last| last.position);
        let more = list(guest, handle, position, size, is_plus).unwrap();
        if more.is_empty() {
            return all;
        }
        all.extend(more);
    }
}

#[test]
fn a_listing_has_every_name_once_with_its_kind() {
    let folder = Folder::new();
    fs::create_dir(folder.join("directory")).unwrap();
    fs::write(folder.join("file"), "").unwrap();
    std::os::unix::fs::symlink("file", folder.join("link")).unwrap();
    let mut guest = folder.mount();
    let handle = open(&mut guest, ROOT_ID);
    for is_plus in [false, true] {
        let mut listed = list_all(&mut guest, handle, 4096, is_plus);
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        let kinds: Vec<_> = listed
            .iter()
            .map(|one| (one.name.as_str(), one.kind))
            .collect();
        let expected = [
            (".", 4),
            ("..", 4),
            ("directory", 4),
            ("file", 8),
            ("link", 10),
        ];
        assert_eq!(kinds, expected, "{is_plus}");
        for one in &listed {
            let is_known = is_plus && !one.name.starts_with('.');
            assert_eq!(one.node != 0, is_known, "{one:?}");
            if is_known {
                let attributes = guest.attributes(one.node).unwrap();
                assert_eq!(attributes.inode, one.inode);
                assert_eq!(attributes.mode >> 12, one.kind);
            }
        }
    }
    // Each listing with attributes counts as a lookup of each name.
    let node = guest.lookup(ROOT_ID, "file").unwrap().node;
    guest.forget(node, 1);
    assert!(guest.attributes(node).is_ok());
    guest.forget(node, 1);
    assert_eq!(guest.attributes(node), Err(Errno::STALE));
}

/// Make `count` files in a folder and list them, with and without attributes.
fn list_many(folder: &Folder, count: usize) {
    fs::create_dir(folder.join("big")).unwrap();
    for number in 0..count {
        let path = folder.join(&format!("big/a file with number {number}"));
        let kind = rustix::fs::FileType::RegularFile;
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, 0o600.into(), 0).unwrap();
    }
    let mut guest = folder.mount();
    let big = guest.lookup(ROOT_ID, "big").unwrap().node;
    let handle = open(&mut guest, big);
    for (size, is_plus) in [(32 << 10, false), (4096, true)] {
        let listed = list_all(&mut guest, handle, size, is_plus);
        assert_eq!(listed.len(), count + 2);
        let names: BTreeSet<_> = listed.iter().map(|one| &one.name).collect();
        assert_eq!(names.len(), count + 2, "each once");
        // What cannot be held is listed nonetheless.
        let known = listed.iter().filter(|one| one.node != 0).count() as u64;
        assert_eq!(guest.metric("current_nodes"), 2 + known);
        assert_eq!(known > 0, is_plus);
    }
}

#[test]
fn many_names_are_listed_a_piece_at_a_time() {
    list_many(&Folder::new(), 3_000);
}

#[test]
fn a_hundred_thousand_names_are_listed() {
    // In memory: what is tested is not how fast a disk makes files.
    list_many(&Folder::new_in("/dev/shm"), 100_000);
}

#[test]
fn a_listing_goes_on_anywhere_and_sees_changes() {
    let folder = Folder::new();
    for name in ["a", "b", "c", "d"] {
        fs::write(folder.join(name), "").unwrap();
    }
    let mut guest = folder.mount();
    let handle = open(&mut guest, ROOT_ID);
    let all = list_all(&mut guest, handle, 4096, false);
    let rest = list(&mut guest, handle, all[2].position, 4096, false).unwrap();
    assert_eq!(rest, all[3..]);
    fs::remove_file(folder.join("c")).unwrap();
    assert_eq!(
        list_all(&mut guest, handle, 4096, true).len(),
        all.len() - 1
    );
}

#[test]
fn listings_of_several_handles_do_not_mix() {
    let folder = Folder::new();
    for number in 0..100 {
        fs::write(folder.join(&format!("{number}")), "").unwrap();
    }
    let mut guest = folder.mount();
    let handles = [open(&mut guest, ROOT_ID), open(&mut guest, ROOT_ID)];
    let whole = list_all(&mut guest, handles[0], 64 << 10, false);
    let mut listed: [Vec<Listed>; 2] = Default::default();
    while listed[1].len() < whole.len() {
        for (handle, listed) in handles.iter().zip(&mut listed) {
            let position = listed.last().map_or(0, |last| last.position);
            listed.extend(list(&mut guest, *handle, position, 128, false).unwrap());
        }
    }
    assert_eq!(
        listed,
        [whole, list_all(&mut guest, handles[1], 4096, false)]
    );
    // The same piece again, as after a seek, and what is gone meanwhile.
    let again = list(&mut guest, handles[0], listed[0][3].position, 128, false).unwrap();
    assert_eq!(again[0], listed[0][4]);
    let rest = list(&mut guest, handles[0], listed[0][3].position, 4096, false).unwrap();
    assert_eq!(rest[..], listed[0][4..4 + rest.len()]);
    let gone = listed[0].last().unwrap();
    let before = listed[0].get(100).unwrap().position;
    assert_eq!(
        list(&mut guest, handles[0], before, 4096, true)
            .unwrap()
            .len(),
        1
    );
    fs::remove_file(folder.join(&gone.name)).unwrap();
    assert_eq!(list(&mut guest, handles[0], before, 4096, true), Ok(vec![]));
}

#[test]
fn room_for_no_entry_gives_none() {
    let folder = Folder::new();
    fs::write(folder.join(&"x".repeat(255)), "").unwrap();
    let mut guest = folder.mount();
    let handle = open(&mut guest, ROOT_ID);
    assert_eq!(list(&mut guest, handle, 0, 0, false), Ok(vec![]));
    assert_eq!(list(&mut guest, handle, 0, 31, false), Ok(vec![]));
    // The longest name and its fields.
    let all = list_all(&mut guest, handle, 280, false);
    assert_eq!(all.len(), 3);
    let long = all.iter().position(|one| one.name.len() == 255).unwrap();
    let before = long.checked_sub(1).map_or(0, |index| all[index].position);
    assert_eq!(list(&mut guest, handle, before, 279, false), Ok(vec![]));
    assert_eq!(list_all(&mut guest, handle, 408, true).len(), 3);
}

#[test]
fn only_directories_are_listed() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    let (file, handle) = guest.create(ROOT_ID, "file", libc::O_RDWR, 0o600).unwrap();
    let opened = guest.request(opcode::OPENDIR, file.node, Body::new().u64(0));
    assert_eq!(opened, Err(Errno::NOTDIR));
    assert_eq!(list(&mut guest, handle, 0, 4096, false), Err(Errno::BADF));
    assert_eq!(list(&mut guest, 999, 0, 4096, true), Err(Errno::BADF));
    let directory = open(&mut guest, ROOT_ID);
    assert_eq!(guest.read(directory, 0, 10), Err(Errno::BADF));
    let body = Body::new().u64(directory).u32(0).u32(0).u64(0);
    guest.request(opcode::RELEASEDIR, ROOT_ID, body).unwrap();
    assert_eq!(
        list(&mut guest, directory, 0, 4096, false),
        Err(Errno::BADF)
    );
}
