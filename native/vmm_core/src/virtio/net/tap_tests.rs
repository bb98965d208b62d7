//! Real taps, each test in a network namespace of its own: what opening one says when it can not
//! be, and that frames, offloads and several queues work as the kernel means them. They need
//! `CAP_NET_ADMIN`, and say so where it is missing.

use std::ffi::CString;
use std::os::fd::FromRawFd;
use std::path::Path;

use rustix::thread::CapabilitySet;
use virtio_core::mock::{MockBuffer, MockDriver, mock_ram};

use super::super::{Net, NetConfig, NetError};
use super::*;
use crate::rate_limiter::RateLimiterConfig;
use crate::virtio::device::VirtioDevice;
use crate::virtio::mock::MockTransport;

/// An `EtherType` for experiments (IEEE 802): frames of ours among those the kernel sends by itself.
const ETHER_TYPE: [u8; 2] = [0x88, 0xb5];
const BUFFERS: u64 = 0x10_0000;

/// Run `test` in a namespace that ends with it.
fn in_namespace<T: Send>(test: impl FnOnce() -> T + Send) -> Option<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: this thread alone leaves the namespace, and ends with the test.
            let is_there = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
            if !is_there || !Path::new("/dev/net/tun").exists() {
                eprintln!("skipped: needs CAP_SYS_ADMIN, CAP_NET_ADMIN and /dev/net/tun");
                return None;
            }
            Some(test())
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn tun() -> OwnedFd {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open("/dev/net/tun", flags, Mode::empty()).unwrap()
}

fn named(name: &str, flags: libc::c_int) -> libc::ifreq {
    let mut request = request(&CString::new(name).unwrap());
    request.ifr_ifru.ifru_flags = flags.try_into().unwrap();
    request
}

/// Make a tap that stays, and take it up.
fn make_tap(name: &str, extra_flags: libc::c_int) {
    let fd = tun();
    let request = named(name, FLAGS | extra_flags);
    for (number, argument) in [
        (libc::TUNSETIFF, (&raw const request).addr()),
        (libc::TUNSETPERSIST, 1),
        // Somebody else's, for those without CAP_NET_ADMIN.
        (libc::TUNSETOWNER, 12_345),
    ] {
        // SAFETY: an `ifreq` that lives, or a number, as each call takes.
        let status = unsafe { libc::ioctl(fd.as_raw_fd(), number, argument) };
        check(status).unwrap();
    }
    let socket = packet_socket(None);
    let request = named(name, libc::IFF_UP);
    // SAFETY: SIOCSIFFLAGS reads one `ifreq`.
    let status = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    check(status).unwrap();
}

/// The host's side of an interface: whole frames, with virtio headers if asked for.
fn packet_socket(interface: Option<&str>) -> OwnedFd {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let protocol = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
    // SAFETY: numbers only.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(protocol)) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: a descriptor that nobody else has.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    if let Some(name) = interface {
        let name = CString::new(name).unwrap();
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET.try_into().unwrap(),
            sll_protocol: protocol,
            // SAFETY: a string that ends in zero.
            sll_ifindex: unsafe { libc::if_nametoindex(name.as_ptr()) }
                .try_into()
                .unwrap(),
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        let size = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
        // SAFETY: an address of this size.
        let status = unsafe { libc::bind(fd, (&raw const address).cast(), size) };
        check(status).unwrap();
    }
    socket
}

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

fn by_name(name: &str, queue_pairs: u16) -> Result<Net, NetError> {
    Net::new(config(TapSource::Name(name.to_owned()), queue_pairs))
}

fn refusal(name: &str, queue_pairs: u16) -> TapError {
    match by_name(name, queue_pairs) {
        Err(NetError::Tap(error)) => error,
        other => panic!("{name}: {other:?}"),
    }
}

fn frame(payload: &[u8]) -> Vec<u8> {
    let addresses = [[2, 0, 0, 0, 0, 7], [2, 0, 0, 0, 0, 8]].concat();
    [&addresses, &ETHER_TYPE[..], payload].concat()
}

