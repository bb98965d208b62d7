//! What a snapshot keeps of a shared folder: enough to serve the same ids in another process.
//!
//! Nodes and handles are kept by path below the folder, and by inode so that another file with the
//! same name is not taken for them. What is not found again (removed, replaced, unlinked while
//! open) is lost: it keeps its id, and every use of it is `ESTALE`, upon which the guest's kernel
//! looks names up anew.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, openat2, readlinkat_raw};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::descriptor_path::DescriptorPath;
use super::handle::{Handle, Handles, open_directory, open_file};
use super::node::{Identity, Node, Nodes, Place, SINGLE, attributes_of, kind_of};
use super::protocol::{MAX_PATH, ROOT_ID};
use super::session::Session;
use super::share::{Share, root_node};
use super::table::Table;

/// Of this format.
const VERSION: u32 = 1;

/// A shared folder.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FsState {
    version: u32,
    tag: String,
    is_read_only: bool,
    session: Option<Session>,
    node_generation: u32,
    nodes: Vec<NodeState>,
    handle_generation: u32,
    handles: Vec<HandleState>,
}

#[derive(Debug, Serialize, Deserialize)]
struct NodeState {
    id: u64,
    lookups: u64,
    file: FileState,
}

#[derive(Debug, Serialize, Deserialize)]
struct HandleState {
    id: u64,
    flags: u32,
    file: FileState,
}

/// Which file it was.
#[derive(Debug, Serialize, Deserialize)]
struct FileState {
    /// Below the folder, empty for the folder itself; none if it was not there any more.
    path: Option<Vec<u8>>,
    /// Type bits of its mode.
    kind: u32,
    device: u64,
    mount: u64,
    inode: u64,
}

impl FileState {
    fn identity(&self) -> Identity {
        Identity {
            place: Place {
                device: self.device,
                mount: self.mount,
            },
            inode: self.inode,
        }
    }

    fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.kind)
    }

    /// Find it below the folder again.
    fn find(&self, root: BorrowedFd<'_>) -> Result<(OwnedFd, Identity), Errno> {
        let path = self.path.as_deref().ok_or(Errno::STALE)?;
        let path = if path.is_empty() { b"." } else { path };
        let path = CString::new(path).map_err(|_| Errno::STALE)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let confined = SINGLE | ResolveFlags::BENEATH;
        let descriptor = openat2(root, path, flags, Mode::empty(), confined)?;
        let stat = attributes_of(descriptor.as_fd(), c"")?;
        let identity = Identity::of(&stat);
        let is_same = kind_of(&stat) == self.kind()
            && stat.stx_ino == self.inode
            // A file system mounted anew has another device number. Its directories are as good
            // as they were, but of a file the guest may hold data.
            && (identity.place.device == self.device || self.kind() == FileType::Directory);
        is_same
            .then_some((descriptor, identity))
            .ok_or(Errno::STALE)
    }
}

impl Share {
    /// What a snapshot keeps.
    ///
    /// # Errors
    /// As readlink(2) of the folder's own path.
    pub(super) fn save(&self) -> Result<FsState, Errno> {
        let root = path_of(self.nodes.get(ROOT_ID)?.descriptor()?)?;
        let below = |descriptor: Option<&OwnedFd>| {
            let path = path_of(descriptor?.as_fd()).ok()?;
            below(&root, &path)
        };
        let nodes = self.nodes.table.iter().filter(|(id, _)| *id != ROOT_ID);
        let handles = self.handles.0.iter();
        Ok(FsState {
            version: VERSION,
            tag: self.config.tag.clone(),
            is_read_only: self.config.is_read_only,
            session: self.session,
            node_generation: self.nodes.table.generation(),
            nodes: nodes
                .map(|(id, node)| NodeState {
                    id,
                    lookups: node.lookups,
                    file: FileState {
                        path: below(node.descriptor.as_ref()),
                        kind: node.kind.as_raw_mode(),
                        device: node.identity.place.device,
                        mount: node.identity.place.mount,
                        inode: node.identity.inode,
                    },
                })
                .collect(),
            handle_generation: self.handles.0.generation(),
            handles: handles
                .map(|(id, handle)| HandleState {
                    id,
                    flags: handle.flags.bits(),
                    file: file_of_handle(handle, below(handle.descriptor.as_ref())),
                })
                .collect(),
        })
    }

