//! The card behind a mock transport, with packet sockets in the place of taps: frames both ways,
//! drivers without manners, limits, pairs, and snapshots. What only a real tap shows is in
//! `tap_tests.rs`.

use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use virtio_core::mock::{MockBuffer, MockDriver, UsedElement, mock_ram};

use super::super::TapSource;
use super::super::features::{HEADER_SIZE, MRG_RXBUF};
use super::*;
use crate::rate_limiter::{RateLimiterConfig, TokenBucketConfig};
use crate::virtio::mock::MockTransport;

const RAM_SIZE: usize = 0x80_0000;
/// Rings are below this, one every 8 KiB.
const BUFFERS: u64 = 0x10_0000;
const RX: usize = 0;
const TX: usize = 1;
/// A header that asks for nothing.
const HEADER: [u8; HEADER_SIZE] = [0; HEADER_SIZE];

fn config(source: TapSource, queue_pairs: u16) -> NetConfig {
    NetConfig {
        id: "eth0".to_owned(),
        source,
        mac: [2, 0, 0, 0, 0, 7],
        mtu: 1500,
        queue_pairs,
        rx_limiter: RateLimiterConfig::default(),
        tx_limiter: RateLimiterConfig::default(),
    }
}

fn sockets() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

struct Fixture {
    net: Net,
    transport: MockTransport,
    drivers: Vec<MockDriver>,
    /// The other ends of the taps.
    peers: Vec<OwnedFd>,
    next_buffer: u64,
}

/// An active card with a driver that accepts `features`.
fn fixture_of(
    queue_pairs: u16,
    features: impl Fn(&Net) -> u64,
    change: impl Fn(&mut NetConfig),
) -> Fixture {
    let (taps, peers) = (0..queue_pairs).map(|_| sockets()).unzip();
    let mut config = config(TapSource::Packets(taps), queue_pairs);
    change(&mut config);
    let mut net = Net::new(config).unwrap();
    let ram = mock_ram(RAM_SIZE);
    let queue_count = u32::try_from(net.queue_sizes().len()).unwrap();
    let transport = MockTransport::new(&ram, queue_count);
    let driver = |index| MockDriver::new(&ram, u64::from(index) * 0x2000, 256);
    let drivers: Vec<MockDriver> = (0..queue_count).map(driver).collect();
    let rings: Vec<_> = drivers.iter().map(Some).collect();
    net.activate(transport.activation(features(&net), &rings))
        .unwrap();
    Fixture {
        net,
        transport,
        drivers,
        peers,
        next_buffer: BUFFERS,
    }
}

fn fixture() -> Fixture {
    fixture_of(1, Net::features, |_| {})
}

impl Fixture {
    /// Post a buffer on queue `queue`; gives its address.
    fn post_on(&mut self, queue: usize, len: u32) -> u64 {
        let address = self.next_buffer;
        self.next_buffer += u64::from(len.next_multiple_of(16));
        self.drivers[queue].add(&[MockBuffer::writable(address, len)]);
        address
    }

    fn post(&mut self, len: u32) -> u64 {
        self.post_on(RX, len)
    }

    /// Queue a frame whose header and payload lie in buffers of these lengths.
    fn queue_frame(&mut self, bytes: &[u8], split: &[u32]) {
        let mut address = self.next_buffer;
        self.next_buffer += (bytes.len() as u64).next_multiple_of(16);
        self.drivers[TX].write(address, bytes);
        let mut buffers = Vec::new();
        for len in split {
            buffers.push(MockBuffer::readable(address, *len));
            address += u64::from(*len);
        }
        self.drivers[TX].add(&buffers);
    }

    fn settle(&mut self) {
        self.transport.settle(&mut self.net).unwrap();
    }

    fn kick(&mut self, queue: usize) {
        self.transport.kick(queue);
        self.settle();
    }

    /// The host sends a frame to the guest.
    fn send(&self, pair: usize, payload: &[u8]) {
        let frame = [&HEADER, payload].concat();
        let sent = rustix::net::send(&self.peers[pair], &frame, SendFlags::DONTWAIT);
        assert_eq!(sent.unwrap(), frame.len());
    }

