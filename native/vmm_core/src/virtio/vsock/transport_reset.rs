//! Telling a restored guest that its connections are gone.
//!
//! `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2, 5.10.6.7) makes the driver end every stream
//! it has, also one begun after the restore. So hosts are kept waiting until the driver has acted
//! on the event, which it shows by offering the event's buffer again:
//!
//! ```text
//!            request                 event buffer filled          buffer offered again
//!   [Idle] ───────────► [Due] ───────────────────────────► [Sent] ───────────────────► [Idle]
//!                         └───────────────── over 2 s ────────┴───────────────────────► [Idle]
//! ```
//!
//! While waiting, the other event buffers are held, so that only a new one makes a kick; they go
//! back afterwards. I/O thread.

use std::time::{Duration, Instant};

use virtio_core::chain::Chain;
use virtio_core::ring::{Ring, RingError};

/// `struct virtio_vsock_event` with `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const EVENT: [u8; 4] = 0u32.to_le_bytes();
/// `EVENT`'s length as rings count it.
const EVENT_LEN: u32 = 4;
/// For the driver to act. One that does not still learns of each stream's end when it uses it.
const LIMIT: Duration = Duration::from_secs(2);

/// Where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Idle,
    Due,
    Sent {
        /// Event buffers taken off the ring and not used.
        held: u16,
    },
}

/// What an [`TransportReset::advance`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The driver has not acted yet.
    Waiting,
    /// It has.
    Done,
    /// It has not in time.
    GaveUp,
}

/// The event, from need to effect.
#[derive(Debug)]
pub(super) struct TransportReset {
    stage: Stage,
    /// When to give up, from the first look on.
    until: Option<Instant>,
}

impl TransportReset {
    /// Nothing to tell.
    pub(super) fn new() -> Self {
        Self {
            stage: Stage::Idle,
            until: None,
        }
    }

    /// The guest has to be told.
    pub(super) fn request(&mut self) {
        self.stage = Stage::Due;
        self.until = None;
    }

    /// Hosts have to wait.
    pub(super) fn is_pending(&self) -> bool {
        self.stage != Stage::Idle
    }

    /// When [`TransportReset::advance`] has to be called next, whatever happens.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.until
    }

    /// Do what can be done now. Only while pending.
    ///
    /// # Errors
    /// The event ring is broken.
    pub(super) fn advance(&mut self, ring: &mut Ring, now: Instant) -> Result<Progress, RingError> {
        let until = *self.until.get_or_insert(now + LIMIT);
        if self.stage == Stage::Due
            && let Some(held) = send(ring)?
        {
            self.stage = Stage::Sent { held };
        }
        // Asks for a kick with the next buffer, too.
        let has_new = ring.enable_kicks();
        let progress = match self.stage {
            Stage::Sent { .. } if has_new => Progress::Done,
            _ if now >= until => Progress::GaveUp,
            _ => return Ok(Progress::Waiting),
        };
        self.stop(ring);
        Ok(progress)
    }

    /// Give back what is held: nothing is to be told any more.
    pub(super) fn stop(&mut self, ring: &mut Ring) {
        if let Stage::Sent { held } = self.stage {
            ring.unpop(held);
        }
        *self = Self::new();
    }

    /// Give back what is held; the guest will be told, again, after a pause.
    pub(super) fn pause(&mut self, ring: &mut Ring) {
        if self.is_pending() {
            self.stop(ring);
            self.request();
        }
    }
}

/// Fill an event buffer, if there is one: gives how many others are held since.
fn send(ring: &mut Ring) -> Result<Option<u16>, RingError> {
    let mut chain = Chain::new(ring.ram());
    // Not for ever: a driver may offer one as soon as it has it back.
    let mut tries = 0..ring.size();
    loop {
        if tries.next().is_none() || !ring.pop(&mut chain)? {
            return Ok(None);
        }
        if chain.writable.copy_from(0, &EVENT) == EVENT.len() {
            break;
        }
        ring.complete(chain.head, 0);
    }
    // Before the driver can see the event, so that a buffer offered later is a sign of it.
    let mut other = Chain::new(ring.ram());
    let mut held = 0;
    while ring.pop_another(&mut other)? {
        held += 1;
    }
    ring.complete(chain.head, EVENT_LEN);
    Ok(Some(held))
}

