//! What a card did.

/// Counters of one card, all pairs together. They only grow.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct NetMetrics {
    /// Frames that the guest received, and their bytes without our header.
    pub(super) rx_frames: u64,
    pub(super) rx_bytes: u64,
    /// Frames lost on the way to the guest: larger than its buffers, or no frames.
    pub(super) rx_dropped: u64,
    /// Times that the guest had no buffers, or too few.
    pub(super) rx_starved: u64,
    /// Times that receiving had to wait for the rate limiter.
    pub(super) rx_throttled: u64,
    /// Frames that the guest sent, and their bytes without our header.
    pub(super) tx_frames: u64,
    pub(super) tx_bytes: u64,
    /// Frames that the tap did not take.
    pub(super) tx_dropped: u64,
    /// Times that sending had to wait for the rate limiter.
    pub(super) tx_throttled: u64,
    /// Buffers of the guest that are too small or too large for a frame.
    pub(super) bad_buffers: u64,
    /// Commands on the control queue.
    pub(super) commands: u64,
    /// Chains that broke a rule, of queues that are no more.
    pub(super) malformed_chains: u64,
}

impl NetMetrics {
    pub(super) fn list(&self, malformed_now: u64) -> Vec<(&'static str, u64)> {
        vec![
            ("rx_frames", self.rx_frames),
            ("rx_bytes", self.rx_bytes),
            ("rx_dropped", self.rx_dropped),
            ("rx_starved", self.rx_starved),
            ("rx_throttled", self.rx_throttled),
            ("tx_frames", self.tx_frames),
            ("tx_bytes", self.tx_bytes),
            ("tx_dropped", self.tx_dropped),
            ("tx_throttled", self.tx_throttled),
            ("bad_buffers", self.bad_buffers),
            ("commands", self.commands),
            ("malformed_chains", self.malformed_chains + malformed_now),
        ]
    }
}