    /// What the host gets from the guest, header and all.
    fn received(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut bytes = vec![0; 0x2_0000];
        while let Ok((len, _)) =
            rustix::net::recv(&self.peers[0], &mut bytes[..], RecvFlags::DONTWAIT)
        {
            frames.push(bytes[..len].to_vec());
        }
        frames
    }

    fn lens(&mut self, queue: usize) -> Vec<u32> {
        let used = self.drivers[queue].take_used();
        used.iter().map(|UsedElement { len, .. }| *len).collect()
    }

    fn metric(&self, name: &str) -> u64 {
        let metrics = self.net.metrics();
        metrics.iter().find(|(key, _)| *key == name).unwrap().1
    }

    fn num_buffers(&self, address: u64) -> u16 {
        let bytes = self.drivers[RX].read(address + 10, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// Send a command on the control queue; gives the answer.
    fn command(&mut self, bytes: &[u8]) -> u8 {
        let control = self.drivers.len() - 1;
        let (data, answer) = (BUFFERS - 0x100, BUFFERS - 0x10);
        let driver = &mut self.drivers[control];
        driver.write(data, bytes);
        driver.write(answer, &[0xff]);
        let len = u32::try_from(bytes.len()).unwrap();
        driver.add(&[
            MockBuffer::readable(data, len),
            MockBuffer::writable(answer, 1),
        ]);
        self.kick(control);
        assert_eq!(self.lens(control), [1]);
        self.drivers[control].read(answer, 1)[0]
    }
}

/// Bytes that differ from place to place.
fn payload(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from(at * 7 % 251).unwrap())
        .collect()
}

fn without_merge(net: &Net) -> u64 {
    net.features() & !MRG_RXBUF
}

fn limit(operations: u64, refill_time_ms: u32) -> RateLimiterConfig {
    RateLimiterConfig {
        bandwidth: None,
        operations: Some(TokenBucketConfig {
            size: operations,
            one_time_burst: 0,
            refill_time_ms,
        }),
    }
}

// --- what it is --------------------------------------------------------------------------------

#[test]
fn the_configuration_says_what_was_asked_for() {
    let test = fixture_of(2, Net::features, |config| config.mtu = 9000);
    let mut data = [0xaa; 14];
    data[12..].fill(0);
    test.net.read_config(0, &mut data);
    assert_eq!(data, [2, 0, 0, 0, 0, 7, 1, 0, 2, 0, 0x28, 0x23, 0, 0]);
    assert_eq!(test.net.queue_sizes(), [256, 256, 256, 256, 64]);
    assert_eq!(test.net.name(), "eth0");
    assert_eq!(test.net.features() & (MQ | CTRL_VQ), MQ | CTRL_VQ);
    let single = fixture();
    assert_eq!(single.net.features() & (MQ | CTRL_VQ), 0);
    assert_eq!(single.net.queue_sizes().len(), 2);
}

#[test]
fn a_card_that_cannot_be_is_refused() {
    let refused = |change: &dyn Fn(&mut NetConfig)| {
        let mut config = config(TapSource::Packets(vec![sockets().0]), 1);
        change(&mut config);
        Net::new(config).unwrap_err()
    };
    let error = refused(&|config| config.queue_pairs = 0);
    assert!(matches!(error, NetError::QueuePairs { count: 0 }));
    let error = refused(&|config| config.queue_pairs = 9);
    assert!(matches!(error, NetError::QueuePairs { count: 9 }));
    let error = refused(&|config| config.mac[0] = 1);
    assert_eq!(
        error.to_string(),
        "[01, 00, 00, 00, 00, 07] is no address of one card"
    );
    assert!(matches!(
        refused(&|config| config.mac = [0; 6]),
        NetError::Mac { .. }
    ));
    assert!(matches!(
        refused(&|config| config.mtu = 67),
        NetError::Mtu { mtu: 67 }
    ));
    let error = refused(&|config| config.queue_pairs = 2);
    assert_eq!(error.to_string(), "1 tap descriptors for 2 queue pairs");
    let error = refused(&|config| config.tx_limiter = limit(0, 1));
    assert_eq!(error.to_string(), "transmit limits");
}

// --- to the guest ------------------------------------------------------------------------------

#[test]
fn a_frame_reaches_the_guest() {
    let mut test = fixture();
    let address = test.post(1530);
    test.send(0, &payload(60));
    test.settle();
    assert_eq!(test.lens(RX), [72]);
    assert_eq!(test.drivers[RX].read(address + 12, 60), payload(60));
    assert_eq!(test.num_buffers(address), 1);
    assert_eq!(test.transport.interrupt.raised(), 1);
    assert_eq!((test.metric("rx_frames"), test.metric("rx_bytes")), (1, 60));
}

#[test]
fn a_large_frame_fills_several_buffers() {
    let mut test = fixture();
    let addresses: Vec<u64> = (0..60).map(|_| test.post(1500)).collect();
    test.send(0, &payload(5000));
    test.send(0, &payload(65_550));
    test.send(0, &payload(100));
    test.settle();
    assert_eq!(test.num_buffers(addresses[0]), 4);
    assert_eq!(test.num_buffers(addresses[4]), 44);
    assert_eq!(test.num_buffers(addresses[48]), 1);
    let lens = test.lens(RX);
    assert_eq!(lens.len(), 49);
    assert_eq!(lens[..5], [1500, 1500, 1500, 512, 1500]);
    assert_eq!(lens[46..], [1500, 65_562 - 43 * 1500, 112]);
    let read = |from: usize, len: usize| -> Vec<u8> {
        let buffers = addresses[from..].iter();
        let bytes = buffers.flat_map(|address| test.drivers[RX].read(*address, 1500));
        bytes.skip(12).take(len).collect()
    };
    assert_eq!(read(0, 5000), payload(5000));
    assert_eq!(read(4, 65_550), payload(65_550));
    assert_eq!(read(48, 100), payload(100));
}

#[test]
fn many_small_buffers_take_a_frame_that_one_call_cannot() {
    let mut test = fixture();
    // More ranges than one system call is given.
    let addresses: Vec<u64> = (0..200).map(|_| test.post(30)).collect();
    test.send(0, &payload(4000));
    test.settle();
    let count = 4012usize.div_ceil(30);
    assert_eq!(usize::from(test.num_buffers(addresses[0])), count);
    assert_eq!(test.lens(RX).len(), count);
    let buffers = addresses.iter();
    let bytes = buffers.flat_map(|address| test.drivers[RX].read(*address, 30));
    assert_eq!(
        bytes.skip(12).take(4000).collect::<Vec<u8>>(),
        payload(4000)
    );
}

#[test]
fn a_frame_waits_for_buffers_and_is_not_cut() {
    let mut test = fixture();
    let first = test.post(1000);
    test.send(0, &payload(2500));
    test.settle();
    assert!(test.lens(RX).is_empty());
    assert_eq!(test.metric("rx_starved"), 1);
    // Not enough yet; then enough.
    let second = test.post(1000);
    test.kick(RX);
    assert!(test.lens(RX).is_empty());
    let third = test.post(1000);
    test.kick(RX);
    assert_eq!(test.lens(RX), [1000, 1000, 512]);
    assert_eq!(test.num_buffers(first), 3);
    let read = |address, len| test.drivers[RX].read(address, len);
    let bytes = [read(first + 12, 988), read(second, 1000), read(third, 512)].concat();
    assert_eq!(bytes, payload(2500));
}

#[test]
fn a_tap_is_not_watched_while_the_guest_has_no_buffers() {
    let mut test = fixture();
    test.send(0, &payload(60));
    test.settle();
    // Level-triggered, and still there: it would be reported for ever.
    assert_eq!(test.transport.turn(&mut test.net, 0).unwrap(), 0);
    assert!(!test.drivers[RX].is_kick_unwanted());
    test.post(1530);
    test.kick(RX);
    assert_eq!(test.lens(RX), [72]);
    test.post(1530);
    test.send(0, &payload(61));
    test.kick(RX);
    assert_eq!(test.lens(RX), [73]);
}

#[test]
fn without_merging_one_buffer_has_to_do() {
    let mut test = fixture_of(1, without_merge, |_| {});
    let address = test.post(1530);
    test.post(1530);
    test.send(0, &payload(1519));
    test.send(0, &payload(1518));
    test.settle();
    // The first does not fit and is lost; the next goes where it would have been.
    assert_eq!(test.lens(RX), [1530]);
    assert_eq!(test.drivers[RX].read(address + 12, 1518), payload(1518));
    assert_eq!(test.num_buffers(address), 1);
    assert_eq!(test.metric("rx_dropped"), 1);
}

#[test]
fn a_chain_of_buffers_is_one() {
    let mut test = fixture_of(1, without_merge, |_| {});
    let pieces = [(0x10u64, 12u32), (0x40, 5), (0x80, 600)];
    let buffers = pieces.map(|(offset, len)| MockBuffer::writable(BUFFERS + offset, len));
    test.drivers[RX].add(&buffers);
    test.send(0, &payload(500));
    test.settle();
    assert_eq!(test.lens(RX), [512]);
    assert_eq!(test.num_buffers(BUFFERS + 0x10), 1);
    assert_eq!(test.drivers[RX].read(BUFFERS + 0x40, 5), payload(500)[..5]);
    assert_eq!(
        test.drivers[RX].read(BUFFERS + 0x80, 495),
        payload(500)[5..]
    );
}

#[test]
fn what_is_no_frame_is_dropped() {
    let mut test = fixture();
    test.post(1530);
    // Half a header, a header alone, more than anybody segments.
    for len in [6, 12, 0x1_2000] {
        let bytes = vec![0; len];
        rustix::net::send(&test.peers[0], &bytes, SendFlags::DONTWAIT).unwrap();
    }
    test.send(0, &payload(60));
    test.settle();
    assert_eq!(test.lens(RX), [72]);
    assert_eq!(test.metric("rx_dropped"), 3);
}

#[test]
fn buffers_that_are_none_come_back_empty() {
    let mut test = fixture();
    test.post(11);
    test.drivers[RX].add(&[MockBuffer::readable(BUFFERS, 2000)]);
    test.drivers[RX].add(&[MockBuffer::writable(0x1000_0000, 2000)]);
    let address = test.post(1530);
    test.send(0, &payload(60));
    test.settle();
    assert_eq!(test.lens(RX), [0, 0, 0, 72]);
    assert_eq!(test.drivers[RX].read(address + 12, 60), payload(60));
    assert_eq!(
        (test.metric("bad_buffers"), test.metric("malformed_chains")),
        (2, 1)
    );
}

#[test]
fn a_bad_buffer_behind_good_ones_stops_nothing() {
    let mut test = fixture();
    test.post(100);
    test.post(5);
    test.post(100);
    test.drivers[RX].add(&[MockBuffer::writable(0x1000_0000, 2000)]);
    test.post(1530);
    // Larger than what is before the bad one: lost. Smaller ones go on.
    test.send(0, &payload(150));
    test.send(0, &payload(50));
    test.send(0, &payload(51));
    test.send(0, &payload(1000));
    test.settle();
    assert_eq!(test.lens(RX), [62, 0, 63, 0, 1012]);
    assert_eq!(test.metric("rx_dropped"), 1);
}

#[test]
fn a_frame_that_never_fits_is_dropped_when_all_is_posted() {
    let mut test = fixture();
    for _ in 0..256 {
        test.post(16);
    }
    test.send(0, &payload(5000));
    test.send(0, &payload(4));
    test.settle();
    assert_eq!(test.lens(RX), [16]);
    assert_eq!(test.metric("rx_dropped"), 1);
}

#[test]
fn receiving_is_bounded_per_turn() {
    let mut test = fixture();
    for _ in 0..200 {
        test.post(100);
    }
    for _ in 0..150 {
        test.send(0, &[1; 20]);
    }
    test.transport.turn(&mut test.net, 0).unwrap();
    assert_eq!(test.lens(RX).len(), 128);
    assert_eq!(test.transport.interrupt.raised(), 1);
    test.settle();
    assert_eq!(test.lens(RX).len(), 22);
}

#[test]
fn the_guest_receives_no_faster_than_allowed() {
    let mut test = fixture_of(1, Net::features, |config| config.rx_limiter = limit(2, 40));
    for _ in 0..4 {
        test.post(1530);
        test.send(0, &payload(60));
    }
    let start = Instant::now();
    test.settle();
    assert_eq!(test.lens(RX).len(), 2);
    assert_eq!(test.metric("rx_throttled"), 1);
    // The tap is ready and nobody asks: only the timer counts.
    let mut count = 0;
    while count < 2 {
        assert_ne!(test.transport.turn(&mut test.net, 10_000).unwrap(), 0);
        count += test.lens(RX).len();
    }
    assert!(start.elapsed().as_millis() >= 40);
}

#[test]
fn a_driver_without_rules_ends_it() {
    let mut test = fixture();
    test.drivers[RX].set_available_index(300);
    test.send(0, &payload(60));
    assert!(test.transport.settle(&mut test.net).is_err());
    let mut test = fixture();
    test.drivers[TX].make_available(1000);
    test.transport.kick(TX);
    assert!(test.transport.settle(&mut test.net).is_err());
}

// --- from the guest ----------------------------------------------------------------------------

#[test]
fn a_frame_leaves_however_it_is_split() {
    let mut test = fixture();
    let mut header = HEADER;
    header[0] = 1;
    let bytes = [&header[..], &payload(100)].concat();
    let singles = [[1; 20].as_slice(), &[92]].concat();
    for split in [&[112][..], &[12, 100], &[5, 7, 50, 50], &[30, 82], &singles] {
        test.queue_frame(&bytes, split);
    }
    test.kick(TX);
    assert_eq!(test.received(), vec![bytes; 5]);
    assert_eq!(test.lens(TX), [0; 5]);
    assert_eq!(
        (test.metric("tx_frames"), test.metric("tx_bytes")),
        (5, 500)
    );
    assert_eq!(test.transport.interrupt.raised(), 1);
}

#[test]
fn a_frame_in_more_pieces_than_one_call_takes_is_one_frame() {
    let mut test = fixture();
    let bytes = [&HEADER[..], &payload(188)].concat();
    test.queue_frame(&bytes, &[2; 100]);
    test.kick(TX);
    assert_eq!(test.received(), [bytes]);
}

#[test]
fn what_the_guest_sends_that_is_no_frame_costs_nothing_but_itself() {
    let mut test = fixture();
    test.queue_frame(&[0; 12], &[12]);
    test.queue_frame(&[0; 5], &[5]);
    test.drivers[TX].add(&[MockBuffer::writable(BUFFERS, 100)]);
    test.drivers[TX].add(&[MockBuffer::readable(BUFFERS, 65_567)]);
    test.drivers[TX].add(&[MockBuffer::readable(0x1000_0000, 100)]);
    let bytes = [&HEADER[..], &payload(60)].concat();
    test.queue_frame(&bytes, &[72]);
    test.kick(TX);
    assert_eq!(test.received(), [bytes]);
    assert_eq!(test.lens(TX), [0; 6]);
    let counts = |test: &Fixture| (test.metric("bad_buffers"), test.metric("malformed_chains"));
    assert_eq!(counts(&test), (4, 1));
    test.net.reset();
    assert_eq!(counts(&test), (4, 1));
}

#[test]
fn a_frame_that_the_tap_does_not_take_is_lost() {
    let mut test = fixture();
    // Fill the socket.
    let bytes = vec![0; 60_000];
    test.drivers[TX].write(BUFFERS, &bytes);
    for _ in 0..20 {
        test.drivers[TX].add(&[MockBuffer::readable(BUFFERS, 60_000)]);
    }
    test.kick(TX);
    assert_eq!(test.lens(TX).len(), 20);
    let (sent, dropped) = (test.metric("tx_frames"), test.metric("tx_dropped"));
    assert!(
        sent > 0 && dropped > 0 && sent + dropped == 20,
        "{sent} {dropped}"
    );
}

#[test]
fn the_guest_sends_no_faster_than_allowed() {
    let mut test = fixture_of(1, Net::features, |config| config.tx_limiter = limit(2, 40));
    let bytes = [&HEADER[..], &payload(60)].concat();
    for _ in 0..4 {
        test.queue_frame(&bytes, &[72]);
    }
    let start = Instant::now();
    test.kick(TX);
    assert_eq!(test.received().len(), 2);
    // A kick does not hurry it.
    test.kick(TX);
    assert_eq!(test.metric("tx_throttled"), 1);
    let mut count = 0;
    while count < 2 {
        assert_ne!(test.transport.turn(&mut test.net, 10_000).unwrap(), 0);
        count += test.received().len();
    }
    assert!(start.elapsed().as_millis() >= 40);
}

// --- pairs -------------------------------------------------------------------------------------

#[test]
fn the_driver_chooses_how_many_pairs_there_are() {
    let mut test = fixture_of(2, Net::features, |_| {});
    test.post_on(0, 1530);
    test.post_on(2, 1530);
    test.send(1, &payload(61));
    test.send(0, &payload(60));
    test.settle();
    assert_eq!((test.lens(0), test.lens(2)), (vec![72], Vec::<u32>::new()));
    // Too few, too many, unknown, then both.
    assert_eq!(test.command(&[4, 0, 0, 0]), 1);
    assert_eq!(test.command(&[4, 0, 3, 0]), 1);
    assert_eq!(test.command(&[0, 0, 1]), 1);
    assert_eq!(test.command(&[4, 0, 2, 0]), 0);
    test.settle();
    assert_eq!(test.lens(2), [73]);
    // Back to one: the second pair's buffers are the driver's again.
    test.post_on(2, 1530);
    test.post_on(2, 1530);
    test.send(1, &payload(62));
    test.kick(2);
    assert_eq!(test.lens(2), [74]);
    assert_eq!(test.command(&[4, 0, 1, 0]), 0);
    test.send(1, &payload(63));
    test.kick(2);
    assert!(test.lens(2).is_empty());
    assert_eq!(test.net.ring_states()[2].unwrap().next_available, 2);
    assert_eq!(test.metric("commands"), 5);
}

#[test]
fn the_second_pair_sends_too() {
    let mut test = fixture_of(2, Net::features, |_| {});
    assert_eq!(test.command(&[4, 0, 2, 0]), 0);
    let bytes = [&HEADER[..], &payload(60)].concat();
    test.drivers[3].write(BUFFERS, &bytes);
    test.drivers[3].add(&[MockBuffer::readable(BUFFERS, 72)]);
    test.kick(3);
    let mut frame = [0; 100];
    let (len, _) = rustix::net::recv(&test.peers[1], &mut frame[..], RecvFlags::DONTWAIT).unwrap();
    assert_eq!(frame[..len], bytes);
}

#[test]
fn without_the_feature_the_control_queue_is_the_third() {
    let mut test = fixture_of(2, |net| net.features() & !MQ, |_| {});
    // The third ring is the control queue now.
    test.drivers.truncate(3);
    assert_eq!(test.command(&[4, 0, 2, 0]), 1);
    assert_eq!(test.command(&[4, 0, 1, 0]), 0);
    let states = test.net.ring_states();
    assert_eq!(
        states.iter().map(Option::is_some).collect::<Vec<_>>(),
        [true, true, true, false, false]
    );
}

#[test]
fn every_pair_gets_its_share_of_the_rate() {
    let mut test = fixture_of(2, Net::features, |config| config.rx_limiter = limit(1, 5));
    assert_eq!(test.command(&[4, 0, 2, 0]), 0);
    for _ in 0..20 {
        test.post_on(0, 100);
        test.post_on(2, 100);
        test.send(0, &payload(20));
        test.send(1, &payload(20));
    }
    let mut counts = [0, 0];
    while counts[0] + counts[1] < 10 {
        assert_ne!(test.transport.turn(&mut test.net, 10_000).unwrap(), 0);
        counts[0] += test.lens(0).len();
        counts[1] += test.lens(2).len();
    }
    assert!(counts[0] > 2 && counts[1] > 2, "{counts:?}");
}

// --- its life ----------------------------------------------------------------------------------

#[test]
fn a_tap_that_is_gone_takes_the_link_down() {
    let mut test = fixture();
    test.post(1530);
    test.peers.clear();
    test.settle();
    let mut status = [0; 2];
    test.net.read_config(6, &mut status);
    assert_eq!(status, [0, 0]);
    assert_eq!(test.transport.interrupt.status() & 2, 2);
    // The buffer is still the driver's, and sending loses frames, no more.
    assert_eq!(test.net.ring_states()[RX].unwrap().next_available, 0);
    test.queue_frame(&[0; 72], &[72]);
    test.kick(TX);
    assert_eq!((test.lens(TX), test.metric("tx_dropped")), (vec![0], 1));
}

#[test]
fn a_tap_that_goes_while_nobody_listens_is_noticed_too() {
    let mut test = fixture();
    test.send(0, &payload(60));
    test.settle();
    assert_eq!(test.metric("rx_starved"), 1);
    test.peers.clear();
    test.settle();
    let mut status = [0; 2];
    test.net.read_config(6, &mut status);
    assert_eq!(status, [0, 0]);
}

#[test]
fn a_snapshot_holds_no_buffer_of_the_driver() {
    let mut test = fixture_of(2, Net::features, |_| {});
    assert_eq!(test.command(&[4, 0, 2, 0]), 0);
    for _ in 0..5 {
        test.post_on(2, 1000);
    }
    test.send(1, &payload(100));
    test.settle();
    // Four are held now, with a frame that waits for more.
    test.send(1, &payload(5000));
    test.settle();
    assert_eq!(test.metric("rx_starved"), 1);
    test.net.pause().unwrap();
    let states = test.net.ring_states();
    assert_eq!(
        (
            states[2].unwrap().next_available,
            states[2].unwrap().next_used
        ),
        (1, 1)
    );
    let saved = test.net.save().unwrap();

    // Another card over other taps takes over.
    let (taps, peers) = (0..2).map(|_| sockets()).unzip();
    let mut config = config(TapSource::Packets(taps), 2);
    config.mac = [2, 0, 0, 0, 0, 9];
    let mut net = Net::new(config).unwrap();
    net.restore(&saved).unwrap();
    let rings: Vec<_> = test.drivers.iter().map(Some).collect();
    let mut activation = test.transport.activation(net.features(), &rings);
    let ram = activation.ram.clone();
    for (queue, state) in activation.queues.iter_mut().zip(&states) {
        queue.as_mut().unwrap().ring =
            virtio_core::ring::Ring::new(ram.clone(), state.unwrap()).unwrap();
    }
    test.net.reset();
    // The kicks are watched for either card; a new transport would watch its own.
    net.activate(activation).unwrap();
    net.resume();
    (test.net, test.peers) = (net, peers);
    test.lens(2);
    test.send(1, &payload(200));
    test.settle();
    assert_eq!(test.lens(2), [212]);
    let mut mac = [0; 6];
    test.net.read_config(0, &mut mac);
    assert_eq!(mac[5], 7);
}

#[test]
fn a_paused_card_goes_on_by_itself() {
    let mut test = fixture();
    test.send(0, &payload(60));
    test.settle();
    test.net.pause().unwrap();
    test.post(1530);
    test.queue_frame(&[0; 72], &[72]);
    test.net.resume();
    test.settle();
    assert_eq!((test.lens(RX), test.lens(TX)), (vec![72], vec![0]));
}

#[test]
fn a_state_of_another_card_is_refused() {
    let one = fixture();
    let mut two = fixture_of(2, Net::features, |_| {});
    let error = two.net.restore(&one.net.save().unwrap()).unwrap_err();
    let text = "restore net: the snapshot's card has 1 queue pairs, this one 2";
    assert_eq!(error.to_string(), text);
    let mut saved = two.net.save().unwrap();
    *saved.last_mut().unwrap() = 3;
    assert!(two.net.restore(&saved).is_err());
    assert!(two.net.restore(&[]).is_err());
}

#[test]
fn a_reset_card_is_as_new() {
    let mut test = fixture();
    test.post(1530);
    test.net.reset();
    test.net.reset();
    test.send(0, &payload(60));
    test.kick(RX);
    assert!(test.lens(RX).is_empty());
    assert_eq!(test.net.ring_states(), [None, None]);
    let rings: Vec<_> = test.drivers.iter().map(Some).collect();
    test.net
        .activate(test.transport.activation(test.net.features(), &rings))
        .unwrap();
    test.settle();
    assert_eq!(test.lens(RX), [72]);
}

#[test]
fn missing_queues_are_said() {
    let (tap, _peer) = sockets();
    let mut net = Net::new(config(TapSource::Packets(vec![tap]), 1)).unwrap();
    let ram = mock_ram(0x1_0000);
    let transport = MockTransport::new(&ram, 2);
    let driver = MockDriver::new(&ram, 0, 256);
    for (rings, missing) in [([Some(&driver), None], 1), ([None, Some(&driver)], 0)] {
        let error = net.activate(transport.activation(0, &rings)).unwrap_err();
        assert!(matches!(error, DeviceError::QueueMissing { index } if index == missing));
    }
}
