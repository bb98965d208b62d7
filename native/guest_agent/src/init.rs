//! The agent as PID 1: mounts, devices, cgroups, names.
//!
//! Runs once, before any thread. A step that fails is logged and passed over where the guest is
//! still of use without it.

use std::ffi::CStr;
use std::fs;
use std::path::Path;

use rustix::fs::{CWD, Mode, mkdirat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind_recursive, mount_move};
use rustix::process::{chdir, chroot, setsid};

use crate::error::{AgentError, IoContext, Result};

const CGROUP_ROOT: &str = "/sys/fs/cgroup";

struct Mount {
    source: &'static str,
    target: &'static str,
    kind: &'static str,
    flags: MountFlags,
    data: &'static CStr,
}

/// Prepares the guest; what could not be done is returned as text for the log.
pub(crate) fn prepare() -> Vec<String> {
    let secure = MountFlags::NOSUID | MountFlags::NODEV;
    let no_exec = secure | MountFlags::NOEXEC;
    let mounts = [
        Mount {
            source: "proc",
            target: "/proc",
            kind: "proc",
            flags: no_exec,
            data: c"",
        },
        Mount {
            source: "sysfs",
            target: "/sys",
            kind: "sysfs",
            flags: no_exec,
            data: c"",
        },
        Mount {
            source: "devtmpfs",
            target: "/dev",
            kind: "devtmpfs",
            flags: MountFlags::NOSUID,
            data: c"mode=0755",
        },
        Mount {
            source: "shm",
            target: "/dev/shm",
            kind: "tmpfs",
            flags: secure,
            data: c"mode=1777",
        },
        Mount {
            source: "devpts",
            target: "/dev/pts",
            kind: "devpts",
            flags: MountFlags::NOSUID | MountFlags::NOEXEC,
            data: c"gid=5,mode=0620,ptmxmode=0666",
        },
        Mount {
            source: "tmpfs",
            target: "/run",
            kind: "tmpfs",
            flags: secure,
            data: c"mode=0755",
        },
        Mount {
            source: "cgroup2",
            target: CGROUP_ROOT,
            kind: "cgroup2",
            flags: no_exec,
            data: c"nsdelegate",
        },
    ];
    let mut failures = Vec::new();
    let mut note = |result: Result<()>| {
        if let Err(error) = result {
            failures.push(crate::error::chain(&error));
        }
    };
    note(leave_rootfs());
    for entry in &mounts {
        note(attach(entry));
    }
    note(enable_controllers());
    note(link_ptmx());
    // PID 1 has no session yet; a signal from the console must not reach it.
    note(setsid().map(drop).during("start session"));
    note(set_hostname());
    note(raise_loopback());
    failures
}

/// `pivot_root` refuses to work on the kernel's initial `rootfs`. A bind mount of it moved over the
/// root is an ordinary mount, so containers can leave it in the usual way.
fn leave_rootfs() -> Result<()> {
    const PLACE: &str = "/run";
    mount_bind_recursive("/", PLACE).on("bind root on", PLACE)?;
    chdir(PLACE).on("enter", PLACE)?;
    mount_move(".", "/").on("move root from", PLACE)?;
    chroot(".").on("change root to", PLACE)?;
    chdir("/").on("enter", "/")
}

fn attach(entry: &Mount) -> Result<()> {
    match mkdirat(CWD, entry.target, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error).on("create", entry.target),
    }
    match mount(
        entry.source,
        entry.target,
        entry.kind,
        entry.flags,
        entry.data,
    ) {
        // devtmpfs may be there from the kernel.
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(error) => Err(error).on("mount", entry.target),
    }
}

/// Controllers must be passed down from the root to be of use below.
fn enable_controllers() -> Result<()> {
    let root = Path::new(CGROUP_ROOT);
    let available = root.join("cgroup.controllers");
    let control = root.join("cgroup.subtree_control");
    let names = fs::read_to_string(&available).on("read", available)?;
    for name in names.split_ascii_whitespace() {
        // One by one: a controller that cannot be passed down must not keep the others.
        fs::write(&control, format!("+{name}")).on("write", &control)?;
    }
    Ok(())
}

fn link_ptmx() -> Result<()> {
    const PTMX: &str = "/dev/ptmx";
    match fs::remove_file(PTMX) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).on("remove", PTMX);
        }
        _ => {}
    }
    std::os::unix::fs::symlink("/dev/pts/ptmx", PTMX).on("link", PTMX)
}

fn set_hostname() -> Result<()> {
    let Ok(name) = fs::read_to_string("/etc/hostname") else {
        return Ok(());
    };
    rustix::system::sethostname(name.trim().as_bytes()).during("set host name")
}

fn raise_loopback() -> Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    use std::os::fd::AsRawFd;
    /// `IFF_UP | IFF_RUNNING` in linux/if.h, as the request holds them.
    const UP: libc::c_short = 0x41;
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .during("open socket")?;
    let mut name = [0; libc::IFNAMSIZ];
    for (place, byte) in name.iter_mut().zip(b"lo") {
        *place = libc::c_char::from_ne_bytes([*byte]);
    }
    let request = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: UP },
    };
    // SAFETY: SIOCSIFFLAGS reads an ifreq, to which the pointer leads.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result < 0 {
        return Err(std::io::Error::last_os_error()).during("raise loopback");
    }
    Ok(())
}

/// Ends the guest. Does not return unless the kernel refuses.
pub(crate) fn power_off() -> AgentError {
    rustix::fs::sync();
    // SAFETY: the flags are valid; the call ends the machine.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
    AgentError::System {
        operation: "power off",
        source: std::io::Error::last_os_error(),
    }
}
