//! What an entropy device did.

/// Counters of one device. They only grow.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RngMetrics {
    /// Requests answered.
    pub(super) requests: u64,
    /// Random bytes given.
    pub(super) bytes: u64,
    /// Times that requests had to wait for the rate limiter.
    pub(super) throttled: u64,
}

impl RngMetrics {
    pub(super) fn list(&self, malformed_chains: u64) -> Vec<(&'static str, u64)> {
        vec![
            ("requests", self.requests),
            ("bytes", self.bytes),
            ("throttled", self.throttled),
            ("malformed_chains", malformed_chains),
        ]
    }
}
