//! Packets off the transmit ring into the muxer, and out of the muxer onto the receive ring.
//!
//! Each call moves a bounded number, so that other users of the I/O thread get their turn, and
//! leaves the ring asking for kicks exactly when only a kick can tell of more work. Whether the
//! driver wants an interrupt is the caller's to ask (`Ring::needs_signal`), once per turn.

use std::sync::Arc;

use crate::buffers::GuestBuffers;
use crate::chain::Chain;
use crate::ring::{Ring, RingError};

use thiserror::Error;

use super::muxer::Muxer;
use super::packet::{HEADER_SIZE, PacketHeader};
use super::receive::{ChainPool, RxRing};
use super::{RX_QUEUE, TX_QUEUE};

/// Packets moved in one turn, each way.
const PACKETS_PER_TURN: usize = 256;

/// The guest's driver broke a ring.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("serve the {} queue", if *.index == RX_QUEUE { "receive" } else { "transmit" })]
pub struct QueueError {
    /// Which queue.
    pub index: usize,
    /// What it broke.
    #[source]
    pub source: RingError,
}

/// What moving packets needs of memory, kept between turns.
#[derive(Debug, Default)]
pub struct Exchange {
    pool: ChainPool,
    packet: Option<(Chain, GuestBuffers)>,
}

impl Exchange {
    /// Hold on to no guest memory.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// Move packets both ways. True if more can be moved at once.
    ///
    /// # Errors
    /// A ring is broken.
    pub fn run(
        &mut self,
        muxer: &mut Muxer,
        rx: &mut Ring,
        tx: &mut Ring,
    ) -> Result<bool, QueueError> {
        let broken = |index| move |source| QueueError { index, source };
        let tx_has_more = self.drain_tx(muxer, tx).map_err(broken(TX_QUEUE))?;
        let rx_has_more = self.fill_rx(muxer, rx).map_err(broken(RX_QUEUE))?;
        // Packets left on the ring for want of reply space can be taken when there is some again;
        // without guest buffers there is none, and the guest's next buffer kicks.
        Ok(rx_has_more || tx_has_more && !muxer.is_reply_queue_full())
    }

    /// Take packets from the guest. True if some were left on the ring.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn drain_tx(&mut self, muxer: &mut Muxer, tx: &mut Ring) -> Result<bool, RingError> {
        let ram = tx.ram();
        let (chain, payload) = self
            .packet
            .get_or_insert_with(|| (Chain::new(ram), GuestBuffers::new(Arc::clone(ram))));
        tx.disable_kicks();
        for _ in 0..PACKETS_PER_TURN {
            if muxer.is_reply_queue_full() {
                return Ok(true);
            }
            if !tx.pop(chain)? {
                if tx.enable_kicks() {
                    continue;
                }
                return Ok(false);
            }
            take_packet(muxer, chain, payload);
            tx.complete(chain.head, 0);
        }
        Ok(true)
    }

    /// Give the guest what waits. True if there is more and room for it.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn fill_rx(&mut self, muxer: &mut Muxer, rx: &mut Ring) -> Result<bool, RingError> {
        // Buffers are looked for when there is something to put in them.
        rx.disable_kicks();
        let mut ring = RxRing::new(rx, &mut self.pool, PACKETS_PER_TURN);
        muxer.transmit(&mut ring)?;
        let is_exhausted = ring.is_exhausted();
        if !muxer.has_pending() {
            return Ok(false);
        }
        // Only a kick tells of new buffers, so ask for it; some may have come meanwhile.
        Ok(!is_exhausted || rx.enable_kicks())
    }
}

/// Hand one chain of the transmit ring to the muxer.
fn take_packet(muxer: &mut Muxer, chain: &Chain, payload: &mut GuestBuffers) {
    let header = chain.readable.read_array::<HEADER_SIZE>(0);
    let Some(bytes) = header.filter(|_| chain.writable.is_empty()) else {
        muxer.count_invalid();
        return;
    };
    let header = PacketHeader::parse(&bytes);
    payload.reset(chain.readable.ram());
    payload.append_range(&chain.readable, HEADER_SIZE, header.len as usize);
    muxer.receive(&header, payload);
}

#[cfg(test)]
#[path = "exchange_tests.rs"]
mod tests;
