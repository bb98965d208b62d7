//! From the tap to the guest: frames are read straight into the buffers that the driver posted.
//!
//! ```text
//!            buffers?        frame?             fits?             rate?
//!   fetch ──────────► read ──────────► deliver ───────► deliver ───────► give back, next
//!     │ none            │ none            │ no: wait for   │ no: wait for
//!     ▼ wait for kick   ▼ wait for tap    ▼ more buffers   ▼ the timer
//! ```
//!
//! How large a frame is shows only when it is read, so the driver's buffers are taken off the ring
//! ahead, and after them comes room of our own: a frame larger than what is posted is kept there
//! until more is, and none is ever cut. Buffers that are held can go back to the ring as if never
//! taken, which a snapshot relies on.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use virtio_core::buffers::GuestBuffers;
use virtio_core::chain::Chain;
use virtio_core::ram::GuestRam;

use super::features::{self, HEADER_SIZE, MAX_FRAME_SIZE, NUM_BUFFERS_OFFSET};
use super::metrics::NetMetrics;
use super::tap::Tap;
use crate::virtio::device::{DeviceError, Queue};
use crate::virtio::throttle::Throttle;

/// Frames of one turn: a millisecond at most.
const FRAMES_PER_TURN: usize = 128;

/// What receiving goes on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaited {
    /// The tap has a frame.
    Frame,
    /// The driver posts buffers, and kicks.
    Buffers,
    /// The limiter's timer ends.
    Rate,
    /// Nothing: the tap is gone.
    Nothing,
}

/// A frame that was read and not yet given to the driver.
#[derive(Clone, Copy, Debug)]
struct Frame {
    /// Its size, with our header.
    len: usize,
    /// How much of it lies in the first buffers; the rest is in `overflow`.
    in_buffers: usize,
}

/// What became of a frame, other than that it was delivered.
enum Held {
    Buffers,
    Rate,
}

/// The receiving half of a pair.
#[derive(Debug)]
pub(super) struct Receiver {
    queue: Queue,
    ram: Arc<GuestRam>,
    /// Frames may fill several buffers.
    can_merge: bool,
    /// Buffers are held until this many bytes have room.
    largest_frame: usize,
    /// Buffers taken off the ring: the last ones taken, in order.
    posted: VecDeque<Chain>,
    /// Bytes of room in `posted`.
    room: usize,
    /// Chains to be used again.
    spares: Vec<Chain>,
    overflow: Box<[u8]>,
    frame: Option<Frame>,
}

impl Receiver {
    /// For a driver that accepted `features`.
    pub(super) fn new(queue: Queue, ram: Arc<GuestRam>, features: u64, mtu: u16) -> Self {
        Self {
            queue,
            ram,
            can_merge: features & features::MRG_RXBUF != 0,
            largest_frame: features::largest_frame(features, mtu),
            posted: VecDeque::new(),
            room: 0,
            spares: Vec::new(),
            overflow: vec![0; MAX_FRAME_SIZE].into_boxed_slice(),
            frame: None,
        }
    }

    /// The queue.
    pub(super) fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Put what is held back into the ring. A frame under way is lost, as frames may be.
    pub(super) fn put_back(&mut self, metrics: &mut NetMetrics) {
        if self.frame.take().is_some() {
            metrics.rx_dropped += 1;
        }
        // As many as the ring has at most.
        let held = u16::try_from(self.posted.len()).unwrap_or(u16::MAX);
        self.queue.ring.unpop(held);
        self.spares.extend(self.posted.drain(..));
        self.room = 0;
    }

    /// Give frames to the driver until there are none, or something is missing.
    ///
    /// # Errors
    /// The driver broke the rules of the ring.
    pub(super) fn receive(
        &mut self,
        tap: &Tap,
        throttle: &mut Throttle,
        metrics: &mut NetMetrics,
    ) -> Result<Awaited, DeviceError> {
        let awaited = self.turn(tap, throttle, metrics);
        self.queue.signal();
        awaited
    }

