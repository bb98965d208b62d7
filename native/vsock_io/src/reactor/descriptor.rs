//! The descriptors that sources watch, and the epoll set they are in.
//!
//! Each is named by its source and a key of the source's choice. In the epoll set it carries a
//! number that is never used again, so an event for a descriptor that was unwatched meanwhile
//! finds no owner. [`Registry`](super::Registry) owns this and uses it on the I/O thread only.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use super::source::{Interest, SharedFd, SourceId};

/// The epoll datum of the mailbox; registrations count up from 1.
const MAILBOX: u64 = 0;

/// Whose descriptor it is, and its key there.
type Owner = (SourceId, u64);

pub(super) struct Descriptors {
    epoll: OwnedFd,
    next_id: u64,
    registrations: HashMap<u64, Registration>,
    ids: HashMap<Owner, u64>,
}

struct Registration {
    owner: Owner,
    fd: SharedFd,
    interest: Interest,
}

impl Descriptors {
    /// An epoll set with only the mailbox's eventfd in it.
    pub(super) fn new(wake: &OwnedFd) -> Result<Self, Errno> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // Edge-triggered: each write to the eventfd wakes, and it never needs to be read.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, wake, epoll::EventData::new_u64(MAILBOX), flags)?;
        Ok(Self {
            epoll,
            next_id: MAILBOX + 1,
            registrations: HashMap::new(),
            ids: HashMap::new(),
        })
    }

    pub(super) fn len(&self) -> usize {
        self.registrations.len()
    }

    /// Whose descriptor an event is about. `None`: the mailbox's, or it was unwatched meanwhile.
    pub(super) fn owner(&self, id: u64) -> Option<Owner> {
        self.registrations.get(&id).map(|found| found.owner)
    }

    /// Fill the spare capacity of `events`, waiting until there is something to put there.
    pub(super) fn wait(
        &self,
        events: &mut Vec<epoll::Event>,
        timeout: Option<&Timespec>,
    ) -> Result<(), Errno> {
        let spare = rustix::buffer::spare_capacity(events);
        epoll::wait(&self.epoll, spare, timeout).map(|_count| ())
    }

    pub(super) fn watch(
        &mut self,
        owner: Owner,
        fd: SharedFd,
        interest: Interest,
    ) -> io::Result<()> {
        if self.ids.contains_key(&owner) {
            return Err(Errno::EXIST.into());
        }
        let id = self.next_id;
        self.next_id += 1;
        if interest != Interest::NONE {
            let data = epoll::EventData::new_u64(id);
            epoll::add(&self.epoll, &fd, data, interest.flags())?;
        }
        self.ids.insert(owner, id);
        let registration = Registration {
            owner,
            fd,
            interest,
        };
        self.registrations.insert(id, registration);
        Ok(())
    }

    pub(super) fn set_interest(&mut self, owner: Owner, interest: Interest) -> io::Result<()> {
        let id = self.ids.get(&owner).copied().ok_or(Errno::NOENT)?;
        let registration = self.registrations.get_mut(&id).ok_or(Errno::NOENT)?;
        if registration.interest == interest {
            return Ok(());
        }
        let data = epoll::EventData::new_u64(id);
        if interest == Interest::NONE {
            epoll::delete(&self.epoll, &registration.fd)?;
        } else if registration.interest == Interest::NONE {
            epoll::add(&self.epoll, &registration.fd, data, interest.flags())?;
        } else {
            epoll::modify(&self.epoll, &registration.fd, data, interest.flags())?;
        }
        registration.interest = interest;
        Ok(())
    }

    pub(super) fn unwatch(&mut self, owner: Owner) {
        let Some(id) = self.ids.remove(&owner) else {
            return;
        };
        if let Some(registration) = self.registrations.remove(&id)
            && registration.interest != Interest::NONE
        {
            // It is registered, so this cannot fail in a way that leaves it registered.
            let _deleted = epoll::delete(&self.epoll, &registration.fd);
        }
    }

    /// Unwatch all descriptors of a source.
    pub(super) fn forget(&mut self, source: SourceId) {
        let owners = self.ids.keys().filter(|(owner, _)| *owner == source);
        for owner in owners.copied().collect::<Vec<_>>() {
            self.unwatch(owner);
        }
    }
}
