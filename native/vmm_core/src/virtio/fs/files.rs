//! Open files: moving their bytes between the host and the guest's memory, and what else is done
//! with a handle.
//!
//! Reads and writes go straight between the file and the guest's pages: no copy, no allocation.

use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;
use virtio_core::buffers::MAX_RANGES_PER_CALL;
use virtio_core::chain::Chain;

use super::handle::{drop_set_ids, host_flags, is_writing, open_directory, open_file};
use super::protocol::{
    FSYNC_DATA_ONLY, IN_HEADER_SIZE, MAX_TRANSFER, OPEN_KILL_SUIDGID, OUT_HEADER_SIZE,
    TRANSFER_IN_SIZE, WRITE_CACHE, WRITE_KILL_SUIDGID,
};
use super::reply::Reply;
use super::request::Fields;
use super::share::{Outcome, Share};

/// `struct fuse_write_out` and the header.
const WRITE_REPLY_SIZE: usize = OUT_HEADER_SIZE + 8;
/// Bytes copied between files in one request, so that others get their turn; callers go on.
const MAX_COPY: u64 = 16 << 20;

/// `struct fuse_read_in`, `fuse_write_in`.
#[derive(Clone, Copy, Debug)]
struct Transfer {
    handle: u64,
    position: u64,
    size: usize,
    /// `FUSE_READ_*`, `FUSE_WRITE_*`.
    request_flags: u32,
    /// As for open(2), now.
    file_flags: OFlags,
}

impl Transfer {
    fn parse(body: &mut Fields<'_>) -> Result<Self, Errno> {
        let (handle, position) = (body.u64()?, body.u64()?);
        let (size, request_flags) = (body.u32()?, body.u32()?);
        body.skip::<8>()?;
        let file_flags = OFlags::from_bits_retain(body.u32()?);
        body.skip::<4>()?;
        if size > MAX_TRANSFER {
            return Err(Errno::INVAL);
        }
        Ok(Self {
            handle,
            position,
            size: size as usize,
            request_flags,
            file_flags,
        })
    }
}

impl Share {
    /// `FUSE_OPEN`.
    pub(super) fn open(
        &mut self,
        node: u64,
        mut body: Fields<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let flags = host_flags(body.u32()?);
        let open_flags = body.u32()?;
        if self.config.is_read_only && is_writing(flags) {
            return Err(Errno::ROFS);
        }
        self.handles.0.check_room()?;
        let node = self.nodes.get(node)?;
        if open_flags & OPEN_KILL_SUIDGID != 0 && flags.contains(OFlags::TRUNC) {
            drop_set_ids(node.descriptor()?)?;
        }
        let file = open_file(node.kind, node.descriptor()?, flags)?;
        self.answer_open(file, flags, reply)
    }

    /// `FUSE_READ`.
    pub(super) fn read(
        &mut self,
        mut body: Fields<'_>,
        chain: &mut Chain,
    ) -> Result<Outcome, Errno> {
        let transfer = Transfer::parse(&mut body)?;
        let file = self.handles.file(transfer.handle)?;
        chain.writable.truncate(OUT_HEADER_SIZE + transfer.size);
        let one_call = chain.writable.range_count() <= MAX_RANGES_PER_CALL;
        let room = chain.writable.len().saturating_sub(OUT_HEADER_SIZE);
        let mut done = 0;
        while done < room {
            let position = transfer.position.checked_add(done as u64);
            let position = position.ok_or(Errno::INVAL)?;
            let offset = OUT_HEADER_SIZE + done;
            match chain.writable.read_at(file, offset, position) {
                Ok(count) => {
                    done += count;
                    if count == 0 || one_call {
                        break;
                    }
                }
                Err(_) if done > 0 => break,
                Err(error) => return Err(errno_of(&error)),
            }
        }
        self.metrics.read_bytes += done as u64;
        Ok(Outcome::InPlace(done))
    }

