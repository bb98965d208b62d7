//! The balloon behind a mock transport: what a driver does to it, and what it must survive.

use std::sync::Arc;

use virtio_core::mock::{MockBuffer, MockDriver, mock_ram};
use virtio_core::ram::GuestRam;

use super::*;
use crate::virtio::mock::MockTransport;

const PAGE: u64 = 4096;
const CONFIG: BalloonConfig = BalloonConfig {
    target_pages: 0,
    deflates_on_oom: true,
    reports_free_pages: true,
};

struct Fixture {
    balloon: Balloon,
    control: Arc<BalloonControl>,
    transport: MockTransport,
    drivers: [MockDriver; 3],
    _ram: Arc<GuestRam>,
}

/// An active balloon in 4 MiB of memory; its rings are below 64 KiB.
fn fixture() -> Fixture {
    let ram = mock_ram(0x40_0000);
    let (mut balloon, control) = Balloon::new(CONFIG);
    let transport = MockTransport::new(&ram, 3);
    let drivers = [0, 0x4000, 0x8000].map(|base| MockDriver::new(&ram, base, 128));
    let [inflate, deflate, reporting] = &drivers;
    let queues = [Some(inflate), Some(deflate), Some(reporting)];
    let activation = transport.activation(balloon.features(), &queues);
    balloon.activate(activation).unwrap();
    Fixture {
        balloon,
        control,
        transport,
        drivers,
        _ram: ram,
    }
}

impl Fixture {
    fn kick(&mut self, queue: usize) {
        self.transport.kick(queue);
        self.transport.settle(&mut self.balloon).unwrap();
    }

    fn metric(&self, name: &str) -> u64 {
        let metrics = self.balloon.metrics();
        metrics.iter().find(|(key, _)| *key == name).unwrap().1
    }
}

#[test]
fn a_driver_inflates_and_deflates() {
    let mut test = fixture();
    test.drivers[0].write(0x10_0000, &[0xaa; 8192]);
    test.drivers[0].write(0xc000, &[0, 1, 0, 0, 1, 1, 0, 0]);
    test.drivers[0].add(&[MockBuffer::readable(0xc000, 8)]);
    test.kick(0);
    assert_eq!(test.drivers[0].take_used()[0].len, 0);
    assert_eq!(test.drivers[0].read(0x10_0000, 8192), vec![0; 8192]);
    assert_eq!(test.transport.interrupt.raised(), 1);
    test.balloon.write_config(4, &[2, 0, 0, 0]);
    assert_eq!(test.control.actual_pages(), 2);
    test.drivers[1].add(&[MockBuffer::readable(0xc000, 8)]);
    test.kick(1);
    assert_eq!(test.drivers[1].take_used().len(), 1);
    assert_eq!(test.metric("deflated_pages"), 2);
    assert_eq!(test.metric("discarded_pages"), 2);
}

#[test]
fn free_ranges_are_given_back_before_they_are_acknowledged() {
    let mut test = fixture();
    test.drivers[2].write(0x20_0000, &[0xaa; 0x4000]);
    let ranges = [
        MockBuffer::writable(0x20_0000, 0x2000),
        MockBuffer::writable(0x20_3000, 0x1000),
    ];
    test.drivers[2].add(&ranges);
    test.kick(2);
    assert_eq!(test.drivers[2].take_used()[0].len, 0);
    let first = |page: u64| test.drivers[2].read(0x20_0000 + page * PAGE, 1)[0];
    assert_eq!([0, 1, 2, 3].map(first), [0, 0, 0xaa, 0]);
}

#[test]
fn many_requests_take_several_turns() {
    let mut test = fixture();
    let numbers: Vec<u8> = (0x100u32..0x200).flat_map(u32::to_le_bytes).collect();
    test.drivers[0].write(0xc000, &numbers);
    for _ in 0..20 {
        test.drivers[0].add(&[MockBuffer::readable(0xc000, 1024)]);
    }
    test.transport.kick(0);
    test.transport.turn(&mut test.balloon, 0).unwrap();
    assert_eq!(test.drivers[0].take_used().len(), PAGES_PER_TURN / 256);
    test.transport.settle(&mut test.balloon).unwrap();
    assert_eq!(test.drivers[0].take_used().len(), 20 - PAGES_PER_TURN / 256);
}