/// A card with its driver; pair 0 has 100 buffers posted, of 1500 bytes each.
struct Card {
    net: Net,
    transport: MockTransport,
    drivers: Vec<MockDriver>,
}

impl Card {
    fn new(mut net: Net, features: u64) -> Self {
        let ram = mock_ram(0x80_0000);
        let count = u32::try_from(net.queue_sizes().len()).unwrap();
        let transport = MockTransport::new(&ram, count);
        let driver = |index| MockDriver::new(&ram, u64::from(index) * 0x2000, 256);
        let mut drivers: Vec<MockDriver> = (0..count).map(driver).collect();
        for index in 0..100 {
            drivers[0].add(&[MockBuffer::writable(BUFFERS + index * 1500, 1500)]);
        }
        let rings: Vec<_> = drivers.iter().map(Some).collect();
        net.activate(transport.activation(features, &rings))
            .unwrap();
        Self {
            net,
            transport,
            drivers,
        }
    }

    /// Send a frame on pair 0; whether the tap took it.
    fn send(&mut self, header: [u8; HEADER_SIZE], frame: &[u8]) -> bool {
        let bytes = [&header, frame].concat();
        let at = BUFFERS + 0x20_0000;
        self.drivers[1].write(at, &bytes);
        self.drivers[1].add(&[MockBuffer::readable(at, bytes.len().try_into().unwrap())]);
        self.transport.kick(1);
        self.transport.settle(&mut self.net).unwrap();
        assert_eq!(self.drivers[1].take_used().len(), 1);
        let metrics = self.net.metrics();
        metrics.contains(&("tx_dropped", 0))
    }

    /// Frames that came meanwhile: of how many buffers, and their bytes behind the header.
    fn received(&mut self) -> Vec<(u16, Vec<u8>)> {
        self.transport.settle(&mut self.net).unwrap();
        let mut used = self.drivers[0].take_used().into_iter();
        let mut frames = Vec::new();
        while let Some(first) = used.next() {
            let at = |head: u32| BUFFERS + u64::from(head) * 1500;
            let mut bytes = self.drivers[0].read(at(first.head), first.len as usize);
            let count = u16::from_le_bytes([bytes[10], bytes[11]]);
            for _ in 1..count {
                let next = used.next().unwrap();
                bytes.extend(self.drivers[0].read(at(next.head), next.len as usize));
            }
            frames.push((count, bytes.split_off(HEADER_SIZE)));
        }
        frames.retain(|(_, bytes)| bytes.len() > 14 && bytes[..6] == [2, 0, 0, 0, 0, 7]);
        frames
    }
}

#[test]
fn a_missing_tap_is_named_and_not_made() {
    in_namespace(|| {
        let error = refusal("tap7", 1);
        assert!(matches!(&error, TapError::Missing { name } if name == "tap7"));
        assert!(
            error
                .to_string()
                .starts_with("tap tap7 is missing in this network namespace")
        );
        assert!(matches!(refusal("tap7", 1), TapError::Missing { .. }));
    });
}

#[test]
fn a_name_that_is_none_is_refused() {
    for name in [
        "",
        "a name",
        "a/b",
        "sixteen-letters-",
        "tap%d",
        "tap\0x",
        "a:b",
    ] {
        assert!(
            matches!(refusal(name, 1), TapError::Name { .. }),
            "{name:?}"
        );
    }
}

#[test]
fn a_tap_in_use_is_busy() {
    in_namespace(|| {
        make_tap("tap0", 0);
        let _first = by_name("tap0", 1).unwrap();
        assert!(matches!(refusal("tap0", 1), TapError::Busy { .. }));
    });
}

#[test]
fn what_is_no_fitting_tap_is_refused() {
    in_namespace(|| {
        make_tap("tap0", 0);
        make_tap("multi0", libc::IFF_MULTI_QUEUE);
        for (name, queue_pairs) in [("lo", 1), ("tap0", 2), ("multi0", 1)] {
            let error = refusal(name, queue_pairs);
            assert!(matches!(error, TapError::Kind { .. }), "{name}: {error}");
        }
        by_name("multi0", 2).unwrap();
    });
}

