//! A card in use: the pairs of queues, what each of them waits for, and which taps are watched.
//!
//! A tap is watched only while the guest has buffers and its rate is not used up: readiness is a
//! level, and what is not fetched would be reported without end.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::event::epoll::EventFlags;
use virtio_core::chain::Chain;

use super::control::{self, Command};
use super::metrics::NetMetrics;
use super::receive::{Awaited, Receiver};
use super::tap::Tap;
use super::transmit::{Sent, transmit};
use crate::interrupt::Interrupt;
use crate::virtio::device::{DeviceError, FIRST_DEVICE_TOKEN, Queue, Watcher};
use crate::virtio::throttle::Throttle;
use crate::virtio::turn::Served;

/// Tokens of the taps, one a pair.
const FIRST_TAP_TOKEN: u32 = FIRST_DEVICE_TOKEN;
/// Tokens of the limiters' timers.
pub(super) const RX_TIMER_TOKEN: u32 = FIRST_DEVICE_TOKEN + 16;
pub(super) const TX_TIMER_TOKEN: u32 = RX_TIMER_TOKEN + 1;
/// Commands of one turn of the control queue.
const COMMANDS_PER_TURN: usize = 16;

/// What the pairs share, and what outlives an activation.
#[derive(Debug)]
pub(super) struct Link {
    /// One a pair.
    pub(super) taps: Vec<Tap>,
    pub(super) rx_throttle: Throttle,
    pub(super) tx_throttle: Throttle,
    pub(super) is_up: bool,
    pub(super) metrics: NetMetrics,
}

/// Two queues.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) receiver: Receiver,
    pub(super) transmitter: Queue,
    awaited: Awaited,
    /// What the tap is watched for: frames, nothing but its end, or not even that.
    interest: Option<EventFlags>,
    is_tx_throttled: bool,
}

impl Pair {
    pub(super) fn new(receiver: Receiver, transmitter: Queue) -> Self {
        Self {
            receiver,
            transmitter,
            awaited: Awaited::Frame,
            interest: None,
            is_tx_throttled: false,
        }
    }
}

/// The card since its driver was ready.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) pairs: Vec<Pair>,
    pub(super) control: Option<Queue>,
    pub(super) chain: Chain,
    pub(super) watcher: Watcher,
    pub(super) interrupt: Arc<Interrupt>,
    /// How many pairs the driver uses: the first ones.
    pub(super) used_pairs: usize,
    /// Which pair goes first when a limiter's timer ends, in turn.
    pub(super) first_pair: usize,
}

impl Active {
    /// Watch what is to be watched.
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub(super) fn start(&mut self, link: &mut Link) -> Result<(), DeviceError> {
        let timers = [
            (&link.rx_throttle, RX_TIMER_TOKEN),
            (&link.tx_throttle, TX_TIMER_TOKEN),
        ];
        for (timer, token) in timers {
            let added = self.watcher.add(timer, token, EventFlags::IN);
            added.map_err(DeviceError::system("watch a limiter's timer"))?;
        }
        self.use_pairs(self.used_pairs, link)
    }

    /// Watch nothing any more.
    pub(super) fn stop(&mut self, link: &mut Link) {
        for timer in [&link.rx_throttle, &link.tx_throttle] {
            timer.disarm();
            // One that is not watched is as good.
            let _removed = self.watcher.remove(timer.as_fd());
        }
        for (index, (pair, tap)) in self.pairs.iter_mut().zip(&link.taps).enumerate() {
            if pair.interest.take().is_none() {
                continue;
            }
            let _removed = self.watcher.remove(tap.as_fd());
            if index > 0 {
                // The next driver begins with one pair. A tap that is gone has no frames anyway.
                let _detached = tap.set_attached(false);
            }
        }
    }

    /// Something is ready, or a queue was kicked.
    ///
    /// # Errors
    /// The driver broke the rules of a ring, or a call failed that should not.
    pub(super) fn handle(
        &mut self,
        token: u32,
        readiness: EventFlags,
        link: &mut Link,
    ) -> Result<(), DeviceError> {
        match token {
            RX_TIMER_TOKEN => {
                link.rx_throttle.acknowledge();
                for index in self.in_turn() {
                    if self.awaits(index, Awaited::Rate) {
                        self.receive(index, link)?;
                    }
                }
                Ok(())
            }
            TX_TIMER_TOKEN => {
                link.tx_throttle.acknowledge();
                for index in self.in_turn() {
                    if self
                        .pairs
                        .get(index)
                        .is_some_and(|pair| pair.is_tx_throttled)
                    {
                        self.transmit(index, link)?;
                    }
                }
                Ok(())
            }
            FIRST_TAP_TOKEN.. => {
                let index = (token - FIRST_TAP_TOKEN) as usize;
                if readiness.contains(EventFlags::IN) {
                    self.receive(index, link)
                } else {
                    // An error or an end, and nobody asked for anything else.
                    self.lose_link(index, link);
                    Ok(())
                }
            }
            _ => self.kicked(token as usize, link),
        }
    }

