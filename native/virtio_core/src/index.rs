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

/// The entry that a free-running index names; `size` is a power of two.
pub(crate) fn slot(index: u16, size: u16) -> u16 {
    index & size.wrapping_sub(1)
}

/// `vring_need_event`: the other side asked to hear when `event` is passed, and the index went
/// from `old` to `new` (virtio 1.2, 2.7.7.2 and 2.7.10).
pub(crate) fn has_passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn passing_is_what_counting_says(event: u16, old: u16, steps in 0u16..=1024) {
            let new = old.wrapping_add(steps);
            // Entries old, old + 1, …, new - 1 were added; event is passed by adding it.
            let counted = (0..steps).any(|step| old.wrapping_add(step) == event);
            prop_assert_eq!(has_passed(event, new, old), counted);
        }

        #[test]
        fn no_more_than_a_full_ring_is_pending(next: u16, added: u16, bits in 0u32..=15) {
            let size = 1u16 << bits;
            let expected = (added <= size).then_some(added);
            prop_assert_eq!(pending(next.wrapping_add(added), next, size), expected);
        }

        #[test]
        fn a_slot_is_inside_of_the_ring(index: u16, bits in 0u32..=15) {
            let size = 1u16 << bits;
            prop_assert!(slot(index, size) < size);
            prop_assert_eq!(slot(index, size), index % size);
        }
    }
}

#[cfg(kani)]
mod proofs {
    use super::*;

    fn any_size() -> u16 {
        let bits: u32 = kani::any();
        kani::assume(bits <= 15);
        1 << bits
    }

    #[kani::proof]
    fn a_slot_is_inside_of_the_ring() {
        let size = any_size();
        assert!(slot(kani::any(), size) < size);
    }

    #[kani::proof]
    fn pending_never_exceeds_the_ring_and_never_panics() {
        let size = any_size();
        if let Some(count) = pending(kani::any(), kani::any(), size) {
            assert!(count <= size);
        }
    }

    #[kani::proof]
    fn nothing_added_passes_nothing() {
        let index = kani::any();
        assert!(!has_passed(kani::any(), index, index));
    }

    #[kani::proof]
    fn the_entry_just_added_is_passed() {
        let old: u16 = kani::any();
        assert!(has_passed(old, old.wrapping_add(1), old));
    }
}
