//! Namespaces that outlive the process that made them: the pod's shared ipc, uts and pid.
//!
//! Each is pinned by a bind mount of its nsfs file. Making one changes the calling thread, so it
//! happens on a thread of its own that ends right after.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::mount::mount_bind;
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::error::{AgentError, IoContext, Result};
use crate::mount::unmount_at;
use crate::spec::SharedNamespaces;

/// Where the files are.
const DIRECTORY: &str = "/run/sandbox-ns";

/// Makes the pod's ipc and uts namespaces; the latter with `hostname`.
///
/// # Errors
/// The kernel refuses, or the files cannot be pinned.
pub(crate) fn create_shared(hostname: &str) -> Result<SharedNamespaces> {
    let hostname = hostname.to_owned();
    fs::create_dir_all(DIRECTORY).on("create", DIRECTORY)?;
    let thread = std::thread::Builder::new()
        .name("namespaces".into())
        .spawn(move || unshare_and_pin(&hostname))
        .during("start namespace thread")?;
    thread.join().map_err(|_| AgentError::TaskLost)?
}

fn unshare_and_pin(hostname: &str) -> Result<SharedNamespaces> {
    // SAFETY: only this thread, which ends after the pinning, leaves the namespaces; neither flag
    // touches memory or descriptors shared with other threads.
    unsafe { unshare_unsafe(UnshareFlags::NEWIPC | UnshareFlags::NEWUTS) }
        .during("unshare ipc and uts")?;
    if !hostname.is_empty() {
        rustix::system::sethostname(hostname.as_bytes()).during("set host name")?;
    }
    Ok(SharedNamespaces {
        ipc: Some(pin(Path::new("/proc/thread-self/ns/ipc"), "ipc")?),
        uts: Some(pin(Path::new("/proc/thread-self/ns/uts"), "uts")?),
        pid: None,
    })
}

/// Pins the pid namespace of a process as the pod's.
///
/// # Errors
/// The process is gone.
pub(crate) fn pin_pid(pid: i32) -> Result<String> {
    fs::create_dir_all(DIRECTORY).on("create", DIRECTORY)?;
    pin(Path::new(&format!("/proc/{pid}/ns/pid")), "pid")
}

fn pin(source: &Path, name: &str) -> Result<String> {
    let target = PathBuf::from(DIRECTORY).join(name);
    // One that has ended may still be pinned here.
    unmount_at(&target)?;
    fs::write(&target, "").on("create", &target)?;
    mount_bind(source, &target).on("pin namespace at", &target)?;
    Ok(target.to_string_lossy().into_owned())
}
