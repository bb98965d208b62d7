//! Feature bits of a network card (virtio 1.2, 5.1.3), and what follows from them.

use super::tap::Offloads;

/// Driver leaves checksums to the device.
pub(super) const CSUM: u64 = 1 << 0;
/// Device leaves checksums to the driver.
pub(super) const GUEST_CSUM: u64 = 1 << 1;
/// The configuration space has an MTU.
pub(super) const MTU: u64 = 1 << 3;
/// The configuration space has an address.
pub(super) const MAC: u64 = 1 << 5;
/// Driver takes large TCP frames, over IPv4 and IPv6, and UDP datagrams to be fragmented.
pub(super) const GUEST_TSO4: u64 = 1 << 7;
pub(super) const GUEST_TSO6: u64 = 1 << 8;
pub(super) const GUEST_UFO: u64 = 1 << 10;
/// Device takes them.
pub(super) const HOST_TSO4: u64 = 1 << 11;
pub(super) const HOST_TSO6: u64 = 1 << 12;
pub(super) const HOST_UFO: u64 = 1 << 14;
/// A frame may fill several buffers.
pub(super) const MRG_RXBUF: u64 = 1 << 15;
/// The configuration space has the link's status.
pub(super) const STATUS: u64 = 1 << 16;
/// There is a control queue.
pub(super) const CTRL_VQ: u64 = 1 << 17;
/// There is more than one pair of queues.
pub(super) const MQ: u64 = 1 << 22;

/// What any card here offers.
pub(super) const ALWAYS: u64 = virtio_core::features::RING
    | CSUM
    | GUEST_CSUM
    | MTU
    | MAC
    | GUEST_TSO4
    | GUEST_TSO6
    | GUEST_UFO
    | HOST_TSO4
    | HOST_TSO6
    | HOST_UFO
    | MRG_RXBUF
    | STATUS;

/// `struct virtio_net_hdr_v1`: before each frame, in both directions.
pub(super) const HEADER_SIZE: usize = 12;
/// Where in it the number of buffers is, 16 bits.
pub(super) const NUM_BUFFERS_OFFSET: usize = 10;
/// Ethernet header with a VLAN tag.
const LINK_HEADER_SIZE: usize = 18;
/// The largest frame with its header: a 64 KiB packet that somebody else segments.
pub(super) const MAX_FRAME_SIZE: usize = HEADER_SIZE + LINK_HEADER_SIZE + 65_536;

/// What the tap may leave to the driver.
pub(super) fn offloads(features: u64) -> Offloads {
    // The larger ones need checksums left out (5.1.3.1): a driver that takes them alone gets none.
    let has_checksum = features & GUEST_CSUM != 0;
    let has = |bit| has_checksum && features & bit != 0;
    Offloads {
        checksum: has_checksum,
        tcp4: has(GUEST_TSO4),
        tcp6: has(GUEST_TSO6),
        udp: has(GUEST_UFO),
    }
}

/// The largest frame, with its header, that the tap gives when it is set up for these features.
pub(super) fn largest_frame(features: u64, mtu: u16) -> usize {
    if offloads(features).has_large_frames() {
        MAX_FRAME_SIZE
    } else {
        HEADER_SIZE + LINK_HEADER_SIZE + usize::from(mtu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_frames_come_only_with_checksums_left_out() {
        assert_eq!(largest_frame(GUEST_TSO4 | GUEST_UFO, 1500), 1530);
        assert_eq!(largest_frame(GUEST_CSUM, 1500), 1530);
        assert_eq!(largest_frame(GUEST_CSUM | GUEST_TSO6, 1500), 65_566);
        assert_eq!(offloads(GUEST_TSO4), Offloads::default());
    }
}
