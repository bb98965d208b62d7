//! A guest's accesses to a device's registers and configuration space: any width, offset, value
//! and order, with the driver's steps, kicks, turns of the I/O thread and snapshots in between.
//!
//! Checked beside panics and sanitizer findings: what is past an access stays as it was, constant
//! registers stay, the status never claims a step whose condition is not met, a saved window comes
//! back as it was, and a driver that begins anew is served.

#![no_main]

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use fuzz_support::Input;
use libfuzzer_sys::fuzz_target;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_core::mock::{MockBuffer, MockDriver, mock_ram};
use virtio_core::ram::GuestRam;
use vmm_core::bus::{BusDevice, Outcome};
use vmm_core::event::{VmEvents, VmExit};
use vmm_core::interrupt::Interrupt;
use vmm_core::rate_limiter::RateLimiterConfig;
use vmm_core::virtio::balloon::{Balloon, BalloonConfig};
use vmm_core::virtio::block::{Block, BlockConfig, EngineChoice};
use vmm_core::virtio::device::{VirtioDevice, Watcher};
use vmm_core::virtio::mmio::MmioTransport;
use vmm_core::virtio::rng::Rng;

const RAM_SIZE: usize = 1 << 17;
const RING_SPACE: u64 = 0x4000;
const RING_SIZE: u16 = 16;
const DISK_SIZE: u64 = 64 << 10;
const SUBSCRIBER: u32 = 3;
/// Rounds after which a device that always has something to do never comes to rest.
const MAX_ROUNDS: usize = 1000;
const VERSION_1: u64 = 1 << 32;
/// Registers that never change: magic, version, device, vendor, shared memory.
const CONSTANTS: [u64; 8] = [0x00, 0x04, 0x08, 0x0c, 0xb0, 0xb4, 0xb8, 0xbc];
const STATUS: u64 = 0x70;
const NEEDS_RESET: u32 = 0x40;

struct Quiet;

impl VmEvents for Quiet {
    fn exited(&self, exit: &VmExit) {
        panic!("registers end no machine: {exit}");
    }

    fn warning(&self, text: &str) {
        assert!(!text.is_empty());
    }
}

/// A device behind its registers, and what the I/O thread has of it.
struct Window {
    transport: MmioTransport,
    epoll: Arc<OwnedFd>,
    queue_count: u32,
    constants: [u32; 8],
}

impl Window {
    fn new(kind: u8, ram: &Arc<GuestRam>) -> Self {
        let device = device(kind);
        let queue_count = u32::try_from(device.queue_sizes().len()).expect("a few queues");
        let epoll = Arc::new(epoll::create(CreateFlags::CLOEXEC).expect("an epoll set"));
        let transport = MmioTransport::new(
            device,
            Arc::clone(ram),
            Arc::new(Interrupt::new(None).expect("a page")),
            Watcher::new(Arc::clone(&epoll), SUBSCRIBER),
            Arc::new(Quiet),
        )
        .expect("eventfds");
        let mut window = Self {
            transport,
            epoll,
            queue_count,
            constants: [0; 8],
        };
        window.constants = CONSTANTS.map(|offset| window.read(offset));
        window
    }