#[test]
fn a_tap_of_somebody_else_is_not_ours() {
    in_namespace(|| {
        make_tap("tap0", 0);
        // This thread's, which ends with the test.
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::NET_ADMIN);
        rustix::thread::set_capabilities(None, sets).unwrap();
        assert!(matches!(refusal("tap0", 1), TapError::NoPermission { .. }));
    });
}

#[test]
fn descriptors_have_to_be_taps() {
    let file = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()).unwrap();
    let error = Net::new(config(TapSource::Fds(vec![file]), 1)).unwrap_err();
    assert!(
        matches!(error, NetError::Tap(TapError::Descriptor { .. })),
        "{error}"
    );
    in_namespace(|| {
        // One without the header that we need.
        let fd = tun();
        let request = named("tap0", libc::IFF_TAP | libc::IFF_NO_PI);
        // SAFETY: an `ifreq` that lives.
        let status = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
        check(status).unwrap();
        let error = Net::new(config(TapSource::Fds(vec![fd]), 1)).unwrap_err();
        assert!(
            matches!(error, NetError::Tap(TapError::Descriptor { .. })),
            "{error}"
        );
    });
}

#[test]
fn frames_go_both_ways() {
    in_namespace(|| {
        make_tap("tap0", 0);
        let host = packet_socket(Some("tap0"));
        let net = by_name("tap0", 1).unwrap();
        let features = net.features();
        let mut card = Card::new(net, features);
        let sent = frame(&[7; 100]);
        rustix::io::write(&host, &sent).unwrap();
        assert_eq!(card.received(), [(1, sent.clone())]);
        assert!(card.send([0; HEADER_SIZE], &sent));
        let mut bytes = [0; 2000];
        loop {
            let len = rustix::io::read(&host, &mut bytes).unwrap();
            if bytes[..len] == sent {
                break;
            }
        }
        // A frame without even an Ethernet header is lost, and that is all.
        assert!(!card.send([0; HEADER_SIZE], &[1, 2, 3]));
    });
}

#[test]
fn a_tap_of_another_namespace_is_used_by_its_descriptor() {
    let made = in_namespace(|| {
        make_tap("tap0", 0);
        let fd = open("tap0", 1).unwrap();
        (fd, packet_socket(Some("tap0")))
    });
    let Some((fd, host)) = made else {
        return;
    };
    // This thread is where no such tap is.
    let net = Net::new(config(TapSource::Fds(vec![fd]), 1)).unwrap();
    let features = net.features();
    let mut card = Card::new(net, features);
    rustix::io::write(&host, &frame(&[9; 50])).unwrap();
    assert_eq!(card.received(), [(1, frame(&[9; 50]))]);
}

/// An IPv4 packet with `len` bytes of TCP data in a frame, and the header that asks for segments.
fn large_frame(len: usize) -> ([u8; HEADER_SIZE], Vec<u8>) {
    let mut bytes = frame(&[]);
    bytes.truncate(12);
    let total = u16::try_from(40 + len).unwrap().to_be_bytes();
    bytes.extend([
        8, 0, 0x45, 0, total[0], total[1], 0, 1, 0x40, 0, 64, 6, 0, 0,
    ]);
    bytes.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    let sum: u32 = bytes[14..34]
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    bytes[24..26].copy_from_slice(&sum.to_be_bytes());
    // Ports, numbers, header length, ACK, window, checksum of the pseudo header to go on from.
    bytes.extend([
        0x30, 0x39, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0,
    ]);
    bytes.extend((0..len).map(|at| u8::try_from(at % 251).unwrap()));
    // Needs a checksum; TCPv4; headers of 54, segments of 1448; checksum from 34, at 16.
    let header = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
    (header, bytes)
}

/// Have the host send a large frame through the tap, as its TCP would.
fn send_large(host: &OwnedFd, header: [u8; HEADER_SIZE], bytes: &[u8]) {
    let is_on: libc::c_int = 1;
    // SAFETY: an int and its size.
    let status = unsafe {
        libc::setsockopt(
            host.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_VNET_HDR,
            (&raw const is_on).cast(),
            4,
        )
    };
    check(status).unwrap();
    // The socket's header is the older one, without the number of buffers.
    let bytes = [&header[..10], bytes].concat();
    assert_eq!(rustix::io::write(host, &bytes).unwrap(), bytes.len());
}

