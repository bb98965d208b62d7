//! Listing directories.
//!
//! Positions are the host file system's own cookies, so a listing goes on where it was in another
//! process too; a handle keeps nothing but a descriptor, and the share what is left of one listing.

use std::mem::take;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::handle::{Handle, open_directory};
use super::listing::{Listed, Listing};
use super::node::Identity;
use super::reply::{ENTRY_SIZE, Reply, pair};
use super::request::Fields;
use super::share::Share;

/// The largest answer.
const MAX_ANSWER: usize = 128 << 10;
/// `struct fuse_dirent` without the name.
const DIRENT_SIZE: usize = 24;

impl Share {
    /// `FUSE_OPENDIR`.
    pub(super) fn open_directory(&mut self, node: u64, reply: &mut Reply) -> Result<(), Errno> {
        self.handles.0.check_room()?;
        let node = self.nodes.get(node)?;
        let handle = Handle {
            descriptor: Some(open_directory(node.directory()?)?),
            directory: Some(node.identity.place),
            flags: OFlags::RDONLY,
        };
        reply.u64(self.handles.0.insert(handle)?);
        reply.u32(self.config.cache.directory_flags());
        reply.u32(0);
        Ok(())
    }

    /// `FUSE_READDIR`, and `FUSE_READDIRPLUS`, which looks each name up.
    pub(super) fn read_directory(
        &mut self,
        mut body: Fields<'_>,
        reply: &mut Reply,
        is_plus: bool,
    ) -> Result<(), Errno> {
        let (handle, position, size) = (body.u64()?, body.u64()?, body.u32()?);
        reply.limit((size as usize).min(MAX_ANSWER));
        let mut listing = take(&mut self.listing);
        let listed = self.list(&mut listing, handle, position, reply, is_plus);
        self.listing = listing;
        match listed {
            // What was listed before counts; the guest comes again for the rest.
            Err(_) if !reply.is_empty() => Ok(()),
            listed => listed,
        }
    }

    fn list(
        &mut self,
        listing: &mut Listing,
        handle: u64,
        position: u64,
        reply: &mut Reply,
        is_plus: bool,
    ) -> Result<(), Errno> {
        let terms = self.entry_terms();
        let (directory, place) = self.handles.directory(handle)?;
        listing.go_to(directory, handle, position)?;
        let fixed = DIRENT_SIZE + if is_plus { ENTRY_SIZE } else { 0 };
        while let Some(entry) = listing.first(directory)? {
            let len = (fixed + entry.name.count_bytes()).next_multiple_of(8);
            if len > reply.room_left() {
                break;
            }
            if is_plus {
                // A name that cannot be looked up, or that the guest may not hold another node
                // for, is listed without attributes.
                let found = match entry.name.to_bytes() {
                    b"." | b".." => Err(Errno::INVAL),
                    _ => {
                        let inode = entry.inode;
                        let listed = Identity { place, inode };
                        self.nodes.find_listed(directory, entry.name, listed)
                    }
                };
                match found {
                    Ok(found) => terms.answer(&mut self.nodes, found, place, reply)?,
                    Err(_) => reply.no_entry(),
                }
            }
            put_entry(&entry, reply);
            listing.advance();
        }
        Ok(())
    }
}

/// `struct fuse_dirent`.
fn put_entry(entry: &Listed<'_>, reply: &mut Reply) {
    let name = entry.name.to_bytes();
    let len = u32::try_from(name.len()).unwrap_or(0);
    let kind = entry.kind.as_raw_mode() >> 12;
    reply.words([entry.inode, entry.next, pair(len, kind)]);
    reply.bytes(name);
    let padding = name.len().next_multiple_of(8) - name.len();
    reply.bytes([0; 8].get(..padding).unwrap_or_default());
}

#[cfg(test)]
#[path = "directories_tests.rs"]
mod tests;
