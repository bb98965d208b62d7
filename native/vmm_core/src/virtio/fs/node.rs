//! What the guest has looked up: one `O_PATH` descriptor each, by node id.
//!
//! ```text
//!   lookup, create ──▶ held (lookups += 1) ──(forget: lookups = 0)──▶ gone
//!                        ▲
//!   restore ─────────────┴── or lost: still counted, every use is ESTALE
//! ```
//!
//! The same file is the same node however often and by whatever name it is found: nodes are also
//! kept by identity, which cannot be another file's as long as the descriptor holds the inode.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::fs::{openat2, statx};
use rustix::io::Errno;

use super::protocol::ROOT_ID;
use super::table::Table;

/// Where a file lives: which file system, mounted where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Place {
    pub(super) device: u64,
    pub(super) mount: u64,
}

/// Which file it is, as long as it is held open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    pub(super) place: Place,
    pub(super) inode: u64,
}

impl Identity {
    /// Of the file these are the attributes of.
    pub(super) fn of(stat: &Statx) -> Self {
        Self {
            place: Place {
                device: u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor),
                mount: stat.stx_mnt_id,
            },
            inode: stat.stx_ino,
        }
    }
}

/// The kind of file these are the attributes of.
pub(super) fn kind_of(stat: &Statx) -> FileType {
    FileType::from_raw_mode(u32::from(stat.stx_mode))
}

/// A file the guest knows.
#[derive(Debug)]
pub(super) struct Node {
    /// `O_PATH`; none when a restore did not find the file.
    pub(super) descriptor: Option<OwnedFd>,
    pub(super) identity: Identity,
    pub(super) kind: FileType,
    /// How often the guest was given it.
    pub(super) lookups: u64,
}

impl Node {
    /// Its descriptor.
    ///
    /// # Errors
    /// `ESTALE`: lost.
    pub(super) fn descriptor(&self) -> Result<BorrowedFd<'_>, Errno> {
        self.descriptor
            .as_ref()
            .map(AsFd::as_fd)
            .ok_or(Errno::STALE)
    }

    /// Its descriptor, to resolve a name in.
    ///
    /// # Errors
    /// `ENOTDIR`, `ESTALE`.
    pub(super) fn directory(&self) -> Result<BorrowedFd<'_>, Errno> {
        match self.kind {
            FileType::Directory => self.descriptor(),
            _ => Err(Errno::NOTDIR),
        }
    }
}

/// A file found, before it is counted.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) stat: Statx,
    /// Already a node, or a descriptor to become one.
    known: Result<u64, OwnedFd>,
}

/// The nodes of one session.
#[derive(Debug)]
pub(super) struct Nodes {
    pub(super) table: Table<Node>,
    by_identity: HashMap<Identity, u64>,
}

impl Nodes {
    /// Only the root, which is always node 1.
    pub(super) fn new(root: Node, limit: usize) -> Self {
        let mut table = Table::new(limit.max(1));
        let identity = root.identity;
        let _id = table.insert(root);
        Self {
            table,
            by_identity: HashMap::from([(identity, ROOT_ID)]),
        }
    }

    /// Those of a restored session.
    pub(super) fn resume(table: Table<Node>) -> Self {
        let held = table.iter().filter(|(_, node)| node.descriptor.is_some());
        let by_identity = held.map(|(id, node)| (node.identity, id)).collect();
        Self { table, by_identity }
    }

    /// The node with this id.
    ///
    /// # Errors
    /// `ESTALE`: there is none.
    pub(super) fn get(&self, id: u64) -> Result<&Node, Errno> {
        self.table.get(id).ok_or(Errno::STALE)
    }

    /// What `name` is in `directory`, a link itself and not what it points to.
    ///
    /// # Errors
    /// `ENOENT` and others of openat2(2).
    pub(super) fn find(&self, directory: BorrowedFd<'_>, name: &CStr) -> Result<Found, Errno> {
        // Most names were found before: then one call is enough.
        let stat = attributes_of(directory, name)?;
        if let Some(id) = self.by_identity.get(&Identity::of(&stat)) {
            let known = Ok(*id);
            return Ok(Found { stat, known });
        }
        self.find_new(directory, name)
    }

