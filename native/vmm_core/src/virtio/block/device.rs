//! The block device: what its driver and the machine ask of it.
//!
//! ```text
//!   kick ────────┐
//!   completions ─┼─► handle ─► Pump::turn
//!   timer ───────┘
//!   pause ──────────► Pump::drain, answers given;  reset ─► Pump::drain, answers dropped
//! ```
//!
//! Owns the disk and, between activation and reset, the queue. `activate` and `reset` come from a
//! vCPU, everything else from the I/O thread, always under the transport's lock.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use virtio_core::features::RING;
use virtio_core::ring::RingState;

use super::SERIAL_LEN;
use super::config::{BlockConfig, BlockError};
use super::config_space::{self, ConfigSpace};
use super::disk::Disk;
use super::engine::Engine;
use super::pump::{Pump, Source};
use super::request::Terms;
use super::slot::Slot;
use super::state::{BlockState, VERSION};
use crate::virtio::device::{
    Activation, DeviceError, DeviceKind, FIRST_DEVICE_TOKEN, VirtioDevice, Watcher,
};
use crate::virtio::saved;
use crate::virtio::throttle::Throttle;

/// Entries of the queue. With indirect descriptors a request takes one, but may have this many
/// less two segments: 1 MiB in single pages, which is as large as Linux makes them.
pub(super) const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE];
/// The engine's completions.
const TOKEN_COMPLETIONS: u32 = FIRST_DEVICE_TOKEN;
/// The rate limiter's timer.
const TOKEN_TIMER: u32 = FIRST_DEVICE_TOKEN + 1;
/// How long a pause or a reset waits for the disk.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// A disk as a virtio device.
#[derive(Debug)]
pub struct Block {
    pub(super) id: String,
    pub(super) pump: Pump,
    pub(super) uring_refusal: Option<io::Error>,
    pub(super) config_space: ConfigSpace,
    pub(super) active: Option<Active>,
    /// Of a device that disks come into and leave.
    pub(super) slot: Option<Slot>,
}

/// What there is between activation and reset.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) source: Source,
    pub(super) watcher: Watcher,
}

impl Block {
    /// Open the disk and set its engine up.
    ///
    /// # Errors
    /// The disk, the engine or the limiter is not to be had as configured.
    pub fn new(config: BlockConfig) -> Result<Self, BlockError> {
        let BlockConfig {
            id,
            path,
            is_read_only,
            is_direct,
            engine,
            rate_limiter,
        } = config;
        let disk = match Disk::open(&path, is_read_only, is_direct) {
            Ok(disk) => disk,
            Err(source) => return Err(BlockError::Disk { id, source }),
        };
        let (engine, uring_refusal) = match Engine::new(engine, &disk) {
            Ok(made) => made,
            Err(source) => return Err(BlockError::Uring { id, source }),
        };
        let throttle = match rate_limiter.as_ref().map(Throttle::new).transpose() {
            Ok(throttle) => throttle,
            Err(source) => return Err(BlockError::Throttle { id, source }),
        };
        let mut block = Self::with_pump(id, Pump::new(disk, engine, throttle));
        block.uring_refusal = uring_refusal;
        Ok(block)
    }

    /// Of parts that are made.
    pub(super) fn with_pump(id: String, pump: Pump) -> Self {
        Self {
            id,
            config_space: config_space::of(&pump.disk),
            pump,
            uring_refusal: None,
            active: None,
            slot: None,
        }
    }

    /// The file or device.
    pub fn disk(&self) -> &Disk {
        &self.pump.disk
    }

