//! What the vsock device does for every packet before any byte of payload moves, measured per
//! item so that `benchmarks/bench_packet_reference.py` (the same work in Cython) can be set
//! against it in the same run:
//!
//! - `vsock_packet/parse`: one item is one 44-byte header, decoded from a contiguous buffer and
//!   judged by the device's rules (addresses, type, operation, length). [`HEADERS`] per iteration.
//! - `virtqueue/walk`: one item is one chain of two descriptors (44 + 4096 bytes) taken from the
//!   available ring, both descriptors read and checked against guest memory, the header copied
//!   out and decoded, and the chain put into the used ring. [`CHAINS`] per iteration.
//!
//! Divide an iteration's time by the number of items (criterion prints it as throughput).

#![allow(missing_docs, reason = "criterion's macros make public functions")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vsock_io::vhost_user::buffers::{Direction, GuestBuffers};
use vsock_io::vhost_user::packet::{HEADER_SIZE, HOST_CID, PacketHeader, TYPE_STREAM};
use vsock_io::vhost_user::queue::Vring;

const GUEST_CID: u64 = 3;
/// Headers per iteration of `vsock_packet/parse`.
const HEADERS: usize = 256;
/// Chains per iteration of `virtqueue/walk`.
const CHAINS: u16 = 128;
const QUEUE_SIZE: u16 = 256;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const DATA: u64 = 0x1_0000;

fn header(index: u32) -> PacketHeader {
    PacketHeader {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: 1000 + index,
        dst_port: 2000 + index,
        len: 4096,
        socket_type: TYPE_STREAM,
        op: 5,
        flags: 0,
        buf_alloc: 65_536,
        fwd_cnt: index,
    }
}

fn parse(criterion: &mut Criterion) {
    let bytes: Vec<u8> = (0..HEADERS)
        .flat_map(|index| header(u32::try_from(index).expect("a small constant")).to_bytes())
        .collect();
    let mut group = criterion.benchmark_group("vsock_packet");
    group.throughput(Throughput::Elements(HEADERS as u64));
    group.measurement_time(Duration::from_secs(2));
    group.bench_function("parse", |bencher| {
        bencher.iter(|| {
            let mut sum = 0u64;
            for item in black_box(&bytes).chunks_exact(HEADER_SIZE) {
                if let Ok(header) = PacketHeader::parse_prefix(item)
                    && header.check(GUEST_CID).is_ok()
                {
                    sum += u64::from(header.src_port) + u64::from(header.len);
                }
            }
            sum
        });
    });
    group.finish();
}

fn guest_memory() -> GuestMemoryMmap {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x20_0000)]).expect("2 MiB");
    let put = |descriptor: Descriptor, index: u16| {
        let at = GuestAddress(TABLE + u64::from(index) * 16);
        memory
            .write_obj(RawDescriptor::from(descriptor), at)
            .expect("in range");
    };
    for chain in 0..CHAINS {
        let (head, tail) = (chain * 2, chain * 2 + 1);
        let at = DATA + u64::from(chain) * 0x2000;
        put(Descriptor::new(at, 44, 1, tail), head);
        put(Descriptor::new(at + 0x1000, 4096, 0, 0), tail);
        memory
            .write_slice(&header(u32::from(chain)).to_bytes(), GuestAddress(at))
            .expect("in range");
        let slot = AVAILABLE + 4 + u64::from(chain) * 2;
        memory
            .write_obj(head, GuestAddress(slot))
            .expect("in range");
    }
    memory
        .write_obj(CHAINS, GuestAddress(AVAILABLE + 2))
        .expect("in range");
    memory
}

fn walk(criterion: &mut Criterion) {
    let memory = guest_memory();
    let mut vring = Vring::new().expect("constant size");
    vring.set_size(QUEUE_SIZE).expect("a power of two");
    vring
        .set_addresses(TABLE, AVAILABLE, USED)
        .expect("aligned");
    vring.is_enabled = true;
    assert!(vring.start(&memory));
    let mut group = criterion.benchmark_group("virtqueue");
    group.throughput(Throughput::Elements(u64::from(CHAINS)));
    group.measurement_time(Duration::from_secs(2));
    group.bench_function("walk", |bencher| {
        bencher.iter(|| {
            vring.set_base(0);
            let mut sum = 0u64;
            while let Some(chain) = vring.pop(&memory).expect("a sound ring") {
                let head = chain.head_index();
                let mut packet = GuestBuffers::default();
                let gathered = packet.gather(
                    &memory,
                    chain,
                    Direction::FromGuest,
                    usize::from(QUEUE_SIZE),
                );
                gathered.expect("a sound chain");
                let mut bytes = [0; HEADER_SIZE];
                packet.copy_to(&mut bytes);
                let header = PacketHeader::parse(&bytes);
                sum += u64::from(header.src_port) + packet.len() as u64;
                vring.complete(&memory, head, 0).expect("a sound ring");
            }
            sum
        });
    });
    group.finish();
}

criterion_group!(benches, parse, walk);
criterion_main!(benches);
