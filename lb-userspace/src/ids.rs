//! Numbers for Service ports and backends.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::service::{BackendRef, is_living};

/// How many numbers rest before the first of them is used again.
const RESTING: usize = 4096;

/// Hands out numbers, from 1.
///
/// One that was given back rests for a while: a flow that still names it would
/// show under another name. Numbers stay low all the same, so that not every one
/// that there may be needs counters (`klb_traffic`).
#[derive(Clone, Debug)]
pub struct Numbers {
    free: BTreeSet<u32>,
    next: u32,
    end: u32,
    /// Below it are those that were used again last: they go by turns.
    turn: u32,
}

impl Numbers {
    /// Numbers below `end`.
    pub fn new(end: u32) -> Self {
        Self {
            free: BTreeSet::new(),
            next: 1,
            end,
            turn: 0,
        }
    }

    /// `None` if all are in use.
    pub fn take(&mut self) -> Option<u32> {
        if self.next < self.end && self.free.len() <= RESTING {
            self.next += 1;
            return Some(self.next - 1);
        }
        let number = self.free.range(self.turn..).next();
        let number = *number.or_else(|| self.free.first())?;
        self.free.remove(&number);
        self.turn = number + 1;
        Some(number)
    }

    /// Takes a given number; `false` if it is in use or none of these.
    pub fn reserve(&mut self, number: u32) -> bool {
        if number == 0 || number >= self.end {
            return false;
        }
        if number < self.next {
            return self.free.remove(&number);
        }
        self.free.extend(self.next..number);
        self.next = number + 1;
        true
    }

    /// Gives a number back.
    pub fn release(&mut self, number: u32) {
        self.free.insert(number);
    }
}

/// Hands out ids of backends, each time with a generation that the id never
/// had. The map keeps the last generation of dead ids too, so this holds
/// across restarts.
#[derive(Clone, Debug)]
pub struct BackendIds {
    numbers: Numbers,
    /// What `klb_backend` holds, by id: 0 for one that never lived.
    values: Vec<u32>,
}

impl BackendIds {
    /// From the content of the map and its number of entries.
    pub fn new(values: BTreeMap<u32, u32>, capacity: u32) -> Self {
        let mut this = Self {
            numbers: Numbers::new(capacity),
            values: Vec::new(),
        };
        for (id, value) in values {
            this.set(id, value);
        }
        this
    }

    /// What the map should hold, without zeros.
    pub fn values(&self) -> impl Iterator<Item = (u32, u32)> {
        let values = (0..).zip(self.values.iter().copied());
        values.filter(|(_, value)| *value != 0)
    }

    /// 0 for an id that never lived.
    fn value(&self, id: u32) -> u32 {
        self.values.get(id as usize).copied().unwrap_or(0)
    }

    fn set(&mut self, id: u32, value: u32) {
        let place = id as usize;
        if place >= self.values.len() {
            self.values.resize(place + 1, 0);
        }
        self.values[place] = value;
    }

    /// Takes in that somebody else wrote a backend, who has been ended.
    pub fn learn(&mut self, backend: BackendRef) {
        let dead = backend.generation.wrapping_add(1);
        self.set(backend.id, dead);
    }

    /// Takes back a backend that a slot names; `false` if it does not live, or
    /// has been taken already.
    pub fn adopt(&mut self, backend: BackendRef) -> bool {
        is_living(backend.generation)
            && self.value(backend.id) == backend.generation
            && self.numbers.reserve(backend.id)
    }

    /// Ids that live in the map and that nobody has adopted.
    pub fn strays(&self) -> Vec<BackendRef> {
        let mut numbers = self.numbers.clone();
        let living = self.values().filter(|(_, value)| is_living(*value));
        living
            .filter(|(id, _)| numbers.reserve(*id))
            .map(|(id, generation)| BackendRef { id, generation })
            .collect()
    }

    /// A backend that never was. It lives once the map says so.
    pub fn take(&mut self) -> Option<BackendRef> {
        let id = self.numbers.take()?;
        let last = self.value(id);
        // The next odd number.
        let generation = (last | 1).wrapping_add(if is_living(last) { 2 } else { 0 });
        self.set(id, generation);
        Some(BackendRef { id, generation })
    }

    /// Ends a life; returns what the map must say.
    pub fn end(&mut self, backend: BackendRef) -> u32 {
        let dead = backend.generation.wrapping_add(1);
        self.set(backend.id, dead);
        self.numbers.release(backend.id);
        dead
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_unique_and_not_used_again_soon() {
        let mut numbers = Numbers::new(6);
        assert!(numbers.reserve(3) && !numbers.reserve(3));
        assert!(!numbers.reserve(0) && !numbers.reserve(6));
        assert_eq!(numbers.take(), Some(4));
        numbers.release(4);
        let taken: Vec<_> = (0..5).map(|_| numbers.take()).collect();
        assert_eq!(taken, [Some(5), Some(1), Some(2), Some(4), None]);
    }

    #[test]
    fn numbers_stay_low_and_go_by_turns() {
        let mut numbers = Numbers::new(1 << 20);
        let mut last = 0;
        for _ in 0..20 * RESTING {
            let number = numbers.take().expect("there are plenty");
            assert!(number <= RESTING as u32 + 2, "{number}");
            assert_ne!(number, last, "it has just been given back");
            last = number;
            numbers.release(number);
        }
    }

    #[test]
    fn no_life_has_the_generation_of_another() {
        let mut ids = BackendIds::new(BTreeMap::new(), 10);
        let mut seen = BTreeSet::new();
        let mut map = BTreeMap::new();
        for round in 0..20 {
            let backend = ids.take().expect("ids are free");
            assert!(is_living(backend.generation) && seen.insert(backend));
            let dead = ids.end(backend);
            assert!(!is_living(dead));
            map.insert(backend.id, dead);
            if round % 3 == 0 {
                // A restart knows only the map.
                ids = BackendIds::new(map.clone(), 10);
            }
        }
    }

    #[test]
    fn a_restart_adopts_what_lives() {
        let living = BackendRef {
            id: 2,
            generation: 5,
        };
        let mut ids = BackendIds::new(BTreeMap::from([(2, 5), (3, 8), (4, 1)]), 10);
        assert!(ids.adopt(living) && !ids.adopt(living));
        for (id, generation) in [(2, 7), (3, 7), (3, 8), (7, 1)] {
            assert!(
                !ids.adopt(BackendRef { id, generation }),
                "{id} {generation}"
            );
        }
        let stray = BackendRef {
            id: 4,
            generation: 1,
        };
        assert_eq!(ids.strays(), [stray]);
        assert_eq!(ids.take().map(|backend| backend.id), Some(3));
    }
}