    fn read(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn write(&self, offset: u64, value: u32) {
        self.write_bytes(offset, &value.to_le_bytes());
    }

    fn write_bytes(&self, offset: u64, bytes: &[u8]) {
        assert_eq!(self.transport.write(offset, bytes), Outcome::Continue);
    }

    fn write_pair(&self, offset: u64, value: u64) {
        self.write(offset, value as u32);
        self.write(offset + 4, (value >> 32) as u32);
    }

    fn offered(&self) -> u64 {
        [0, 1].map(|half| {
            self.write(0x14, half);
            u64::from(self.read(0x10)) << (32 * half)
        })[..]
            .iter()
            .sum()
    }

    /// All of a driver's steps, with these features and the queues at these rings.
    fn bring_up(&self, features: u64, drivers: &[MockDriver]) {
        self.write(STATUS, 0);
        self.write(STATUS, 1);
        self.write(STATUS, 3);
        for half in [0, 1] {
            self.write(0x24, half);
            self.write(0x20, (features >> (32 * half)) as u32);
        }
        self.write(STATUS, 0xb);
        for (index, driver) in (0..).zip(drivers) {
            let state = driver.state();
            self.write(0x30, index);
            self.write(0x38, state.size.into());
            self.write_pair(0x80, state.descriptors);
            self.write_pair(0x90, state.available);
            self.write_pair(0xa0, state.used);
            self.write(0x44, 1);
        }
        self.write(STATUS, 0xf);
    }

    /// What the I/O thread does, until nothing is ready.
    fn settle(&self) {
        for _ in 0..MAX_ROUNDS {
            let mut events: Vec<epoll::Event> = Vec::with_capacity(16);
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            let room = rustix::buffer::spare_capacity(&mut events);
            if epoll::wait(&*self.epoll, room, Some(&now)).expect("epoll_wait") == 0 {
                return;
            }
            for event in &events {
                let data = event.data.u64();
                assert_eq!(data >> 32, u64::from(SUBSCRIBER));
                self.transport.ready(data as u32, event.flags);
            }
        }
        panic!("the device never comes to rest");
    }

    fn check(&self) {
        assert_eq!(CONSTANTS.map(|offset| self.read(offset)), self.constants);
        let status = self.read(STATUS);
        assert_eq!(status & !0xcf, 0, "bits that the specification lacks");
        assert!(status & 4 == 0 || status & 8 != 0, "DRIVER_OK too early");
    }

    /// What a driver can read of it.
    fn registers(&self) -> Vec<u32> {
        (0..0x100)
            .step_by(4)
            .map(|offset| self.read(offset))
            .collect()
    }
}

fn device(kind: u8) -> Box<dyn VirtioDevice> {
    match kind % 3 {
        0 => Box::new(Rng::new(&RateLimiterConfig::default()).expect("no limits")),
        1 => {
            let config = BalloonConfig {
                target_pages: 7,
                deflates_on_oom: true,
                reports_free_pages: true,
            };
            Box::new(Balloon::new(config).0)
        }
        _ => {
            let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file"));
            file.set_len(DISK_SIZE).expect("its size");
            let block = Block::new(BlockConfig {
                id: "fuzzed".into(),
                path: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
                is_read_only: false,
                is_direct: false,
                engine: EngineChoice::Sync,
                rate_limiter: None,
            });
            Box::new(block.expect("a disk"))
        }
    }
}

fn drivers(ram: &Arc<GuestRam>, count: u32) -> Vec<MockDriver> {
    (0..u64::from(count))
        .map(|index| MockDriver::new(ram, index * RING_SPACE, RING_SIZE))
        .collect()
}

fn run(input: &mut Input<'_>) -> Option<()> {
    let ram = mock_ram(RAM_SIZE);
    let kind = input.u8()?;
    let mut window = Window::new(kind, &ram);
    program(input, kind, &ram, &mut window);

    // Whatever happened: one that begins anew is a driver like any other.
    let offered = window.offered();
    let mut drivers = drivers(&ram, window.queue_count);
    window.bring_up(offered, &drivers);
    assert_eq!(window.read(STATUS), 0xf);
    drivers[0].set_no_interrupt(false);
    let address = u64::from(window.queue_count) * RING_SPACE;
    drivers[0].add(&[MockBuffer::writable(address, 64)]);
    window.write(0x50, 0);
    window.settle();
    // A disk answers a request without a header with an error, a balloon wants no such buffer.
    let is_well = window.read(STATUS) & NEEDS_RESET == 0;
    assert!(is_well && drivers[0].take_used().len() == 1);
    Some(())
}

fn program(
    input: &mut Input<'_>,
    kind: u8,
    ram: &Arc<GuestRam>,
    window: &mut Window,
) -> Option<()> {
    let mut drivers = drivers(ram, window.queue_count);
    loop {
        match input.u8()? % 12 {
            // A register, or near it.
            0..=2 => window.write(u64::from(input.u8()?), input.u32()?),
            3 | 4 => {
                let offset = u64::from(input.u16()?);
                let len = usize::from(input.u8()? % 10);
                window.write_bytes(offset, input.bytes(len));
            }
            5 => {
                let offset = input.u64()?;
                let len = usize::from(input.u8()? % 10);
                let mut data = [0xaa; 16];
                window.transport.read(offset, &mut data[..len]);
                assert_eq!(data[len..], [0xaa; 16][len..]);
            }
            6 => {
                drivers = self::drivers(ram, window.queue_count);
                let features = window.offered() & input.u64()? | VERSION_1;
                window.bring_up(features, &drivers);
            }
            7 => {
                let at = u64::from(input.u16()?);
                let count = drivers.len();
                let driver = &mut drivers[usize::from(input.u8()?) % count];
                driver.add(&[
                    MockBuffer::readable(at, u32::from(input.u8()?)),
                    MockBuffer::writable(at ^ 0x100, u32::from(input.u16()?)),
                ]);
            }
            8 => {
                let at = u64::from(input.u16()?);
                let bytes = input.bytes(usize::from(at as u8 % 32));
                drivers[0].write(at, bytes);
            }
            9 => window.write(0x50, u32::from(input.u8()?)),
            10 => {
                window.transport.interrupt().signal_config();
                window.write(0x64, u32::from(input.u8()?));
            }
            _ => {
                window
                    .transport
                    .pause()
                    .expect("nothing is under way for long");
                let state = window.transport.save().expect("a device that is paused");
                let again = Window::new(kind, ram);
                if again.transport.restore(&state).is_ok() {
                    // A restored device interrupts once more.
                    let shown = |window: &Window| {
                        let mut registers = window.registers();
                        registers[0x60 / 4] |= 1;
                        registers
                    };
                    assert_eq!(shown(&again), shown(window));
                    *window = again;
                }
                window.transport.resume();
            }
        }
        window.settle();
        window.check();
        for driver in &mut drivers {
            let _used = driver.take_used();
        }
    }
}

fuzz_target!(|data: &[u8]| {
    run(&mut Input::new(data));
});
