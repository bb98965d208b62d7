//! The card as a virtio device: what it offers, its configuration space, and its life.

use rustix::event::epoll;
use virtio_core::chain::Chain;
use virtio_core::ring::RingState;

use super::active::{Active, Link, Pair};
use super::features::{self, CTRL_VQ, MQ};
use super::metrics::NetMetrics;
use super::receive::Receiver;
use super::state::NetState;
use super::tap::Tap;
use super::{MAX_QUEUE_PAIRS, MIN_MTU, NetConfig, NetError};
use crate::virtio::device::{Activation, DeviceError, DeviceKind, Queue, VirtioDevice};
use crate::virtio::saved;
use crate::virtio::throttle::Throttle;

/// Entries of a receive or transmit queue.
const QUEUE_SIZE: u16 = 256;
/// Entries of the control queue.
const CONTROL_SIZE: u16 = 64;
/// Address, status, most pairs, MTU (virtio 1.2, 5.1.4).
const CONFIG_SIZE: usize = 12;
/// `VIRTIO_NET_S_LINK_UP`.
const LINK_UP: u16 = 1;
/// The bit of an address that stands for many cards.
const MULTICAST: u8 = 1;

/// The device.
#[derive(Debug)]
pub struct Net {
    id: String,
    mac: [u8; 6],
    mtu: u16,
    queue_pairs: u16,
    queue_sizes: Vec<u16>,
    link: Link,
    active: Option<Active>,
    /// How many pairs the driver of a snapshot used.
    restored_pairs: Option<u16>,
}

