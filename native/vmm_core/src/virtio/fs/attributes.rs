//! Attributes of nodes, links' targets, and figures of file systems.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, CWD, FileType, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use rustix::fs::{Gid, Uid};
use rustix::fs::{chmodat, chownat, fstatfs, ftruncate, readlinkat_raw, utimensat};
use rustix::io::Errno;

use super::descriptor_path::DescriptorPath;
use super::entries::mode_bits;
use super::handle::{drop_set_ids, open_file};
use super::node::attributes_of;
use super::protocol::{MAX_PATH, set};
use super::reply::Reply;
use super::request::{Fields, Header};
use super::share::Share;

/// `struct fuse_setattr_in`.
#[derive(Clone, Copy, Debug)]
struct NewAttributes {
    valid: u32,
    handle: u64,
    size: u64,
    /// Of access and of modification.
    seconds: [u64; 2],
    nanoseconds: [u32; 2],
    mode: u32,
    uid: u32,
    gid: u32,
}

impl NewAttributes {
    fn parse(body: &mut Fields<'_>) -> Result<Self, Errno> {
        let valid = body.u32()?;
        body.skip::<4>()?;
        let (handle, size) = (body.u64()?, body.u64()?);
        // The lock's owner.
        body.skip::<8>()?;
        let seconds = [body.u64()?, body.u64()?];
        // The time of change is the host's.
        body.skip::<8>()?;
        let nanoseconds = [body.u32()?, body.u32()?];
        body.skip::<4>()?;
        let mode = body.u32()?;
        body.skip::<4>()?;
        Ok(Self {
            valid,
            handle,
            size,
            seconds,
            nanoseconds,
            mode,
            uid: body.u32()?,
            gid: body.u32()?,
        })
    }

    fn has(&self, bits: u32) -> bool {
        self.valid & bits != 0
    }

    fn times(&self) -> Timestamps {
        let ([access_s, change_s], [access, change]) = (self.seconds, self.nanoseconds);
        let time = |is_now: bool, is_set: bool, seconds: u64, nanoseconds: u32| Timespec {
            tv_sec: seconds.cast_signed(),
            tv_nsec: match (is_now, is_set) {
                (true, _) => UTIME_NOW,
                (false, true) => i64::from(nanoseconds),
                (false, false) => UTIME_OMIT,
            },
        };
        let (has_access, has_change) = (self.has(set::ATIME), self.has(set::MTIME));
        Timestamps {
            last_access: time(self.has(set::ATIME_NOW), has_access, access_s, access),
            last_modification: time(self.has(set::MTIME_NOW), has_change, change_s, change),
        }
    }
}

impl Share {
    /// `FUSE_GETATTR`.
    pub(super) fn get_attributes(&self, node: u64, reply: &mut Reply) -> Result<(), Errno> {
        let stat = attributes_of(self.nodes.get(node)?.descriptor()?, c"")?;
        reply.attributes(&stat, self.timeout());
        Ok(())
    }

    /// `FUSE_SETATTR`.
    pub(super) fn set_attributes(
        &self,
        node: u64,
        mut body: Fields<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let new = NewAttributes::parse(&mut body)?;
        let descriptor = self.nodes.get(node)?.descriptor()?;
        if new.has(set::MODE) {
            change_mode(descriptor, new.mode)?;
        }
        if new.has(set::UID | set::GID) {
            let id = |bit, id: u32| (new.has(bit) && id != u32::MAX).then_some(id);
            let owner = id(set::UID, new.uid).map(Uid::from_raw);
            let group = id(set::GID, new.gid).map(Gid::from_raw);
            let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
            chownat(descriptor, c"", owner, group, flags)?;
        }
        if new.has(set::SIZE) {
            self.resize(node, &new)?;
        }
        if new.has(set::ATIME | set::MTIME | set::ATIME_NOW | set::MTIME_NOW) {
            let path = DescriptorPath::new(descriptor);
            utimensat(CWD, path.as_c_str(), &new.times(), AtFlags::empty())?;
        }
        self.get_attributes(node, reply)
    }

    fn resize(&self, node: u64, new: &NewAttributes) -> Result<(), Errno> {
        let resize = |file: BorrowedFd<'_>| {
            if new.has(set::KILL_SUIDGID) {
                drop_set_ids(file)?;
            }
            ftruncate(file, new.size)
        };
        if new.has(set::FH) {
            resize(self.handles.file(new.handle)?)
        } else {
            let node = self.nodes.get(node)?;
            let file = open_file(node.kind, node.descriptor()?, OFlags::WRONLY)?;
            resize(file.as_fd())
        }
    }

    /// `FUSE_READLINK`.
    pub(super) fn read_link(&self, node: u64, reply: &mut Reply) -> Result<(), Errno> {
        let node = self.nodes.get(node)?;
        if node.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let descriptor = node.descriptor()?;
        let len = (MAX_PATH - 1).min(reply.room_left());
        reply.fill(len, |target| readlinkat_raw(descriptor, c"", target))
    }

    /// `FUSE_STATFS`.
    pub(super) fn stat_file_system(&self, node: u64, reply: &mut Reply) -> Result<(), Errno> {
        let stat = fstatfs(self.nodes.get(node)?.descriptor()?)?;
        for count in [
            stat.f_blocks,
            stat.f_bfree,
            stat.f_bavail,
            stat.f_files,
            stat.f_ffree,
        ] {
            reply.u64(count);
        }
        for size in [stat.f_bsize, stat.f_namelen, stat.f_frsize] {
            reply.u32(u32::try_from(size).map_err(|_| Errno::OVERFLOW)?);
        }
        reply.bytes(&[0; 28]);
        Ok(())
    }

    /// `FUSE_ACCESS`: the guest's kernel checks by itself; who asks nonetheless gets what the
    /// mode says.
    pub(super) fn access(&self, header: &Header, mut body: Fields<'_>) -> Result<(), Errno> {
        let mask = body.u32()?;
        if mask & !0o7 != 0 {
            return Err(Errno::INVAL);
        }
        let node = self.nodes.get(header.node)?;
        let stat = attributes_of(node.descriptor()?, c"")?;
        if self.config.is_read_only && mask & 0o2 != 0 {
            return Err(Errno::ROFS);
        }
        let mode = u32::from(stat.stx_mode);
        let allowed = if header.uid == 0 {
            let is_searchable = node.kind == FileType::Directory || mode & 0o111 != 0;
            0o6 | u32::from(is_searchable)
        } else if header.uid == stat.stx_uid {
            mode >> 6
        } else if header.gid == stat.stx_gid {
            mode >> 3
        } else {
            mode
        };
        if mask & !allowed == 0 {
            Ok(())
        } else {
            Err(Errno::ACCESS)
        }
    }
}

/// chmod(2) of whatever a descriptor names.
pub(super) fn change_mode(descriptor: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
    let path = DescriptorPath::new(descriptor);
    chmodat(CWD, path.as_c_str(), mode_bits(mode), AtFlags::empty())
}

#[cfg(test)]
#[path = "attributes_tests.rs"]
mod tests;
