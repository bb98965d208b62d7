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
    /// Chains that broke a rule, of queues that are no more.
    pub(super) malformed_chains: u64,
}

impl RngMetrics {
    pub(super) fn list(&self, malformed_now: u64) -> Vec<(&'static str, u64)> {
        vec![
            ("requests", self.requests),
            ("bytes", self.bytes),
            ("throttled", self.throttled),
            ("malformed_chains", self.malformed_chains + malformed_now),
        ]
    }
}
