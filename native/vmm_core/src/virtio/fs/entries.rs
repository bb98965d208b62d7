//! Names: looking them up, making, renaming and removing them.
//!
//! Each name is one component, resolved relative to its directory's descriptor and never followed.
//! New files are made as the user who asked, everything else as ourselves.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags};
use rustix::fs::{linkat, makedev, mkdirat, mknodat, openat, openat2, renameat_with};
use rustix::fs::{symlinkat, unlinkat};
use rustix::io::Errno;
use virtio_core::chain::Chain;

use super::credentials::become_caller;
use super::descriptor_path::DescriptorPath;
use super::handle::{Handle, drop_set_ids, host_flags, open_file};
use super::node::{Found, Identity, Nodes, Place, SINGLE, kind_of};
use super::protocol::{ATTR_SUBMOUNT, IN_HEADER_SIZE, MAX_PATH, OPEN_KILL_SUIDGID};
use super::reply::{Reply, decode_device};
use super::request::{Fields, Header, Name};
use super::share::{Outcome, Share};

/// Permission bits, and those above them.
const MODE_BITS: u32 = 0o7777;
/// Bytes of one node in a `BATCH_FORGET`.
const FORGET_ONE_SIZE: usize = 16;
/// Nodes of one `BATCH_FORGET`: far more than a kernel sends.
const MAX_FORGETS: u32 = 1 << 16;

pub(super) fn mode_bits(mode: u32) -> Mode {
    Mode::from_bits_retain(mode & MODE_BITS)
}

/// What holds for every entry of a session.
#[derive(Clone, Copy, Debug)]
pub(super) struct EntryTerms {
    timeout: Duration,
    has_submounts: bool,
}

impl EntryTerms {
    /// Answer with a file that lies in a directory at `parent`.
    pub(super) fn answer(
        self,
        nodes: &mut Nodes,
        found: Found,
        parent: Place,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let stat = found.stat;
        let is_submount = self.has_submounts
            && kind_of(&stat) == FileType::Directory
            && Identity::of(&stat).place != parent;
        let id = nodes.admit(found)?;
        let flags = if is_submount { ATTR_SUBMOUNT } else { 0 };
        reply.entry(id, &stat, self.timeout, flags);
        Ok(())
    }
}

impl Share {
    /// `FUSE_LOOKUP`.
    pub(super) fn lookup(
        &mut self,
        parent: u64,
        mut body: Fields<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let name = body.name()?;
        self.answer_entry(parent, name, reply)
    }

    /// Look a name up and answer with what it is.
    fn answer_entry(
        &mut self,
        parent: u64,
        name: Name<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let node = self.nodes.get(parent)?;
        let place = node.identity.place;
        let found = self.nodes.find(node.directory()?, name.as_c_str())?;
        self.answer_found(found, place, reply)
    }

    fn answer_found(
        &mut self,
        found: Found,
        parent: Place,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let terms = self.entry_terms();
        terms.answer(&mut self.nodes, found, parent, reply)
    }

    /// What holds for every entry of this session.
    pub(super) fn entry_terms(&self) -> EntryTerms {
        EntryTerms {
            timeout: self.timeout(),
            has_submounts: self.session.is_some_and(|session| session.has_submounts),
        }
    }

    /// `FUSE_FORGET`.
    pub(super) fn forget(&mut self, node: u64, mut body: Fields<'_>) -> Result<Outcome, Errno> {
        self.nodes.forget(node, body.u64()?);
        Ok(Outcome::Silent)
    }

    /// `FUSE_BATCH_FORGET`: read from the guest's memory a piece at a time.
    pub(super) fn batch_forget(
        &mut self,
        mut body: Fields<'_>,
        chain: &Chain,
        header: &Header,
    ) -> Result<Outcome, Errno> {
        let count = body.u32()?.min(MAX_FORGETS);
        body.skip::<4>()?;
        let end = header.len as usize;
        let mut at = IN_HEADER_SIZE + 8;
        for _ in 0..count {
            if at + FORGET_ONE_SIZE > end {
                break;
            }
            let Some(bytes) = chain.readable.read_array::<FORGET_ONE_SIZE>(at) else {
                break;
            };
            let mut one = Fields(&bytes);
            self.nodes.forget(one.u64()?, one.u64()?);
            at += FORGET_ONE_SIZE;
        }
        Ok(Outcome::Silent)
    }

