//! The socket device of the built-in machine.
//!
//! The hybrid socket exists from construction on: hosts that dial before the guest is up wait in
//! its backlog. Once the driver is ready, the device watches the host's sockets through one nested
//! epoll descriptor and their time limits through one timerfd; a turn is whatever those or a kick
//! call for, then packets both ways, then at most one interrupt.
//!
//! ```text
//!   kick ───────────────────────────┐
//!   host sockets readable ──► poll ─┼─► exchange ──► interrupt, timer, a kick of our own if
//!   timer ────────────────────┘     │                 there is more
//!   restored: transport reset ──────┘  (hosts are watched once the driver has acted on it)
//! ```

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::epoll;
use thiserror::Error;
use virtio_core::features;
use virtio_core::ring::{Ring, RingState};
use virtio_core::vsock::exchange::QueueError;
use virtio_core::vsock::hybrid::{HybridError, HybridVsock};
use virtio_core::vsock::{EVENT_QUEUE, QUEUE_COUNT, RX_QUEUE, TX_QUEUE};

use super::metrics::VsockMetrics;
use super::state::VsockState;
use super::transport_reset::{Progress, TransportReset};
use crate::virtio::device::{
    Activation, DeviceError, DeviceKind, FIRST_DEVICE_TOKEN, Queue, VirtioDevice, Watcher,
};
use crate::virtio::saved;
use crate::virtio::timer::DeadlineTimer;

/// Host sockets want attention.
const HOST_TOKEN: u32 = FIRST_DEVICE_TOKEN;
/// A time limit is over.
const TIMER_TOKEN: u32 = FIRST_DEVICE_TOKEN + 1;
const QUEUE_SIZES: [u16; QUEUE_COUNT] = [256; QUEUE_COUNT];
/// Context ids below are the hypervisor's, the loopback and the host's; the largest is "any".
const GUEST_CIDS: std::ops::Range<u64> = 3..0xffff_ffff;

/// What the device is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockConfig {
    /// The guest's context id: 3 or more.
    pub guest_cid: u64,
    /// Where hosts connect, and the stem of where the guest does.
    pub path: PathBuf,
}

/// Why the device cannot be made.
#[derive(Debug, Error)]
pub enum VsockError {
    /// the context id is reserved, or none
    #[error("guest cid {0} is reserved: use one from 3 to 4294967294")]
    GuestCid(u64),
    /// its sockets could not be made
    #[error(transparent)]
    Hybrid(#[from] HybridError),
    /// its timer could not be made
    #[error("make a timer")]
    Timer(#[source] io::Error),
}

/// The device. Dropping it removes the socket file.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    pub(super) host: HybridVsock,
    timer: DeadlineTimer,
    transport_reset: TransportReset,
    metrics: VsockMetrics,
    active: Option<Active>,
}

/// What there is while the driver uses the device.
#[derive(Debug)]
struct Active {
    rx: Queue,
    tx: Queue,
    /// A driver that set none up is told nothing.
    events: Option<Queue>,
    watcher: Watcher,
    is_host_watched: bool,
    /// Since when it is paused.
    paused_at: Option<Instant>,
    /// What went wrong where no error can be returned.
    failure: Option<DeviceError>,
}

impl Active {
    fn rings(&self) -> [Option<&Ring>; QUEUE_COUNT] {
        let events = self.events.as_ref().map(|queue| &queue.ring);
        [Some(&self.rx.ring), Some(&self.tx.ring), events]
    }

    fn watch_host(&mut self, host: &HybridVsock) -> Result<(), DeviceError> {
        if !self.is_host_watched {
            self.watcher
                .add(host, HOST_TOKEN, epoll::EventFlags::IN)
                .map_err(DeviceError::system("watch the host's sockets"))?;
            self.is_host_watched = true;
        }
        Ok(())
    }

    fn forget_host(&mut self, host: &HybridVsock) -> Result<(), DeviceError> {
        if self.is_host_watched {
            self.watcher
                .remove(host.as_fd())
                .map_err(DeviceError::system("stop watching the host's sockets"))?;
            self.is_host_watched = false;
        }
        Ok(())
    }

    /// Interrupt the driver where it wants it, once for both rings if one line serves them.
    fn signal(&mut self) {
        let has_news = self.tx.ring.needs_signal();
        if has_news {
            self.tx.interrupt.signal_used();
        }
        let is_told = has_news && Arc::ptr_eq(&self.tx.interrupt, &self.rx.interrupt);
        if self.rx.ring.needs_signal() && !is_told {
            self.rx.interrupt.signal_used();
        }
    }
}

impl Vsock {
    /// Make the device, its socket included.
    ///
    /// # Errors
    /// The context id is reserved, the path cannot be bound, or the system refused.
    pub fn new(config: VsockConfig) -> Result<Self, VsockError> {
        let VsockConfig { guest_cid, path } = config;
        if !GUEST_CIDS.contains(&guest_cid) {
            return Err(VsockError::GuestCid(guest_cid));
        }
        let timer = DeadlineTimer::new().map_err(|errno| VsockError::Timer(errno.into()))?;
        Ok(Self {
            guest_cid,
            host: HybridVsock::bind(&path, guest_cid)?,
            timer,
            transport_reset: TransportReset::new(),
            metrics: VsockMetrics::default(),
            active: None,
        })
    }

    fn set_timer(&self, deadline: Option<Instant>) -> Result<(), DeviceError> {
        let set = self.timer.set(deadline);
        set.map_err(DeviceError::system("set the timer"))
    }

