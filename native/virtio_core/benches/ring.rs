//! What a device does with every request before any byte of payload moves, measured per item so
//! that `benchmarks/bench_packet_reference.py` (the same work in Cython) can be set against it in
//! the same run:
//!
//! - `virtqueue/walk`: one item is one chain of two descriptors (44 + 4096 bytes) taken from the
//!   available ring, both descriptors read and checked against guest memory, the first 44 bytes
//!   copied out and decoded as a vsock header, and the chain put into the used ring. [`CHAINS`]
//!   per iteration.
//! - `virtqueue/walk_indirect`: the same chains by way of indirect tables, as Linux sends them
//!   once `VIRTIO_F_INDIRECT_DESC` is negotiated. Nothing to compare with; for our own eyes.
//!
//! Divide an iteration's time by the number of items (criterion prints it as throughput).

#![allow(missing_docs, reason = "criterion's macros make public functions")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use virtio_core::chain::Chain;
use virtio_core::ram::GuestRam;
use virtio_core::ring::{Ring, RingState};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Chains per iteration.
const CHAINS: u16 = 128;
const QUEUE_SIZE: u16 = 256;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const INDIRECT: u64 = 0x8000;
const DATA: u64 = 0x1_0000;
const HEADER_SIZE: usize = 44;

/// The fields of a vsock packet's header (virtio 1.2, 5.10.6).
struct Header {
    _source: u64,
    _destination: u64,
    source_port: u32,
    _destination_port: u32,
    _len: u32,
    _kind: u16,
    _operation: u16,
    _flags: u32,
    _allocation: u32,
    _forwarded: u32,
}

fn field<const N: usize>(bytes: &[u8; HEADER_SIZE], at: usize) -> [u8; N] {
    std::array::from_fn(|offset| bytes[at + offset])
}

fn decode(bytes: &[u8; HEADER_SIZE]) -> Header {
    Header {
        _source: u64::from_le_bytes(field(bytes, 0)),
        _destination: u64::from_le_bytes(field(bytes, 8)),
        source_port: u32::from_le_bytes(field(bytes, 16)),
        _destination_port: u32::from_le_bytes(field(bytes, 20)),
        _len: u32::from_le_bytes(field(bytes, 24)),
        _kind: u16::from_le_bytes(field(bytes, 28)),
        _operation: u16::from_le_bytes(field(bytes, 30)),
        _flags: u32::from_le_bytes(field(bytes, 32)),
        _allocation: u32::from_le_bytes(field(bytes, 36)),
        _forwarded: u32::from_le_bytes(field(bytes, 40)),
    }
}

fn header(index: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(3u64.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    let index = u32::from(index);
    for word in [1000 + index, 2000 + index, 4096] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend([1, 0, 5, 0]);
    for word in [0, 65_536, index] {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> u128 {
    u128::from(address) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112
}

/// A ring and its driver, which offers the same chains again and again.
struct Bench {
    ring: Ring,
    memory: GuestMemoryMmap,
    /// The driver's available index.
    offered: u16,
}

impl Bench {
    fn offer(&mut self) {
        self.offered = self.offered.wrapping_add(CHAINS);
        let index = self.offered.to_le_bytes();
        self.memory
            .write_slice(&index, GuestAddress(AVAILABLE + 2))
            .expect("in range");
    }
}

/// The memory of `benchmarks/bench_packet_reference.py`, or the same with indirect tables; each
/// chain stands in the available ring as often as it fits.
fn bench(is_indirect: bool) -> Bench {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x20_0000)]).expect("2 MiB");
    let put = |at: u64, bytes: &[u8]| {
        memory
            .write_slice(bytes, GuestAddress(at))
            .expect("in range");
    };
    for chain in 0..CHAINS {
        let (head, tail) = (chain * 2, chain * 2 + 1);
        let at = DATA + u64::from(chain) * 0x2000;
        let table = INDIRECT + u64::from(chain) * 32;
        let (first, next) = if is_indirect {
            let reference = descriptor(table, 32, 4, 0);
            put(TABLE + u64::from(head) * 16, &reference.to_le_bytes());
            (table, 1)
        } else {
            (TABLE + u64::from(head) * 16, tail)
        };
        put(first, &descriptor(at, 44, 1, next).to_le_bytes());
        put(
            first + 16,
            &descriptor(at + 0x1000, 4096, 0, 0).to_le_bytes(),
        );
        put(at, &header(chain));
        for entry in (chain..QUEUE_SIZE).step_by(CHAINS.into()) {
            put(AVAILABLE + 4 + u64::from(entry) * 2, &head.to_le_bytes());
        }
    }
    let state = RingState {
        size: QUEUE_SIZE,
        descriptors: TABLE,
        available: AVAILABLE,
        used: USED,
        ..RingState::default()
    };
    let ring = Ring::new(GuestRam::new(memory.clone()), state).expect("a sound ring");
    Bench {
        ring,
        memory,
        offered: 0,
    }
}

fn walk_all(ring: &mut Ring, chain: &mut Chain) -> u64 {
    let mut sum = 0u64;
    while ring.pop(chain).expect("a sound ring") {
        let bytes: [u8; HEADER_SIZE] = chain.readable.read_array(0).expect("a header");
        let header = decode(&bytes);
        sum += u64::from(black_box(&header).source_port) + chain.readable.len() as u64;
        ring.complete(chain.head, 0);
    }
    sum
}

fn walk(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("virtqueue");
    group.throughput(Throughput::Elements(u64::from(CHAINS)));
    group.measurement_time(Duration::from_secs(2));
    for (name, is_indirect) in [("walk", false), ("walk_indirect", true)] {
        let mut bench = bench(is_indirect);
        let mut chain = Chain::new(bench.ring.ram());
        let expected: u64 = (0..u64::from(CHAINS))
            .map(|index| 1000 + index + 44 + 4096)
            .sum();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                bench.offer();
                assert_eq!(walk_all(&mut bench.ring, &mut chain), expected);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, walk);
criterion_main!(benches);
