//! `INIT`: what both sides agree on.
//!
//! Not offered, so the guest's kernel does it itself: locks, POSIX access control lists, writing
//! back late. Offered: other file systems below the folder are announced, and dropping
//! set-user-id bits on writes, which spares the guest a question before each.

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::config::CacheMode;
use super::protocol::{MAJOR, MAX_PAGES, MAX_TRANSFER, MINOR, OLDEST_MINOR, init};
use super::reply::Reply;
use super::request::Fields;
use super::share::{Outcome, Share};

/// Requests the guest's kernel has under way without anyone waiting, such as read-ahead.
const MAX_BACKGROUND: u32 = 64;
/// From when on it holds back.
const CONGESTION_THRESHOLD: u32 = 48;

/// What was agreed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Session {
    /// The guest mounts other file systems as such.
    pub(super) has_submounts: bool,
}

impl Share {
    /// `FUSE_INIT`: begin anew.
    pub(super) fn init(
        &mut self,
        mut body: Fields<'_>,
        reply: &mut Reply,
    ) -> Result<Outcome, Errno> {
        let (major, minor) = (body.u32()?, body.u32()?);
        let (max_readahead, flags) = (body.u32()?, body.u32()?);
        if major < MAJOR || (major == MAJOR && minor < OLDEST_MINOR) {
            return Err(Errno::PROTO);
        }
        self.end_session();
        let mut wanted = init::ASYNC_READ
            | init::ATOMIC_O_TRUNC
            | init::BIG_WRITES
            | init::AUTO_INVAL_DATA
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::SUBMOUNTS
            | init::HANDLE_KILLPRIV_V2
            | init::INIT_EXT
            | init::DIRECT_IO_ALLOW_MMAP;
        if self.config.cache != CacheMode::Never {
            wanted |= init::DO_READDIRPLUS | init::READDIRPLUS_AUTO;
        }
        let mut offered = u64::from(flags);
        if offered & init::INIT_EXT != 0 {
            offered |= u64::from(body.u32()?) << 32;
        }
        // A newer major version asks again with ours.
        let agreed = if major > MAJOR { 0 } else { offered & wanted };
        if major == MAJOR {
            self.session = Some(Session {
                has_submounts: agreed & init::SUBMOUNTS != 0,
            });
        }
        let (low, high) = (agreed & u64::from(u32::MAX), agreed >> 32);
        reply.u32(MAJOR);
        reply.u32(MINOR);
        reply.u32(max_readahead.min(MAX_TRANSFER));
        reply.u32(u32::try_from(low).unwrap_or(0));
        reply.u32(MAX_BACKGROUND | CONGESTION_THRESHOLD << 16);
        reply.u32(MAX_TRANSFER);
        // Times are exact to a nanosecond.
        reply.u32(1);
        reply.u32(u32::from(MAX_PAGES));
        reply.u32(u32::try_from(high).unwrap_or(0));
        reply.bytes(&[0; 28]);
        Ok(Outcome::Reply)
    }
}
