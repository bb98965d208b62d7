//! The I/O thread's own umask, and making files as the guest's user.
//!
//! Files belong to who made them in the guest, so they are made with that user's `fsuid` and
//! `fsgid`: the kernel then applies what depends on them (set-group-id directories, quotas).
//! Permissions were checked by the guest's kernel, which knows the user's groups as we do not, so
//! the capability to pass checks is kept. Both are per thread when the system calls are made
//! directly. Without privilege all files belong to the user we run as.

#![expect(unsafe_code, reason = "unshare(2), setfsuid(2) and setfsgid(2)")]

use std::cell::Cell;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::umask;
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};
use rustix::thread::{capabilities, set_capabilities, unshare_unsafe};

/// What the thread was before it made files for others.
#[derive(Clone, Copy, Debug)]
struct Original {
    uid: u32,
    gid: u32,
    capabilities: CapabilitySets,
}

thread_local! {
    /// Set once the thread is prepared.
    static ORIGINAL: Cell<Option<Original>> = const { Cell::new(None) };
}

/// Give this thread a umask of its own, 0: the guest's kernel has applied the guest's. Done by the
/// first request if not before; repeats cost nothing. The thread's working directory becomes its
/// own too.
///
/// # Errors
/// As unshare(2), capget(2).
pub fn prepare_thread() -> Result<(), Errno> {
    if ORIGINAL.get().is_some() {
        return Ok(());
    }
    // SAFETY: only CLONE_FILES takes descriptors from other threads, and it is not among the flags.
    unsafe { unshare_unsafe(UnshareFlags::FS) }?;
    umask(Mode::empty());
    ORIGINAL.set(Some(Original {
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        capabilities: capabilities(None)?,
    }));
    Ok(())
}

/// While it lives, this thread makes files as another user.
#[derive(Debug)]
pub(super) struct AsCaller {
    /// None: it is the same user, or we may not.
    original: Option<Original>,
}

/// Make files as `uid` and `gid` until the result is dropped.
///
/// # Errors
/// `EINVAL`: ids that are none. `EPERM`: the kernel refused.
pub(super) fn become_caller(uid: u32, gid: u32) -> Result<AsCaller, Errno> {
    let needed = CapabilitySet::SETUID | CapabilitySet::SETGID;
    let original = ORIGINAL.get().filter(|original| {
        original.capabilities.effective.contains(needed)
            && (original.uid, original.gid) != (uid, gid)
    });
    let Some(was) = original else {
        return Ok(AsCaller { original: None });
    };
    if uid == u32::MAX || gid == u32::MAX {
        return Err(Errno::INVAL);
    }
    let caller = AsCaller { original };
    // Returns what it was; asking again with an id that is none shows what it is now.
    set_fs_id(libc::SYS_setfsgid, gid);
    set_fs_id(libc::SYS_setfsuid, uid);
    if set_fs_id(libc::SYS_setfsgid, u32::MAX) != gid
        || set_fs_id(libc::SYS_setfsuid, u32::MAX) != uid
    {
        return Err(Errno::PERM);
    }
    // Leaving user 0 took the file capabilities. All but one come back: who has FSETID keeps
    // set-group-id bits that the kernel should drop.
    set_capabilities(
        None,
        CapabilitySets {
            effective: was.capabilities.effective - CapabilitySet::FSETID,
            ..was.capabilities
        },
    )?;
    Ok(caller)
}

impl Drop for AsCaller {
    fn drop(&mut self) {
        if let Some(original) = self.original {
            set_fs_id(libc::SYS_setfsuid, original.uid);
            set_fs_id(libc::SYS_setfsgid, original.gid);
            // A subset of what is permitted, which never changed: cannot fail.
            let _restored = set_capabilities(None, original.capabilities);
        }
    }
}

/// setfsuid(2) or setfsgid(2) of this thread only; gives what it was.
fn set_fs_id(call: libc::c_long, id: u32) -> u32 {
    // SAFETY: these calls take a number, touch no memory and cannot fail.
    let was = unsafe { libc::syscall(call, id) };
    // The kernel returns a 32-bit id; -1 is none.
    u32::try_from(was).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn the_umask_is_this_threads_alone() {
        let folder = tempfile::tempdir().unwrap();
        let before = umask(Mode::from_bits_retain(0o027));
        let ours = std::thread::spawn({
            let path = folder.path().join("ours");
            move || {
                prepare_thread().unwrap();
                prepare_thread().unwrap();
                std::fs::write(&path, "").unwrap();
                path.metadata().unwrap().permissions().mode() & 0o777
            }
        });
        assert_eq!(ours.join().unwrap(), 0o666);
        assert_eq!(umask(before), Mode::from_bits_retain(0o027));
    }

    #[test]
    fn files_are_the_callers_while_it_lasts() {
        std::thread::spawn(|| {
            prepare_thread().unwrap();
            let original = ORIGINAL.get().unwrap();
            let folder = tempfile::tempdir().unwrap();
            let owner = |name: &str| {
                let path = folder.path().join(name);
                std::fs::write(&path, "").unwrap();
                let metadata = path.metadata().unwrap();
                (metadata.uid(), metadata.gid())
            };
            let expected = if original
                .capabilities
                .effective
                .contains(CapabilitySet::SETUID)
            {
                (1234, 4321)
            } else {
                (original.uid, original.gid)
            };
            {
                // The folder is ours and closed to others: the capability to pass is needed.
                let _caller = become_caller(1234, 4321).unwrap();
                assert_eq!(owner("theirs"), expected);
            }
            assert_eq!(owner("ours"), (original.uid, original.gid));
            assert_eq!(capabilities(None).unwrap(), original.capabilities);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn no_user_is_nobody() {
        std::thread::spawn(|| {
            prepare_thread().unwrap();
            let may = ORIGINAL.get().unwrap().capabilities.effective;
            let outcome = become_caller(u32::MAX, 0).map(drop);
            if may.contains(CapabilitySet::SETUID | CapabilitySet::SETGID) {
                assert_eq!(outcome, Err(Errno::INVAL));
            } else {
                assert_eq!(outcome, Ok(()), "nothing is switched");
            }
        })
        .join()
        .unwrap();
    }
}
