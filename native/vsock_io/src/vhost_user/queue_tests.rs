//! Rings driven by the mock driver of `virtio-queue`.

use std::fs::File;
use std::io::Read;

use rustix::event::{EventfdFlags, eventfd};
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::Bytes;

use super::*;

const QUEUE_SIZE: u16 = 16;
const RINGS: u64 = 0x1000;
/// Not where the mock puts it: its available ring would reach into the used ring.
const USED: u64 = 0x8000;
const DATA: u64 = 0x1_0000;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap()
}

fn driver(memory: &GuestMemoryMmap) -> MockSplitQueue<'_, GuestMemoryMmap> {
    MockSplitQueue::create(memory, GuestAddress(RINGS), QUEUE_SIZE)
}

fn vring(memory: &GuestMemoryMmap, driver: &MockSplitQueue<'_, GuestMemoryMmap>) -> Vring {
    let mut vring = Vring::new().unwrap();
    vring.set_size(QUEUE_SIZE).unwrap();
    vring
        .set_addresses(driver.desc_table_addr().0, driver.avail_addr().0, USED)
        .unwrap();
    vring.is_enabled = true;
    assert!(vring.start(memory));
    vring
}

/// Descriptors of one chain per entry: `(address, len)` lists.
fn post(driver: &MockSplitQueue<'_, GuestMemoryMmap>, chains: &[&[(u64, u32)]], first: u16) {
    let mut descriptors = Vec::new();
    for chain in chains {
        for (index, (address, len)) in chain.iter().enumerate() {
            let is_last = index + 1 == chain.len();
            let flags = VRING_DESC_F_WRITE | if is_last { 0 } else { VRING_DESC_F_NEXT };
            let next = first + u16::try_from(descriptors.len()).unwrap() + 1;
            let made = Descriptor::new(*address, *len, u16::try_from(flags).unwrap(), next);
            descriptors.push(RawDescriptor::from(made));
        }
    }
    driver.add_desc_chains(&descriptors, first).unwrap();
}

fn used(memory: &GuestMemoryMmap) -> Vec<(u32, u32)> {
    let count: u16 = memory.read_obj(GuestAddress(USED + 2)).unwrap();
    (0..u64::from(count))
        .map(|index| {
            let at = USED + 4 + index * 8;
            (
                memory.read_obj(GuestAddress(at)).unwrap(),
                memory.read_obj(GuestAddress(at + 4)).unwrap(),
            )
        })
        .collect()
}

#[test]
fn a_packet_goes_into_a_chain_split_anywhere() {
    let memory = memory();
    let driver = driver(&memory);
    let mut vring = vring(&memory, &driver);
    post(
        &driver,
        &[&[(DATA, 10), (DATA + 100, 20), (DATA + 200, 14)]],
        0,
    );
    let header = PacketHeader {
        src_cid: 2,
        dst_port: 77,
        op: 3,
        ..Default::default()
    };
    assert!(RxRing::new(&mut vring, &memory, 10).put(&header).unwrap());
    assert_eq!(used(&memory), [(0, 44)]);
    let mut bytes = [0; HEADER_SIZE];
    memory
        .read_slice(&mut bytes[..10], GuestAddress(DATA))
        .unwrap();
    memory
        .read_slice(&mut bytes[10..30], GuestAddress(DATA + 100))
        .unwrap();
    memory
        .read_slice(&mut bytes[30..], GuestAddress(DATA + 200))
        .unwrap();
    assert_eq!(PacketHeader::parse(&bytes), header);
}

#[test]
fn useless_chains_are_given_back_empty() {
    let memory = memory();
    let driver = driver(&memory);
    let mut vring = vring(&memory, &driver);
    // Too short; outside of memory; good.
    post(
        &driver,
        &[&[(DATA, 43)], &[(u64::MAX - 8, 100)], &[(DATA, 100)]],
        0,
    );
    assert!(
        RxRing::new(&mut vring, &memory, 10)
            .put(&PacketHeader::default())
            .unwrap()
    );
    assert_eq!(used(&memory), [(0, 0), (1, 0), (2, 44)]);
}

#[test]
fn a_flood_of_useless_chains_ends_the_turn() {
    let memory = memory();
    let driver = driver(&memory);
    let mut vring = vring(&memory, &driver);
    post(&driver, &[[(DATA, 1)].as_slice(); 8], 0);
    let mut ring = RxRing::new(&mut vring, &memory, 3);
    assert!(!ring.put(&PacketHeader::default()).unwrap());
    assert!(ring.is_done());
    assert_eq!(used(&memory).len(), 3);
}

