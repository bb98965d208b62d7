//! Counters of the device; all only grow, but for `connections_now`.

use virtio_core::ring::Ring;
use virtio_core::vsock::hybrid::HybridVsock;

/// What the device counts itself.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct VsockMetrics {
    /// Restored guests told that their connections are gone.
    pub(super) transport_resets: u64,
    /// Guests that did not say in time that they heard it.
    pub(super) transport_reset_timeouts: u64,
    /// Chains that broke a rule, on rings that are gone.
    malformed_chains: u64,
}

impl VsockMetrics {
    /// A ring comes to its end: keep its count.
    pub(super) fn retire(&mut self, ring: &Ring) {
        self.malformed_chains += ring.malformed().0;
    }

    /// All of it by name, with the counts of the rings in use.
    pub(super) fn list<'a>(
        &self,
        host: &HybridVsock,
        rings: impl Iterator<Item = &'a Ring>,
    ) -> Vec<(&'static str, u64)> {
        let counters = host.counters();
        let malformed: u64 = rings.map(|ring| ring.malformed().0).sum();
        vec![
            ("connections_now", host.connection_count() as u64),
            ("host_connections", counters.host_connections),
            ("guest_connections", counters.guest_connections),
            ("refused_connections", counters.refused_connections),
            ("connection_timeouts", counters.timeouts),
            ("packets_from_guest", counters.packets_from_guest),
            ("invalid_packets", counters.invalid_packets),
            ("bytes_from_guest", counters.bytes_from_guest),
            ("bytes_to_guest", counters.bytes_to_guest),
            ("malformed_chains", self.malformed_chains + malformed),
            ("transport_resets", self.transport_resets),
            ("transport_reset_timeouts", self.transport_reset_timeouts),
        ]
    }
}