#[cfg(test)]
mod tests {
    use virtio_core::mock::{MockBuffer, MockDriver, UsedElement, mock_ram};

    use super::*;

    const DATA: u64 = 0x1_0000;

    fn driver(buffers: u64) -> MockDriver {
        let ram = mock_ram(0x2_0000);
        let mut driver = MockDriver::new(&ram, 0x1000, 16);
        for index in 0..buffers {
            driver.write(DATA + index * 8, &[0xff; 8]);
            driver.add(&[MockBuffer::writable(DATA + index * 8, 4)]);
        }
        driver
    }

    fn requested() -> TransportReset {
        let mut reset = TransportReset::new();
        reset.request();
        reset
    }

    const SENT: UsedElement = UsedElement { head: 0, len: 4 };

    #[test]
    fn the_driver_is_told_once_and_shows_that_it_heard() {
        for has_event_idx in [false, true] {
            let mut driver = driver(8);
            let mut ring = driver.ring(has_event_idx).unwrap();
            let mut reset = requested();
            let now = Instant::now();
            driver.needs_kick(has_event_idx);
            for _ in 0..3 {
                let progress = reset.advance(&mut ring, now).unwrap();
                assert_eq!(progress, Progress::Waiting);
            }
            assert_eq!(driver.take_used(), [SENT]);
            assert_eq!(driver.read(DATA, 5), [0, 0, 0, 0, 0xff]);
            driver.add(&[MockBuffer::writable(DATA, 4)]);
            assert!(driver.needs_kick(has_event_idx));
            assert_eq!(reset.advance(&mut ring, now), Ok(Progress::Done));
            assert!(!reset.is_pending());
            // All buffers but the one used are the device's to take, in order.
            assert_eq!(ring.state().next_available, 1);
            let mut chain = Chain::new(ring.ram());
            assert_eq!(ring.pop(&mut chain), Ok(true));
            assert_eq!(chain.head, 1);
        }
    }

    #[test]
    fn without_a_buffer_the_event_waits_for_one() {
        let mut driver = driver(0);
        let mut ring = driver.ring(true).unwrap();
        let mut reset = requested();
        let now = Instant::now();
        assert_eq!(reset.advance(&mut ring, now), Ok(Progress::Waiting));
        // Too short for an event: given back.
        driver.add(&[MockBuffer::writable(DATA, 3)]);
        assert!(driver.needs_kick(true));
        assert_eq!(reset.advance(&mut ring, now), Ok(Progress::Waiting));
        driver.add(&[MockBuffer::writable(DATA, 4)]);
        assert!(driver.needs_kick(true));
        assert_eq!(reset.advance(&mut ring, now), Ok(Progress::Waiting));
        let lens: Vec<u32> = driver.take_used().iter().map(|used| used.len).collect();
        assert_eq!(lens, [0, 4]);
    }

    #[test]
    fn a_driver_that_does_not_act_is_not_waited_for_long() {
        for buffers in [0, 3] {
            let mut ring = driver(buffers).ring(false).unwrap();
            let mut reset = requested();
            let now = Instant::now();
            assert_eq!(reset.advance(&mut ring, now), Ok(Progress::Waiting));
            assert_eq!(reset.deadline(), Some(now + LIMIT));
            assert_eq!(reset.advance(&mut ring, now + LIMIT), Ok(Progress::GaveUp));
            assert!(!reset.is_pending());
            assert_eq!(ring.state().next_available, u16::from(buffers > 0));
        }
    }

    #[test]
    fn a_pause_gives_the_buffers_back_and_tells_again() {
        let mut driver = driver(3);
        let mut ring = driver.ring(false).unwrap();
        let mut reset = requested();
        let now = Instant::now();
        reset.advance(&mut ring, now).unwrap();
        reset.pause(&mut ring);
        assert!(reset.is_pending());
        assert_eq!(ring.state().next_available, 1);
        reset.advance(&mut ring, now).unwrap();
        let heads: Vec<u32> = driver.take_used().iter().map(|used| used.head).collect();
        assert_eq!(heads, [0, 1]);
    }

    #[test]
    fn a_broken_ring_is_an_error() {
        let mut driver = driver(0);
        let mut ring = driver.ring(false).unwrap();
        driver.set_available_index(17);
        assert!(requested().advance(&mut ring, Instant::now()).is_err());
    }
}
