use std::fs;
use std::os::unix::fs::symlink;

use rustix::io::Errno;

use crate::virtio::fs::mock_guest::{Answer, Body, Folder, MockGuest};
use crate::virtio::fs::protocol::{ROOT_ID, opcode};

fn set(
    guest: &mut MockGuest,
    node: u64,
    name: &str,
    value: &[u8],
    flags: i32,
) -> Result<(), Errno> {
    let size = u32::try_from(value.len()).unwrap();
    let body = Body::new().u32(size).u32(flags.cast_unsigned());
    let body = body.text(name).bytes(value);
    guest.request(opcode::SETXATTR, node, body).map(drop)
}

fn get(guest: &mut MockGuest, node: u64, name: &str, size: u32) -> Result<Answer, Errno> {
    let body = Body::new().u32(size).u32(0).text(name);
    guest.request(opcode::GETXATTR, node, body)
}

#[test]
fn attributes_are_set_sized_got_listed_and_removed() {
    let folder = Folder::new();
    fs::write(folder.join("file"), "").unwrap();
    let mut guest = folder.mount();
    let node = guest.lookup(ROOT_ID, "file").unwrap().node;
    set(&mut guest, node, "user.a", b"value", 0).unwrap();
    assert_eq!(
        set(&mut guest, node, "user.a", b"v", libc::XATTR_CREATE),
        Err(Errno::EXIST)
    );
    assert_eq!(
        set(&mut guest, node, "user.b", b"v", libc::XATTR_REPLACE),
        Err(Errno::NODATA)
    );
    set(&mut guest, node, "user.b", b"", libc::XATTR_CREATE).unwrap();

    let size = get(&mut guest, node, "user.a", 0).unwrap();
    assert_eq!((size.u32(0), size.0.len()), (5, 8));
    assert_eq!(get(&mut guest, node, "user.a", 100).unwrap().0, b"value");
    assert_eq!(get(&mut guest, node, "user.a", 5).unwrap().0, b"value");
    assert_eq!(get(&mut guest, node, "user.a", 4), Err(Errno::RANGE));
    assert_eq!(get(&mut guest, node, "user.b", 4).unwrap().0, b"");
    assert_eq!(get(&mut guest, node, "user.none", 4), Err(Errno::NODATA));

    let names = guest
        .request(opcode::LISTXATTR, node, Body::new().u32(4096).u32(0))
        .unwrap();
    let size = guest
        .request(opcode::LISTXATTR, node, Body::new().u64(0))
        .unwrap();
    assert_eq!(size.u32(0) as usize, names.0.len());
    let mut names: Vec<_> = names.0.split(|byte| *byte == 0).collect();
    names.retain(|name| name.starts_with(b"user."));
    names.sort_unstable();
    assert_eq!(names, [b"user.a", b"user.b"]);

    guest
        .request(opcode::REMOVEXATTR, node, Body::new().text("user.a"))
        .unwrap();
    assert_eq!(get(&mut guest, node, "user.a", 0), Err(Errno::NODATA));
}

#[test]
fn large_values_and_nonsense() {
    let folder = Folder::new();
    let mut guest = folder.mount();
    let large = vec![7; 3000];
    set(&mut guest, ROOT_ID, "user.large", &large, 0).unwrap();
    assert_eq!(
        get(&mut guest, ROOT_ID, "user.large", 1 << 16).unwrap().0,
        large
    );
    assert_eq!(
        get(&mut guest, ROOT_ID, "user.large", u32::MAX).map(|a| a.0),
        Ok(large)
    );
    let too_large = set(&mut guest, ROOT_ID, "user.x", &vec![0; (1 << 16) + 1], 0);
    assert_eq!(too_large, Err(Errno::TOOBIG));
    assert_eq!(
        set(&mut guest, ROOT_ID, &"x".repeat(256), b"", 0),
        Err(Errno::RANGE)
    );
    assert_eq!(
        set(&mut guest, ROOT_ID, "user.x", b"", 8),
        Err(Errno::INVAL)
    );
    // A size that promises more than the request has.
    let body = Body::new().u32(100).u32(0).text("user.x").bytes(b"short");
    assert_eq!(
        guest.request(opcode::SETXATTR, ROOT_ID, body),
        Err(Errno::INVAL)
    );
    // Room for less than the attribute, whatever size the request names.
    let body = Body::new().u32(4096).u32(0).text("user.large");
    let answer = guest.request_with_room(opcode::GETXATTR, ROOT_ID, &body, 16 + 100);
    assert_eq!(answer, Err(Errno::RANGE));
}

#[test]
fn a_links_own_attributes_are_meant() {
    let folder = Folder::new();
    symlink("../canary", folder.join("link")).unwrap();
    let mut guest = folder.mount();
    let link = guest.lookup(ROOT_ID, "link").unwrap().node;
    // The kernel has no user attributes on links.
    assert_eq!(
        set(&mut guest, link, "user.a", b"value", 0),
        Err(Errno::PERM)
    );
    let canary = folder.outside().join("canary");
    let mut names = [0; 256];
    let listed = rustix::fs::listxattr(&canary, names.as_mut_slice()).unwrap();
    assert!(!names[..listed].windows(6).any(|part| part == b"user.a"));
    if rustix::process::geteuid().is_root() {
        set(&mut guest, link, "trusted.a", b"value", 0).unwrap();
        assert_eq!(get(&mut guest, link, "trusted.a", 10).unwrap().0, b"value");
        let canarys = rustix::fs::getxattr(&canary, "trusted.a", &mut [0; 10][..]);
        assert_eq!(canarys, Err(Errno::NODATA));
    }
}
