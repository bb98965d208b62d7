//! What a thread of the machine may ask of the kernel: one list per kind of thread.
//!
//! A filter is for one thread and for good; nothing of it reaches the rest of the process. What is
//! not on the list fails with EPERM, so that a forgotten call shows as an error of one request and
//! not as a death; what starts programs, changes namespaces or mounts, traces processes or loads
//! code into the kernel is on neither list. Lists hold what the C library needs besides (memory,
//! locks, the end of a thread, a panic's message). Called once by `thread.rs`, before the thread
//! touches anything of the guest.

use std::io;
use std::sync::OnceLock;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::arch::syscalls::OLDER_CALLS;
use crate::thread::Kind;

/// Memory, locks, clocks, signals, the end of a thread, a panic's message.
const BASE: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_fcntl,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Activating and resetting devices: vCPUs do it when their guest asks, the I/O thread when the
/// machine ends.
const DEVICES: &[libc::c_long] = &[
    libc::SYS_dup,
    libc::SYS_epoll_ctl,
    libc::SYS_eventfd2,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_newfstatat,
    libc::SYS_openat2,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_readlinkat,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_statx,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
];

/// Serving devices: host sockets of the vsock device, files of the shared folders, the balloon,
/// snapshots.
const SERVING: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_copy_file_range,
    libc::SYS_epoll_pwait,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_flock,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getxattr,
    libc::SYS_lgetxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    libc::SYS_lremovexattr,
    libc::SYS_lseek,
    libc::SYS_lsetxattr,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_name_to_handle_at,
    libc::SYS_openat,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_removexattr,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_setfsgid,
    libc::SYS_setfsuid,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_setgroups,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_setxattr,
    libc::SYS_statfs,
    libc::SYS_symlinkat,
    libc::SYS_sync_file_range,
    libc::SYS_syncfs,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
];

/// `KVMIO`: the type byte of KVM's requests (`linux/kvm.h`).
const KVM_REQUESTS: u64 = 0xae00;
const REQUEST_TYPE: u64 = 0xff00;
/// `TUNSETOFFLOAD`, `TUNSETQUEUE`, `TUNSETVNETHDRSZ` (`linux/if_tun.h`).
const TUN_REQUESTS: [u64; 3] = [0x4004_54d0, 0x4004_54d9, 0x4004_54d8];
/// `BLKDISCARD`, `BLKZEROOUT`, `BLKGETSIZE64` (`linux/fs.h`).
const BLOCK_REQUESTS: [u64; 3] = [0x1277, 0x127f, 0x8008_1272];

/// `AF_UNIX`.
const UNIX_FAMILY: u64 = 1;

/// Confine the calling thread, for good.
///
/// # Errors
/// The kernel does not take the filter.
pub(crate) fn confine(kind: Kind) -> io::Result<()> {
    static VCPU: OnceLock<Option<BpfProgram>> = OnceLock::new();
    static IO: OnceLock<Option<BpfProgram>> = OnceLock::new();
    let program = match kind {
        Kind::Vcpu => VCPU.get_or_init(|| compile(&[BASE, DEVICES])),
        Kind::Io => IO.get_or_init(|| compile(&[BASE, DEVICES, SERVING, OLDER_CALLS])),
    };
    let program = program
        .as_ref()
        .ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))?;
    seccompiler::apply_filter(program).map_err(io::Error::other)
}

/// A rule for the calls whose argument `index` compares to `value`.
fn rule(index: u8, operator: SeccompCmpOp, value: u64) -> Option<SeccompRule> {
    let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value).ok()?;
    SeccompRule::new(vec![condition]).ok()
}

/// Make the program of a filter that lets these calls through, sockets of the host's own, and some
/// requests of ioctl(2).
fn compile(lists: &[&[libc::c_long]]) -> Option<BpfProgram> {
    let unconditional = lists
        .iter()
        .copied()
        .flatten()
        .map(|call| (*call, Vec::new()));
    let mut requests = vec![rule(1, SeccompCmpOp::MaskedEq(REQUEST_TYPE), KVM_REQUESTS)?];
    for value in TUN_REQUESTS.into_iter().chain(BLOCK_REQUESTS) {
        requests.push(rule(1, SeccompCmpOp::Eq, value)?);
    }
    // Useless to a vCPU, which may not connect.
    let families = vec![rule(0, SeccompCmpOp::Eq, UNIX_FAMILY)?];
    let rules = unconditional
        .chain([(libc::SYS_ioctl, requests), (libc::SYS_socket, families)])
        .collect();
    // Positive, and as wide as the filter's field.
    let errno = u32::try_from(libc::EPERM).ok()?;
    let arch = TargetArch::try_from(std::env::consts::ARCH).ok()?;
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Errno(errno),
        SeccompAction::Allow,
        arch,
    );
    filter.ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::TcpListener;
    use std::process::Command;
    use std::thread;

    use super::*;

    fn confined<T: Send + 'static>(kind: Kind, work: impl FnOnce() -> T + Send + 'static) -> T {
        thread::spawn(move || {
            confine(kind).unwrap();
            work()
        })
        .join()
        .unwrap()
    }

    #[test]
    fn neither_kind_of_thread_starts_programs_or_reaches_the_network() {
        for kind in [Kind::Vcpu, Kind::Io] {
            let (program, network) = confined(kind, || {
                let program = Command::new("/bin/true").spawn();
                (
                    program.map(|_| ()),
                    TcpListener::bind("127.0.0.1:0").map(|_| ()),
                )
            });
            assert_eq!(program.unwrap_err().raw_os_error(), Some(libc::EPERM));
            assert_eq!(network.unwrap_err().raw_os_error(), Some(libc::EPERM));
        }
    }

    #[test]
    fn a_vcpu_opens_no_files_and_the_io_thread_does() {
        let open = || File::open("/proc/self/status").map(|_| ());
        let refused = confined(Kind::Vcpu, open).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
        confined(Kind::Io, open).unwrap();
    }

    #[test]
    fn the_rest_of_the_process_is_not_confined() {
        confined(Kind::Vcpu, || ());
        let status = Command::new("/bin/true").status().unwrap();
        assert!(status.success());
    }

    #[test]
    fn a_panic_on_a_confined_thread_can_be_caught() {
        for kind in [Kind::Vcpu, Kind::Io] {
            let is_caught = confined(kind, || {
                std::panic::catch_unwind(|| panic!("on purpose")).is_err()
            });
            assert!(is_caught);
        }
    }
}