    /// Go on with telling the guest that it was restored.
    fn advance_reset(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let progress = if let Some(queue) = &mut active.events {
            let now = Instant::now();
            let advanced = self.transport_reset.advance(&mut queue.ring, now);
            let progress = advanced.map_err(DeviceError::ring(EVENT_QUEUE))?;
            queue.signal();
            progress
        } else {
            self.transport_reset = TransportReset::new();
            Progress::GaveUp
        };
        match progress {
            Progress::Waiting => return Ok(()),
            Progress::Done => self.metrics.transport_resets += 1,
            Progress::GaveUp => self.metrics.transport_reset_timeouts += 1,
        }
        active.watch_host(&self.host)
    }

    fn turn(&mut self, token: u32) -> Result<(), DeviceError> {
        if token == TIMER_TOKEN {
            self.timer.clear();
        }
        if self.transport_reset.is_pending() {
            self.advance_reset()?;
        }
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let mut has_more = false;
        if matches!(token, HOST_TOKEN | TIMER_TOKEN) && active.is_host_watched {
            let polled = self.host.poll(true);
            has_more = polled.map_err(DeviceError::system("wait for host sockets"))?;
        }
        let exchanged = self.host.exchange(&mut active.rx.ring, &mut active.tx.ring);
        has_more |= exchanged
            .map_err(|QueueError { index, source }| DeviceError::Ring { index, source })?;
        active.signal();
        if has_more {
            active.rx.kick_self();
        }
        // While hosts are not served, their time limits are not looked at either.
        let host_deadline = active.is_host_watched.then(|| self.host.next_deadline());
        let deadlines = [host_deadline.flatten(), self.transport_reset.deadline()];
        self.set_timer(deadlines.into_iter().flatten().min())
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn name(&self) -> &str {
        DeviceKind::Vsock.name()
    }

    fn features(&self) -> u64 {
        // Streams are what a device has that offers no feature of its own.
        features::RING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        // struct virtio_vsock_config: the guest's context id, nothing else.
        let config = self.guest_cid.to_le_bytes();
        for (target, source) in data.iter_mut().zip(config.iter().skip(offset)) {
            *target = *source;
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), DeviceError> {
        let mut active = Active {
            rx: activation.take_queue(RX_QUEUE)?,
            tx: activation.take_queue(TX_QUEUE)?,
            events: activation.take_queue(EVENT_QUEUE).ok(),
            watcher: activation.watcher,
            is_host_watched: false,
            paused_at: None,
            failure: None,
        };
        if self.transport_reset.is_pending() {
            // Restored: the machine stands still until it is resumed.
            active.paused_at = Some(Instant::now());
        } else {
            active.watch_host(&self.host)?;
        }
        let watched = active
            .watcher
            .add(&self.timer, TIMER_TOKEN, epoll::EventFlags::IN);
        if let Err(errno) = watched {
            active.forget_host(&self.host)?;
            return Err(DeviceError::system("watch the timer")(errno));
        }
        self.active = Some(active);
        Ok(())
    }

    fn handle(&mut self, token: u32, _readiness: epoll::EventFlags) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        if active.paused_at.is_some() {
            return Ok(());
        }
        if let Some(failure) = active.failure.take() {
            return Err(failure);
        }
        self.turn(token)
    }

    fn reset(&mut self) {
        let Some(mut active) = self.active.take() else {
            return;
        };
        // Watches that cannot be removed go with the device; what they bring is ignored.
        let _result = active.forget_host(&self.host);
        let _result = active.watcher.remove(self.timer.as_fd());
        let _result = self.timer.set(None);
        for ring in active.rings().into_iter().flatten() {
            self.metrics.retire(ring);
        }
        self.transport_reset = TransportReset::new();
        self.host.reset();
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        // Nothing is ever under way between turns.
        active.forget_host(&self.host)?;
        if let Some(events) = &mut active.events {
            self.transport_reset.pause(&mut events.ring);
        }
        active.paused_at.get_or_insert_with(Instant::now);
        self.set_timer(None)
    }

    fn resume(&mut self) {
        let Some(active) = &mut self.active else {
            return;
        };
        let Some(paused_at) = active.paused_at.take() else {
            return;
        };
        // The guest could not answer meanwhile.
        self.host.postpone(paused_at.elapsed());
        if !self.transport_reset.is_pending() {
            active.failure = active.watch_host(&self.host).err();
        }
        active.rx.kick_self();
    }

    fn ring_states(&self) -> Vec<Option<RingState>> {
        match &self.active {
            Some(active) => active.rings().map(|ring| ring.map(Ring::state)).into(),
            None => vec![None; QUEUE_COUNT],
        }
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        let state = VsockState {
            guest_cid: self.guest_cid,
            was_active: self.active.is_some(),
            next_host_port: self.host.next_host_port(),
        };
        saved::encode(DeviceKind::Vsock, &state)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        let VsockState {
            guest_cid,
            was_active,
            next_host_port,
        } = saved::decode(DeviceKind::Vsock, state)?;
        if guest_cid != self.guest_cid {
            let reason = format!("the guest's cid is {guest_cid}, not {}", self.guest_cid);
            return Err(saved::refused(DeviceKind::Vsock, reason));
        }
        self.host.set_next_host_port(next_host_port);
        if was_active {
            self.transport_reset.request();
        }
        Ok(())
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let rings = self.active.iter().flat_map(Active::rings).flatten();
        self.metrics.list(&self.host, rings)
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
