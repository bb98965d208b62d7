//! The endpoints of a muxer, by tokens that never name two of them.
//!
//! A token is a slot number and the slot's generation, so an epoll event that was on its way when
//! its endpoint closed does not reach the next one in the slot. Owned by the muxer.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::epoll;

use super::endpoint::Endpoint;

/// Names an endpoint, in epoll events too. Never below `1 << 32`.
pub type Token = u64;

#[derive(Debug)]
struct Slot {
    generation: u32,
    endpoint: Option<Box<Endpoint>>,
}

/// Endpoints, their sockets watched edge-triggered.
#[derive(Debug)]
pub struct EndpointTable {
    epoll: Arc<OwnedFd>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    capacity: usize,
}

impl EndpointTable {
    /// For at most `capacity` endpoints, watched through `epoll`.
    pub fn new(epoll: Arc<OwnedFd>, capacity: usize) -> Self {
        Self {
            epoll,
            slots: Vec::new(),
            free: Vec::new(),
            capacity,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Add an endpoint.
    ///
    /// # Errors
    /// `QuotaExceeded`: the table is full. Or its socket cannot be watched.
    pub fn insert(&mut self, endpoint: Endpoint) -> io::Result<Token> {
        if self.len() >= self.capacity {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let index = self.free.last().copied().unwrap_or(self.slots.len());
        let generation = self.slots.get(index).map_or(1, |slot| slot.generation);
        let token = (u64::from(generation) << 32) | index as u64;
        let flags = epoll::EventFlags::IN
            | epoll::EventFlags::OUT
            | epoll::EventFlags::RDHUP
            | epoll::EventFlags::ET;
        epoll::add(
            &self.epoll,
            endpoint.socket(),
            epoll::EventData::new_u64(token),
            flags,
        )?;
        if self.free.pop().is_none() {
            self.slots.push(Slot {
                generation,
                endpoint: None,
            });
        }
        self.slots[index].endpoint = Some(Box::new(endpoint));
        Ok(token)
    }

    fn slot(&mut self, token: Token) -> Option<(usize, &mut Slot)> {
        let index = usize::try_from(token & u64::from(u32::MAX)).ok()?;
        let slot = self.slots.get_mut(index)?;
        (u64::from(slot.generation) == token >> 32).then_some((index, slot))
    }

    /// The endpoint, if it is still there.
    pub fn get_mut(&mut self, token: Token) -> Option<&mut Endpoint> {
        self.slot(token)?.1.endpoint.as_deref_mut()
    }

    /// Take an endpoint out. Dropping it closes its socket, which ends the watch.
    pub fn remove(&mut self, token: Token) -> Option<Endpoint> {
        let (index, slot) = self.slot(token)?;
        let endpoint = slot.endpoint.take()?;
        slot.generation = slot.generation.wrapping_add(1).max(1);
        self.free.push(index);
        Some(*endpoint)
    }

    /// The tokens of all endpoints.
    pub fn tokens(&self) -> Vec<Token> {
        let living = |(index, slot): (usize, &Slot)| {
            let token = (u64::from(slot.generation) << 32) | index as u64;
            slot.endpoint.is_some().then_some(token)
        };
        self.slots.iter().enumerate().filter_map(living).collect()
    }
}
