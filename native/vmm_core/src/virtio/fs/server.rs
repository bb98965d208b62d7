//! One request from its chain to its answer: copy, check, perform, answer.
//!
//! Owns the memory that requests are copied to and answers are built in, which is used again for
//! each, and counts what happened.

use rustix::io::Errno;
use virtio_core::chain::Chain;

use super::protocol::{
    IN_HEADER_SIZE, MAX_NAME, MAX_TRANSFER, MAX_XATTR, OUT_HEADER_SIZE, TRANSFER_IN_SIZE, opcode,
};
use super::reply::Reply;
use super::request::{Fields, Header};
use super::share::{Outcome, Share};

/// The first copy: enough for whole requests without long names.
const FIRST_COPY: usize = 128;
/// The longest body that is copied: an extended attribute with its name.
const MAX_BODY: usize = MAX_XATTR + MAX_NAME + 64;
/// The longest request: a write.
const MAX_REQUEST: usize = IN_HEADER_SIZE + TRANSFER_IN_SIZE + MAX_TRANSFER as usize;

/// A folder, and memory to serve it with.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) share: Share,
    request: Box<[u8]>,
    reply: Reply,
}

impl Server {
    /// Serve this folder.
    pub(super) fn new(share: Share) -> Self {
        Self {
            share,
            request: vec![0; IN_HEADER_SIZE + MAX_BODY].into_boxed_slice(),
            reply: Reply::new(),
        }
    }

    /// Answer one request; gives the bytes written to the guest's memory.
    pub(super) fn serve(&mut self, chain: &mut Chain) -> u32 {
        self.share.metrics.requests += 1;
        let room = chain.writable.len();
        self.reply.begin(room);
        let Some((header, body_len)) = self.copy_request(chain) else {
            self.share.metrics.malformed += 1;
            return 0;
        };
        let body = self.request.get(IN_HEADER_SIZE..IN_HEADER_SIZE + body_len);
        let performed = match body {
            Some(body) => self
                .share
                .perform(&header, Fields(body), chain, &mut self.reply),
            None => Err(Errno::INVAL),
        };
        let (error, in_place) = match performed {
            Ok(Outcome::Silent) => return 0,
            // Without room for an answer nobody waits for one.
            _ if room < OUT_HEADER_SIZE => {
                self.share.metrics.malformed += 1;
                return 0;
            }
            Ok(Outcome::InPlace(len)) => (None, len),
            Ok(Outcome::Reply) => (None, 0),
            Err(_) if is_unanswered(header.opcode) => return 0,
            Err(errno) => (Some(errno), 0),
        };
        if error.is_some_and(|errno| errno != Errno::NOENT) {
            self.share.metrics.errors += 1;
        }
        self.answer(chain, header.unique, error, in_place)
    }

    /// Copy the header, and as much of the rest as is not data; gives how much that is.
    fn copy_request(&mut self, chain: &Chain) -> Option<(Header, usize)> {
        let (first, rest) = self.request.split_at_mut_checked(FIRST_COPY)?;
        let copied = chain.readable.copy_to(0, first);
        let header = Header::parse(first.get(..copied)?)?;
        let len = header.len as usize;
        if len < IN_HEADER_SIZE || len > chain.readable.len() || len > MAX_REQUEST {
            return None;
        }
        let body_len = match header.opcode {
            opcode::WRITE | opcode::BATCH_FORGET => (len - IN_HEADER_SIZE).min(TRANSFER_IN_SIZE),
            _ => len - IN_HEADER_SIZE,
        };
        if let Some(more) = (IN_HEADER_SIZE + body_len).checked_sub(FIRST_COPY) {
            // Too long for any request.
            let target = rest.get_mut(..more)?;
            if chain.readable.copy_to(FIRST_COPY, target) != more {
                return None;
            }
        }
        Some((header, body_len))
    }

    fn answer(&mut self, chain: &Chain, unique: u64, error: Option<Errno>, in_place: usize) -> u32 {
        let mut in_place = in_place;
        let bytes = match self.reply.finish(unique, error, in_place) {
            Ok(bytes) => bytes,
            Err(errno) => {
                // The guest left too little room for what it asked.
                self.share.metrics.errors += 1;
                in_place = 0;
                self.reply.begin(OUT_HEADER_SIZE);
                self.reply
                    .finish(unique, Some(errno), 0)
                    .unwrap_or_default()
            }
        };
        let written = chain.writable.copy_from(0, bytes) + in_place;
        u32::try_from(written).unwrap_or(0)
    }
}

/// Requests that get no answer even if they fail.
fn is_unanswered(opcode: u32) -> bool {
    matches!(
        opcode,
        opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT
    )
}
