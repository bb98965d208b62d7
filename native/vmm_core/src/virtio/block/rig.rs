//! What tests put around a [`Block`]: a temporary disk, a mock driver and the I/O thread's loop.
//!
//! The loop is the real one in small: epoll, the kick cleared before `handle`, tokens as given.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use tempfile::NamedTempFile;
use virtio_core::mock::{MockBuffer, MockDriver, UsedElement, mock_ram};
use virtio_core::ram::GuestRam;

use super::config::BlockConfig;
use super::device::{Block, QUEUE_SIZE};
use super::engine::EngineChoice;
use crate::interrupt::Interrupt;
use crate::virtio::device::{Activation, DeviceError, Queue, VirtioDevice, Watcher};

pub(super) const RAM_SIZE: usize = 32 << 20;
const RING: u64 = 0x1000;
/// Headers, statuses and indirect tables.
const CONTROL: u64 = 0x1_0000;
/// Where tests put data.
pub(super) const DATA: u64 = 0x10_0000;
const PATIENCE: Duration = Duration::from_secs(20);

/// `VIRTIO_BLK_T_*` and `_S_*`, as a driver knows them.
pub(super) const IN: u32 = 0;
pub(super) const OUT: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const WRITE_ZEROES: u32 = 13;
pub(super) const OK: u8 = 0;
pub(super) const IO_ERROR: u8 = 1;
pub(super) const UNSUPPORTED: u8 = 2;

pub(super) const MIB: usize = 1 << 20;

/// The engines that can be used here; says so when `io_uring` cannot.
pub(super) fn engines() -> Vec<EngineChoice> {
    let file = disk_file(512);
    match Block::new(config(&file, EngineChoice::Uring)) {
        Ok(_) => vec![EngineChoice::Uring, EngineChoice::Sync],
        Err(error) => {
            eprintln!(
                "not tested with io_uring: {error}: {:?}",
                std::error::Error::source(&error)
            );
            vec![EngineChoice::Sync]
        }
    }
}

/// A disk whose sectors differ.
pub(super) fn disk_file(size: usize) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&pattern(size)).unwrap();
    file
}

/// Bytes that tell which sector they were in.
pub(super) fn pattern(size: usize) -> Vec<u8> {
    let words = (0..128u32).flat_map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes());
    let mut bytes: Vec<u8> = words.collect::<Vec<_>>().repeat(size.div_ceil(512));
    for (sector, number) in bytes.chunks_mut(512).zip(0u32..) {
        sector[..4].copy_from_slice(&number.to_le_bytes());
        sector[508..].copy_from_slice(&(!number).to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

pub(super) fn config(file: &NamedTempFile, engine: EngineChoice) -> BlockConfig {
    BlockConfig {
        id: "disk-0".into(),
        path: file.path().to_owned(),
        is_read_only: false,
        is_direct: false,
        engine,
        rate_limiter: None,
    }
}

pub(super) fn from_disk(len: u32) -> [MockBuffer; 1] {
    [MockBuffer::writable(DATA, len)]
}

pub(super) fn to_disk(len: u32) -> [MockBuffer; 1] {
    [MockBuffer::readable(DATA, len)]
}

pub(super) fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let word = u128::from(sector) | u128::from(sectors) << 64 | u128::from(flags) << 96;
    word.to_le_bytes().to_vec()
}

/// A rig with a disk past the page cache for each engine, so that requests are really under way.
pub(super) fn each_direct_engine(size: usize, mut test: impl FnMut(Rig)) {
    for engine in engines() {
        let file = disk_file(size);
        test(Rig::new(BlockConfig {
            is_direct: true,
            ..config(&file, engine)
        }));
    }
}

/// A rig with a disk of `size` bytes for each engine.
pub(super) fn each_engine(size: usize, mut test: impl FnMut(Rig, &tempfile::NamedTempFile)) {
    for engine in engines() {
        let file = disk_file(size);
        test(Rig::new(config(&file, engine)), &file);
    }
}

/// A request whose answer is waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ticket {
    pub(super) head: u16,
    pub(super) status: u64,
}

/// A status that no device gives.
pub(super) const NO_STATUS: u8 = 0xee;

pub(super) struct Rig {
    pub(super) ram: Arc<GuestRam>,
    pub(super) driver: MockDriver,
    pub(super) block: Block,
    pub(super) interrupt: Arc<Interrupt>,
    epoll: Arc<OwnedFd>,
    kick: Arc<OwnedFd>,
    next_control: u64,
}

impl Rig {
    /// An active device.
    pub(super) fn new(config: BlockConfig) -> Self {
        let block = Block::new(config).unwrap();
        let features = block.features();
        Self::with_features(block, features)
    }

