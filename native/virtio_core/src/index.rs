//! The arithmetic of ring indices: they run freely through 2^16 and wrap (virtio 1.2, 2.7.6).
//!
//! Pure functions of a few numbers, so that they can be proved and not only tested. Called by
//! `ring.rs` alone.

/// How many entries the driver has added since `next`; `None` if more than the ring holds, which
/// no driver that keeps the rules can have done.
pub(crate) fn pending(available: u16, next: u16, size: u16) -> Option<u16> {
    let count = available.wrapping_sub(next);
    (count <= size).then_some(count)
}

/// How many chains were taken and not given back: each is given back once, so the two indices tell.
/// None where they don't match, since somebody had us go over entries again (vhost-user may).
pub(crate) fn in_flight(next_available: u16, next_used: u16, size: u16) -> u16 {
    let count = next_available.wrapping_sub(next_used);
    if count <= size { count } else { 0 }
}

/// The entry that a free-running index names; `size` is a power of two.
pub(crate) fn slot(index: u16, size: u16) -> u16 {
    index & size.wrapping_sub(1)
}

/// `vring_need_event`: the other side asked to hear when `event` is passed, and the index went
/// from `old` to `new` (virtio 1.2, 2.7.7.2 and 2.7.10).
pub(crate) fn has_passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// What is claimed of each function, for any arguments: proved by Kani where it is to be had
/// (`cargo kani -p virtio_core`), and gone through by the tests as far as there is time.
#[cfg(any(test, kani))]
mod claims {
    use super::{has_passed, in_flight, pending, slot};

    pub(super) fn a_slot_is_inside_of_the_ring(index: u16, size: u16) -> bool {
        slot(index, size) < size && slot(index, size) == index % size
    }

    pub(super) fn no_more_than_a_full_ring_is_pending(next: u16, added: u16, size: u16) -> bool {
        let expected = if added <= size { Some(added) } else { None };
        pending(next.wrapping_add(added), next, size) == expected
    }

    /// So `size - in_flight` is the room for more, and never less than none.
    pub(super) fn at_most_a_full_ring_is_in_flight(next_used: u16, taken: u16, size: u16) -> bool {
        let expected = if taken <= size { taken } else { 0 };
        in_flight(next_used.wrapping_add(taken), next_used, size) == expected
    }

    pub(super) fn nothing_added_passes_nothing(event: u16, index: u16) -> bool {
        !has_passed(event, index, index)
    }

    /// Entries old, old + 1, …, new - 1 were added; an event is passed by adding its entry.
    pub(super) fn an_event_is_passed_by_its_entry(event: u16, old: u16, steps: u16) -> bool {
        let is_among = event.wrapping_sub(old) < steps;
        has_passed(event, old.wrapping_add(steps), old) == is_among
    }

    /// Two batches pass what one of both does, or an event would be lost or told twice.
    pub(super) fn a_batch_may_be_cut_in_two(event: u16, old: u16, first: u16, rest: u16) -> bool {
        let Some(steps) = first.checked_add(rest) else {
            return true;
        };
        let (middle, new) = (old.wrapping_add(first), old.wrapping_add(steps));
        let [one, other] = [
            has_passed(event, middle, old),
            has_passed(event, new, middle),
        ];
        !(one && other) && (one || other) == has_passed(event, new, old)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::claims;
    use super::has_passed;

    fn sizes() -> impl Iterator<Item = u16> {
        (0..=15).map(|bits| 1 << bits)
    }

    /// All indices; under miri a few of them.
    fn indices() -> impl Iterator<Item = u16> {
        (0..=u16::MAX).step_by(if cfg!(miri) { 4099 } else { 1 })
    }

    /// Where something could change.
    const EDGES: [u16; 9] = [0, 1, 2, 255, 0x7fff, 0x8000, 0x8001, 0xfffe, 0xffff];

    #[test]
    fn every_index_has_a_slot_in_every_ring() {
        for size in sizes() {
            assert!(indices().all(|index| claims::a_slot_is_inside_of_the_ring(index, size)));
        }
    }

    #[test]
    fn every_difference_is_pending_or_refused_in_every_ring() {
        for size in sizes() {
            for next in EDGES {
                assert!(indices().all(|added| {
                    claims::no_more_than_a_full_ring_is_pending(next, added, size)
                }));
            }
        }
    }

    #[test]
    fn every_difference_is_in_flight_or_no_match_in_every_ring() {
        for size in sizes() {
            for next_used in EDGES {
                assert!(indices().all(|taken| {
                    claims::at_most_a_full_ring_is_in_flight(next_used, taken, size)
                }));
            }
        }
    }

    #[test]
    fn nothing_added_passes_no_event() {
        for index in EDGES {
            assert!(indices().all(|event| claims::nothing_added_passes_nothing(event, index)));
        }
    }

    #[test]
    fn every_event_is_passed_by_its_entry() {
        for old in EDGES {
            for steps in EDGES {
                assert!(
                    indices()
                        .all(|event| claims::an_event_is_passed_by_its_entry(event, old, steps))
                );
            }
        }
    }

    proptest! {
        #[test]
        fn passing_is_what_counting_says(event: u16, old: u16, steps in 0u16..=1024) {
            let new = old.wrapping_add(steps);
            let counted = (0..steps).any(|step| old.wrapping_add(step) == event);
            prop_assert_eq!(has_passed(event, new, old), counted);
            prop_assert!(claims::an_event_is_passed_by_its_entry(event, old, steps));
        }

        #[test]
        fn a_batch_may_be_cut_in_two(event: u16, old: u16, first: u16, rest: u16) {
            prop_assert!(claims::a_batch_may_be_cut_in_two(event, old, first, rest));
        }
    }
}

#[cfg(kani)]
mod proofs {
    use super::claims;

    fn any_size() -> u16 {
        let bits: u32 = kani::any();
        kani::assume(bits <= 15);
        1 << bits
    }

    #[kani::proof]
    fn a_slot_is_inside_of_the_ring() {
        assert!(claims::a_slot_is_inside_of_the_ring(
            kani::any(),
            any_size()
        ));
    }

    #[kani::proof]
    fn no_more_than_a_full_ring_is_pending() {
        assert!(claims::no_more_than_a_full_ring_is_pending(
            kani::any(),
            kani::any(),
            any_size()
        ));
    }

    #[kani::proof]
    fn at_most_a_full_ring_is_in_flight() {
        assert!(claims::at_most_a_full_ring_is_in_flight(
            kani::any(),
            kani::any(),
            any_size()
        ));
    }

    #[kani::proof]
    fn nothing_added_passes_nothing() {
        assert!(claims::nothing_added_passes_nothing(
            kani::any(),
            kani::any()
        ));
    }

    #[kani::proof]
    fn an_event_is_passed_by_its_entry() {
        assert!(claims::an_event_is_passed_by_its_entry(
            kani::any(),
            kani::any(),
            kani::any()
        ));
    }

    #[kani::proof]
    fn a_batch_may_be_cut_in_two() {
        assert!(claims::a_batch_may_be_cut_in_two(
            kani::any(),
            kani::any(),
            kani::any(),
            kani::any()
        ));
    }
}
