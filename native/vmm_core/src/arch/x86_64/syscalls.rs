//! System calls that only this architecture has: older forms of those that take a directory's
//! descriptor or a time limit, which the C library and rustix still use here.

/// To be let through together with the forms that all architectures have.
pub(crate) const OLDER_CALLS: &[libc::c_long] = &[
    libc::SYS_epoll_wait,
    libc::SYS_open,
    libc::SYS_poll,
    libc::SYS_rename,
    libc::SYS_stat,
    libc::SYS_unlink,
];