impl Net {
    /// A card over the taps of `config`.
    ///
    /// # Errors
    /// The configuration makes no sense, or a tap can not be used.
    pub fn new(config: NetConfig) -> Result<Self, NetError> {
        let NetConfig {
            id,
            source,
            mac,
            mtu,
            queue_pairs,
            rx_limiter,
            tx_limiter,
        } = config;
        if !(1..=MAX_QUEUE_PAIRS).contains(&queue_pairs) {
            return Err(NetError::QueuePairs { count: queue_pairs });
        }
        let [first_byte, ..] = mac;
        if first_byte & MULTICAST != 0 || mac == [0; 6] {
            return Err(NetError::Mac { mac });
        }
        if mtu < MIN_MTU {
            return Err(NetError::Mtu { mtu });
        }
        let limiter = |direction: &'static str, config: &_| {
            Throttle::new(config).map_err(|source| NetError::Limiter { direction, source })
        };
        let link = Link {
            rx_throttle: limiter("receive", &rx_limiter)?,
            tx_throttle: limiter("transmit", &tx_limiter)?,
            taps: Tap::open_all(source, queue_pairs)?,
            is_up: true,
            metrics: NetMetrics::default(),
        };
        let mut queue_sizes = vec![QUEUE_SIZE; usize::from(queue_pairs) * 2];
        if queue_pairs > 1 {
            queue_sizes.push(CONTROL_SIZE);
        }
        Ok(Self {
            id,
            mac,
            mtu,
            queue_pairs,
            queue_sizes,
            link,
            active: None,
            restored_pairs: None,
        })
    }

    fn config(&self) -> [u8; CONFIG_SIZE] {
        let status = if self.link.is_up { LINK_UP } else { 0 };
        let [m0, m1, m2, m3, m4, m5] = self.mac;
        let [s0, s1] = status.to_le_bytes();
        let [p0, p1] = self.queue_pairs.to_le_bytes();
        let [u0, u1] = self.mtu.to_le_bytes();
        [m0, m1, m2, m3, m4, m5, s0, s1, p0, p1, u0, u1]
    }

    fn take_pairs(&self, activation: &mut Activation) -> Result<Vec<Pair>, DeviceError> {
        let features = activation.features;
        let count = if features & MQ == 0 {
            1
        } else {
            usize::from(self.queue_pairs)
        };
        let mut pairs = Vec::with_capacity(count);
        for index in 0..count {
            let receive = activation.take_queue(index * 2);
            let transmit = activation.take_queue(index * 2 + 1);
            let (receive, transmit) = match (receive, transmit) {
                (Ok(receive), Ok(transmit)) => (receive, transmit),
                // A driver may do with fewer.
                _ if index > 0 => break,
                (receive, transmit) => (receive?, transmit?),
            };
            let ram = activation.ram.clone();
            let receiver = Receiver::new(receive, ram, features, self.mtu);
            pairs.push(Pair::new(receiver, transmit));
        }
        Ok(pairs)
    }

    /// The control queue comes after all pairs there are, or after the only one that is used.
    fn take_control(&self, activation: &mut Activation) -> Result<Option<Queue>, DeviceError> {
        let pairs = match activation.features & (CTRL_VQ | MQ) {
            0 | MQ => return Ok(None),
            CTRL_VQ => 1,
            _ => usize::from(self.queue_pairs),
        };
        activation.take_queue(pairs * 2).map(Some)
    }

    fn queues(&self) -> impl Iterator<Item = &Queue> {
        self.active.iter().flat_map(|active| {
            let pairs = active.pairs.iter();
            let pairs = pairs.flat_map(|pair| [pair.receiver.queue(), &pair.transmitter]);
            pairs.chain(&active.control)
        })
    }

    fn malformed_now(&self) -> u64 {
        self.queues().map(|queue| queue.ring.malformed().0).sum()
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn name(&self) -> &str {
        &self.id
    }

    fn features(&self) -> u64 {
        let has_pairs = self.queue_pairs > 1;
        features::ALWAYS | if has_pairs { CTRL_VQ | MQ } else { 0 }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = self.config();
        for (target, source) in data.iter_mut().zip(config.iter().skip(offset)) {
            *target = *source;
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        let pairs = self.take_pairs(&mut activation)?;
        let control = self.take_control(&mut activation)?;
        if let Some(tap) = self.link.taps.first()
            && self.link.is_up
        {
            // They are the interface's, whichever queue says them.
            let offloads = features::offloads(activation.features);
            let set = tap.set_offloads(offloads);
            set.map_err(DeviceError::system("set the tap's offloads"))?;
        }
        let restored = self.restored_pairs.take().map_or(1, usize::from);
        let mut active = Active {
            used_pairs: restored.clamp(1, pairs.len()),
            pairs,
            control,
            chain: Chain::new(&activation.ram),
            watcher: activation.watcher,
            interrupt: activation.interrupt,
            first_pair: 0,
        };
        let started = active.start(&mut self.link);
        if started.is_err() {
            active.stop(&mut self.link);
        } else {
            self.active = Some(active);
        }
        started
    }

    fn handle(&mut self, token: u32, readiness: epoll::EventFlags) -> Result<(), DeviceError> {
        match &mut self.active {
            Some(active) => active.handle(token, readiness, &mut self.link),
            None => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.link.metrics.malformed_chains += self.malformed_now();
        if let Some(mut active) = self.active.take() {
            active.stop(&mut self.link);
        }
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        if let Some(active) = &mut self.active {
            for pair in &mut active.pairs {
                pair.receiver.put_back(&mut self.link.metrics);
            }
        }
        Ok(())
    }

    fn resume(&mut self) {
        self.queues().for_each(Queue::kick_self);
    }

    fn ring_states(&self) -> Vec<Option<RingState>> {
        let mut states = vec![None; self.queue_sizes.len()];
        for queue in self.queues() {
            if let Some(state) = states.get_mut(queue.index) {
                *state = Some(queue.ring.state());
            }
        }
        states
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        let used_pairs = self.active.as_ref().map_or(1, |active| active.used_pairs);
        let state = NetState {
            mac: self.mac,
            mtu: self.mtu,
            queue_pairs: self.queue_pairs,
            // No more than `queue_pairs`.
            used_pairs: u16::try_from(used_pairs).unwrap_or(1),
        };
        saved::encode(DeviceKind::Net, &state)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        let state: NetState = saved::decode(DeviceKind::Net, state)?;
        if state.queue_pairs != self.queue_pairs {
            let reason = format!(
                "the snapshot's card has {} queue pairs, this one {}",
                state.queue_pairs, self.queue_pairs
            );
            return Err(saved::refused(DeviceKind::Net, reason));
        }
        if !(1..=state.queue_pairs).contains(&state.used_pairs) {
            let reason = format!("{} pairs in use", state.used_pairs);
            return Err(saved::refused(DeviceKind::Net, reason));
        }
        (self.mac, self.mtu) = (state.mac, state.mtu);
        self.restored_pairs = Some(state.used_pairs);
        Ok(())
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.link.metrics.list(self.malformed_now())
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
