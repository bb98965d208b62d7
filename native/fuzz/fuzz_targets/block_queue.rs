//! A hostile driver against a disk: any bytes in guest memory, any descriptors, any indices, with
//! turns, pauses and resets in between; by plain system calls and by io_uring.
//!
//! The input is a program: an operation byte, then its operands. Beside panics and sanitizer
//! findings it is checked that the device never says it wrote more than the chain had room for
//! (where the chain is known), that a pause leaves nothing under way, and that the disk keeps its
//! size.

#![no_main]

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use rustix::event::epoll::{self, CreateFlags, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_core::mock::{MockBuffer, MockDriver, mock_ram};
use virtio_core::ram::GuestRam;
use vmm_core::interrupt::Interrupt;
use vmm_core::virtio::block::{Block, BlockConfig, EngineChoice};
use vmm_core::virtio::device::{Activation, FIRST_DEVICE_TOKEN, Queue, VirtioDevice, Watcher};

const DISK_SIZE: u64 = 64 << 10;
const RAM_SIZE: usize = 1 << 18;
const RING: u64 = 0x1000;
const SIZE: u16 = 16;
const MEMORY: u64 = 0x4000;
/// Each request type, and one that is none.
const KINDS: [u32; 7] = [0, 1, 4, 8, 11, 13, 99];

/// A disk that outlives the runs: setting io_uring up takes longer than a run.
struct Disk {
    file: File,
    block: Block,
}

impl Disk {
    fn new(engine: EngineChoice, is_read_only: bool) -> Self {
        let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(DISK_SIZE).unwrap();
        let block = Block::new(BlockConfig {
            id: "fuzzed".into(),
            path: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
            is_read_only,
            is_direct: false,
            engine,
            rate_limiter: None,
        })
        .unwrap();
        Self { file, block }
    }
}

thread_local! {
    static DISKS: RefCell<[Disk; 3]> = RefCell::new([
        Disk::new(EngineChoice::Sync, false),
        Disk::new(EngineChoice::Auto, false),
        Disk::new(EngineChoice::Sync, true),
    ]);
}

/// Operands of a program; zeros after its end.
struct Operands<'a>(&'a [u8]);

impl Operands<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        first
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// An address mostly in memory.
    fn address(&mut self) -> u64 {
        match self.byte() {
            255 => u64::MAX - u64::from(self.byte()),
            page => u64::from(page) << 10 | u64::from(self.byte()),
        }
    }

    /// One that is not in the rings.
    fn data_address(&mut self) -> u64 {
        match self.address() {
            in_rings @ 0..MEMORY => in_rings + MEMORY,
            other => other,
        }
    }
}

struct Machine<'a> {
    block: &'a mut Block,
    ram: Arc<GuestRam>,
    driver: MockDriver,
    epoll: Arc<OwnedFd>,
    kick: Arc<OwnedFd>,
    interrupt: Arc<Interrupt>,
    /// Room of chains by head; none once descriptors or rings may be other than as added.
    rooms: Option<HashMap<u32, u32>>,
    /// Descriptors used by them since the ring was known to be empty.
    descriptors: usize,
}