    /// Take over what was saved; what is not found is counted.
    ///
    /// # Errors
    /// What in the state cannot be.
    pub(super) fn restore(&mut self, state: FsState) -> Result<(), String> {
        if state.version != VERSION {
            return Err(format!("version {}, not {VERSION}", state.version));
        }
        if (&state.tag, state.is_read_only) != (&self.config.tag, self.config.is_read_only) {
            let access = if state.is_read_only {
                "read-only"
            } else {
                "writable"
            };
            return Err(format!("of folder {:?}, {access}", state.tag));
        }
        let (node_limit, handle_limit) = (self.nodes.table.limit(), self.handles.0.limit());
        let root = self.nodes.get(ROOT_ID).and_then(Node::descriptor);
        let root_descriptor = root.map_err(|errno| errno.to_string())?;
        let root = rustix::io::fcntl_dupfd_cloexec(root_descriptor, 0).and_then(root_node);
        let root = root.map_err(|errno| errno.to_string())?;

        let mut lost_nodes = 0;
        let nodes: Vec<(u64, Node)> = state
            .nodes
            .into_iter()
            .map(|saved| {
                let found = saved.file.find(root_descriptor).ok();
                lost_nodes += u64::from(found.is_none());
                let (descriptor, identity) = match found {
                    Some((descriptor, identity)) => (Some(descriptor), identity),
                    None => (None, saved.file.identity()),
                };
                let node = Node {
                    descriptor,
                    identity,
                    kind: saved.file.kind(),
                    lookups: saved.lookups,
                };
                (saved.id, node)
            })
            .collect();
        let mut lost_handles = 0;
        let handles: Vec<(u64, Handle)> = state
            .handles
            .into_iter()
            .map(|saved| {
                let handle = saved.open(root_descriptor);
                lost_handles += u64::from(handle.descriptor.is_none());
                (saved.id, handle)
            })
            .collect();
        let nodes = nodes.into_iter().chain([(ROOT_ID, root)]);
        let impossible = |id: u64| format!("id {id:#x} is impossible, or one too many");
        let nodes = Table::resume(node_limit, state.node_generation, nodes).map_err(impossible)?;
        let handles =
            Table::resume(handle_limit, state.handle_generation, handles).map_err(impossible)?;
        self.nodes = Nodes::resume(nodes);
        self.handles = Handles(handles);
        self.session = state.session;
        self.metrics.lost_nodes += lost_nodes;
        self.metrics.lost_handles += lost_handles;
        Ok(())
    }
}

impl HandleState {
    /// Open it again.
    fn open(&self, root: BorrowedFd<'_>) -> Handle {
        let flags = OFlags::from_bits_retain(self.flags) - OFlags::TRUNC;
        let found = self.file.find(root);
        let place = found
            .as_ref()
            .map_or(self.file.identity().place, |(_, identity)| identity.place);
        let descriptor = found.and_then(|(descriptor, _)| match self.file.kind() {
            FileType::Directory => open_directory(descriptor.as_fd()),
            kind => open_file(kind, descriptor.as_fd(), flags),
        });
        Handle {
            descriptor: descriptor.ok(),
            directory: (self.file.kind() == FileType::Directory).then_some(place),
            flags,
        }
    }
}

fn file_of_handle(handle: &Handle, path: Option<Vec<u8>>) -> FileState {
    let stat = handle.descriptor.as_ref();
    let stat = stat.and_then(|descriptor| attributes_of(descriptor.as_fd(), c"").ok());
    let identity = stat.as_ref().map(Identity::of);
    let kind = if handle.directory.is_some() {
        FileType::Directory
    } else {
        FileType::RegularFile
    };
    FileState {
        path: path.filter(|_| identity.is_some()),
        kind: kind.as_raw_mode(),
        device: identity.map_or(0, |identity| identity.place.device),
        mount: identity.map_or(0, |identity| identity.place.mount),
        inode: identity.map_or(0, |identity| identity.inode),
    }
}

/// The path of what a descriptor has open, from the process's root.
fn path_of(descriptor: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    let link = DescriptorPath::new(descriptor);
    let mut path = vec![0; MAX_PATH];
    let len = readlinkat_raw(CWD, link.as_c_str(), path.as_mut_slice())?;
    path.truncate(len);
    Ok(path)
}

/// `path` relative to `root`. The end that the kernel gives to removed files is kept: no such
/// file will be found, or not with that inode.
fn below(root: &[u8], path: &[u8]) -> Option<Vec<u8>> {
    let rest = path.strip_prefix(root)?;
    match rest.strip_prefix(b"/") {
        Some(rest) => Some(rest.to_vec()),
        // The folder itself, or one whose name begins like its own.
        None => (rest.is_empty() || root.ends_with(b"/")).then(|| rest.to_vec()),
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
