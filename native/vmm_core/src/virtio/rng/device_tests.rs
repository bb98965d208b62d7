//! The entropy device behind a mock transport.

use virtio_core::mock::{MockBuffer, MockDriver, mock_ram};

use super::*;
use crate::rate_limiter::TokenBucketConfig;
use crate::virtio::mock::MockTransport;

const BUFFER: u64 = 0x1_0000;
const RAM_SIZE: usize = 0x4_0000;

struct Fixture {
    rng: Rng,
    transport: MockTransport,
    driver: MockDriver,
}

fn fixture(bandwidth: Option<TokenBucketConfig>) -> Fixture {
    let limiter = RateLimiterConfig {
        bandwidth,
        operations: None,
    };
    let ram = mock_ram(RAM_SIZE);
    let mut rng = Rng::new(&limiter).unwrap();
    let transport = MockTransport::new(&ram, 1);
    let driver = MockDriver::new(&ram, 0, 64);
    rng.activate(transport.activation(rng.features(), &[Some(&driver)]))
        .unwrap();
    Fixture {
        rng,
        transport,
        driver,
    }
}

impl Fixture {
    fn kick(&mut self) {
        self.transport.kick(0);
        self.transport.settle(&mut self.rng).unwrap();
    }

    fn metric(&self, name: &str) -> u64 {
        let metrics = self.rng.metrics();
        metrics.iter().find(|(key, _)| *key == name).unwrap().1
    }
}

#[test]
fn all_of_a_request_is_filled_with_different_bytes() {
    let mut test = fixture(None);
    let buffers = [
        MockBuffer::writable(BUFFER, 3000),
        MockBuffer::writable(BUFFER + 4000, 100),
    ];
    test.driver.add(&buffers);
    test.kick();
    assert_eq!(test.driver.take_used()[0].len, 3100);
    assert_eq!(test.transport.interrupt.raised(), 1);
    // 32 bytes of random ones are not all zeros, and no two runs of them are alike.
    let run = |at: u64| test.driver.read(BUFFER + at, 32);
    let runs = [run(0), run(1024), run(2968), run(4000), run(4068)];
    for (index, one) in runs.iter().enumerate() {
        assert_ne!(*one, vec![0; 32]);
        assert!(!runs[index + 1..].contains(one));
    }
    // What was not asked for is untouched.
    assert_eq!(test.driver.read(BUFFER + 3000, 1000), vec![0; 1000]);
    assert_eq!(test.driver.read(BUFFER + 4100, 1000), vec![0; 1000]);
}

#[test]
fn a_huge_request_gets_a_part() {
    let mut test = fixture(None);
    test.driver.add(&[MockBuffer::writable(BUFFER, 0x2_0000)]);
    test.kick();
    assert_eq!(test.driver.take_used()[0].len, 0x1_0000);
    assert_eq!(test.driver.read(BUFFER + 0x1_0000, 64), vec![0; 64]);
    assert_eq!(test.metric("bytes"), 0x1_0000);
}

#[test]
fn requests_without_room_are_given_back_empty() {
    let mut test = fixture(None);
    test.driver.write(BUFFER, &[7; 16]);
    test.driver.add(&[MockBuffer::readable(BUFFER, 16)]);
    test.driver.add(&[MockBuffer::writable(BUFFER, 0)]);
    test.driver.add(&[MockBuffer::writable(0x4_0000, 16)]);
    test.kick();
    let used = test.driver.take_used();
    assert_eq!(
        used.iter().map(|used| used.len).collect::<Vec<_>>(),
        [0, 0, 0]
    );
    assert_eq!(test.driver.read(BUFFER, 16), [7; 16]);
    assert_eq!(test.metric("malformed_chains"), 1);
}

#[test]
fn one_turn_is_bounded() {
    let mut test = fixture(None);
    for _ in 0..6 {
        test.driver.add(&[MockBuffer::writable(BUFFER, 0x1_0000)]);
    }
    test.transport.kick(0);
    test.transport.turn(&mut test.rng, 0).unwrap();
    assert_eq!(test.driver.take_used().len(), 4);
    test.transport.settle(&mut test.rng).unwrap();
    assert_eq!(test.driver.take_used().len(), 2);
}

#[test]
fn the_rate_is_kept_and_the_timer_goes_on_by_itself() {
    let mut test = fixture(Some(TokenBucketConfig {
        size: 1000,
        one_time_burst: 0,
        refill_time_ms: 50,
    }));
    for _ in 0..3 {
        test.driver.add(&[MockBuffer::writable(BUFFER, 500)]);
    }
    let start = Instant::now();
    test.kick();
    assert_eq!(test.driver.take_used().len(), 2);
    assert_eq!(test.metric("throttled"), 1);
    // Nobody kicks: the third comes when its tokens are there.
    while test.driver.take_used().is_empty() {
        assert_ne!(test.transport.turn(&mut test.rng, 10_000).unwrap(), 0);
    }
    assert!(start.elapsed().as_millis() >= 25);
}

#[test]
fn a_reset_device_does_nothing() {
    let mut test = fixture(Some(TokenBucketConfig {
        size: 10,
        one_time_burst: 0,
        refill_time_ms: 20,
    }));
    for _ in 0..2 {
        test.driver.add(&[MockBuffer::writable(BUFFER, 10)]);
    }
    test.kick();
    test.rng.reset();
    test.rng.reset();
    assert_eq!(test.rng.ring_states(), [None]);
    assert_eq!(test.transport.turn(&mut test.rng, 40).unwrap(), 0);
    test.kick();
    assert_eq!(test.driver.take_used().len(), 1);
    // And starts anew.
    let activation = test
        .transport
        .activation(features::RING, &[Some(&test.driver)]);
    test.rng.activate(activation).unwrap();
}

#[test]
fn a_snapshot_goes_on_where_the_ring_was() {
    let mut test = fixture(None);
    test.driver.add(&[MockBuffer::writable(BUFFER, 10)]);
    test.kick();
    test.rng.pause().unwrap();
    assert_eq!(test.rng.ring_states()[0].unwrap().next_used, 1);
    let saved = test.rng.save().unwrap();
    let mut other = Rng::new(&RateLimiterConfig::default()).unwrap();
    other.restore(&saved).unwrap();
    assert!(other.restore(&[1]).is_err());
    test.driver.add(&[MockBuffer::writable(BUFFER, 10)]);
    test.rng.resume();
    test.transport.settle(&mut test.rng).unwrap();
    assert_eq!(test.driver.take_used().len(), 2);
}

#[test]
fn a_missing_queue_is_said() {
    let mut rng = Rng::new(&RateLimiterConfig::default()).unwrap();
    let transport = MockTransport::new(&mock_ram(0x1000), 1);
    let error = rng
        .activate(transport.activation(features::RING, &[None]))
        .unwrap_err();
    assert!(matches!(error, DeviceError::QueueMissing { index: 0 }));
}
