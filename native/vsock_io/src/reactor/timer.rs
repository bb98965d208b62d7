//! The timers of all sources, ordered by when they are due.
//!
//! Each is named by its source and a key of the source's choice; setting one again replaces it.
//! [`Registry`](super::Registry) owns them and uses them on the I/O thread only.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use rustix::event::Timespec;

use super::source::SourceId;

/// Whose timer it is, and its key there.
type Owner = (SourceId, u64);
/// When a timer is due, and a number that tells it from others due then.
type Due = (Instant, u64);

#[derive(Default)]
pub(super) struct Timers {
    next_number: u64,
    queue: BTreeMap<Due, Owner>,
    by_owner: HashMap<Owner, Due>,
}

impl Timers {
    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(super) fn set(&mut self, owner: Owner, deadline: Instant) {
        self.cancel(owner);
        let due = (deadline, self.next_number);
        self.next_number += 1;
        self.queue.insert(due, owner);
        self.by_owner.insert(owner, due);
    }

    pub(super) fn cancel(&mut self, owner: Owner) {
        if let Some(due) = self.by_owner.remove(&owner) {
            self.queue.remove(&due);
        }
    }

    /// Cancel all timers of a source.
    pub(super) fn forget(&mut self, source: SourceId) {
        self.by_owner.retain(|(owner, _), _| *owner != source);
        self.queue.retain(|_, (owner, _)| *owner != source);
    }

    /// The timers due by `now`, earliest first. They stay until they are taken.
    pub(super) fn due(&self, now: Instant) -> Vec<Due> {
        let due = self.queue.range(..=(now, u64::MAX));
        due.map(|(due, _)| *due).collect()
    }

    /// Take a timer out to fire it. `None` if it was cancelled or replaced.
    pub(super) fn take(&mut self, due: Due) -> Option<Owner> {
        let owner = self.queue.remove(&due)?;
        self.by_owner.remove(&owner);
        Some(owner)
    }

    /// How long the thread may wait for descriptors; `None` is for ever.
    pub(super) fn next_timeout(&self) -> Option<Timespec> {
        let ((deadline, _), _) = self.queue.first_key_value()?;
        let left = deadline.saturating_duration_since(Instant::now());
        // A day at most: it is only a wake-up, and always representable.
        Timespec::try_from(left.min(Duration::from_secs(86_400))).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: Owner = (SourceId(1), 7);
    const OTHER: Owner = (SourceId(2), 7);

    fn fire(timers: &mut Timers, now: Instant) -> Vec<Owner> {
        let due = timers.due(now);
        due.into_iter().filter_map(|due| timers.take(due)).collect()
    }

    #[test]
    fn timers_fire_once_in_the_order_of_their_deadlines() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut timers = Timers::default();
        timers.set(OTHER, later);
        timers.set(OWNER, now);
        assert_eq!(fire(&mut timers, later), [OWNER, OTHER]);
        assert!(timers.is_empty());
    }

    #[test]
    fn timers_of_one_instant_fire_in_the_order_they_were_set() {
        let now = Instant::now();
        let mut timers = Timers::default();
        timers.set(OTHER, now);
        timers.set(OWNER, now);
        assert_eq!(fire(&mut timers, now), [OTHER, OWNER]);
    }

    #[test]
    fn a_timer_set_again_is_due_at_the_new_deadline_only() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut timers = Timers::default();
        timers.set(OWNER, now);
        timers.set(OWNER, later);
        assert_eq!(fire(&mut timers, now), []);
        assert_eq!(fire(&mut timers, later), [OWNER]);
    }

    #[test]
    fn a_due_timer_that_is_cancelled_before_its_turn_does_not_fire() {
        let now = Instant::now();
        let mut timers = Timers::default();
        timers.set(OWNER, now);
        let due = timers.due(now);
        timers.cancel(OWNER);
        assert_eq!(timers.take(due[0]), None);
    }

    #[test]
    fn forgetting_a_source_leaves_the_timers_of_others() {
        let now = Instant::now();
        let mut timers = Timers::default();
        timers.set(OWNER, now);
        timers.set((OWNER.0, 8), now);
        timers.set(OTHER, now);
        timers.forget(OWNER.0);
        assert_eq!(timers.len(), 1);
        assert_eq!(fire(&mut timers, now), [OTHER]);
    }

    #[test]
    fn the_wait_ends_by_the_first_deadline_and_without_timers_never() {
        let mut timers = Timers::default();
        assert_eq!(timers.next_timeout(), None);
        timers.set(OWNER, Instant::now() + Duration::from_secs(60));
        timers.set(OTHER, Instant::now());
        let timeout = timers.next_timeout().unwrap();
        assert_eq!((timeout.tv_sec, timeout.tv_nsec), (0, 0));
    }
}
