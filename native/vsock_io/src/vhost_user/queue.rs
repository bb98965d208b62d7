//! One virtqueue of the device: rings in guest memory, kick and call descriptors.
//!
//! The guest writes the rings, so an index or a head it should not have written is an error that
//! stops the device ([`QueueError`]), while a bad chain only costs that chain: it is given back
//! with length 0. Completed chains are announced once per batch ([`Vring::signal`]), and with
//! `EVENT_IDX` only if the driver asked. Owned by the back end, used on the I/O thread.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::Ordering;

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::buffers::{Direction, GuestBuffers};
use super::packet::{HEADER_SIZE, PacketHeader};

/// The largest queue this device takes (`QEMU` uses 128).
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// The driver broke the rules of the ring itself: the device cannot go on.
#[derive(Debug, Error)]
pub enum QueueError {
    /// reading the available ring failed
    #[error("take a chain from the available ring")]
    Available(#[source] virtio_queue::Error),
    /// writing the used ring failed
    #[error("give chain {head} back")]
    Used {
        /// Head index of the chain.
        head: u16,
        /// The cause.
        #[source]
        source: virtio_queue::Error,
    },
    /// the event fields of the rings are unreachable
    #[error("exchange notification fields")]
    Notification(#[source] virtio_queue::Error),
    /// the call descriptor failed
    #[error("signal the driver")]
    Call(#[source] std::io::Error),
    /// a ring address or size makes no sense
    #[error("set up ring")]
    Setup(#[source] virtio_queue::Error),
}

/// A virtqueue.
#[derive(Debug)]
pub struct Vring {
    queue: Queue,
    /// The driver's doorbell.
    pub kick: Option<File>,
    /// The driver's interrupt.
    pub call: Option<File>,
    /// `SET_VRING_ENABLE` said so, or protocol features are off.
    pub is_enabled: bool,
    has_unannounced: bool,
}

impl Vring {
    /// A queue that is not set up.
    ///
    /// # Errors
    /// Never for the constant size used here.
    pub fn new() -> Result<Self, QueueError> {
        let queue = Queue::new(MAX_QUEUE_SIZE).map_err(QueueError::Setup)?;
        Ok(Self {
            queue,
            kick: None,
            call: None,
            is_enabled: false,
            has_unannounced: false,
        })
    }

    /// Set the number of entries.
    ///
    /// # Errors
    /// Not a power of two, or over [`MAX_QUEUE_SIZE`].
    pub fn set_size(&mut self, size: u16) -> Result<(), QueueError> {
        self.queue.try_set_size(size).map_err(QueueError::Setup)
    }

    /// Set the guest addresses of the three areas.
    ///
    /// # Errors
    /// An address is not aligned.
    pub fn set_addresses(
        &mut self,
        table: u64,
        available: u64,
        used: u64,
    ) -> Result<(), QueueError> {
        let set = |queue: &mut Queue| {
            queue.try_set_desc_table_address(GuestAddress(table))?;
            queue.try_set_avail_ring_address(GuestAddress(available))?;
            queue.try_set_used_ring_address(GuestAddress(used))
        };
        set(&mut self.queue).map_err(QueueError::Setup)
    }

    /// Set where to go on in the available ring.
    pub fn set_base(&mut self, base: u16) {
        self.queue.set_next_avail(base);
    }

    /// The next entry of the available ring.
    pub fn base(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Use `EVENT_IDX` or not.
    pub fn set_event_idx(&mut self, is_enabled: bool) {
        self.queue.set_event_idx(is_enabled);
    }

    /// Start serving, if the rings lie in memory. The used ring goes on where it stands.
    pub fn start(&mut self, memory: &GuestMemoryMmap) -> bool {
        self.queue.set_ready(true);
        let used = self.queue.used_idx(memory, Ordering::Acquire);
        let is_valid = self.queue.is_valid(memory) && used.is_ok();
        if let Ok(index) = used {
            self.queue.set_next_used(index.0);
        }
        self.queue.set_ready(is_valid);
        is_valid
    }

    /// Stop serving; addresses and indices stay.
    pub fn stop(&mut self) {
        self.queue.set_ready(false);
        self.kick = None;
        self.has_unannounced = false;
    }

    /// The driver's doorbell was handed over.
    pub fn is_started(&self) -> bool {
        self.queue.ready()
    }

    /// The rings are inside of `memory`.
    pub fn lies_in(&self, memory: &GuestMemoryMmap) -> bool {
        self.queue.is_valid(memory)
    }

    /// Chains may be taken.
    pub fn is_running(&self) -> bool {
        self.is_enabled && self.queue.ready()
    }

    /// Take the next available chain.
    ///
    /// # Errors
    /// The available index or the ring is nonsense.
    pub fn pop<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, QueueError> {
        if !self.is_running() {
            return Ok(None);
        }
        let mut available = self.queue.iter(memory).map_err(QueueError::Available)?;
        Ok(available.next())
    }

    /// Put back the last `count` chains taken, unused.
    pub fn unpop(&mut self, count: u16) {
        self.queue
            .set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Give a chain back to the driver with `len` bytes written.
    ///
    /// # Errors
    /// The head was no valid index.
    pub fn complete(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        len: u32,
    ) -> Result<(), QueueError> {
        self.has_unannounced = true;
        self.queue
            .add_used(memory, head, len)
            .map_err(|source| QueueError::Used { head, source })
    }

    /// Interrupt the driver, if chains were given back since the last time and it wants to know.
    ///
    /// # Errors
    /// The ring is unreachable or the call descriptor broken.
    pub fn signal(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        if !std::mem::take(&mut self.has_unannounced) {
            return Ok(());
        }
        if !self
            .queue
            .needs_notification(memory)
            .map_err(QueueError::Notification)?
        {
            return Ok(());
        }
        match self
            .call
            .as_mut()
            .map(|call| call.write(&1u64.to_ne_bytes()))
        {
            // A full counter is a pending interrupt already.
            Some(Err(error)) if error.kind() != std::io::ErrorKind::WouldBlock => {
                Err(QueueError::Call(error))
            }
            _ => Ok(()),
        }
    }

    /// Ask for kicks again. True: chains arrived meanwhile, look again.
    ///
    /// # Errors
    /// The ring is unreachable.
    pub fn enable_kicks(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(memory)
            .map_err(QueueError::Notification)
    }

    /// Ask for no kicks: we look anyway.
    ///
    /// # Errors
    /// The ring is unreachable.
    pub fn disable_kicks(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        self.queue
            .disable_notification(memory)
            .map_err(QueueError::Notification)
    }

    /// Reset the doorbell after it rang.
    pub fn clear_kick(&mut self) {
        if let Some(kick) = &mut self.kick {
            let mut counter = [0; 8];
            // It polled readable and nobody else reads it, so this cannot block; if it fails, the
            // queue is looked at all the same.
            let _cleared = kick.read(&mut counter);
        }
    }

    /// Entries of the queue: the longest chain allowed.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }
}

/// Guest buffers taken for one batch of packets: one packet per chain.
#[derive(Debug, Default)]
pub struct Reservation<'m> {
    chains: Vec<ReservedChain<'m>>,
    /// Payload areas of all chains, in order.
    pub payload: GuestBuffers<'m>,
}

#[derive(Debug)]
struct ReservedChain<'m> {
    head: u16,
    buffers: GuestBuffers<'m>,
    room: usize,
}

/// The receive queue and its memory for the time of one turn.
#[derive(Debug)]
pub struct RxRing<'v, 'm> {
    vring: &'v mut Vring,
    memory: &'m GuestMemoryMmap,
    /// Chains that may still be taken in this turn.
    budget: usize,
    is_exhausted: bool,
}

impl<'v, 'm> RxRing<'v, 'm> {
    /// For one turn of at most `budget` chains.
    pub fn new(vring: &'v mut Vring, memory: &'m GuestMemoryMmap, budget: usize) -> Self {
        Self {
            vring,
            memory,
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
    ) -> Result<Option<ReservedChain<'m>>, QueueError> {
        while self.budget > 0 {
            let Some(chain) = self.vring.pop(self.memory)? else {
                self.is_exhausted = true;
                return Ok(None);
            };
            let head = chain.head_index();
            let mut buffers = GuestBuffers::default();
            let max = usize::from(self.vring.size());
            let gathered = buffers.gather(self.memory, chain, Direction::ToGuest, max);
            if gathered.is_ok() && buffers.len() >= HEADER_SIZE + min_room {
                self.budget -= 1;
                let room = buffers.len() - HEADER_SIZE;
                return Ok(Some(ReservedChain {
                    head,
                    buffers,
                    room,
                }));
            }
            if is_holding {
                self.vring.unpop(1);
                return Ok(None);
            }
            self.budget -= 1;
            self.vring.complete(self.memory, head, 0)?;
        }
        Ok(None)
    }

    /// Put a packet without payload. False: no buffer.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn put(&mut self, header: &PacketHeader) -> Result<bool, QueueError> {
        let Some(chain) = self.take(0, false)? else {
            return Ok(false);
        };
        chain.buffers.copy_from(&header.to_bytes());
        self.vring
            .complete(self.memory, chain.head, HEADER_SIZE_U32)?;
        Ok(true)
    }

    /// Take chains for at most `wanted` payload bytes, at least one and at most `max_chains`.
    /// Give it back by [`RxRing::commit`].
    ///
    /// # Errors
    /// The ring is broken.
    pub fn reserve(
        &mut self,
        wanted: usize,
        max_chains: usize,
    ) -> Result<Reservation<'m>, QueueError> {
        let mut reservation = Reservation::default();
        while reservation.payload.len() < wanted && reservation.chains.len() < max_chains {
            let is_holding = !reservation.chains.is_empty();
            let Some(chain) = self.take(1, is_holding)? else {
                break;
            };
            let room = chain
                .room
                .min(wanted - reservation.payload.len())
                .min(MAX_PAYLOAD);
            reservation
                .payload
                .append(chain.buffers.range(HEADER_SIZE, room));
            reservation.chains.push(ReservedChain { room, ..chain });
        }
        Ok(reservation)
    }

    /// `filled` payload bytes were put in the reservation: add the headers and give the chains to
    /// the driver. Chains left empty go back as if never taken.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn commit(
        &mut self,
        reservation: &Reservation<'m>,
        filled: usize,
        mut header: impl FnMut(u32) -> PacketHeader,
    ) -> Result<(), QueueError> {
        let mut rest = filled;
        for (index, chain) in reservation.chains.iter().enumerate() {
            if rest == 0 {
                let unused = reservation.chains.len() - index;
                self.budget += unused;
                // At most the queue size.
                self.vring.unpop(u16::try_from(unused).unwrap_or(u16::MAX));
                break;
            }
            let len = rest.min(chain.room);
            rest -= len;
            // `room` is at most MAX_PAYLOAD, so this never saturates.
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            chain.buffers.copy_from(&header(len).to_bytes());
            self.vring
                .complete(self.memory, chain.head, HEADER_SIZE_U32 + len)?;
        }
        Ok(())
    }
}

const HEADER_SIZE_U32: u32 = 44;
const MAX_PAYLOAD: usize = 64 * 1024;
const _: () = assert!(HEADER_SIZE == HEADER_SIZE_U32 as usize);
const _: () = assert!(MAX_PAYLOAD == super::packet::MAX_PAYLOAD_SIZE as usize);

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