    pub(super) fn with_features(block: Block, features: u64) -> Self {
        let ram = mock_ram(RAM_SIZE);
        let epoll = Arc::new(epoll::create(CreateFlags::CLOEXEC).unwrap());
        let kick = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        epoll::add(&epoll, &*kick, EventData::new_u64(0), EventFlags::IN).unwrap();
        let mut rig = Self {
            driver: MockDriver::new(&ram, RING, QUEUE_SIZE),
            block,
            interrupt: Arc::new(Interrupt::new(None).unwrap()),
            epoll,
            kick,
            ram,
            next_control: CONTROL,
        };
        rig.activate(features).unwrap();
        rig
    }

    /// Activate, with a ring laid out anew.
    pub(super) fn activate(&mut self, features: u64) -> Result<(), DeviceError> {
        self.driver = MockDriver::new(&self.ram, RING, QUEUE_SIZE);
        let has_event_idx = features & virtio_core::features::EVENT_IDX != 0;
        let queue = Queue {
            index: 0,
            ring: self.driver.ring(has_event_idx).unwrap(),
            kick: Arc::clone(&self.kick),
            interrupt: Arc::clone(&self.interrupt),
        };
        self.block.activate(Activation {
            ram: Arc::clone(&self.ram),
            features,
            queues: vec![Some(queue)],
            interrupt: Arc::clone(&self.interrupt),
            watcher: Watcher::new(Arc::clone(&self.epoll), 0),
        })
    }

    // --- the driver ----------------------------------------------------------------------------

    fn control(&mut self, len: u64) -> u64 {
        if self.next_control + len > DATA {
            self.next_control = CONTROL;
        }
        let at = self.next_control;
        self.next_control += len.next_multiple_of(16);
        at
    }

    /// Write a request's header and ready its status; gives where they are.
    pub(super) fn header(&mut self, kind: u32, sector: u64) -> (u64, u64) {
        let at = self.control(32);
        let word = u128::from(kind) | u128::from(sector) << 64;
        self.driver.write(at, &word.to_le_bytes());
        self.driver.write(at + 16, &[NO_STATUS]);
        (at, at + 16)
    }

    /// Add a request by way of an indirect table, so that a ring's worth of them fits.
    pub(super) fn add(&mut self, kind: u32, sector: u64, data: &[MockBuffer]) -> Ticket {
        let (header, status) = self.header(kind, sector);
        let mut buffers = vec![MockBuffer::readable(header, 16)];
        buffers.extend(data);
        buffers.push(MockBuffer::writable(status, 1));
        let table = self.control(buffers.len() as u64 * 16);
        let head = self.driver.add_indirect(table, &buffers);
        Ticket { head, status }
    }

    pub(super) fn status(&self, ticket: Ticket) -> u8 {
        self.driver.read(ticket.status, 1)[0]
    }

    pub(super) fn kick(&self) {
        rustix::io::write(&*self.kick, &1u64.to_ne_bytes()).unwrap();
    }

    // --- the I/O thread ------------------------------------------------------------------------

    /// Handle what is ready, waiting for it at most `timeout`; gives how many events there were.
    pub(super) fn turn(&mut self, timeout: Duration) -> usize {
        let timeout = Timespec {
            tv_sec: timeout.as_secs().try_into().unwrap(),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        let mut events: Vec<Event> = Vec::with_capacity(8);
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut events),
            Some(&timeout),
        ) {
            // Completions interrupt system calls of the thread that submitted.
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => panic!("epoll: {errno}"),
        }
        for event in &events {
            let token = u32::try_from(event.data.u64()).unwrap();
            if token == 0 {
                let _cleared = rustix::io::read(&*self.kick, &mut [0; 8]);
            }
            self.block.handle(token, event.flags).unwrap();
        }
        events.len()
    }

    /// Until the device has given `count` requests back.
    pub(super) fn wait_used(&mut self, count: usize) -> Vec<UsedElement> {
        let deadline = Instant::now() + PATIENCE;
        let mut used = self.driver.take_used();
        while used.len() < count {
            assert!(
                Instant::now() < deadline,
                "{} of {count} given back",
                used.len()
            );
            self.turn(Duration::from_millis(100));
            used.extend(self.driver.take_used());
        }
        used
    }

    /// Do one request; gives its status and the length in the used ring.
    pub(super) fn request(&mut self, kind: u32, sector: u64, data: &[MockBuffer]) -> (u8, u32) {
        let ticket = self.add(kind, sector, data);
        self.kick();
        let used = self.wait_used(1);
        assert_eq!((used.len(), used[0].head), (1, u32::from(ticket.head)));
        (self.status(ticket), used[0].len)
    }

    pub(super) fn metric(&self, name: &str) -> u64 {
        let metrics = self.block.metrics();
        metrics.iter().find(|(known, _)| *known == name).unwrap().1
    }
}