    fn kicked(&mut self, queue: usize, link: &mut Link) -> Result<(), DeviceError> {
        if self
            .control
            .as_ref()
            .is_some_and(|control| control.index == queue)
        {
            return self.serve_control(link);
        }
        let index = queue / 2;
        if !queue.is_multiple_of(2) {
            // One that waits for the rate is not to go on early.
            return match self.pairs.get(index) {
                Some(pair) if !pair.is_tx_throttled => self.transmit(index, link),
                _ => Ok(()),
            };
        }
        if self.awaits(index, Awaited::Buffers) {
            return self.receive(index, link);
        }
        Ok(())
    }

    fn awaits(&self, index: usize, awaited: Awaited) -> bool {
        self.pairs
            .get(index)
            .is_some_and(|pair| pair.awaited == awaited)
    }

    /// All pairs, beginning with another one each time: the first takes most of the rate.
    fn in_turn(&mut self) -> impl Iterator<Item = usize> + use<> {
        let (count, first) = (self.pairs.len(), self.first_pair);
        self.first_pair = (first + 1) % count.max(1);
        (0..count).map(move |step| (first + step) % count)
    }

    fn receive(&mut self, index: usize, link: &mut Link) -> Result<(), DeviceError> {
        let (Some(pair), Some(tap)) = (self.pairs.get_mut(index), link.taps.get(index)) else {
            return Ok(());
        };
        if pair.interest.is_none() {
            // Not in use, or not any more.
            return Ok(());
        }
        let throttle = &mut link.rx_throttle;
        pair.awaited = pair.receiver.receive(tap, throttle, &mut link.metrics)?;
        let wanted = match pair.awaited {
            Awaited::Frame => EventFlags::IN,
            Awaited::Buffers | Awaited::Rate => EventFlags::empty(),
            Awaited::Nothing => {
                self.lose_link(index, link);
                return Ok(());
            }
        };
        if pair.interest != Some(wanted) {
            let modified = self.watcher.modify(tap, tap_token(index), wanted);
            modified.map_err(DeviceError::system("watch the tap"))?;
            pair.interest = Some(wanted);
        }
        Ok(())
    }

    fn transmit(&mut self, index: usize, link: &mut Link) -> Result<(), DeviceError> {
        let (Some(pair), Some(tap)) = (self.pairs.get_mut(index), link.taps.get(index)) else {
            return Ok(());
        };
        let sent = transmit(
            &mut pair.transmitter,
            &mut self.chain,
            tap,
            &mut link.tx_throttle,
            &mut link.metrics,
        )?;
        pair.is_tx_throttled = sent == Sent::Throttled;
        Ok(())
    }

    /// The tap is gone, and does not come back: somebody deleted it.
    fn lose_link(&mut self, index: usize, link: &mut Link) {
        let (Some(pair), Some(tap)) = (self.pairs.get_mut(index), link.taps.get(index)) else {
            return;
        };
        if pair.interest.take().is_none() {
            return;
        }
        let _removed = self.watcher.remove(tap.as_fd());
        pair.awaited = Awaited::Nothing;
        pair.receiver.put_back(&mut link.metrics);
        if std::mem::replace(&mut link.is_up, false) {
            self.interrupt.signal_config();
        }
    }

    // --- how many pairs ------------------------------------------------------------------------

    fn serve_control(&mut self, link: &mut Link) -> Result<(), DeviceError> {
        let Some(mut control) = self.control.take() else {
            return Ok(());
        };
        let mut chain = Chain::new(control.ring.ram());
        let turned = control.turn(&mut chain, COMMANDS_PER_TURN, |chain| {
            link.metrics.commands += 1;
            let is_done = match Command::parse(chain) {
                Some(Command::SetPairs(count)) => self.set_pairs(count, link),
                Some(Command::Unknown) => false,
                None => return Served::Done { len: 0, cost: 1 },
            };
            let len = control::answer(chain, is_done);
            Served::Done { len, cost: 1 }
        });
        self.control = Some(control);
        turned
    }

    /// The driver uses the first `count` pairs from now on. False: there are not so many.
    fn set_pairs(&mut self, count: u16, link: &mut Link) -> bool {
        let count = usize::from(count);
        if count == 0 || count > self.pairs.len() {
            return false;
        }
        self.use_pairs(count, link).is_ok()
    }

    /// Have frames come to the first `count` taps, and to no others.
    fn use_pairs(&mut self, count: usize, link: &mut Link) -> Result<(), DeviceError> {
        for (index, (pair, tap)) in self.pairs.iter_mut().zip(&link.taps).enumerate() {
            let is_used = index < count;
            if is_used == pair.interest.is_some() || pair.awaited == Awaited::Nothing {
                continue;
            }
            if index > 0 {
                let attached = tap.set_attached(is_used);
                attached.map_err(|error| DeviceError::System {
                    operation: "attach or detach a queue of the tap",
                    source: std::io::Error::other(error),
                })?;
            }
            if is_used {
                let added = self.watcher.add(tap, tap_token(index), EventFlags::IN);
                added.map_err(DeviceError::system("watch the tap"))?;
                (pair.awaited, pair.interest) = (Awaited::Frame, Some(EventFlags::IN));
            } else {
                let _removed = self.watcher.remove(tap.as_fd());
                pair.interest = None;
                pair.receiver.put_back(&mut link.metrics);
            }
        }
        self.used_pairs = count;
        Ok(())
    }
}

fn tap_token(index: usize) -> u32 {
    // At most eight pairs.
    FIRST_TAP_TOKEN + u32::try_from(index).unwrap_or_default()
}
