//! From the guest to the tap: each chain of the transmit queue is a header and a frame.
//!
//! Where the header ends and the frame begins is not where a buffer ends: the driver may split
//! them as it likes, and the kernel, which checks the header, gets all as one. A frame that the
//! tap does not take is lost, as on any network.

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use virtio_core::buffers::{GuestBuffers, MAX_RANGES_PER_CALL};
use virtio_core::chain::Chain;

use super::features::{HEADER_SIZE, MAX_FRAME_SIZE};
use super::metrics::NetMetrics;
use super::tap::Tap;
use crate::virtio::device::{DeviceError, Queue};
use crate::virtio::throttle::Throttle;
use crate::virtio::turn::Served;

/// Frames of one turn: a millisecond at most.
const FRAMES_PER_TURN: usize = 128;

/// How a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// All was sent, or the queue comes back by its doorbell.
    Done,
    /// The rate is used up: the limiter's timer says when to go on.
    Throttled,
}

/// Send what the driver has queued.
///
/// # Errors
/// The driver broke the rules of the ring.
pub(super) fn transmit(
    queue: &mut Queue,
    chain: &mut Chain,
    tap: &Tap,
    throttle: &mut Throttle,
    metrics: &mut NetMetrics,
) -> Result<Sent, DeviceError> {
    let now = Instant::now();
    let mut sent = Sent::Done;
    let mut failure = None;
    queue.turn(chain, FRAMES_PER_TURN, |chain| {
        let frame = &chain.readable;
        let done = Served::Done { len: 0, cost: 1 };
        if frame.len() <= HEADER_SIZE || frame.len() > MAX_FRAME_SIZE {
            metrics.bad_buffers += 1;
            return done;
        }
        let bytes = (frame.len() - HEADER_SIZE) as u64;
        match throttle.try_take(now, 1, bytes) {
            Ok(true) => {}
            Ok(false) => {
                metrics.tx_throttled += 1;
                sent = Sent::Throttled;
                return Served::Later;
            }
            Err(errno) => {
                failure = Some(DeviceError::system("arm the timer")(errno));
                return Served::Later;
            }
        }
        if send(frame, tap).is_ok_and(|count| count == frame.len()) {
            metrics.tx_frames += 1;
            metrics.tx_bytes += bytes;
        } else {
            metrics.tx_dropped += 1;
        }
        done
    })?;
    failure.map_or(Ok(sent), Err)
}

/// Give the tap a frame, in one call: each is a frame of its own.
fn send(frame: &GuestBuffers, tap: &Tap) -> io::Result<usize> {
    if frame.range_count() <= MAX_RANGES_PER_CALL {
        return frame.write_to(tap.as_fd(), 0);
    }
    // No driver that means well has so many pieces.
    let mut bytes = vec![0; frame.len()];
    frame.copy_to(0, &mut bytes);
    let sent = rustix::io::retry_on_intr(|| rustix::io::write(tap, &bytes));
    sent.map_err(io::Error::from)
}
