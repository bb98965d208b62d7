//! The transport with a device that gives every request back, and a driver that follows the rules
//! or does not.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use rustix::event::epoll;
use virtio_core::chain::Chain;
use virtio_core::mock::{MockBuffer, MockDriver, mock_ram};

use super::super::registers::{MAGIC, half};
use super::*;
use crate::event::VmExit;

const QUEUE_SIZE: u16 = 16;
const RING_BASE: u64 = 0x1000;
const MEMORY: usize = 0x2_0000;

#[derive(Default)]
struct Warnings(Mutex<Vec<String>>);

impl VmEvents for Warnings {
    fn exited(&self, exit: &VmExit) {
        panic!("{exit}");
    }

    fn warning(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
}

/// Gives requests back with the number of bytes it could write.
#[derive(Default)]
struct Echo {
    queue: Option<Queue>,
    config: [u8; 8],
    served: Arc<AtomicU64>,
    resets: Arc<AtomicU64>,
}

impl VirtioDevice for Echo {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn name(&self) -> &'static str {
        "echo"
    }

    fn features(&self) -> u64 {
        features::RING | 1
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        for (byte, value) in data.iter_mut().zip(self.config.iter().skip(offset)) {
            *byte = *value;
        }
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        for (byte, value) in self.config.iter_mut().skip(offset).zip(data) {
            *byte = *value;
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        self.queue = Some(activation.take_queue(0)?);
        Ok(())
    }

    fn handle(&mut self, token: u32, _readiness: epoll::EventFlags) -> Result<(), DeviceError> {
        let (0, Some(queue)) = (token, &mut self.queue) else {
            return Ok(());
        };
        let mut chain = Chain::new(queue.ring.ram());
        loop {
            while queue.ring.pop(&mut chain).map_err(DeviceError::ring(0))? {
                let len = u32::try_from(chain.writable.len()).unwrap();
                queue.ring.complete(chain.head, len);
                self.served.fetch_add(1, Ordering::Relaxed);
            }
            if !queue.ring.enable_kicks() {
                break;
            }
        }
        queue.signal();
        Ok(())
    }

    fn reset(&mut self) {
        self.queue = None;
        self.resets.fetch_add(1, Ordering::Relaxed);
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn resume(&mut self) {
        if let Some(queue) = &self.queue {
            queue.kick_self();
        }
    }

    fn ring_states(&self) -> Vec<Option<RingState>> {
        vec![self.queue.as_ref().map(|queue| queue.ring.state()), None]
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        Ok(self.config.to_vec())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        self.config = state.try_into().unwrap();
        Ok(())
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        vec![("served", self.served.load(Ordering::Relaxed))]
    }
}

struct Bench {
    transport: MmioTransport,
    epoll: Arc<OwnedFd>,
    warnings: Arc<Warnings>,
    ram: Arc<GuestRam>,
    served: Arc<AtomicU64>,
    resets: Arc<AtomicU64>,
}

impl Bench {
    fn new() -> Self {
        Self::with_ram(mock_ram(MEMORY))
    }

    fn with_ram(ram: Arc<GuestRam>) -> Self {
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).unwrap());
        let warnings = Arc::<Warnings>::default();
        let echo = Echo::default();
        let (served, resets) = (Arc::clone(&echo.served), Arc::clone(&echo.resets));
        let transport = MmioTransport::new(
            Box::new(echo),
            Arc::clone(&ram),
            Arc::new(Interrupt::new(None).unwrap()),
            Watcher::new(Arc::clone(&epoll), 1),
            Arc::clone(&warnings) as Arc<dyn VmEvents>,
        );
        Self {
            transport: transport.unwrap(),
            epoll,
            warnings,
            ram,
            served,
            resets,
        }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        assert_eq!(
            self.transport.write(offset, &value.to_le_bytes()),
            Outcome::Continue
        );
    }

    fn set_status(&self, bits: u32) {
        self.write(0x70, self.read(0x70) | bits);
    }

    fn negotiate(&self, chosen: u64) {
        self.write(0x70, 0);
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::DRIVER);
        for select in 0..2 {
            self.write(0x24, select);
            self.write(0x20, half(chosen, select));
        }
        self.set_status(status::FEATURES_OK);
    }

    fn set_queue(&self, index: u32, driver: &MockDriver) {
        let state = driver.state();
        self.write(0x30, index);
        self.write(0x38, state.size.into());
        for (offset, address) in [
            (0x80, state.descriptors),
            (0x90, state.available),
            (0xa0, state.used),
        ] {
            self.write(offset, half(address, 0));
            self.write(offset + 4, half(address, 1));
        }
        self.write(0x44, 1);
    }

    /// As a Linux driver comes up.
    fn bring_up(&self) -> MockDriver {
        let driver = MockDriver::new(&self.ram, RING_BASE, QUEUE_SIZE);
        self.negotiate(features::VERSION_1);
        self.set_queue(0, &driver);
        self.set_status(status::DRIVER_OK);
        assert_eq!(self.read(0x70), 0xf);
        driver
    }

    /// One turn of the I/O thread.
    fn turn(&self) -> usize {
        let mut events = Vec::with_capacity(8);
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let room = rustix::buffer::spare_capacity(&mut events);
        epoll::wait(&self.epoll, room, Some(&now)).unwrap();
        for event in &events {
            let data = event.data.u64();
            assert_eq!(data >> 32, 1);
            self.transport
                .ready(u32::try_from(data & 0xffff_ffff).unwrap(), event.flags);
        }
        events.len()
    }
}