#[test]
fn nonsense_costs_the_driver_its_request_only() {
    let mut test = fixture();
    test.drivers[0].write(0xc000, &[0xff; 64]);
    // Pages that are none, half a number, no buffers for the device, memory that is none.
    test.drivers[0].add(&[MockBuffer::readable(0xc000, 64)]);
    test.drivers[0].add(&[MockBuffer::readable(0xc000, 3)]);
    test.drivers[0].add(&[MockBuffer::writable(0xc000, 64)]);
    test.drivers[0].add(&[MockBuffer::readable(0x40_0000, 4)]);
    test.kick(0);
    assert_eq!(test.drivers[0].take_used().len(), 4);
    // The same page sixteen times is one.
    assert_eq!(test.metric("failed_pages"), 1);
    assert_eq!(test.metric("malformed_chains"), 1);
    // Ranges that are no pages, and one the device may not write.
    test.drivers[2].add(&[MockBuffer::writable(0x20_0001, 0x1000)]);
    test.drivers[2].add(&[MockBuffer::readable(0x20_0000, 0x1000)]);
    test.kick(2);
    assert_eq!(test.drivers[2].take_used().len(), 2);
    assert_eq!(test.metric("discarded_pages"), 0);
    test.drivers[1].set_available_index(500);
    test.transport.kick(1);
    assert!(test.transport.settle(&mut test.balloon).is_err());
}

#[test]
fn a_target_reaches_the_driver_and_outlives_a_reset() {
    let mut test = fixture();
    test.control.set_target(1000);
    assert_eq!(test.transport.interrupt.status(), 2);
    test.balloon.write_config(4, &[5, 0, 0, 0]);
    test.balloon.reset();
    let mut data = [0; 8];
    test.balloon.read_config(0, &mut data);
    assert_eq!(data, [0xe8, 3, 0, 0, 0, 0, 0, 0]);
    test.control.set_target(2000);
    assert_eq!(test.transport.interrupt.raised(), 1);
    assert_eq!(test.balloon.ring_states(), [None; 3]);
    // What was rung before the reset finds nothing.
    test.kick(0);
}

#[test]
fn a_snapshot_keeps_target_and_progress() {
    let mut test = fixture();
    test.control.set_target(77);
    test.balloon.write_config(4, &[33, 0, 0, 0]);
    test.balloon.pause().unwrap();
    let saved = test.balloon.save().unwrap();
    assert_eq!(
        test.balloon.ring_states()[2],
        Some(test.drivers[2].ring(true).unwrap().state())
    );
    let (mut other, control) = Balloon::new(CONFIG);
    other.restore(&saved).unwrap();
    assert_eq!((control.target_pages(), control.actual_pages()), (77, 33));
    assert!(other.restore(&saved[1..]).is_err());
}

#[test]
fn a_request_made_while_paused_is_seen_after() {
    let mut test = fixture();
    test.balloon.pause().unwrap();
    test.drivers[1].add(&[MockBuffer::readable(0xc000, 4)]);
    test.balloon.resume();
    test.transport.settle(&mut test.balloon).unwrap();
    assert_eq!(test.drivers[1].take_used().len(), 1);
}

#[test]
fn only_what_was_asked_for_is_offered() {
    let (mut balloon, _control) = Balloon::new(BalloonConfig {
        target_pages: 0,
        deflates_on_oom: false,
        reports_free_pages: false,
    });
    assert_eq!(balloon.features(), features::RING);
    assert_eq!(balloon.queue_sizes().len(), 2);
    let ram = mock_ram(0x1_0000);
    let transport = MockTransport::new(&ram, 2);
    let driver = MockDriver::new(&ram, 0, 128);
    let activation = transport.activation(features::RING, &[Some(&driver), None]);
    let error = balloon.activate(activation).unwrap_err();
    assert!(matches!(error, DeviceError::QueueMissing { index: 1 }));
}
