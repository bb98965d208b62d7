//! The folder as FUSE sees it: state of the session, and which function answers which request.
//!
//! ```text
//!   fresh ──INIT──▶ open ──DESTROY, device reset──▶ fresh
//!                    └──INIT──▶ open anew
//! ```
//!
//! The operations are in the files next to this: `entries` (names), `attributes`, `files`,
//! `directories`, `xattrs`.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use virtio_core::chain::Chain;

use super::config::{FsConfig, FsError};
use super::handle::Handles;
use super::listing::Listing;
use super::metrics::Metrics;
use super::node::{Identity, Node, Nodes, attributes_of, kind_of};
use super::protocol::opcode;
use super::reply::Reply;
use super::request::{Fields, Header};
use super::session::Session;
use super::table::{MAX_SLOTS, Table};

/// Descriptors left to the rest of the process.
const RESERVED_DESCRIPTORS: usize = 512;
/// What we take even of a process that may open little.
const LEAST_DESCRIPTORS: usize = 128;

/// How a request was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// With what the reply holds.
    Reply,
    /// With this many bytes that are in the guest's memory already, after the header.
    InPlace(usize),
    /// Not to be answered.
    Silent,
}

/// One folder, one guest.
#[derive(Debug)]
pub(super) struct Share {
    pub(super) config: FsConfig,
    pub(super) session: Option<Session>,
    pub(super) nodes: Nodes,
    pub(super) handles: Handles,
    pub(super) metrics: Metrics,
    /// Of the directory that was listed last.
    pub(super) listing: Listing,
}

impl Share {
    /// Hold the folder.
    ///
    /// # Errors
    /// It is missing, or no directory.
    pub(super) fn new(config: FsConfig) -> Result<Self, FsError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, &config.folder, flags, Mode::empty()).and_then(root_node);
        let root = root.map_err(|errno| FsError::folder(&config.folder, errno))?;
        let (node_limit, handle_limit) = limits();
        Ok(Self {
            session: None,
            nodes: Nodes::new(root, node_limit),
            handles: Handles(Table::new(handle_limit)),
            metrics: Metrics::default(),
            listing: Listing::new(),
            config,
        })
    }

    /// Back to before `INIT`.
    pub(super) fn end_session(&mut self) {
        self.session = None;
        self.nodes.clear();
        self.handles.0.clear();
    }

    /// How long the guest may trust names and attributes.
    pub(super) fn timeout(&self) -> Duration {
        self.config.cache.timeout()
    }

    /// Meet one request.
    ///
    /// # Errors
    /// What the guest is told.
    pub(super) fn perform(
        &mut self,
        header: &Header,
        body: Fields<'_>,
        chain: &mut Chain,
        reply: &mut Reply,
    ) -> Result<Outcome, Errno> {
        if header.opcode == opcode::INIT {
            return self.init(body, reply);
        }
        if self.session.is_none() {
            return Err(Errno::IO);
        }
        if self.config.is_read_only && opcode::is_change(header.opcode) {
            return Err(Errno::ROFS);
        }
        let node = header.node;
        match header.opcode {
            opcode::READ => return self.read(body, chain),
            opcode::WRITE => return self.write(body, chain, reply),
            opcode::FORGET => return self.forget(node, body),
            opcode::BATCH_FORGET => return self.batch_forget(body, chain, header),
            opcode::INTERRUPT => return Ok(Outcome::Silent),
            opcode::LOOKUP => self.lookup(node, body, reply),
            opcode::GETATTR => self.get_attributes(node, reply),
            opcode::SETATTR => self.set_attributes(node, body, reply),
            opcode::READLINK => self.read_link(node, reply),
            opcode::SYMLINK => self.make_link(header, body, reply),
            opcode::MKNOD => self.make_node(header, body, reply),
            opcode::MKDIR => self.make_directory(header, body, reply),
            opcode::UNLINK => self.remove(node, body, false),
            opcode::RMDIR => self.remove(node, body, true),
            opcode::RENAME => self.rename(node, body, false),
            opcode::RENAME2 => self.rename(node, body, true),
            opcode::LINK => self.hard_link(node, body, reply),
            opcode::CREATE => self.create(header, body, reply),
            opcode::OPEN => self.open(node, body, reply),
            opcode::OPENDIR => self.open_directory(node, reply),
            opcode::RELEASE | opcode::RELEASEDIR => self.release(body),
            opcode::FSYNC => self.sync(body, false),
            opcode::FSYNCDIR => self.sync(body, true),
            opcode::SYNCFS => self.sync_file_system(node),
            opcode::READDIR => self.read_directory(body, reply, false),
            opcode::READDIRPLUS => self.read_directory(body, reply, true),
            opcode::STATFS => self.stat_file_system(node, reply),
            opcode::ACCESS => self.access(header, body),
            opcode::SETXATTR => self.set_xattr(node, body),
            opcode::GETXATTR => self.get_xattr(node, body, reply),
            opcode::LISTXATTR => self.list_xattrs(node, body, reply),
            opcode::REMOVEXATTR => self.remove_xattr(node, body),
            opcode::FALLOCATE => self.allocate(body),
            opcode::LSEEK => self.seek(body, reply),
            opcode::COPY_FILE_RANGE => self.copy_range(body, reply),
            opcode::DESTROY => {
                self.end_session();
                Ok(())
            }
            // The guest's kernel then does without, and does not ask again. Among them FLUSH:
            // locks are the guest's own and data is never kept here, so nothing is done at close.
            _ => Err(Errno::NOSYS),
        }?;
        Ok(Outcome::Reply)
    }
}

/// The root's node.
///
/// # Errors
/// As statx(2).
pub(super) fn root_node(descriptor: OwnedFd) -> Result<Node, Errno> {
    let stat = attributes_of(descriptor.as_fd(), c"")?;
    Ok(Node {
        descriptor: Some(descriptor),
        identity: Identity::of(&stat),
        kind: kind_of(&stat),
        lookups: 1,
    })
}

/// How many nodes and handles there may be: what the process may open, less what the rest of it
/// needs. Whoever runs the machine raises the process's limit before.
fn limits() -> (usize, usize) {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let limit = limit.map_or(MAX_SLOTS, |limit| {
        usize::try_from(limit).unwrap_or(MAX_SLOTS)
    });
    let limit = limit
        .saturating_sub(RESERVED_DESCRIPTORS)
        .clamp(LEAST_DESCRIPTORS, MAX_SLOTS);
    let handles = limit / 4;
    (limit - handles, handles)
}
