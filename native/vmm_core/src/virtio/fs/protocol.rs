//! Numbers of the FUSE protocol that we use (`linux/fuse.h`, version 7.39), and of the device.
//!
//! All fields are little-endian here: the guest's kernel is of the host's byte order.

/// The protocol's major version.
pub(super) const MAJOR: u32 = 7;
/// What we speak.
pub(super) const MINOR: u32 = 39;
/// The first kernel with virtio-fs speaks this.
pub(super) const OLDEST_MINOR: u32 = 31;
/// `FUSE_ROOT_ID`: the shared folder.
pub(super) const ROOT_ID: u64 = 1;

/// `struct fuse_in_header`.
pub(super) const IN_HEADER_SIZE: usize = 40;
/// `struct fuse_out_header`.
pub(super) const OUT_HEADER_SIZE: usize = 16;
/// `struct fuse_read_in`, `fuse_write_in`.
pub(super) const TRANSFER_IN_SIZE: usize = 40;
/// Pages of one read or write (`FUSE_MAX_PAGES`), and bytes.
pub(super) const MAX_PAGES: u16 = 256;
/// The largest read or write.
pub(super) const MAX_TRANSFER: u32 = 1 << 20;
/// Names (`NAME_MAX`), without the end.
pub(super) const MAX_NAME: usize = 255;
/// Links (`PATH_MAX`), with the end.
pub(super) const MAX_PATH: usize = 4096;
/// `XATTR_SIZE_MAX`, `XATTR_LIST_MAX`.
pub(super) const MAX_XATTR: usize = 1 << 16;
/// A tag in the device's configuration space.
pub(super) const TAG_SIZE: usize = 36;

/// `FUSE_LOOKUP` and so on.
pub(super) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const ACCESS: u32 = 34;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const SYNCFS: u32 = 50;

    /// What a read-only folder refuses before looking further. Opening for writing is refused by
    /// `OPEN`, so requests on handles need no check.
    pub(crate) fn is_change(opcode: u32) -> bool {
        matches!(
            opcode,
            SETATTR
                | SYMLINK
                | MKNOD
                | MKDIR
                | UNLINK
                | RMDIR
                | RENAME
                | RENAME2
                | LINK
                | SETXATTR
                | REMOVEXATTR
                | CREATE
        )
    }
}

/// `FUSE_INIT` flags, both words.
pub(super) mod init {
    pub(crate) const ASYNC_READ: u64 = 1 << 0;
    pub(crate) const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub(crate) const BIG_WRITES: u64 = 1 << 5;
    pub(crate) const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub(crate) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(crate) const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub(crate) const ASYNC_DIO: u64 = 1 << 15;
    pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    pub(crate) const SUBMOUNTS: u64 = 1 << 27;
    pub(crate) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(crate) const INIT_EXT: u64 = 1 << 30;
    pub(crate) const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
}

/// `FOPEN_*` in answers.
pub(super) mod open_reply {
    pub(crate) const DIRECT_IO: u32 = 1 << 0;
    pub(crate) const KEEP_CACHE: u32 = 1 << 1;
    pub(crate) const CACHE_DIR: u32 = 1 << 3;
    pub(crate) const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// `FATTR_*`: which fields of a `SETATTR` count.
pub(super) mod set {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const FH: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
    pub(crate) const KILL_SUIDGID: u32 = 1 << 11;
}

/// `FUSE_ATTR_SUBMOUNT`: the directory is another file system's root.
pub(super) const ATTR_SUBMOUNT: u32 = 1 << 0;
/// `FUSE_OPEN_KILL_SUIDGID`.
pub(super) const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// `FUSE_WRITE_CACHE`: pages that are written back, at their own place even if opened to append.
pub(super) const WRITE_CACHE: u32 = 1 << 0;
/// `FUSE_WRITE_KILL_SUIDGID`.
pub(super) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `FUSE_FSYNC_FDATASYNC`.
pub(super) const FSYNC_DATA_ONLY: u32 = 1 << 0;
