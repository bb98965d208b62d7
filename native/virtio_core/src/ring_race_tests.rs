//! Driver and device on two threads, each asleep whenever the ring says it may be: a wish that is
//! not seen in time leaves both asleep for ever, and the test fails at its deadline.
//!
//! Waiting is a spin on a flag, as the narrow moment is when one side goes to sleep while the
//! other publishes. Miri runs this too, with its own idea of what a weakly ordered processor may
//! do (`cargo +nightly miri test -p virtio_core race`).

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::mock::{MockBuffer, MockDriver, mock_ram};

/// How many requests a race has: so many, or as many as there is time for.
const ROUNDS: u64 = if cfg!(miri) { 30 } else { 100_000 };
const DURATION: Duration = Duration::from_millis(700);
/// Asleep for so long is asleep for ever.
const DEADLINE: Duration = Duration::from_secs(30);
/// The number of the last request.
const LAST: u64 = u64::MAX - 1;
const DATA: u64 = 0x1000;

/// What an eventfd is between two threads.
#[derive(Default)]
struct Bell {
    is_rung: AtomicBool,
    rings: AtomicU64,
}

impl Bell {
    fn ring(&self) {
        self.rings.fetch_add(1, Ordering::Relaxed);
        self.is_rung.store(true, Ordering::Release);
    }

    /// False at the deadline.
    fn wait(&self) -> bool {
        let until = Instant::now() + DEADLINE;
        let mut spins = 0u32;
        while !self.is_rung.swap(false, Ordering::AcqRel) {
            spins = spins.wrapping_add(1);
            if cfg!(miri) || spins.is_multiple_of(64) {
                thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
            if !cfg!(miri) && spins.is_multiple_of(4096) && Instant::now() > until {
                return false;
            }
        }
        true
    }
}

/// Take requests, and answer each number with the next, until the last came.
fn device(mut ring: Ring, kick: &Bell, interrupt: &Bell) {
    let mut chain = Chain::new(ring.ram());
    let (mut answered, mut is_over) = (0u64, false);
    loop {
        ring.disable_kicks();
        loop {
            while ring.pop(&mut chain).expect("a sound ring") {
                let number = u64::from_le_bytes(chain.readable.read_array(0).expect("a number"));
                let answer = (number + 1).to_le_bytes();
                assert_eq!(chain.writable.copy_from(0, &answer), 8);
                ring.complete(chain.head, 8);
                answered += 1;
                is_over = number == LAST;
            }
            if ring.needs_signal() {
                interrupt.ring();
            }
            if !ring.enable_kicks() {
                break;
            }
        }
        if is_over {
            return;
        }
        assert!(kick.wait(), "the device sleeps after {answered} requests");
    }
}

/// Send numbers in batches of 1 to `batch`, and check each answer. Gives how many there were.
fn driver(
    mut driver: MockDriver,
    (batch, has_event_idx): (u64, bool),
    (kick, interrupt): (&Bell, &Bell),
) -> u64 {
    let until = Instant::now() + DURATION;
    let slot = |count: u64| DATA + count % 64 * 16;
    let (mut sent, mut answered, mut is_over) = (0, 0, false);
    while !is_over {
        is_over = sent >= ROUNDS || (!cfg!(miri) && Instant::now() > until);
        for left in (0..=sent % batch).rev() {
            let is_last = is_over && left == 0;
            let number = if is_last { LAST } else { sent };
            let at = slot(sent);
            driver.write(at, &number.to_le_bytes());
            driver.add(&[MockBuffer::readable(at, 8), MockBuffer::writable(at + 8, 8)]);
            sent += 1;
        }
        if driver.needs_kick(has_event_idx) {
            kick.ring();
        }
        while answered < sent {
            for used in driver.take_used() {
                let answer = driver.read(slot(answered) + 8, 8);
                answered += 1;
                assert_eq!(used.len, 8);
                let is_last = is_over && answered == sent;
                let expected = if is_last { LAST + 1 } else { answered };
                assert_eq!(answer, expected.to_le_bytes());
            }
            if answered < sent && !driver.enable_interrupts(has_event_idx) {
                assert!(
                    interrupt.wait(),
                    "the driver sleeps after {answered} answers"
                );
                driver.set_no_interrupt(!has_event_idx);
            }
        }
    }
    sent
}

fn race(batch: u64, has_event_idx: bool) {
    let ram = mock_ram(0x2000);
    let mut mock = MockDriver::new(&ram, 0, 32);
    mock.start_at(65_530);
    let ring = mock.ring(has_event_idx).unwrap();
    let (kick, interrupt) = (Bell::default(), Bell::default());
    let sent = thread::scope(|scope| {
        scope.spawn(|| device(ring, &kick, &interrupt));
        driver(mock, (batch, has_event_idx), (&kick, &interrupt))
    });
    assert!(sent > batch);
    // One more than asked for, after `start_at`: the ring is then one that was taken over.
    assert!(kick.rings.into_inner() <= sent);
    assert!(interrupt.rings.into_inner() <= sent + 1);
}

#[test]
fn neither_side_oversleeps_by_flags_one_at_a_time() {
    race(1, false);
}

#[test]
fn neither_side_oversleeps_by_flags_in_batches() {
    race(7, false);
}

#[test]
fn neither_side_oversleeps_by_event_indices_one_at_a_time() {
    race(1, true);
}

#[test]
fn neither_side_oversleeps_by_event_indices_in_batches() {
    race(7, true);
}