#[test]
fn a_batch_is_split_into_packets_and_the_rest_goes_back() {
    let memory = memory();
    let driver = driver(&memory);
    let mut vring = vring(&memory, &driver);
    post(
        &driver,
        &[
            &[(DATA, 44), (DATA + 0x100, 10)],
            &[(DATA + 0x200, 54)],
            &[(DATA + 0x300, 54)],
            &[(DATA, 20)],
        ],
        0,
    );
    let mut ring = RxRing::new(&mut vring, &memory, 10);
    let reservation = ring.reserve(100, 8).unwrap();
    assert_eq!(reservation.payload.len(), 30);
    reservation.payload.copy_from(b"abcdefghijklm");
    ring.commit(&reservation, 13, |len| PacketHeader {
        len,
        ..Default::default()
    })
    .unwrap();
    assert_eq!(used(&memory), [(0, 54), (2, 47)]);
    let mut tail = [0; 3];
    memory
        .read_slice(&mut tail, GuestAddress(DATA + 0x200 + 44))
        .unwrap();
    assert_eq!(&tail, b"klm");
    // The third chain and the short one after it are still there, in order.
    assert!(ring.put(&PacketHeader::default()).unwrap());
    assert!(!ring.put(&PacketHeader::default()).unwrap());
    assert_eq!(used(&memory)[2..], [(3, 44), (4, 0)]);
}

#[test]
fn a_reservation_is_no_larger_than_wanted() {
    let memory = memory();
    let driver = driver(&memory);
    let mut vring = vring(&memory, &driver);
    post(&driver, &[&[(DATA, 0x8000)], &[(DATA, 0x8000)]], 0);
    let mut ring = RxRing::new(&mut vring, &memory, 10);
    let reservation = ring.reserve(5, 8).unwrap();
    assert_eq!(reservation.payload.len(), 5);
    ring.commit(&reservation, 0, |_| unreachable!()).unwrap();
    assert_eq!(used(&memory), []);
    assert!(ring.put(&PacketHeader::default()).unwrap());
}

#[test]
fn an_available_index_too_far_ahead_is_an_error() {
    let memory = memory();
    let driver = driver(&memory);
    let mut vring = vring(&memory, &driver);
    driver.avail().idx().store(QUEUE_SIZE + 1);
    assert!(matches!(vring.pop(&memory), Err(QueueError::Available(_))));
}

#[test]
fn a_head_outside_of_the_table_is_an_error() {
    let memory = memory();
    let driver = driver(&memory);
    let mut vring = vring(&memory, &driver);
    driver.avail().ring().ref_at(0).unwrap().store(QUEUE_SIZE);
    driver.avail().idx().store(1);
    let result = RxRing::new(&mut vring, &memory, 10).put(&PacketHeader::default());
    assert!(matches!(
        result,
        Err(QueueError::Used {
            head: QUEUE_SIZE,
            ..
        })
    ));
}

#[test]
fn a_chain_that_loops_ends() {
    let memory = memory();
    let driver = driver(&memory);
    let mut vring = vring(&memory, &driver);
    let flags = u16::try_from(VRING_DESC_F_WRITE | VRING_DESC_F_NEXT).unwrap();
    let looped = RawDescriptor::from(Descriptor::new(DATA, 1, flags, 0));
    driver.desc_table().store(0, looped).unwrap();
    driver.avail().ring().ref_at(0).unwrap().store(0);
    driver.avail().idx().store(1);
    assert!(
        !RxRing::new(&mut vring, &memory, 10)
            .put(&PacketHeader::default())
            .unwrap()
    );
    assert_eq!(used(&memory), [(0, 0)]);
}

fn eventfd_pair() -> (File, File) {
    let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
    let ours = File::from(fd);
    (ours.try_clone().unwrap(), ours)
}

fn count(call: &mut File) -> u64 {
    let mut counter = [0; 8];
    call.read(&mut counter)
        .map_or(0, |_| u64::from_ne_bytes(counter))
}

#[test]
fn a_batch_is_announced_once() {
    let memory = memory();
    let driver = driver(&memory);
    let mut vring = vring(&memory, &driver);
    let (theirs, mut ours) = eventfd_pair();
    vring.call = Some(theirs);
    post(&driver, &[[(DATA, 100)].as_slice(); 4], 0);
    let mut ring = RxRing::new(&mut vring, &memory, 10);
    while ring.put(&PacketHeader::default()).unwrap() {}
    vring.signal(&memory).unwrap();
    vring.signal(&memory).unwrap();
    assert_eq!(count(&mut ours), 1);
}

#[test]
fn with_event_idx_the_driver_is_told_when_it_asked() {
    let memory = memory();
    let driver = driver(&memory);
    let mut vring = vring(&memory, &driver);
    vring.set_event_idx(true);
    let (theirs, mut ours) = eventfd_pair();
    vring.call = Some(theirs);
    post(&driver, &[[(DATA, 100)].as_slice(); 4], 0);
    let used_event = driver.avail_addr().0 + 4 + 2 * u64::from(QUEUE_SIZE);
    memory.write_obj(2u16, GuestAddress(used_event)).unwrap();
    for expected in [0, 0, 1, 0] {
        assert!(
            RxRing::new(&mut vring, &memory, 10)
                .put(&PacketHeader::default())
                .unwrap()
        );
        vring.signal(&memory).unwrap();
        assert_eq!(count(&mut ours), expected);
    }
}

#[test]
fn rings_outside_of_memory_do_not_start() {
    let memory = memory();
    let mut vring = Vring::new().unwrap();
    vring.set_size(QUEUE_SIZE).unwrap();
    vring.set_addresses(0xf_fff0, 0x1000, 0x2000).unwrap();
    vring.is_enabled = true;
    assert!(!vring.start(&memory));
    assert!(vring.pop(&memory).unwrap().is_none());
}