#[test]
fn a_driver_finds_the_device_and_its_queues() {
    let bench = Bench::new();
    assert_eq!(bench.read(0x00), MAGIC);
    assert_eq!(bench.read(0x04), 2);
    assert_eq!(bench.read(0x08), DeviceKind::Rng as u32);
    bench.write(0x14, 1);
    assert_eq!(bench.read(0x10), 1, "VERSION_1 is bit 32");
    for (queue, max) in [(0, 16), (1, 16), (2, 0), (u32::MAX, 0)] {
        bench.write(0x30, queue);
        assert_eq!(bench.read(0x34), max, "queue {queue}");
    }
    assert_eq!(bench.read(0xb0), u32::MAX, "no shared memory");
}

#[test]
fn requests_are_served_and_interrupts_acknowledged() {
    let bench = Bench::new();
    let mut driver = bench.bring_up();
    let head = driver.add(&[MockBuffer::writable(0x8000, 64)]);
    // As the ioeventfd would.
    bench.write(QUEUE_NOTIFY, 0);
    assert_eq!(bench.turn(), 1);
    let used = driver.take_used();
    assert_eq!((used[0].head, used[0].len), (u32::from(head), 64));
    assert_eq!(bench.read(0x60), 1);
    bench.write(0x64, 1);
    assert_eq!(bench.read(0x60), 0);
    assert_eq!(bench.turn(), 0, "the kick was cleared");
}

#[test]
fn features_that_were_not_offered_or_are_legacy_are_not_accepted() {
    let bench = Bench::new();
    for chosen in [0, 1, features::VERSION_1 | 2, features::VERSION_1 | 1 << 40] {
        bench.negotiate(chosen);
        assert_eq!(
            bench.read(0x70) & status::FEATURES_OK,
            0,
            "features {chosen:#x}"
        );
    }
    bench.negotiate(features::VERSION_1 | 1);
    assert_eq!(bench.read(0x70) & status::FEATURES_OK, status::FEATURES_OK);
}

#[test]
fn features_and_queues_are_settled_when_their_time_is_over() {
    let bench = Bench::new();
    let mut driver = bench.bring_up();
    bench.write(0x24, 0);
    bench.write(0x20, u32::MAX);
    bench.write(0x30, 0);
    bench.write(0x80, 0x5000);
    bench.write(0x44, 0);
    assert_eq!(bench.read(0x44), 1);
    driver.add(&[MockBuffer::writable(0x8000, 8)]);
    bench.write(QUEUE_NOTIFY, 0);
    bench.turn();
    assert_eq!(driver.take_used().len(), 1);
}

type Damage = fn(&Bench);

#[test]
fn a_queue_that_is_none_makes_the_device_ask_for_a_reset() {
    let bench = Bench::new();
    let broken: [(&str, Damage); 4] = [
        ("not ready", |_| ()),
        ("misaligned", |bench| {
            bench.write(0x80, 0x1001);
            bench.write(0x44, 1);
        }),
        ("outside of memory", |bench| {
            bench.write(0x84, 1);
            bench.write(0x44, 1);
        }),
        ("a size that is none", |bench| {
            bench.write(0x38, 3);
            bench.write(0x44, 1);
        }),
    ];
    for (count, (name, damage)) in (1..).zip(broken) {
        bench.negotiate(features::VERSION_1);
        bench.write(0x30, 0);
        damage(&bench);
        bench.set_status(status::DRIVER_OK);
        assert_ne!(bench.read(0x70) & status::NEEDS_RESET, 0, "{name}");
        assert_ne!(bench.read(0x60) & 2, 0, "{name}");
        assert_eq!(bench.warnings.0.lock().unwrap().len(), count, "{name}");
    }
    bench.bring_up();
}

#[test]
fn a_broken_ring_stops_the_device_until_its_driver_resets_it() {
    let bench = Bench::new();
    let mut driver = bench.bring_up();
    driver.set_available_index(1000);
    bench.write(QUEUE_NOTIFY, 0);
    bench.turn();
    assert_ne!(bench.read(0x70) & status::NEEDS_RESET, 0);
    assert_eq!(bench.resets.load(Ordering::Relaxed), 1);
    let warning = bench.warnings.0.lock().unwrap().join("");
    assert_eq!(
        warning,
        "rng echo: queue 0: available index went from 0 to 1000 in a ring of 16, 0 of it in flight"
    );
    bench.write(QUEUE_NOTIFY, 0);
    assert_eq!(bench.turn(), 0, "nothing is watched");

    let mut driver = bench.bring_up();
    driver.add(&[MockBuffer::writable(0x8000, 8)]);
    bench.write(QUEUE_NOTIFY, 0);
    bench.turn();
    assert_eq!(driver.take_used().len(), 1);
}