    /// What `name` is in `directory`, by whose listing it is probably `listed`.
    ///
    /// # Errors
    /// As [`Nodes::find`].
    pub(super) fn find_listed(
        &self,
        directory: BorrowedFd<'_>,
        name: &CStr,
        listed: Identity,
    ) -> Result<Found, Errno> {
        if self.by_identity.contains_key(&listed) {
            return self.find(directory, name);
        }
        // Probably new: to ask what it is first would be a call more for each name of a listing.
        self.find_new(directory, name)
    }

    /// What `name` is in `directory`, which is held at once.
    fn find_new(&self, directory: BorrowedFd<'_>, name: &CStr) -> Result<Found, Errno> {
        self.table.check_room()?;
        self.take(open_path(directory, name)?)
    }

    /// A file of which the caller has an `O_PATH` descriptor.
    ///
    /// # Errors
    /// As statx(2).
    pub(super) fn take(&self, descriptor: OwnedFd) -> Result<Found, Errno> {
        let stat = attributes_of(descriptor.as_fd(), c"")?;
        let known = self.by_identity.get(&Identity::of(&stat)).copied();
        let known = known.ok_or(descriptor);
        Ok(Found { stat, known })
    }

    /// The descriptor of what was found.
    ///
    /// # Errors
    /// `ESTALE`: lost.
    pub(super) fn descriptor_of<'a>(&'a self, found: &'a Found) -> Result<BorrowedFd<'a>, Errno> {
        match &found.known {
            Ok(id) => self.get(*id)?.descriptor(),
            Err(descriptor) => Ok(descriptor.as_fd()),
        }
    }

    /// Count what was found as given to the guest; gives its id.
    ///
    /// # Errors
    /// `ENFILE`: the guest holds as many as it may.
    pub(super) fn admit(&mut self, found: Found) -> Result<u64, Errno> {
        match found.known {
            Ok(id) => {
                let node = self.table.get_mut(id).ok_or(Errno::STALE)?;
                node.lookups = node.lookups.saturating_add(1);
                Ok(id)
            }
            Err(descriptor) => {
                let identity = Identity::of(&found.stat);
                let id = self.table.insert(Node {
                    descriptor: Some(descriptor),
                    identity,
                    kind: kind_of(&found.stat),
                    lookups: 1,
                })?;
                self.by_identity.insert(identity, id);
                Ok(id)
            }
        }
    }

    /// The guest gives back `lookups` of a node. The root stays.
    pub(super) fn forget(&mut self, id: u64, lookups: u64) {
        if id == ROOT_ID {
            return;
        }
        let Some(node) = self.table.get_mut(id) else {
            return;
        };
        node.lookups = node.lookups.saturating_sub(lookups);
        if node.lookups == 0 {
            let identity = node.identity;
            self.table.remove(id);
            // A lost node may have the identity of one that is held.
            if self.by_identity.get(&identity) == Some(&id) {
                self.by_identity.remove(&identity);
            }
        }
    }

    /// Forget all but the root.
    pub(super) fn clear(&mut self) {
        let ids: Vec<u64> = self.table.iter().map(|(id, _)| id).collect();
        for id in ids {
            self.forget(id, u64::MAX);
        }
    }
}

/// Attributes of a name in a directory, or of the directory itself for an empty name.
///
/// # Errors
/// As statx(2).
pub(super) fn attributes_of(directory: BorrowedFd<'_>, name: &CStr) -> Result<Statx, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let mask = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    statx(directory, name, flags, mask)
}

/// Hold what `name` is in `directory` without opening it.
///
/// # Errors
/// As openat2(2).
pub(super) fn open_path(directory: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(directory, name, flags, Mode::empty(), SINGLE)
}

/// How a single name is resolved: through no link. Since it is not followed either it cannot be
/// otherwise; the kernel is made to see to it nonetheless. (Not `BENEATH`: a name without slash is
/// below, and that check takes a lock that all of the host's processes share.)
pub(super) const SINGLE: ResolveFlags =
    ResolveFlags::NO_SYMLINKS.union(ResolveFlags::NO_MAGICLINKS);
