//! Places for connections, shared fairly between those who hold them. A state machine without I/O.
//!
//! When all are taken, a newcomer gets the oldest place of the holder that has the most, if that has at least
//! two more than the newcomer's own; otherwise it is refused. So one holder can never keep out another.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// The number of a place.
pub(crate) type Place = u64;

/// What comes of asking for a place.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// A free place.
    Free(Place),
    /// A place that another has to leave.
    Taken {
        /// The place.
        place: Place,
        /// The one that has to be left.
        from: Place,
    },
    /// No place.
    Refused,
}

/// A limited number of places.
#[derive(Debug)]
pub(crate) struct FairPool<K> {
    limit: usize,
    next: Place,
    places: BTreeMap<Place, K>,
    holders: BTreeMap<K, VecDeque<Place>>,
    /// The holders by how many places they have.
    by_count: BTreeSet<(usize, K)>,
}

impl<K: Ord + Clone> FairPool<K> {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            limit,
            next: 0,
            places: BTreeMap::new(),
            holders: BTreeMap::new(),
            by_count: BTreeSet::new(),
        }
    }

    /// Asks for a place.
    pub(crate) fn enter(&mut self, key: &K) -> Admission {
        if self.places.len() < self.limit {
            return Admission::Free(self.place(key));
        }
        let own = self.holders.get(key).map_or(0, VecDeque::len);
        let most = self.by_count.last().filter(|(count, _)| *count >= own + 2);
        let oldest = most.and_then(|(_, holder)| self.holders.get(holder)?.front().copied());
        let Some(from) = oldest else {
            return Admission::Refused;
        };
        self.leave(from);
        Admission::Taken { place: self.place(key), from }
    }

    /// Gives a place back. One that was left already may be given back once more.
    pub(crate) fn leave(&mut self, place: Place) {
        let Some(key) = self.places.remove(&place) else {
            return;
        };
        if let Some(held) = self.holders.get_mut(&key) {
            let count = held.len();
            held.retain(|one| *one != place);
            let left = held.len();
            self.by_count.remove(&(count, key.clone()));
            if left == 0 {
                self.holders.remove(&key);
            } else {
                self.by_count.insert((left, key));
            }
        }
    }

    fn place(&mut self, key: &K) -> Place {
        let place = self.next;
        self.next += 1;
        self.places.insert(place, key.clone());
        let held = self.holders.entry(key.clone()).or_default();
        let count = held.len();
        held.push_back(place);
        self.by_count.remove(&(count, key.clone()));
        self.by_count.insert((count + 1, key.clone()));
        place
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holder_of_many_places_gives_its_oldest_to_a_newcomer_until_all_have_alike() {
        let mut pool = FairPool::new(4);
        let places: Vec<Admission> = (0..4).map(|_| pool.enter(&"a")).collect();
        assert_eq!(places, [0, 1, 2, 3].map(Admission::Free));
        assert_eq!(pool.enter(&"a"), Admission::Refused, "its own are no reason");
        assert_eq!(pool.enter(&"b"), Admission::Taken { place: 4, from: 0 });
        assert_eq!(pool.enter(&"b"), Admission::Taken { place: 5, from: 1 });
        assert_eq!(pool.enter(&"b"), Admission::Refused, "two and two");
        assert_eq!(pool.enter(&"c"), Admission::Taken { place: 6, from: 4 }, "one of two has two");
        pool.leave(0);
        assert_eq!(pool.enter(&"d"), Admission::Taken { place: 7, from: 2 });
        assert_eq!(pool.enter(&"e"), Admission::Refused, "everybody has one");
        pool.leave(7);
        assert_eq!(pool.enter(&"e"), Admission::Free(8));
    }

    #[test]
    fn pool_is_empty_again_when_all_have_left() {
        let mut pool = FairPool::new(10);
        for round in 0..100_u64 {
            let key = round % 7;
            let _admitted = pool.enter(&key);
            pool.leave(round / 2);
        }
        (0..200).for_each(|place| pool.leave(place));
        assert!(pool.places.is_empty() && pool.holders.is_empty() && pool.by_count.is_empty());
    }
}
