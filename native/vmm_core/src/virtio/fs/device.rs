//! The device: two queues in front of the server, and the life cycle.

use rustix::event::epoll::EventFlags;
use virtio_core::chain::Chain;
use virtio_core::ring::RingState;

use super::config::{FsConfig, FsError};
use super::credentials::prepare_thread;
use super::protocol::TAG_SIZE;
use super::server::Server;
use super::share::Share;
use crate::virtio::device::{Activation, DeviceError, DeviceKind, Queue, VirtioDevice};
use crate::virtio::saved;
use crate::virtio::turn::Served;

/// The high priority queue, and one for requests.
const QUEUE_COUNT: usize = 2;
/// Bytes of `struct virtio_fs_config`.
const CONFIG_SIZE: usize = TAG_SIZE + 4;
/// Bytes of requests and answers in one turn: some milliseconds at worst.
const BYTES_PER_TURN: usize = 4 << 20;
/// What a small request costs of a turn all the same: it may be a file made or removed.
const LEAST_COST: usize = 32 << 10;

/// A shared folder.
#[derive(Debug)]
pub struct Fs {
    server: Server,
    config_space: [u8; CONFIG_SIZE],
    queue_sizes: [u16; QUEUE_COUNT],
    active: Option<Active>,
}

#[derive(Debug)]
struct Active {
    queues: [Queue; QUEUE_COUNT],
    /// The request under way.
    chain: Chain,
}

impl Fs {
    /// Share a folder.
    ///
    /// # Errors
    /// The tag or queue size is none, the folder is missing or no directory.
    pub fn new(config: FsConfig) -> Result<Self, FsError> {
        config.check()?;
        let mut config_space = [0; CONFIG_SIZE];
        let request_queues: u32 = 1;
        let fields = config.tag.bytes().zip(&mut config_space);
        fields.for_each(|(byte, place)| *place = byte);
        if let Some(place) = config_space.last_chunk_mut() {
            *place = request_queues.to_le_bytes();
        }
        Ok(Self {
            config_space,
            queue_sizes: [config.queue_size; QUEUE_COUNT],
            server: Server::new(Share::new(config)?),
            active: None,
        })
    }
}

impl VirtioDevice for Fs {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Fs
    }

    fn name(&self) -> &str {
        &self.server.share.config.tag
    }

    fn features(&self) -> u64 {
        virtio_core::features::RING
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let from = self.config_space.get(offset..).unwrap_or_default();
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        let queues = [activation.take_queue(0)?, activation.take_queue(1)?];
        let chain = Chain::new(&activation.ram);
        self.active = Some(Active { queues, chain });
        Ok(())
    }

    fn handle(&mut self, token: u32, _readiness: EventFlags) -> Result<(), DeviceError> {
        let (Some(active), Ok(index)) = (&mut self.active, usize::try_from(token)) else {
            return Ok(());
        };
        prepare_thread().map_err(DeviceError::system("prepare thread to serve a folder"))?;
        let Some(queue) = active.queues.get_mut(index) else {
            return Ok(());
        };
        queue.turn(&mut active.chain, BYTES_PER_TURN, |chain| {
            let asked = chain.readable.len();
            let len = self.server.serve(chain);
            let cost = LEAST_COST.max(asked + len as usize);
            Served::Done { len, cost }
        })
    }

    fn reset(&mut self) {
        self.active = None;
        self.server.share.end_session();
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        // Every request is answered before `handle` returns.
        Ok(())
    }

    fn resume(&mut self) {
        for queue in self.active.iter().flat_map(|active| &active.queues) {
            queue.kick_self();
        }
    }

    fn ring_states(&self) -> Vec<Option<RingState>> {
        match &self.active {
            Some(active) => {
                let queues = active.queues.iter();
                queues.map(|queue| Some(queue.ring.state())).collect()
            }
            None => vec![None; QUEUE_COUNT],
        }
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        let share = &self.server.share;
        let state = share.save().map_err(DeviceError::system("save a folder"))?;
        saved::encode(DeviceKind::Fs, &state)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        let state = saved::decode(DeviceKind::Fs, state)?;
        let restored = self.server.share.restore(state);
        restored.map_err(|reason| saved::refused(DeviceKind::Fs, reason))
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let share = &self.server.share;
        share
            .metrics
            .report(share.nodes.table.len(), share.handles.0.len())
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
