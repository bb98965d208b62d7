//! Packets and chains of a hostile driver to the socket device, with hosts that dial, write, read
//! and leave in between. (`vsock_packet` goes deeper into the muxer; this is the whole device.)

#![no_main]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use fuzz_support::{HostileDriver, Input};
use libfuzzer_sys::fuzz_target;
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use virtio_core::vsock::TX_QUEUE;
use virtio_core::vsock::packet::{HOST_CID, PacketHeader, TYPE_STREAM};
use vmm_core::virtio::vsock::{Vsock, VsockConfig};

const CID: u64 = 3;
const MAX_HOSTS: usize = 100;

/// A packet that a guest may well send, of a connection that may well be.
fn packet(input: &mut Input<'_>) -> Option<Vec<u8>> {
    let port = u32::from(input.u8()? % 8);
    let payload = usize::from(input.u16()? % 0x2000);
    let header = PacketHeader {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: 1024,
        dst_port: if port < 6 { (1 << 30) + port } else { port },
        len: u32::try_from(payload).ok()?,
        socket_type: TYPE_STREAM,
        op: u16::from(input.u8()? % 9),
        flags: u32::from(input.u8()? % 4),
        buf_alloc: u32::from(input.u16()?) << 4,
        fwd_cnt: u32::from(input.u16()?),
    };
    let mut bytes = header.to_bytes().to_vec();
    bytes.resize(bytes.len() + payload, 7);
    Some(bytes)
}

/// A host that asks for a stream, if there is room in the listener's backlog: those who left stay
/// in it until the device accepts them.
fn dial(path: &Path) -> Option<UnixStream> {
    let address = SocketAddrUnix::new(path).expect("a short path");
    let socket = net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .expect("a socket");
    match net::connect(&socket, &address) {
        Ok(()) => {
            let mut host = UnixStream::from(socket);
            host.write_all(b"CONNECT 1024\n").expect("an empty buffer");
            Some(host)
        }
        Err(Errno::AGAIN) => None,
        Err(error) => panic!("the device listens: {error}"),
    }
}

fn run(input: &mut Input<'_>, path: &Path) -> Option<()> {
    let mut vsock = Vsock::new(VsockConfig {
        guest_cid: CID,
        path: path.to_owned(),
    })
    .expect("a path of our own");
    let mut driver = HostileDriver::new(&mut vsock);
    let mut hosts: Vec<UnixStream> = Vec::new();
    loop {
        let operation = input.u8()?;
        let who = usize::from(operation) % hosts.len().max(1);
        match operation {
            ..=15 => driver.step(operation, input, &mut vsock)?,
            16..=120 => {
                let packet = packet(input)?;
                driver.request(TX_QUEUE, &packet, &mut vsock);
            }
            121..=160 if hosts.len() < MAX_HOSTS => hosts.extend(dial(path)),
            161..=200 => {
                let len = usize::from(input.u16()?);
                if let Some(host) = hosts.get_mut(who) {
                    let _sent = host.write(&vec![operation; len]);
                }
            }
            201..=230 => {
                if let Some(host) = hosts.get_mut(who) {
                    let _received = host.read(&mut [0; 0x8000]);
                }
            }
            _ if !hosts.is_empty() => drop(hosts.swap_remove(who)),
            _ => {}
        }
        driver.settle(&mut vsock);
    }
}

fuzz_target!(|data: &[u8]| {
    let path = std::env::temp_dir().join(format!("vsock-fuzz-{}", std::process::id()));
    // One that a crash left behind.
    let _gone = fs::remove_file(&path);
    run(&mut Input::new(data), &path);
    assert!(!path.exists(), "the device takes its socket along");
});