impl Machine<'_> {
    fn activate(&mut self, has_event_idx: bool, denied: u64) {
        self.driver = MockDriver::new(&self.ram, RING, SIZE);
        (self.rooms, self.descriptors) = (Some(HashMap::new()), 0);
        let queue = Queue {
            index: 0,
            ring: self.driver.ring(has_event_idx).unwrap(),
            kick: Arc::clone(&self.kick),
            interrupt: Arc::clone(&self.interrupt),
        };
        let activation = Activation {
            ram: Arc::clone(&self.ram),
            features: self.block.features() & !denied,
            queues: vec![Some(queue)],
            interrupt: Arc::clone(&self.interrupt),
            watcher: Watcher::new(Arc::clone(&self.epoll), 0),
        };
        self.block.activate(activation).unwrap();
    }

    /// A request as drivers make them, but for its numbers.
    fn request(&mut self, operands: &mut Operands<'_>) {
        let kind = KINDS[usize::from(operands.byte()) % KINDS.len()];
        let header = operands.data_address() % (RAM_SIZE as u64 - 16);
        let sector = u64::from(operands.byte());
        let word = u128::from(kind) | u128::from(sector) << 64;
        self.driver.write(header, &word.to_le_bytes());
        let mut buffers = vec![MockBuffer::readable(header, 16)];
        let mut room = 1;
        for _ in 0..operands.byte() % 6 {
            let len = u32::from(operands.word());
            let is_writable = kind == 0 || kind == 8;
            room += if is_writable { len } else { 0 };
            buffers.push(MockBuffer {
                address: operands.data_address(),
                len,
                is_writable,
            });
        }
        buffers.push(MockBuffer::writable(operands.data_address(), 1));
        self.descriptors += buffers.len();
        if self.descriptors > usize::from(SIZE) {
            self.rooms = None;
        }
        let head = self.driver.add(&buffers);
        if let Some(rooms) = &mut self.rooms {
            rooms.insert(head.into(), room);
        }
    }

    fn turn(&mut self, token: u32) {
        if self.block.handle(token, EventFlags::IN).is_err() {
            self.block.reset();
            self.activate(true, 0);
        }
    }

    fn check_used(&mut self) {
        let used = self.driver.take_used();
        let Some(rooms) = &self.rooms else {
            return;
        };
        for element in used {
            if let Some(room) = rooms.get(&element.head) {
                assert!(element.len <= *room, "{element:?} of {room}");
            }
        }
    }

    fn pause(&mut self) {
        self.block.pause().unwrap();
        let metrics = self.block.metrics();
        let in_flight = metrics
            .iter()
            .find(|(name, _)| *name == "requests_in_flight_now");
        assert_eq!(in_flight.unwrap().1, 0);
        let state = self.block.ring_states()[0].unwrap();
        assert_eq!(state.next_available, state.next_used);
        self.check_used();
        self.block.resume();
    }

    fn run(&mut self, operands: &mut Operands<'_>) {
        for _ in 0..200 {
            if operands.0.is_empty() {
                return;
            }
            match operands.byte() % 10 {
                0..=2 => self.request(operands),
                3 => {
                    self.rooms = None;
                    let at = operands.address() % (RAM_SIZE as u64 - 32);
                    let bytes: Vec<u8> =
                        (0..operands.byte() % 32).map(|_| operands.byte()).collect();
                    self.driver.write(at, &bytes);
                }
                4 => {
                    self.rooms = None;
                    let (index, address) = (operands.word() % SIZE, operands.address());
                    let (len, flags) = (u32::from(operands.word()), operands.word());
                    self.driver
                        .put_descriptor(index, address, len, flags, operands.word());
                }
                5 => {
                    self.rooms = None;
                    self.driver.make_available(operands.word() % (SIZE + 1));
                }
                6 => self.turn(0),
                7 => self.turn(FIRST_DEVICE_TOKEN),
                8 => self.pause(),
                _ => {
                    self.block.reset();
                    let flags = operands.byte();
                    self.activate(flags & 1 != 0, u64::from(flags) << 7);
                }
            }
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let mut operands = Operands(input);
    DISKS.with_borrow_mut(|disks| {
        let which = usize::from(operands.byte()) % disks.len();
        let disk = &mut disks[which];
        let ram = mock_ram(RAM_SIZE);
        let mut machine = Machine {
            driver: MockDriver::new(&ram, RING, SIZE),
            ram,
            block: &mut disk.block,
            epoll: Arc::new(epoll::create(CreateFlags::CLOEXEC).unwrap()),
            kick: Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()),
            interrupt: Arc::new(Interrupt::new(None).unwrap()),
            rooms: None,
            descriptors: 0,
        };
        machine.activate(true, 0);
        machine.run(&mut operands);
        machine.turn(0);
        machine.pause();
        machine.block.reset();
        assert_eq!(disk.file.metadata().unwrap().len(), DISK_SIZE);
    });
});
