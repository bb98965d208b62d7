//! The entropy device as a virtio device: one queue, each request answered at once or, when the
//! rate is used up, when the timer says so.

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use rustix::event::epoll;
use rustix::io::retry_on_intr;
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_core::buffers::GuestBuffers;
use virtio_core::chain::Chain;
use virtio_core::features;
use virtio_core::ring::RingState;

use super::metrics::RngMetrics;
use crate::rate_limiter::RateLimiterConfig;
use crate::virtio::device::{
    Activation, DeviceError, DeviceKind, FIRST_DEVICE_TOKEN, Queue, VirtioDevice, Watcher,
};
use crate::virtio::saved;
use crate::virtio::throttle::{Throttle, ThrottleError};
use crate::virtio::turn::Served;

/// Linux asks for some dozen bytes at a time, and keeps one request under way.
const QUEUE_SIZES: [u16; 1] = [64];
/// What one request gets at most; the rest of its room stays as it was.
const MAX_REQUEST_SIZE: usize = 64 * 1024;
/// Bytes of one turn: a fraction of a millisecond.
const BYTES_PER_TURN: usize = 256 * 1024;
/// What a small request costs of a turn all the same.
const LEAST_COST: usize = 1024;
/// Bytes taken from the host's generator in one go.
const BATCH_SIZE: usize = 1024;

const QUEUE_TOKEN: u32 = 0;
const TIMER_TOKEN: u32 = FIRST_DEVICE_TOKEN;

#[derive(Debug)]
struct Active {
    queue: Queue,
    chain: Chain,
    watcher: Watcher,
}

/// The device.
#[derive(Debug)]
pub struct Rng {
    throttle: Throttle,
    active: Option<Active>,
    metrics: RngMetrics,
}

impl Rng {
    /// A source with limits; an operation is a request.
    ///
    /// # Errors
    /// The limits make no sense, or there is no timer to be had.
    pub fn new(limiter: &RateLimiterConfig) -> Result<Self, ThrottleError> {
        Ok(Self {
            throttle: Throttle::new(limiter)?,
            active: None,
            metrics: RngMetrics::default(),
        })
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(Active { queue, chain, .. }) = &mut self.active else {
            return Ok(());
        };
        let now = Instant::now();
        let mut failure = None;
        queue.turn(chain, BYTES_PER_TURN, |chain| {
            let wanted = chain.writable.len().min(MAX_REQUEST_SIZE);
            match self.throttle.try_take(now, 1, wanted as u64) {
                Ok(true) => {}
                Ok(false) => {
                    self.metrics.throttled += 1;
                    return Served::Later;
                }
                Err(errno) => {
                    failure = Some(DeviceError::system("arm the timer")(errno));
                    return Served::Later;
                }
            }
            match fill(&chain.writable, wanted) {
                Ok(len) => {
                    self.metrics.requests += 1;
                    self.metrics.bytes += u64::from(len);
                    let cost = wanted.max(LEAST_COST);
                    Served::Done { len, cost }
                }
                Err(error) => {
                    failure = Some(error);
                    Served::Later
                }
            }
        })?;
        failure.map_or(Ok(()), Err)
    }
}

/// Fill the first `wanted` bytes of `room`; gives how many there are now.
fn fill(room: &GuestBuffers, wanted: usize) -> Result<u32, DeviceError> {
    let mut filled = 0;
    while filled < wanted {
        let mut bytes = [0; BATCH_SIZE];
        let batch_len = BATCH_SIZE.min(wanted - filled);
        let Some(batch) = bytes.get_mut(..batch_len) else {
            break;
        };
        // The host's pool is ready long before there are machines: this does not wait.
        let count = retry_on_intr(|| getrandom(&mut *batch, GetRandomFlags::empty()))
            .map_err(DeviceError::system("get random bytes"))?;
        let fresh = batch.get(..count).unwrap_or_default();
        if fresh.is_empty() || room.copy_from(filled, fresh) != fresh.len() {
            let source = io::ErrorKind::UnexpectedEof.into();
            let operation = "get random bytes";
            return Err(DeviceError::System { operation, source });
        }
        filled += count;
    }
    // At most MAX_REQUEST_SIZE.
    Ok(u32::try_from(filled).unwrap_or(u32::MAX))
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn name(&self) -> &'static str {
        "rng"
    }

    fn features(&self) -> u64 {
        features::RING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: usize, _data: &mut [u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        let queue = activation.take_queue(0)?;
        let watcher = activation.watcher;
        watcher
            .add(&self.throttle, TIMER_TOKEN, epoll::EventFlags::IN)
            .map_err(DeviceError::system("watch the timer"))?;
        self.active = Some(Active {
            queue,
            chain: Chain::new(&activation.ram),
            watcher,
        });
        Ok(())
    }

    fn handle(&mut self, token: u32, _readiness: epoll::EventFlags) -> Result<(), DeviceError> {
        match token {
            QUEUE_TOKEN => self.serve(),
            TIMER_TOKEN => {
                self.throttle.acknowledge();
                self.serve()
            }
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            self.metrics.malformed_chains += active.queue.ring.malformed().0;
            // It was added; if it is gone, so much the better.
            let _removed = active.watcher.remove(self.throttle.as_fd());
            self.throttle.disarm();
        }
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        // Nothing is under way between two calls: what waits for the rate is in the ring.
        Ok(())
    }

    fn resume(&mut self) {
        if let Some(active) = &self.active {
            active.queue.kick_self();
        }
    }

    fn ring_states(&self) -> Vec<Option<RingState>> {
        let active = self.active.as_ref();
        vec![active.map(|active| active.queue.ring.state())]
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        // Only the ring, which the transport keeps.
        saved::encode(DeviceKind::Rng, &())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        saved::decode(DeviceKind::Rng, state)
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let active = self.active.as_ref();
        let malformed = active.map_or(0, |active| active.queue.ring.malformed().0);
        self.metrics.list(malformed)
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