#[test]
fn large_frames_pass_whole_to_a_guest_that_takes_them() {
    in_namespace(|| {
        make_tap("tap0", 0);
        let host = packet_socket(Some("tap0"));
        let net = by_name("tap0", 1).unwrap();
        let features = net.features();
        let mut card = Card::new(net, features);
        let (header, bytes) = large_frame(20_000);
        send_large(&host, header, &bytes);
        let received = card.received();
        assert_eq!(received.len(), 1);
        assert_eq!(
            usize::from(received[0].0),
            (bytes.len() + HEADER_SIZE).div_ceil(1500)
        );
        assert!(received[0].1 == bytes, "the frame as it was sent");
        // And the other way.
        assert!(card.send(header, &bytes));
    });
}

#[test]
fn large_frames_are_segmented_for_a_guest_that_does_not() {
    in_namespace(|| {
        make_tap("tap0", 0);
        let host = packet_socket(Some("tap0"));
        let net = by_name("tap0", 1).unwrap();
        // Checksums and segments are the kernel's business.
        let features = net.features() & !0x583;
        let mut card = Card::new(net, features);
        let (header, bytes) = large_frame(20_000);
        send_large(&host, header, &bytes);
        let received = card.received();
        assert_eq!(received.len(), 20_000usize.div_ceil(1448));
        let data: Vec<u8> = received
            .iter()
            .flat_map(|(_, frame)| &frame[54..])
            .copied()
            .collect();
        assert!(data == bytes[54..], "all segments in order");
    });
}

#[test]
fn frames_come_only_to_the_queues_in_use() {
    in_namespace(|| {
        make_tap("multi0", libc::IFF_MULTI_QUEUE);
        let host = packet_socket(Some("multi0"));
        let net = by_name("multi0", 4).unwrap();
        let features = net.features();
        let mut card = Card::new(net, features);
        // Different flows, which several queues would share.
        let send = |count: u8| {
            for number in 0..count {
                rustix::io::write(&host, &frame(&[number; 60])).unwrap();
            }
        };
        send(20);
        assert_eq!(card.received().len(), 20);
        let set_pairs = |card: &mut Card, count: u8| {
            let control = &mut card.drivers[8];
            control.write(BUFFERS - 0x100, &[4, 0, count, 0]);
            let answer = MockBuffer::writable(BUFFERS - 0x10, 1);
            control.add(&[MockBuffer::readable(BUFFERS - 0x100, 4), answer]);
            card.transport.kick(8);
            card.transport.settle(&mut card.net).unwrap();
            assert_eq!(card.drivers[8].read(BUFFERS - 0x10, 1), [0]);
        };
        set_pairs(&mut card, 4);
        set_pairs(&mut card, 1);
        send(20);
        assert_eq!(card.received().len(), 20);
        // A new driver begins with one pair again.
        set_pairs(&mut card, 3);
        card.net.reset();
        let mut card = Card::new(card.net, features);
        send(20);
        assert_eq!(card.received().len(), 20);
    });
}

#[test]
fn a_deleted_tap_takes_the_link_down() {
    in_namespace(|| {
        make_tap("tap0", 0);
        let net = by_name("tap0", 1).unwrap();
        let features = net.features();
        let mut card = Card::new(net, features);
        let status = std::process::Command::new("ip")
            .args(["link", "delete", "tap0"])
            .status();
        if !status.is_ok_and(|status| status.success()) {
            eprintln!("skipped: needs the ip command");
            return;
        }
        card.received();
        let mut status = [0; 2];
        card.net.read_config(6, &mut status);
        assert_eq!(status, [0, 0]);
        assert!(!card.send([0; HEADER_SIZE], &frame(&[1; 60])));
        // It goes on without a network, whatever its driver does.
        card.net.reset();
        let mut card = Card::new(card.net, features);
        assert!(!card.send([0; HEADER_SIZE], &frame(&[1; 60])));
    });
}
