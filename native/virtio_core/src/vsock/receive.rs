//! The receive ring as the muxer fills it: one packet per chain of the driver, several chains for
//! one read of a socket.
//!
//! [`RxRing`] wraps the ring for the time of one turn. A batch is a [`Reservation`]: chains taken,
//! their payload areas in one list, headers written when it is known how much came. Chains that
//! stay empty go back as if never taken. [`ChainPool`] keeps chains between packets, so that one
//! costs no allocation. Called by the muxer on the I/O thread.

use std::sync::Arc;

use crate::buffers::GuestBuffers;
use crate::chain::Chain;
use crate::ram::GuestRam;
use crate::ring::{Ring, RingError};

use super::packet::{HEADER_SIZE, MAX_PAYLOAD_SIZE, PacketHeader};

const MAX_PAYLOAD: usize = MAX_PAYLOAD_SIZE as usize;

/// Chains to take requests in.
#[derive(Debug, Default)]
pub struct ChainPool {
    spare: Vec<Chain>,
    /// The parts of the last reservation, empty.
    reservation: Option<Reservation>,
}

impl ChainPool {
    /// Keep nothing that holds on to other memory than this.
    fn use_memory(&mut self, ram: &Arc<GuestRam>) {
        let is_other = |buffers: &GuestBuffers| !Arc::ptr_eq(buffers.ram(), ram);
        if self.spare.last().is_some_and(|c| is_other(&c.readable)) {
            self.spare.clear();
        }
        if self
            .reservation
            .as_ref()
            .is_some_and(|r| is_other(&r.payload))
        {
            self.reservation = None;
        }
    }

    /// A chain to be filled in by a ring of this memory.
    fn take(&mut self, ram: &Arc<GuestRam>) -> Chain {
        self.spare.pop().unwrap_or_else(|| Chain::new(ram))
    }
}

/// Guest buffers taken for one batch of packets: one packet per chain.
#[derive(Debug)]
#[must_use = "its chains are the guest's: give it back by `RxRing::commit`"]
pub struct Reservation {
    chains: Vec<ReservedChain>,
    /// Payload areas of all chains, in order.
    pub payload: GuestBuffers,
}

#[derive(Debug)]
struct ReservedChain {
    chain: Chain,
    room: usize,
}

/// The receive ring for the time of one turn.
#[derive(Debug)]
pub struct RxRing<'a> {
    ring: &'a mut Ring,
    pool: &'a mut ChainPool,
    /// Chains that may still be taken in this turn.
    budget: usize,
    is_exhausted: bool,
}

impl<'a> RxRing<'a> {
    /// For one turn of at most `budget` chains.
    pub fn new(ring: &'a mut Ring, pool: &'a mut ChainPool, budget: usize) -> Self {
        pool.use_memory(ring.ram());
        Self {
            ring,
            pool,
            budget,
            is_exhausted: false,
        }
    }

    /// The driver has no more buffers.
    pub fn is_exhausted(&self) -> bool {
        self.is_exhausted
    }

    /// Neither buffers nor budget are left.
    pub fn is_done(&self) -> bool {
        self.is_exhausted || self.budget == 0
    }

    /// Take a chain with a header and more than `min_room` - 1 bytes. A useless one is given back
    /// empty, unless others are held: those must stay the last taken, so it waits its turn.
    fn take(
        &mut self,
        min_room: usize,
        is_holding: bool,
    ) -> Result<Option<ReservedChain>, RingError> {
        let mut chain = self.pool.take(self.ring.ram());
        let mut found = None;
        while self.budget > 0 {
            let is_taken = if is_holding {
                self.ring.pop_another(&mut chain)?
            } else {
                self.ring.pop(&mut chain)?
            };
            if !is_taken {
                self.is_exhausted = !is_holding;
                break;
            }
            let is_useful =
                chain.readable.is_empty() && chain.writable.len() >= HEADER_SIZE + min_room;
            if is_useful {
                self.budget -= 1;
                found = Some(chain.writable.len() - HEADER_SIZE);
                break;
            }
            if is_holding {
                self.ring.unpop(1);
                break;
            }
            self.budget -= 1;
            self.ring.complete(chain.head, 0);
        }
        if let Some(room) = found {
            return Ok(Some(ReservedChain { chain, room }));
        }
        self.pool.spare.push(chain);
        Ok(None)
    }

    /// Write the header, and give the chain to the driver with `len` bytes of payload.
    fn complete(&mut self, chain: Chain, header: &PacketHeader, len: usize) {
        chain.writable.copy_from(0, &header.to_bytes());
        // Both are at most MAX_PAYLOAD and a header, so this never saturates.
        let total = u32::try_from(HEADER_SIZE + len).unwrap_or(u32::MAX);
        self.ring.complete(chain.head, total);
        self.pool.spare.push(chain);
    }

    /// Put a packet without payload. False: no buffer.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn put(&mut self, header: &PacketHeader) -> Result<bool, RingError> {
        let Some(reserved) = self.take(0, false)? else {
            return Ok(false);
        };
        self.complete(reserved.chain, header, 0);
        Ok(true)
    }

    /// Take chains for at most `wanted` payload bytes, at least one and at most `max_chains`.
    /// Give it back by [`RxRing::commit`], also if there was no chain.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn reserve(&mut self, wanted: usize, max_chains: usize) -> Result<Reservation, RingError> {
        let made = self.pool.reservation.take();
        let mut reservation = made.unwrap_or_else(|| Reservation {
            chains: Vec::new(),
            payload: GuestBuffers::new(Arc::clone(self.ring.ram())),
        });
        while reservation.payload.len() < wanted && reservation.chains.len() < max_chains {
            let is_holding = !reservation.chains.is_empty();
            let Some(ReservedChain { chain, room }) = self.take(1, is_holding)? else {
                break;
            };
            let room = room
                .min(wanted - reservation.payload.len())
                .min(MAX_PAYLOAD);
            let payload = &mut reservation.payload;
            payload.append_range(&chain.writable, HEADER_SIZE, room);
            reservation.chains.push(ReservedChain { chain, room });
        }
        Ok(reservation)
    }

    /// `filled` payload bytes were put in the reservation: add the headers and give the chains to
    /// the driver. Chains left empty go back as if never taken.
    pub fn commit(
        &mut self,
        mut reservation: Reservation,
        filled: usize,
        mut header: impl FnMut(u32) -> PacketHeader,
    ) {
        let mut rest = filled;
        let mut unused = 0u16;
        for ReservedChain { chain, room } in reservation.chains.drain(..) {
            if rest == 0 {
                unused += 1;
                self.pool.spare.push(chain);
                continue;
            }
            let len = rest.min(room);
            rest -= len;
            // `room` is at most MAX_PAYLOAD, so this never saturates.
            let header = header(u32::try_from(len).unwrap_or(u32::MAX));
            self.complete(chain, &header, len);
        }
        self.budget += usize::from(unused);
        self.ring.unpop(unused);
        reservation.payload.clear();
        self.pool.reservation = Some(reservation);
    }
}

#[cfg(test)]
#[path = "receive_tests.rs"]
mod tests;