    fn turn(
        &mut self,
        tap: &Tap,
        throttle: &mut Throttle,
        metrics: &mut NetMetrics,
    ) -> Result<Awaited, DeviceError> {
        let now = Instant::now();
        self.queue.ring.disable_kicks();
        for _ in 0..FRAMES_PER_TURN {
            self.fetch(metrics)?;
            let frame = match self.frame {
                Some(frame) => frame,
                None if self.posted.is_empty() => {
                    if self.queue.ring.enable_kicks() {
                        self.queue.ring.disable_kicks();
                        continue;
                    }
                    metrics.rx_starved += 1;
                    return Ok(Awaited::Buffers);
                }
                None => match self.read(tap) {
                    Ok(frame) => frame,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        return Ok(Awaited::Frame);
                    }
                    Err(_) => return Ok(Awaited::Nothing),
                },
            };
            self.frame = Some(frame);
            match self.deliver(frame, now, throttle, metrics)? {
                None => self.frame = None,
                Some(Held::Buffers) => {
                    metrics.rx_starved += 1;
                    return Ok(Awaited::Buffers);
                }
                Some(Held::Rate) => {
                    metrics.rx_throttled += 1;
                    return Ok(Awaited::Rate);
                }
            }
        }
        // If the tap has more, it is ready still.
        Ok(Awaited::Frame)
    }

    /// Take buffers off the ring until the largest frame has room. Those too small for a header
    /// go back, but not from behind others: those held stay the last ones taken.
    fn fetch(&mut self, metrics: &mut NetMetrics) -> Result<(), DeviceError> {
        let wanted = self.frame.map_or(0, |frame| frame.len);
        let wanted = wanted.max(self.largest_frame);
        let ring = &mut self.queue.ring;
        let failed = DeviceError::ring(self.queue.index);
        for _ in 0..ring.size() {
            if self.room >= wanted {
                break;
            }
            let spare = self.spares.pop();
            let mut chain = spare.unwrap_or_else(|| Chain::new(&self.ram));
            let popped = if self.posted.is_empty() {
                ring.pop(&mut chain)
            } else {
                ring.pop_another(&mut chain)
            };
            if !popped.map_err(&failed)? {
                self.spares.push(chain);
                break;
            }
            if chain.writable.len() >= HEADER_SIZE {
                self.room += chain.writable.len();
                self.posted.push_back(chain);
                continue;
            }
            let is_first = self.posted.is_empty();
            if is_first {
                metrics.bad_buffers += 1;
                ring.complete(chain.head, 0);
            } else {
                ring.unpop(1);
            }
            self.spares.push(chain);
            if !is_first {
                break;
            }
        }
        Ok(())
    }

    /// Read a frame into the buffers, and what has no room there after them.
    fn read(&mut self, tap: &Tap) -> io::Result<Frame> {
        let usable = if self.can_merge { usize::MAX } else { 1 };
        let parts = self.posted.iter().take(usable).map(|chain| &chain.writable);
        let (len, in_buffers) =
            GuestBuffers::receive_packet(parts, &mut self.overflow, tap.as_fd())?;
        if len == 0 {
            // A tap has no end; a socket in its place has.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Frame { len, in_buffers })
    }

    /// Give a frame to the driver, or drop it if it never can be; `Some` says what it waits for.
    fn deliver(
        &mut self,
        frame: Frame,
        now: Instant,
        throttle: &mut Throttle,
        metrics: &mut NetMetrics,
    ) -> Result<Option<Held>, DeviceError> {
        let first_len = self.posted.front().map_or(0, |chain| chain.writable.len());
        let is_whole = frame.len < frame.in_buffers + self.overflow.len();
        let may_fit = self.can_merge || frame.len <= first_len;
        if frame.len <= HEADER_SIZE || !is_whole || !may_fit {
            metrics.rx_dropped += 1;
            return Ok(None);
        }
        while self.room < frame.len {
            let before = self.posted.len();
            let is_all = before == usize::from(self.queue.ring.size());
            if !is_all && !self.queue.ring.enable_kicks() {
                return Ok(Some(Held::Buffers));
            }
            self.queue.ring.disable_kicks();
            self.fetch(metrics)?;
            if self.posted.len() == before {
                // The ring has no more, or what is next is no buffer: so it never fits.
                metrics.rx_dropped += 1;
                return Ok(None);
            }
        }
        let bytes = (frame.len - HEADER_SIZE) as u64;
        let taken = throttle.try_take(now, 1, bytes);
        if !taken.map_err(DeviceError::system("arm the timer"))? {
            return Ok(Some(Held::Rate));
        }
        self.hand_over(frame);
        metrics.rx_frames += 1;
        metrics.rx_bytes += bytes;
        Ok(None)
    }

    /// Give the buffers that a frame fills back to the driver, all at once.
    fn hand_over(&mut self, frame: Frame) {
        let (mut start, mut count) = (0, 0);
        for chain in &self.posted {
            if start >= frame.len {
                break;
            }
            let end = frame.len.min(start + chain.writable.len());
            // What the kernel did not put here itself.
            let late = start.max(frame.in_buffers);
            let overflow = late - frame.in_buffers..end.saturating_sub(frame.in_buffers);
            if let Some(bytes) = self.overflow.get(overflow) {
                chain.writable.copy_from(late - start, bytes);
            }
            (start, count) = (end, count + 1);
        }
        if let Some(first) = self.posted.front() {
            // No more than the ring has entries.
            let num_buffers = u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes();
            first.writable.copy_from(NUM_BUFFERS_OFFSET, &num_buffers);
        }
        let mut rest = frame.len;
        let given_back = self.posted.iter().take(count).map(|chain| {
            let room = chain.writable.len();
            let len = rest.min(room);
            rest -= len;
            self.room -= room;
            // A frame's size at most.
            (chain.head, u32::try_from(len).unwrap_or(u32::MAX))
        });
        self.queue.ring.complete_all(given_back);
        self.spares.extend(self.posted.drain(..count));
    }
}
