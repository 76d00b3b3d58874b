//! Ranges of the slot array: which are free.

use std::collections::BTreeMap;

/// The free ranges of one slot array, by first slot.
///
/// Two neighbours are never both free as two ranges, so a range that fits is
/// found if there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreeRanges {
    ranges: BTreeMap<u32, u32>,
}

impl FreeRanges {
    /// All of `capacity` slots are free.
    pub fn new(capacity: u32) -> Self {
        let ranges = (capacity > 0).then_some((0, capacity));
        Self {
            ranges: ranges.into_iter().collect(),
        }
    }

    /// Takes the smallest free range that holds `count` slots, the first of
    /// several: its first slot. `None` if there is none.
    pub fn take(&mut self, count: u32) -> Option<u32> {
        let fitting = self.ranges.iter().filter(|(_, free)| **free >= count);
        let (&first, _) = fitting.min_by_key(|(_, free)| **free)?;
        self.reserve(first, count);
        Some(first)
    }

    /// Takes a given range. `false`, and nothing is taken, if not all of it is
    /// free.
    pub fn reserve(&mut self, first: u32, count: u32) -> bool {
        let holding = self.ranges.range(..=first).next_back();
        let Some((&start, &free)) = holding else {
            return false;
        };
        let (Some(end), Some(free_end)) = (first.checked_add(count), start.checked_add(free))
        else {
            return false;
        };
        if count == 0 || end > free_end {
            return false;
        }
        self.ranges.remove(&start);
        if start < first {
            self.ranges.insert(start, first - start);
        }
        if end < free_end {
            self.ranges.insert(end, free_end - end);
        }
        true
    }

    /// Gives a range back.
    pub fn release(&mut self, first: u32, count: u32) {
        let (mut first, mut count) = (first, count);
        if let Some((&before, &free)) = self.ranges.range(..first).next_back()
            && before + free == first
        {
            self.ranges.remove(&before);
            (first, count) = (before, free + count);
        }
        if let Some(free) = self.ranges.remove(&(first + count)) {
            count += free;
        }
        self.ranges.insert(first, count);
    }

    /// Number of free slots.
    pub fn free(&self) -> u32 {
        self.ranges.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_smallest_range_that_fits_is_taken() {
        let mut free = FreeRanges::new(100);
        assert!(free.reserve(10, 10) && free.reserve(25, 10));
        // Free now: 0..10, 20..25, 35..100.
        assert_eq!(free.take(5), Some(20));
        assert_eq!(free.take(6), Some(0));
        assert_eq!(free.take(66), None);
        assert_eq!(free.take(65), Some(35));
        assert_eq!(free.free(), 4);
    }

    #[test]
    fn what_is_not_free_cannot_be_reserved() {
        let mut free = FreeRanges::new(10);
        assert!(free.reserve(2, 3));
        for (first, count) in [
            (2, 1),
            (1, 2),
            (4, 2),
            (9, 2),
            (10, 1),
            (5, 0),
            (u32::MAX, 1),
        ] {
            assert!(!free.reserve(first, count), "{first} {count}");
        }
        assert!(free.reserve(5, 5));
    }

    proptest! {
        /// Against a set of single slots.
        #[test]
        fn no_slot_is_given_twice_and_none_is_lost(steps in prop::collection::vec((any::<bool>(), 1u32..20), 1..200)) {
            let mut free = FreeRanges::new(100);
            let mut taken: Vec<(u32, u32)> = Vec::new();
            for (take, n) in steps {
                if take {
                    if let Some(first) = free.take(n) {
                        taken.push((first, n));
                    }
                } else if !taken.is_empty() {
                    let (first, count) = taken.swap_remove(n as usize % taken.len());
                    free.release(first, count);
                }
                let slots: Vec<u32> = taken.iter().flat_map(|(first, count)| *first..first + count).collect();
                let distinct: BTreeSet<_> = slots.iter().collect();
                prop_assert_eq!(distinct.len(), slots.len());
                prop_assert_eq!(free.free() as usize, 100 - slots.len());
            }
            for (first, count) in taken {
                free.release(first, count);
            }
            prop_assert_eq!(free, FreeRanges::new(100));
        }
    }
}
