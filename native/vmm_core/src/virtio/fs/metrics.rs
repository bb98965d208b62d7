//! What a shared folder has done: counters, and how much it holds.

/// Counters. Only grow.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Metrics {
    /// Requests answered, forgets among them.
    pub(super) requests: u64,
    /// Requests answered with an error other than "no such file".
    pub(super) errors: u64,
    /// Requests that were no requests.
    pub(super) malformed: u64,
    /// Bytes of files given to the guest.
    pub(super) read_bytes: u64,
    /// Bytes of files written for the guest.
    pub(super) written_bytes: u64,
    /// Files the guest knew that a restore did not find.
    pub(super) lost_nodes: u64,
    /// Open files that a restore could not open again.
    pub(super) lost_handles: u64,
}

impl Metrics {
    /// With the names the device reports, and how many nodes and handles there are now.
    pub(super) fn report(&self, nodes: usize, handles: usize) -> Vec<(&'static str, u64)> {
        vec![
            ("requests", self.requests),
            ("errors", self.errors),
            ("malformed_requests", self.malformed),
            ("read_bytes", self.read_bytes),
            ("written_bytes", self.written_bytes),
            ("lost_nodes", self.lost_nodes),
            ("lost_handles", self.lost_handles),
            ("current_nodes", nodes as u64),
            ("current_handles", handles as u64),
        ]
    }
}
