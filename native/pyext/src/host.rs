//! Linux calls that Python's standard library lacks, as Python functions. They act on the calling
//! thread or process and are called from the main thread; those that touch the file system run
//! detached from the interpreter.

use std::ffi::CString;

use pyo3::prelude::*;
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

use crate::detach::detached;
use crate::errors::NativeError;
use crate::mount::MountOptions;

/// Bytes of a thread's name that the kernel keeps (`TASK_COMM_LEN` less its zero).
const THREAD_NAME_LEN: usize = 15;

fn refused(operation: &'static str, path: Option<&str>) -> impl FnOnce(Errno) -> NativeError {
    let path = path.map(str::to_owned);
    move |errno| NativeError::Host {
        operation,
        path,
        source: errno.into(),
    }
}

/// ``prctl(PR_SET_CHILD_SUBREAPER)``: orphaned grandchildren become ours.
#[pyfunction]
pub(crate) fn set_child_subreaper() -> Result<(), NativeError> {
    // Any pid means "on": the call takes a flag.
    let pid = Some(rustix::process::getpid());
    rustix::process::set_child_subreaper(pid).map_err(refused("become a child subreaper", None))
}

/// ``prctl(PR_SET_NAME)`` of the calling thread: what ps shows, at most 15 bytes.
#[pyfunction]
pub(crate) fn set_thread_name(name: &str) -> Result<(), NativeError> {
    let named = |errno| refused("set the thread's name", None)(errno);
    let bytes: Vec<u8> = name.bytes().take(THREAD_NAME_LEN).collect();
    let name = CString::new(bytes).map_err(|_| named(Errno::INVAL))?;
    rustix::thread::set_name(&name).map_err(named)
}

/// ``unshare(CLONE_NEWNS)``, then make / recursively slave and shared.
#[pyfunction]
pub(crate) fn enter_private_mount_namespace(py: Python<'_>) -> PyResult<()> {
    detached(py, || {
        #[expect(unsafe_code, reason = "unshare is unsafe for the sake of CLONE_FILES")]
        // SAFETY: a mount namespace shares no memory and no descriptors with Rust code.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
            .map_err(refused("unshare the mount namespace", None))?;
        for propagation in [
            MountPropagationFlags::DOWNSTREAM,
            MountPropagationFlags::SHARED,
        ] {
            rustix::mount::mount_change("/", propagation | MountPropagationFlags::REC)
                .map_err(refused("change the propagation of mounts", Some("/")))?;
        }
        Ok::<_, NativeError>(())
    })
}

/// mount(2) with fstab-style options; flags are recognised, the rest is data.
#[pyfunction]
#[expect(
    clippy::needless_pass_by_value,
    reason = "a list of strings arrives as a Vec"
)]
pub(crate) fn mount(
    py: Python<'_>,
    source: &str,
    target: &str,
    fstype: &str,
    options: Vec<String>,
) -> PyResult<()> {
    detached(py, || {
        let options = MountOptions::parse(options.iter().map(String::as_str));
        options
            .mount(source, target, fstype)
            .map_err(refused("mount", Some(target)))
    })
}

/// ``umount2(MNT_DETACH | UMOUNT_NOFOLLOW)``. A target that is no mount point is no error.
#[pyfunction]
pub(crate) fn unmount(py: Python<'_>, target: &str) -> PyResult<()> {
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    detached(py, || match rustix::mount::unmount(target, flags) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(errno) => Err(refused("unmount", Some(target))(errno)),
    })
}
