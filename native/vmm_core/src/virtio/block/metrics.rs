//! What a disk has done, in numbers that only grow unless their name says otherwise.
//!
//! Plain counters: the device counts under the transport's lock, whoever asks for them holds it
//! as well.

use super::request::{Kind, Status};

/// Counters of one disk.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BlockMetrics {
    pub(super) reads: u64,
    pub(super) writes: u64,
    pub(super) flushes: u64,
    pub(super) discards: u64,
    pub(super) write_zeroes: u64,
    pub(super) serial_requests: u64,
    pub(super) read_bytes: u64,
    pub(super) written_bytes: u64,
    /// Requests answered `VIRTIO_BLK_S_IOERR`.
    pub(super) failed_requests: u64,
    /// Requests answered `VIRTIO_BLK_S_UNSUPP`.
    pub(super) unsupported_requests: u64,
    /// Times the rate limiter said not yet; several for one request if others end meanwhile.
    pub(super) throttled: u64,
    /// Further steps: short transfers, retries, long requests, zeros, syncs.
    pub(super) continued_steps: u64,
    /// Times the queue was looked at.
    pub(super) turns: u64,
}

impl BlockMetrics {
    /// Count a request that is given back.
    pub(super) fn count(&mut self, kind: Kind, status: Status) {
        match status {
            Status::Ok => {}
            Status::IoError => self.failed_requests += 1,
            Status::Unsupported => self.unsupported_requests += 1,
        }
        match kind {
            Kind::Read => self.reads += 1,
            Kind::Write => self.writes += 1,
            Kind::Flush => self.flushes += 1,
            Kind::Discard => self.discards += 1,
            Kind::WriteZeroes => self.write_zeroes += 1,
            Kind::GetId => self.serial_requests += 1,
            Kind::Unknown => {}
        }
    }

    /// All of them, by name.
    pub(super) fn named(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("reads", self.reads),
            ("writes", self.writes),
            ("flushes", self.flushes),
            ("discards", self.discards),
            ("write_zeroes", self.write_zeroes),
            ("serial_requests", self.serial_requests),
            ("read_bytes", self.read_bytes),
            ("written_bytes", self.written_bytes),
            ("failed_requests", self.failed_requests),
            ("unsupported_requests", self.unsupported_requests),
            ("throttled", self.throttled),
            ("continued_steps", self.continued_steps),
            ("turns", self.turns),
        ]
    }
}
