//! Random 4 KiB reads of a disk, from the driver's available ring to its used ring, by each engine;
//! beside them the same reads by `pread` into host memory, which no device can undercut by much.
//!
//! - `cached`: the file is in the page cache, so what is measured is the work of the device and
//!   the system calls, not the disk.
//! - `direct`: past the page cache; measures the disk as well, and what having many requests under
//!   way is worth. Depends on the disk below the temporary folder.
//!
//! An iteration is [`READS`] reads: `batch` makes all available and kicks once, `single` waits
//! for each before the next. Divide by [`READS`] (criterion prints it as throughput).

#![allow(missing_docs, reason = "criterion's macros make public functions")]

use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use tempfile::NamedTempFile;
use virtio_core::mock::{MockBuffer, MockDriver, mock_ram};
use virtio_core::ram::GuestRam;
use vmm_core::interrupt::Interrupt;
use vmm_core::virtio::block::{Block, BlockConfig, EngineChoice};
use vmm_core::virtio::device::{Activation, Queue, VirtioDevice, Watcher};

/// Reads per iteration.
const READS: u64 = 64;
const DISK_SIZE: u64 = 64 << 20;
const BLOCK: u64 = 4096;
const QUEUE_SIZE: u16 = 256;
const HEADERS: u64 = 0x1_0000;
const DATA: u64 = 0x10_0000;
const RAM_SIZE: usize = 4 << 20;

/// The same places every time, in an order no read-ahead guesses.
struct Places(u64);

impl Places {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % (DISK_SIZE / BLOCK) * BLOCK
    }
}

struct Machine {
    driver: MockDriver,
    block: Block,
    epoll: Arc<OwnedFd>,
    kick: Arc<OwnedFd>,
    _ram: Arc<GuestRam>,
}

impl Machine {
    #[expect(clippy::print_stderr, reason = "says what is not measured")]
    fn new(file: &NamedTempFile, engine: EngineChoice, is_direct: bool) -> Option<Self> {
        let block = Block::new(BlockConfig {
            id: "bench".into(),
            path: file.path().to_owned(),
            is_read_only: false,
            is_direct,
            engine,
            rate_limiter: None,
        });
        let mut block = match block {
            Ok(block) => block,
            Err(error) => {
                eprintln!("not measured with {engine:?}: {error}");
                return None;
            }
        };
        let ram = mock_ram(RAM_SIZE);
        let driver = MockDriver::new(&ram, 0x1000, QUEUE_SIZE);
        let epoll = Arc::new(epoll::create(CreateFlags::CLOEXEC).expect("an epoll set"));
        let kick = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd"));
        epoll::add(&epoll, &*kick, EventData::new_u64(0), EventFlags::IN).expect("watch the kick");
        let interrupt = Arc::new(Interrupt::new(None).expect("a page"));
        let activation = Activation {
            ram: Arc::clone(&ram),
            features: block.features(),
            queues: vec![Some(Queue {
                index: 0,
                ring: driver.ring(true).expect("a ring in memory"),
                kick: Arc::clone(&kick),
                interrupt: Arc::clone(&interrupt),
            })],
            interrupt,
            watcher: Watcher::new(Arc::clone(&epoll), 0),
        };
        block.activate(activation).expect("a queue");
        Some(Self {
            driver,
            block,
            epoll,
            kick,
            _ram: ram,
        })
    }

    fn add(&mut self, slot: u64, position: u64) {
        let header = HEADERS + slot * 32;
        let mut bytes = [0; 16];
        bytes[8..].copy_from_slice(&(position / 512).to_le_bytes());
        self.driver.write(header, &bytes);
        self.driver.add(&[
            MockBuffer::readable(header, 16),
            MockBuffer::writable(DATA + slot * BLOCK, 4096),
            MockBuffer::writable(header + 16, 1),
        ]);
    }

    fn kick(&self) {
        rustix::io::write(&*self.kick, &1u64.to_ne_bytes()).expect("a kick");
    }

    /// The I/O thread until `count` reads are given back.
    fn wait(&mut self, count: usize) {
        let mut left = count;
        let mut events: Vec<Event> = Vec::with_capacity(8);
        loop {
            let used = self.driver.take_used();
            assert!(
                used.iter().all(|element| element.len == 4097),
                "reads succeed"
            );
            left -= used.len();
            // What the device did not ask to hear of is not kicked for.
            self.driver.set_used_event(0);
            if left == 0 {
                return;
            }
            events.clear();
            let room = rustix::buffer::spare_capacity(&mut events);
            if epoll::wait(&self.epoll, room, None).is_err() {
                continue;
            }
            for event in &events {
                let token = u32::try_from(event.data.u64()).unwrap_or(0);
                if token == 0 {
                    let _cleared = rustix::io::read(&*self.kick, &mut [0; 8]);
                }
                self.block
                    .handle(token, event.flags)
                    .expect("the device goes on");
            }
        }
    }
}

fn disk() -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("a temporary file");
    for number in 0..DISK_SIZE / BLOCK {
        file.write_all(&number.to_le_bytes().repeat(512))
            .expect("room for the disk");
    }
    file.as_file().sync_all().expect("the disk is written");
    file
}

/// Memory aligned for direct reads.
#[repr(align(4096))]
struct Aligned([u8; 4096]);

fn block_engine(criterion: &mut Criterion) {
    let file = disk();
    for (cache, is_direct) in [("cached", false), ("direct", true)] {
        let mut group = criterion.benchmark_group(format!("block_engine/{cache}"));
        group.throughput(Throughput::Elements(READS));
        group
            .sample_size(20)
            .warm_up_time(Duration::from_millis(500));
        group.measurement_time(Duration::from_secs(3));

        let flags = if is_direct { libc::O_DIRECT } else { 0 };
        let plain = File::options()
            .read(true)
            .custom_flags(flags)
            .open(file.path());
        let plain = plain.expect("the disk opens");
        let (mut places, mut buffer) = (Places(1), Aligned([0; 4096]));
        group.bench_function("pread", |bencher| {
            bencher.iter(|| {
                for _ in 0..READS {
                    plain
                        .read_exact_at(&mut buffer.0, places.next())
                        .expect("a read");
                    black_box(&buffer.0);
                }
            });
        });

        for (name, engine) in [
            ("sync", EngineChoice::Sync),
            ("io_uring", EngineChoice::Uring),
        ] {
            let Some(mut machine) = Machine::new(&file, engine, is_direct) else {
                continue;
            };
            let mut places = Places(1);
            group.bench_function(BenchmarkId::new(name, "batch"), |bencher| {
                bencher.iter(|| {
                    for slot in 0..READS {
                        machine.add(slot, places.next());
                    }
                    machine.kick();
                    machine.wait(64);
                });
            });
            group.bench_function(BenchmarkId::new(name, "single"), |bencher| {
                bencher.iter(|| {
                    for _ in 0..READS {
                        machine.add(0, places.next());
                        machine.kick();
                        machine.wait(1);
                    }
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, block_engine);
criterion_main!(benches);