#[test]
fn a_guest_that_breaks_its_ring_for_ever_does_not_fill_the_log() {
    let bench = Bench::new();
    for _ in 0..100 {
        bench.bring_up().set_available_index(1000);
        bench.write(QUEUE_NOTIFY, 0);
        bench.turn();
    }
    let count = bench.warnings.0.lock().unwrap().len() as u64;
    assert_eq!(count, MAX_WARNINGS);
    assert!(bench.transport.metrics().contains(&("failures", 100)));
}

#[test]
fn the_configuration_space_takes_any_width_and_registers_only_words() {
    let bench = Bench::new();
    let mut byte = [0xaa];
    bench.transport.read(0x000, &mut byte);
    assert_eq!(byte, [0], "a register in part");
    let _ = bench.transport.write(0x100, &[7]);
    bench.transport.read(0x100, &mut byte);
    assert_eq!(byte, [0], "not before there is a driver");
    bench.set_status(status::DRIVER);
    let _ = bench.transport.write(0x101, &[7, 8]);
    let mut word = [0xaa; 8];
    bench.transport.read(0x100, &mut word);
    assert_eq!(word, [0, 7, 8, 0, 0, 0, 0, 0]);
    bench.transport.read(0x1f00, &mut word);
    assert_eq!(word, [0; 8], "past its end");
}

#[test]
fn a_saved_device_goes_on_with_the_requests_it_had() {
    let bench = Bench::new();
    let mut driver = bench.bring_up();
    driver.add(&[MockBuffer::writable(0x8000, 8)]);
    bench.write(QUEUE_NOTIFY, 0);
    bench.turn();
    driver.add(&[MockBuffer::writable(0x9000, 9)]);
    bench.transport.interrupt().signal_config();
    bench.transport.pause().unwrap();
    let state = bench.transport.save().unwrap();
    let bytes = postcard::to_allocvec(&state).unwrap();

    let again = Bench::with_ram(Arc::clone(&bench.ram));
    again
        .transport
        .restore(&postcard::from_bytes(&bytes).unwrap())
        .unwrap();
    assert_eq!(again.read(0x60), 3, "both interrupts are still pending");
    assert_eq!(again.read(0xfc), 1, "of this configuration");
    assert_eq!(again.read(0x70), 0xf);
    let raised = again.transport.interrupt().raised();
    assert_eq!(
        raised, 1,
        "the line may have been on its way when it was saved"
    );
    again.transport.resume();
    again.turn();
    let used: Vec<u32> = driver.take_used().iter().map(|used| used.len).collect();
    assert_eq!(used, [8, 9]);
    assert_eq!(again.served.load(Ordering::Relaxed), 1);
}

#[test]
fn a_snapshot_of_another_device_is_refused() {
    let bench = Bench::new();
    let mut state = bench.transport.save().unwrap();
    state.kind = DeviceKind::Net as u32;
    let error = Bench::new().transport.restore(&state).unwrap_err();
    assert!(error.to_string().contains("another device"), "{error}");
    let mut state = bench.transport.save().unwrap();
    state.registers.queues.pop();
    let error = Bench::new().transport.restore(&state).unwrap_err();
    assert!(error.to_string().contains("number of queues"), "{error}");
}

proptest! {
    /// Whatever a guest does to the registers, in whatever order: no panic, no wedged device.
    #[test]
    fn any_accesses_leave_a_device_that_can_be_reset(
        accesses in proptest::collection::vec(
            (
                prop_oneof![0u64..0x120, Just(0x70), Just(0x44), Just(0x38), Just(0x20)],
                prop_oneof![any::<u32>(), 0u32..16, Just(0xf), Just(0x1000)],
                0usize..=9,
            ),
            0..200,
        ),
    ) {
        let bench = Bench::new();
        for (offset, value, width) in accesses {
            let word = value.to_le_bytes();
            let data: Vec<u8> = word.into_iter().cycle().take(width).collect();
            prop_assert_eq!(bench.transport.write(offset, &data), Outcome::Continue);
            let mut data = vec![0xaa; width];
            bench.transport.read(offset, &mut data);
            bench.turn();
        }
        let mut driver = bench.bring_up();
        driver.add(&[MockBuffer::writable(0x8000, 8)]);
        bench.write(QUEUE_NOTIFY, 0);
        bench.turn();
        prop_assert_eq!(driver.take_used().len(), 1);
    }
}
