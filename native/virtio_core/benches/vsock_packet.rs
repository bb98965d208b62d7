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
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use virtio_core::chain::Chain;
use virtio_core::mock::{MockBuffer, MockDriver, mock_ram};
use virtio_core::ring::Ring;
use virtio_core::vsock::packet::{HEADER_SIZE, HOST_CID, PacketHeader, TYPE_STREAM};

const GUEST_CID: u64 = 3;
/// Headers per iteration of `vsock_packet/parse`.
const HEADERS: usize = 256;
/// Chains per iteration of `virtqueue/walk`.
const CHAINS: u16 = 128;
const QUEUE_SIZE: u16 = 256;
const RING: u64 = 0x1000;
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

fn walk(criterion: &mut Criterion) {
    let ram = mock_ram(0x20_0000);
    let mut driver = MockDriver::new(&ram, RING, QUEUE_SIZE);
    for index in 0..CHAINS {
        let at = DATA + u64::from(index) * 0x2000;
        driver.write(at, &header(u32::from(index)).to_bytes());
        driver.add(&[
            MockBuffer::readable(at, 44),
            MockBuffer::readable(at + 0x1000, 4096),
        ]);
    }
    let state = driver.state();
    let mut chain = Chain::new(&ram);
    let mut group = criterion.benchmark_group("virtqueue");
    group.throughput(Throughput::Elements(u64::from(CHAINS)));
    group.measurement_time(Duration::from_secs(2));
    group.bench_function("walk", |bencher| {
        bencher.iter(|| {
            // From entry 0 on again; a small share of the iteration.
            let mut ring = Ring::new(Arc::clone(&ram), state).expect("a sound ring");
            let mut sum = 0u64;
            while ring.pop(&mut chain).expect("a sound ring") {
                let bytes: [u8; HEADER_SIZE] = chain.readable.read_array(0).expect("a packet");
                let header = PacketHeader::parse(&bytes);
                sum += u64::from(header.src_port) + chain.readable.len() as u64;
                ring.complete(chain.head, 0);
            }
            sum
        });
    });
    group.finish();
}

criterion_group!(benches, parse, walk);
criterion_main!(benches);