    /// Make something in a directory as the user who asked, and answer with it.
    fn make(
        &mut self,
        header: &Header,
        name: Name<'_>,
        reply: &mut Reply,
        make: impl FnOnce(BorrowedFd<'_>, &CStr) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        self.nodes.table.check_room()?;
        let directory = self.nodes.get(header.node)?.directory()?;
        {
            let _caller = become_caller(header.uid, header.gid)?;
            make(directory, name.as_c_str())?;
        }
        self.answer_entry(header.node, name, reply)
    }

    /// `FUSE_MKDIR`.
    pub(super) fn make_directory(
        &mut self,
        header: &Header,
        mut body: Fields<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let mode = mode_bits(body.u32()?);
        body.skip::<4>()?;
        let name = body.name()?;
        self.make(header, name, reply, |directory, name| {
            mkdirat(directory, name, mode)
        })
    }

    /// `FUSE_MKNOD`: files, pipes, sockets, and devices, which only the guest will open.
    pub(super) fn make_node(
        &mut self,
        header: &Header,
        mut body: Fields<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let mode = body.u32()?;
        let (major, minor) = decode_device(body.u32()?);
        body.skip::<8>()?;
        let name = body.name()?;
        let kind = match FileType::from_raw_mode(mode) {
            FileType::Directory | FileType::Symlink | FileType::Unknown => {
                return Err(Errno::INVAL);
            }
            kind => kind,
        };
        self.make(header, name, reply, |directory, name| {
            mknodat(
                directory,
                name,
                kind,
                mode_bits(mode),
                makedev(major, minor),
            )
        })
    }

    /// `FUSE_SYMLINK`: what the link says is the guest's business, since only it follows links.
    pub(super) fn make_link(
        &mut self,
        header: &Header,
        mut body: Fields<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let name = body.name()?;
        let target = body.text()?;
        if target.count_bytes() >= MAX_PATH {
            return Err(Errno::NAMETOOLONG);
        }
        self.make(header, name, reply, |directory, name| {
            symlinkat(target, directory, name)
        })
    }

    /// `FUSE_LINK`: another name for a node.
    pub(super) fn hard_link(
        &mut self,
        parent: u64,
        mut body: Fields<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let node = self.nodes.get(body.u64()?)?;
        let name = body.name()?;
        let path = DescriptorPath::new(node.descriptor()?);
        let directory = self.nodes.get(parent)?.directory()?;
        let flags = AtFlags::SYMLINK_FOLLOW;
        linkat(CWD, path.as_c_str(), directory, name.as_c_str(), flags)?;
        self.answer_entry(parent, name, reply)
    }

    /// `FUSE_CREATE`: make a file, or open it if it is there.
    pub(super) fn create(
        &mut self,
        header: &Header,
        mut body: Fields<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let asked = body.u32()?;
        let mode = mode_bits(body.u32()?);
        body.skip::<4>()?;
        let open_flags = body.u32()?;
        let name = body.name()?;
        let flags = host_flags(asked);
        self.handles.0.check_room()?;
        self.nodes.table.check_room()?;
        let parent = self.nodes.get(header.node)?;
        let (directory, place) = (parent.directory()?, parent.identity.place);

        let new = {
            let _caller = become_caller(header.uid, header.gid)?;
            // Exclusively: what is there already may be a pipe, or a link.
            let how = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            openat2(directory, name.as_c_str(), flags | how, mode, SINGLE)
        };
        let is_exclusive = OFlags::from_bits_retain(asked).contains(OFlags::EXCL);
        match new {
            Ok(file) => {
                let found = self.nodes.take(hold(&file)?)?;
                self.answer_found(found, place, reply)?;
                self.answer_open(file, flags, reply)
            }
            Err(Errno::EXIST) if !is_exclusive => {
                let found = self.nodes.find(directory, name.as_c_str())?;
                let descriptor = self.nodes.descriptor_of(&found)?;
                if open_flags & OPEN_KILL_SUIDGID != 0 && flags.contains(OFlags::TRUNC) {
                    drop_set_ids(descriptor)?;
                }
                let file = open_file(kind_of(&found.stat), descriptor, flags)?;
                self.answer_found(found, place, reply)?;
                self.answer_open(file, flags, reply)
            }
            Err(errno) => Err(errno),
        }
    }

    /// Keep an open file and answer with its handle.
    pub(super) fn answer_open(
        &mut self,
        file: OwnedFd,
        flags: OFlags,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let handle = self.handles.0.insert(Handle {
            descriptor: Some(file),
            directory: None,
            flags: flags - OFlags::TRUNC,
        })?;
        reply.u64(handle);
        reply.u32(self.config.cache.file_flags());
        reply.u32(0);
        Ok(())
    }

    /// `FUSE_UNLINK`, `FUSE_RMDIR`.
    pub(super) fn remove(
        &mut self,
        parent: u64,
        mut body: Fields<'_>,
        is_directory: bool,
    ) -> Result<(), Errno> {
        let name = body.name()?;
        let flags = if is_directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        let directory = self.nodes.get(parent)?.directory()?;
        unlinkat(directory, name.as_c_str(), flags)
    }

    /// `FUSE_RENAME`, and `FUSE_RENAME2`, which has flags.
    pub(super) fn rename(
        &mut self,
        parent: u64,
        mut body: Fields<'_>,
        has_flags: bool,
    ) -> Result<(), Errno> {
        let new_parent = body.u64()?;
        let mut flags = RenameFlags::empty();
        if has_flags {
            flags = RenameFlags::from_bits_retain(body.u32()?);
            body.skip::<4>()?;
        }
        let (old, new) = (body.name()?, body.name()?);
        let from = self.nodes.get(parent)?.directory()?;
        let to = self.nodes.get(new_parent)?.directory()?;
        renameat_with(from, old.as_c_str(), to, new.as_c_str(), flags)
    }
}

/// An `O_PATH` descriptor of an open file.
fn hold(file: &OwnedFd) -> Result<OwnedFd, Errno> {
    let path = DescriptorPath::new(file.as_fd());
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    openat(CWD, path.as_c_str(), flags, Mode::empty())
}

#[cfg(test)]
#[path = "entries_tests.rs"]
mod tests;