    /// `io_uring` or `sync`.
    pub fn engine_name(&self) -> &'static str {
        self.pump.engine.name()
    }

    /// Why the engine is `sync` although `io_uring` was allowed: to be logged once.
    pub fn uring_refusal(&self) -> Option<&io::Error> {
        self.uring_refusal.as_ref()
    }

    /// Watch what `turn` depends on.
    pub(super) fn watch(&self, watcher: &Watcher) -> Result<(), DeviceError> {
        let failed = DeviceError::system("watch the disk's completions and timer");
        if let Some(completions) = self.pump.engine.completions() {
            watcher
                .add(completions, TOKEN_COMPLETIONS, EventFlags::IN)
                .map_err(&failed)?;
        }
        if let Some(throttle) = &self.pump.throttle {
            watcher
                .add(throttle, TOKEN_TIMER, EventFlags::IN)
                .map_err(&failed)?;
        }
        Ok(())
    }

    pub(super) fn unwatch(&self, watcher: &Watcher) {
        // Those that were never added are not there to be removed.
        if let Some(completions) = self.pump.engine.completions() {
            let _removed = watcher.remove(completions);
        }
        if let Some(throttle) = &self.pump.throttle {
            throttle.disarm();
            let _removed = watcher.remove(throttle.as_fd());
        }
    }

    fn state(&self) -> BlockState {
        BlockState {
            version: VERSION,
            id: self.id.clone(),
            capacity_sectors: self.pump.disk.capacity_sectors(),
            logical_block_size: self.pump.disk.logical_block_size(),
            is_read_only: self.pump.disk.is_read_only(),
        }
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn name(&self) -> &str {
        self.slot.as_ref().map_or(&self.id, |slot| &slot.name)
    }

    fn features(&self) -> u64 {
        let is_read_only = self.slot.is_none() && self.pump.disk.is_read_only();
        RING | config_space::features(is_read_only)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        config_space::read(&self.config_space, offset, data);
        if let Some(slot) = &self.slot {
            slot.is_read(offset);
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        // A reset may have given up waiting; the old requests must not be mixed with new ones.
        self.pump.drain(None, Duration::ZERO)?;
        let queue = activation.take_queue(0)?;
        let Activation {
            ram,
            features,
            watcher,
            ..
        } = activation;
        if let Err(error) = self.watch(&watcher) {
            self.unwatch(&watcher);
            return Err(error);
        }
        let terms = Terms {
            serial: serial_of(&self.id),
            has_flush: features & config_space::FEATURE_FLUSH != 0,
            has_discard: features & config_space::FEATURE_DISCARD != 0,
            has_write_zeroes: features & config_space::FEATURE_WRITE_ZEROES != 0,
        };
        // What the driver added before it said it was ready was kicked for in vain.
        queue.kick_self();
        self.active = Some(Active {
            source: Source { ram, queue, terms },
            watcher,
        });
        Ok(())
    }

    fn handle(&mut self, token: u32, _readiness: EventFlags) -> Result<(), DeviceError> {
        if let (TOKEN_TIMER, Some(throttle)) = (token, &self.pump.throttle) {
            throttle.acknowledge();
        }
        match &mut self.active {
            Some(active) => self.pump.turn(&mut active.source),
            None => Ok(()),
        }
    }

    fn reset(&mut self) {
        let Some(active) = self.active.take() else {
            return;
        };
        self.unwatch(&active.watcher);
        // If the disk does not answer, `activate` refuses until it has.
        let _drained = self.pump.drain(None, DRAIN_TIMEOUT);
        self.pump.shrink();
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        if let Some(throttle) = &self.pump.throttle {
            throttle.disarm();
        }
        let drained = self.pump.drain(Some(&mut active.source), DRAIN_TIMEOUT);
        active.source.queue.signal();
        drained
    }

    fn resume(&mut self) {
        if let Some(active) = &self.active {
            active.source.queue.kick_self();
        }
    }

    fn ring_states(&self) -> Vec<Option<RingState>> {
        let active = self.active.as_ref();
        vec![active.map(|active| active.source.queue.ring.state())]
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        if self.has_plugged_disk() {
            return Err(DeviceError::State {
                kind: DeviceKind::Block.name(),
                reason: format!("{} has a disk that is to be taken out first", self.name()),
            });
        }
        saved::encode(DeviceKind::Block, &self.state())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        let state: BlockState = saved::decode(DeviceKind::Block, state)?;
        match state.difference(&self.state()) {
            Some(difference) => {
                let reason = format!("disk {}: {difference}", self.id);
                Err(saved::refused(DeviceKind::Block, reason))
            }
            None => Ok(()),
        }
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let ring = self.active.as_ref().map(|active| &active.source.queue.ring);
        let mut named = self.pump.metrics.named();
        named.push((
            "malformed_chains",
            ring.map_or(0, |ring| ring.malformed().0),
        ));
        named.push((
            "requests_in_flight_now",
            self.pump.engine.in_flight() as u64,
        ));
        named
    }
}

/// The id's first bytes, zeros after them.
pub(super) fn serial_of(id: &str) -> [u8; SERIAL_LEN] {
    let mut serial = [0; SERIAL_LEN];
    for (target, source) in serial.iter_mut().zip(id.bytes()) {
        *target = source;
    }
    serial
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "lifecycle_tests.rs"]
mod lifecycle_tests;
