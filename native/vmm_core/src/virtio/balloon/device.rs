//! The balloon as a virtio device: three queues, each request answered at once.

use std::sync::Arc;

use rustix::event::epoll;
use virtio_core::chain::Chain;
use virtio_core::features;
use virtio_core::ring::RingState;

use super::metrics::BalloonMetrics;
use super::state::BalloonState;
use super::{BalloonConfig, BalloonControl, pages};
use crate::virtio::device::{Activation, DeviceError, DeviceKind, Queue, VirtioDevice};
use crate::virtio::saved;
use crate::virtio::turn::Served;

/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING`.
const PAGE_REPORTING: u64 = 1 << 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// After those of statistics and hints, if they were offered (virtio 1.2, 5.5.2).
const REPORTING: usize = 2;
/// Linux reports 32 ranges in one request.
const QUEUE_SIZES: [u16; 3] = [128; 3];

/// Pages of one turn of the inflate and deflate queues: some milliseconds at worst.
const PAGES_PER_TURN: usize = 4096;
/// Ranges of one turn of the reporting queue. Linux reports ranges of 2 to 4 MiB, so this takes
/// milliseconds; a guest that names larger ones holds up its own devices only.
const RANGES_PER_TURN: usize = 32;

#[derive(Debug)]
struct Active {
    queues: [Option<Queue>; 3],
    chain: Chain,
}

/// The device.
#[derive(Debug)]
pub struct Balloon {
    config: BalloonConfig,
    control: Arc<BalloonControl>,
    active: Option<Active>,
    metrics: BalloonMetrics,
}

impl Balloon {
    /// A balloon, and what controls it.
    pub fn new(config: BalloonConfig) -> (Self, Arc<BalloonControl>) {
        let control = Arc::new(BalloonControl::new(config.target_pages));
        let balloon = Self {
            config,
            control: Arc::clone(&control),
            active: None,
            metrics: BalloonMetrics::default(),
        };
        (balloon, control)
    }

    fn malformed_now(&self) -> u64 {
        let queues = self.active.iter().flat_map(|active| &active.queues);
        queues.flatten().map(|queue| queue.ring.malformed().0).sum()
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn name(&self) -> &'static str {
        "balloon"
    }

    fn features(&self) -> u64 {
        let mut features = features::RING;
        if self.config.deflates_on_oom {
            features |= DEFLATE_ON_OOM;
        }
        if self.config.reports_free_pages {
            features |= PAGE_REPORTING;
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        let [without_reporting @ .., _] = &QUEUE_SIZES;
        if self.config.reports_free_pages {
            &QUEUE_SIZES
        } else {
            without_reporting
        }
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.control.read_config(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.control.write_config(offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        let inflate = activation.take_queue(INFLATE)?;
        let deflate = activation.take_queue(DEFLATE)?;
        let reporting = if activation.features & PAGE_REPORTING == 0 {
            None
        } else {
            Some(activation.take_queue(REPORTING)?)
        };
        self.control.set_interrupt(Some(activation.interrupt));
        self.active = Some(Active {
            queues: [Some(inflate), Some(deflate), reporting],
            chain: Chain::new(&activation.ram),
        });
        Ok(())
    }

    fn handle(&mut self, token: u32, _readiness: epoll::EventFlags) -> Result<(), DeviceError> {
        let Some(Active { queues, chain }) = &mut self.active else {
            return Ok(());
        };
        let index = token as usize;
        let Some(Some(queue)) = queues.get_mut(index) else {
            return Ok(());
        };
        let metrics = &mut self.metrics;
        let done = |cost| Served::Done { len: 0, cost };
        match index {
            INFLATE => queue.turn(chain, PAGES_PER_TURN, |chain| {
                done(pages::inflate(&chain.readable, metrics))
            }),
            DEFLATE => queue.turn(chain, PAGES_PER_TURN, |chain| {
                // The guest touches the pages when it wants them, and has them.
                let count = pages::count(&chain.readable);
                metrics.deflated_pages += count as u64;
                done(1)
            }),
            _ => queue.turn(chain, RANGES_PER_TURN, |chain| {
                done(pages::report(&chain.writable, metrics))
            }),
        }
    }

    fn reset(&mut self) {
        self.metrics.malformed_chains += self.malformed_now();
        self.active = None;
        self.control.set_interrupt(None);
        // A driver that starts anew has nothing in the balloon.
        self.control.set_actual(0);
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        // Nothing is under way between two calls.
        Ok(())
    }

    fn resume(&mut self) {
        if let Some(active) = &self.active {
            active.queues.iter().flatten().for_each(Queue::kick_self);
        }
    }

    fn ring_states(&self) -> Vec<Option<RingState>> {
        let state = |queue: &Option<Queue>| queue.as_ref().map(|queue| queue.ring.state());
        match &self.active {
            Some(active) => {
                let count = self.queue_sizes().len();
                active.queues.iter().take(count).map(state).collect()
            }
            None => vec![None; self.queue_sizes().len()],
        }
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        let state = BalloonState {
            target_pages: self.control.target_pages(),
            actual_pages: self.control.actual_pages(),
        };
        saved::encode(DeviceKind::Balloon, &state)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        let state: BalloonState = saved::decode(DeviceKind::Balloon, state)?;
        self.control.set_target(state.target_pages);
        self.control.set_actual(state.actual_pages);
        Ok(())
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.metrics.list(self.malformed_now())
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
