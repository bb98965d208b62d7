//! What a balloon did.

/// Counters of one balloon. They only grow.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BalloonMetrics {
    /// Pages that the driver put into the balloon.
    pub(super) inflated_pages: u64,
    /// Pages that it took out again.
    pub(super) deflated_pages: u64,
    /// Pages that it reported free.
    pub(super) reported_pages: u64,
    /// Pages of both kinds that the host has back.
    pub(super) discarded_pages: u64,
    /// Pages that could not be given back: not memory, or the host refused.
    pub(super) failed_pages: u64,
    /// Requests with more pages than are looked at.
    pub(super) oversized_requests: u64,
    /// Chains that broke a rule, of queues that are no more.
    pub(super) malformed_chains: u64,
}

impl BalloonMetrics {
    pub(super) fn list(&self, malformed_now: u64) -> Vec<(&'static str, u64)> {
        vec![
            ("inflated_pages", self.inflated_pages),
            ("deflated_pages", self.deflated_pages),
            ("reported_pages", self.reported_pages),
            ("discarded_pages", self.discarded_pages),
            ("failed_pages", self.failed_pages),
            ("oversized_requests", self.oversized_requests),
            ("malformed_chains", self.malformed_chains + malformed_now),
        ]
    }
}
