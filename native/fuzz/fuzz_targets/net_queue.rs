//! Frames, buffers and commands of a hostile driver to the network card, and a host that sends,
//! reads and leaves in between. Checked beside what every device is: what reaches the host is
//! a header and a frame, of a size that frames have.

#![no_main]

use std::os::fd::OwnedFd;

use fuzz_support::{HostileDriver, Input};
use libfuzzer_sys::fuzz_target;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use vmm_core::rate_limiter::RateLimiterConfig;
use vmm_core::virtio::net::{Net, NetConfig, TapSource};

/// Header, Ethernet header with a tag, 64 KiB.
const MAX_FRAME_SIZE: usize = 12 + 18 + 65_536;

fn sockets() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("sockets")
}

fn read_all(host: &OwnedFd) {
    let mut bytes = vec![0; 2 * MAX_FRAME_SIZE];
    while let Ok((len, _)) = recv(host, &mut bytes[..], RecvFlags::DONTWAIT) {
        assert!(
            (13..=MAX_FRAME_SIZE).contains(&len),
            "a frame of {len} bytes"
        );
    }
}

fn run(input: &mut Input<'_>) -> Option<()> {
    let queue_pairs = u16::from(input.u8()? % 3) + 1;
    let (taps, mut hosts): (Vec<_>, Vec<_>) = (0..queue_pairs).map(|_| sockets()).unzip();
    let mut net = Net::new(NetConfig {
        id: "fuzz".to_owned(),
        source: TapSource::Packets(taps),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        queue_pairs,
        rx_limiter: RateLimiterConfig::default(),
        tx_limiter: RateLimiterConfig::default(),
    })
    .expect("a sound configuration");
    let mut driver = HostileDriver::new(&mut net);
    loop {
        let operation = input.u8()?;
        match operation {
            ..=15 => driver.step(operation, input, &mut net)?,
            16..=128 => {
                let len = usize::from(input.u16()?) + usize::from(input.u8()?);
                if let Some(host) = hosts.get(usize::from(operation) % hosts.len().max(1)) {
                    // A full socket loses it, as a full tap does.
                    let _sent = send(host, &vec![operation; len], SendFlags::DONTWAIT);
                }
                driver.settle(&mut net);
            }
            129..=250 => hosts.iter().for_each(read_all),
            _ => {
                hosts.pop();
                driver.settle(&mut net);
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    run(&mut Input::new(data));
});