    /// `FUSE_WRITE`.
    pub(super) fn write(
        &mut self,
        mut body: Fields<'_>,
        chain: &mut Chain,
        reply: &mut Reply,
    ) -> Result<Outcome, Errno> {
        let transfer = Transfer::parse(&mut body)?;
        let file = self.handles.file(transfer.handle)?;
        let start = IN_HEADER_SIZE + TRANSFER_IN_SIZE;
        if chain.readable.len() < start + transfer.size {
            return Err(Errno::INVAL);
        }
        if chain.writable.len() < WRITE_REPLY_SIZE {
            // Nothing is written that could not be said.
            return Err(Errno::INVAL);
        }
        chain.readable.truncate(start + transfer.size);
        if transfer.request_flags & WRITE_KILL_SUIDGID != 0 {
            drop_set_ids(file)?;
        }
        let how = write_flags(&transfer);
        let mut done = 0;
        while done < transfer.size {
            let position = transfer.position.checked_add(done as u64);
            let position = position.ok_or(Errno::INVAL)?;
            let offset = start + done;
            let written = chain.readable.write_at_with(file, offset, position, how);
            match written {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(_) if done > 0 => break,
                Err(error) => return Err(errno_of(&error)),
            }
        }
        self.metrics.written_bytes += done as u64;
        // At most MAX_TRANSFER.
        reply.u32(u32::try_from(done).unwrap_or(0));
        reply.u32(0);
        Ok(Outcome::Reply)
    }

    /// `FUSE_RELEASE`, `FUSE_RELEASEDIR`.
    pub(super) fn release(&mut self, mut body: Fields<'_>) -> Result<(), Errno> {
        let handle = self.handles.0.remove(body.u64()?);
        handle.map(drop).ok_or(Errno::BADF)
    }

    /// `FUSE_FSYNC`, `FUSE_FSYNCDIR`.
    pub(super) fn sync(&self, mut body: Fields<'_>, is_directory: bool) -> Result<(), Errno> {
        let (handle, flags) = (body.u64()?, body.u32()?);
        let file = if is_directory {
            self.handles.directory(handle)?.0
        } else {
            self.handles.file(handle)?
        };
        if flags & FSYNC_DATA_ONLY != 0 {
            rustix::fs::fdatasync(file)
        } else {
            rustix::fs::fsync(file)
        }
    }

    /// `FUSE_SYNCFS`: of the file system whose root the node is.
    pub(super) fn sync_file_system(&self, node: u64) -> Result<(), Errno> {
        let node = self.nodes.get(node)?;
        let file = open_directory(node.directory()?)?;
        rustix::fs::syncfs(file)
    }

    /// `FUSE_FALLOCATE`.
    pub(super) fn allocate(&self, mut body: Fields<'_>) -> Result<(), Errno> {
        let handle = body.u64()?;
        let (position, len) = (body.u64()?, body.u64()?);
        let mode = FallocateFlags::from_bits_retain(body.u32()?);
        rustix::fs::fallocate(self.handles.file(handle)?, mode, position, len)
    }

    /// `FUSE_LSEEK`: where data or a hole begins; positions are the guest's own.
    pub(super) fn seek(&self, mut body: Fields<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let (handle, position, whence) = (body.u64()?, body.u64()?, body.u32()?);
        let target = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(position),
            libc::SEEK_HOLE => SeekFrom::Hole(position),
            _ => return Err(Errno::INVAL),
        };
        reply.u64(rustix::fs::seek(self.handles.file(handle)?, target)?);
        Ok(())
    }

    /// `FUSE_COPY_FILE_RANGE`.
    pub(super) fn copy_range(&self, mut body: Fields<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let source = self.handles.file(body.u64()?)?;
        let mut source_position = body.u64()?;
        body.skip::<8>()?;
        let target = self.handles.file(body.u64()?)?;
        let (mut target_position, len) = (body.u64()?, body.u64()?);
        let copied = rustix::fs::copy_file_range(
            source,
            Some(&mut source_position),
            target,
            Some(&mut target_position),
            usize::try_from(len.min(MAX_COPY)).unwrap_or(0),
        )?;
        reply.u32(u32::try_from(copied).map_err(|_| Errno::OVERFLOW)?);
        reply.u32(0);
        Ok(())
    }
}

/// What a write asks for beyond its bytes (`RWF_*`). The files are opened without these flags,
/// which the guest may change while they are open.
fn write_flags(transfer: &Transfer) -> i32 {
    let mut how = 0;
    let is_written_back = transfer.request_flags & WRITE_CACHE != 0;
    if transfer.file_flags.contains(OFlags::APPEND) && !is_written_back {
        how |= libc::RWF_APPEND;
    }
    if transfer.file_flags.contains(OFlags::SYNC) {
        how |= libc::RWF_SYNC;
    } else if transfer.file_flags.contains(OFlags::DSYNC) {
        how |= libc::RWF_DSYNC;
    }
    how
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
