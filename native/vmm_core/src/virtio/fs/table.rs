//! Numbered things: what the guest names by a 64-bit id, found by index and never confused.
//!
//! An id is a slot's index plus one, and above it the count of insertions so far, so an id whose
//! thing is gone stays unknown when its slot is used again. Bounded: the guest decides how much
//! it opens, not how much the host holds.

use rustix::io::Errno;

/// The most slots of any table, whatever the process's limits are.
pub(super) const MAX_SLOTS: usize = 1 << 20;

#[derive(Debug)]
struct Slot<T> {
    id: u64,
    value: T,
}

/// The things, by id.
#[derive(Debug)]
pub(super) struct Table<T> {
    slots: Vec<Option<Slot<T>>>,
    free: Vec<u32>,
    /// Insertions so far: the upper half of the next id.
    generation: u32,
    limit: usize,
}

impl<T> Table<T> {
    /// Empty, for at most `limit` things.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            generation: 0,
            limit: limit.min(MAX_SLOTS),
        }
    }

    /// Things held.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Bound it anew.
    #[cfg(test)]
    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// The most it holds.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Whether one more fits.
    ///
    /// # Errors
    /// `ENFILE`: it does not.
    pub(super) fn check_room(&self) -> Result<(), Errno> {
        if self.len() < self.limit {
            Ok(())
        } else {
            Err(Errno::NFILE)
        }
    }

    fn index(id: u64) -> Option<usize> {
        // The lower half, less one.
        let position = u32::try_from(id & u64::from(u32::MAX)).ok()?;
        usize::try_from(position.checked_sub(1)?).ok()
    }

    /// Keep a thing; gives its id.
    ///
    /// # Errors
    /// `ENFILE`: the table is full.
    pub(super) fn insert(&mut self, value: T) -> Result<u64, Errno> {
        self.check_room()?;
        let index = match self.free.pop() {
            Some(index) => index,
            None => u32::try_from(self.slots.len()).map_err(|_| Errno::NFILE)?,
        };
        let id = u64::from(self.generation) << 32 | (u64::from(index) + 1);
        self.generation = self.generation.wrapping_add(1);
        let slot = Some(Slot { id, value });
        match self.slots.get_mut(index as usize) {
            Some(place) => *place = slot,
            None => self.slots.push(slot),
        }
        Ok(id)
    }

    /// The thing with this id.
    pub(super) fn get(&self, id: u64) -> Option<&T> {
        let slot = self.slots.get(Self::index(id)?)?.as_ref()?;
        (slot.id == id).then_some(&slot.value)
    }

    /// The thing with this id, to be changed.
    pub(super) fn get_mut(&mut self, id: u64) -> Option<&mut T> {
        let slot = self.slots.get_mut(Self::index(id)?)?.as_mut()?;
        (slot.id == id).then_some(&mut slot.value)
    }

    /// Give a thing up.
    pub(super) fn remove(&mut self, id: u64) -> Option<T> {
        let index = Self::index(id)?;
        let place = self.slots.get_mut(index)?;
        if place.as_ref()?.id != id {
            return None;
        }
        let slot = place.take()?;
        self.free.push(u32::try_from(index).ok()?);
        Some(slot.value)
    }

    /// Give everything up. Ids given out before stay unknown.
    pub(super) fn clear(&mut self) {
        self.slots = Vec::new();
        self.free = Vec::new();
    }

    /// All of it.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        let taken = self.slots.iter().flatten();
        taken.map(|slot| (slot.id, &slot.value))
    }

    /// What [`Table::resume`] needs beside the things.
    pub(super) fn generation(&self) -> u32 {
        self.generation
    }

    /// A table that goes on where another one was: the same ids, and none of its old ones again.
    ///
    /// # Errors
    /// The id that cannot be: used twice, or past the limit.
    pub(super) fn resume(
        limit: usize,
        generation: u32,
        things: impl IntoIterator<Item = (u64, T)>,
    ) -> Result<Self, u64> {
        let mut table = Self::new(limit);
        table.generation = generation;
        for (count, (id, value)) in things.into_iter().enumerate() {
            let index = Self::index(id).filter(|index| *index < MAX_SLOTS);
            let index = index.filter(|_| count < table.limit).ok_or(id)?;
            if table.slots.len() <= index {
                table.slots.resize_with(index + 1, || None);
            }
            match table.slots.get_mut(index) {
                Some(place @ None) => *place = Some(Slot { id, value }),
                _ => return Err(id),
            }
        }
        for (index, place) in (0u32..).zip(&table.slots) {
            if place.is_none() {
                table.free.push(index);
            }
        }
        Ok(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_id_is_one_and_none_comes_twice() {
        let mut table = Table::new(2);
        let first = table.insert('a').unwrap();
        assert_eq!(first, 1, "FUSE's root");
        let second = table.insert('b').unwrap();
        assert_eq!(table.insert('c'), Err(Errno::NFILE));
        assert_eq!(table.remove(second), Some('b'));
        assert_eq!(table.remove(second), None);
        let third = table.insert('c').unwrap();
        assert_ne!(third, second);
        let slot = |id| id & u64::from(u32::MAX);
        assert_eq!(slot(third), slot(second), "the slot is used again");
        assert_eq!(table.get(second), None);
        assert_eq!(table.get_mut(third), Some(&mut 'c'));
        assert_eq!(table.len(), 2);
    }

    #[test]
    fn ids_that_name_nothing_find_nothing() {
        let mut table = Table::new(8);
        table.insert('a').unwrap();
        for id in [0, 2, 1 << 32, u64::MAX, 1 << 32 | 1, u64::from(u32::MAX)] {
            assert_eq!(table.get(id), None, "{id:#x}");
            assert_eq!(table.remove(id), None, "{id:#x}");
        }
        table.clear();
        assert_eq!(table.get(1), None);
        assert_ne!(table.insert('b').unwrap(), 1, "old ids stay unknown");
    }

    #[test]
    fn a_resumed_table_has_the_same_ids_and_free_slots() {
        let mut table = Table::new(8);
        let ids: Vec<u64> = "abc".chars().map(|c| table.insert(c).unwrap()).collect();
        table.remove(ids[1]);
        let things: Vec<(u64, char)> = table.iter().map(|(id, value)| (id, *value)).collect();
        let mut resumed = Table::resume(8, table.generation(), things).unwrap();
        assert_eq!(resumed.get(ids[0]), Some(&'a'));
        assert_eq!(resumed.get(ids[1]), None);
        assert_eq!(resumed.get(ids[2]), Some(&'c'));
        assert_eq!(resumed.insert('d'), table.insert('d'));
    }

    #[test]
    fn a_table_that_cannot_be_is_not_resumed() {
        assert_eq!(Table::resume(8, 0, [(1, 'a'), (1, 'b')]).err(), Some(1));
        assert_eq!(Table::resume(8, 0, [(0, 'a')]).err(), Some(0));
        assert_eq!(Table::resume(1, 0, [(1, 'a'), (2, 'b')]).err(), Some(2));
        let far = MAX_SLOTS as u64 + 1;
        assert_eq!(Table::resume(8, 0, [(far, 'a')]).err(), Some(far));
    }
}
