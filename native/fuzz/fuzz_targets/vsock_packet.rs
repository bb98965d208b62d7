//! Packets of a hostile guest through rings and muxer to real sockets, with a host that connects,
//! reads, writes and leaves in between.
//!
//! The input is a program: an operation byte, then its operands. Guest memory, both rings and the
//! sockets are real; only the machine monitor is absent. Checked beside panics and sanitizer
//! findings: the bounds on connections and replies, and that the rings stay in step.

#![no_main]

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fuzz_support::Input;
use libfuzzer_sys::fuzz_target;
use rustix::event::{Timespec, epoll};
use virtio_core::mock::mock_ram;
use virtio_core::ram::GuestRam;
use virtio_core::ring::{Ring, RingState};
use virtio_core::vsock::exchange::Exchange;
use virtio_core::vsock::muxer::{Dialer, MAX_CONNECTIONS, Muxer};
use virtio_core::vsock::packet::{HEADER_SIZE, PacketHeader};
use vm_memory::{Bytes, GuestAddress};

const CID: u64 = 3;
const SIZE: u16 = 16;
const RX: [u64; 3] = [0x1000, 0x1200, 0x1400];
const TX: [u64; 3] = [0x2000, 0x2200, 0x2400];
const HEADERS: u64 = 0x3000;
const MEMORY_SIZE: usize = 0x4_0000;

type Hosts = Arc<Mutex<Vec<UnixStream>>>;

struct Listeners(Hosts);

impl Dialer for Listeners {
    fn dial(&mut self, port: u32) -> io::Result<UnixStream> {
        if port % 4 == 3 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = pair()?;
        lock(&self.0).push(theirs);
        Ok(ours)
    }
}

fn pair() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    Ok((ours, theirs))
}

fn lock(hosts: &Hosts) -> std::sync::MutexGuard<'_, Vec<UnixStream>> {
    hosts.lock().expect("one thread")
}

fn ring(
    ram: &Arc<GuestRam>,
    [descriptors, available, used]: [u64; 3],
    has_event_idx: bool,
) -> Ring {
    let state = RingState {
        size: SIZE,
        descriptors,
        available,
        used,
        has_event_idx,
        ..RingState::default()
    };
    Ring::new(Arc::clone(ram), state).expect("a sound ring")
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let ram = mock_ram(MEMORY_SIZE);
    let has_event_idx = input.byte() & 1 == 1;
    let mut rx = ring(&ram, RX, has_event_idx);
    let mut tx = ring(&ram, TX, has_event_idx);
    let mut exchange = Exchange::default();
    let epoll: Arc<OwnedFd> =
        Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).expect("a descriptor"));
    let hosts = Hosts::default();
    let mut muxer = Muxer::new(
        CID,
        Box::new(Listeners(Arc::clone(&hosts))),
        Arc::clone(&epoll),
    );

    for _ in 0..200 {
        if input.is_empty() {
            break;
        }
        match input.byte() % 9 {
            // A likely packet: valid addresses, ports of living connections, any operation.
            0 | 1 => {
                let port = u32::from(input.byte() % 8);
                let header = PacketHeader {
                    src_cid: CID,
                    dst_cid: 2,
                    src_port: 1024 + u32::from(input.byte() % 2),
                    dst_port: if port < 4 { (1 << 30) + port } else { port },
                    len: u32::from(input.word()),
                    socket_type: 1,
                    op: u16::from(input.byte() % 9),
                    flags: u32::from(input.byte() % 4),
                    buf_alloc: u32::from(input.word()) << (input.byte() % 17),
                    fwd_cnt: u32::from(input.word()),
                };
                let at = HEADERS + u64::from(input.byte()) * 64;
                put(&ram, &header.to_bytes(), at);
            }
            // Any bytes for a header.
            2 => {
                let bytes: [u8; HEADER_SIZE] = input.take();
                put(&ram, &bytes, HEADERS + u64::from(input.byte()) * 64);
            }
            // Any descriptor in either table.
            3 | 4 => {
                let table = if input.byte() & 1 == 0 { RX[0] } else { TX[0] };
                let at = table + u64::from(input.byte() % 16) * 16;
                let address = match input.byte() % 4 {
                    0 => u64::from_le_bytes(input.take()),
                    _ => HEADERS + u64::from(input.word()) * 4,
                };
                put(&ram, &address.to_le_bytes(), at);
                let len = match input.byte() % 4 {
                    0 => u32::from_le_bytes(input.take()),
                    1 => 44,
                    _ => u32::from(input.word()),
                };
                put(&ram, &len.to_le_bytes(), at + 8);
                put(&ram, &[input.byte() % 8, 0, input.byte() % 17, 0], at + 12);
            }
            // Make heads available; now and then a nonsensical index.
            5 => {
                let available = if input.byte() & 1 == 0 { RX[1] } else { TX[1] };
                let slot = input.byte() % 16;
                put(
                    &ram,
                    &[input.byte() % 17, 0],
                    available + 4 + u64::from(slot) * 2,
                );
                let index: u16 = ram
                    .mappings()
                    .read_obj(GuestAddress(available + 2))
                    .expect("in range");
                let step = match input.byte() {
                    255 => input.word(),
                    step => u16::from(step % 3),
                };
                put(&ram, &index.wrapping_add(step).to_le_bytes(), available + 2);
            }
            6 => host_acts(&mut input, &mut muxer, &hosts),
            7 => {
                muxer.expire(Instant::now() + Duration::from_secs(2 * u64::from(input.byte() % 2)))
            }
            _ => {
                let mut events = Vec::with_capacity(64);
                let no_wait = Timespec {
                    tv_sec: 0,
                    tv_nsec: 0,
                };
                let spare = rustix::buffer::spare_capacity(&mut events);
                epoll::wait(&epoll, spare, Some(&no_wait)).expect("an epoll set");
                for event in events {
                    muxer.on_socket(event.data.u64(), event.flags, true);
                }
                // A broken ring stops the device: the end of this run.
                if exchange.drain_tx(&mut muxer, &mut tx).is_err()
                    || exchange.fill_rx(&mut muxer, &mut rx).is_err()
                {
                    return;
                }
            }
        }
        assert!(muxer.connection_count() <= MAX_CONNECTIONS);
    }
    muxer.reset();
    lock(&hosts).clear();
});

fn put(ram: &GuestRam, bytes: &[u8], at: u64) {
    ram.mappings()
        .write_slice(bytes, GuestAddress(at))
        .expect("in range");
}

fn host_acts(input: &mut Input<'_>, muxer: &mut Muxer, hosts: &Hosts) {
    let action = input.byte() % 4;
    if action == 0 {
        let Ok((ours, mut theirs)) = pair() else {
            return;
        };
        let line: &[u8] = if input.byte() % 8 == 0 {
            &input.take::<40>()
        } else {
            b"CONNECT 1024\n"
        };
        let _sent = theirs.write(line);
        muxer.accept(ours);
        lock(hosts).push(theirs);
        return;
    }
    let mut hosts = lock(hosts);
    if hosts.is_empty() {
        return;
    }
    let who = usize::from(input.byte()) % hosts.len();
    match action {
        1 => {
            let _sent = hosts[who].write(&vec![7; usize::from(input.word())]);
        }
        2 => {
            let _received = hosts[who].read(&mut vec![0; usize::from(input.word())]);
        }
        _ => {
            let host = hosts.swap_remove(who);
            if input.byte() & 1 == 0 {
                let _result = host.shutdown(std::net::Shutdown::Write);
                hosts.push(host);
            }
        }
    }
}
