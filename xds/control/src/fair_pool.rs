//! Places for connections, shared fairly between those who hold them. A state machine without I/O.
//!
//! When all are taken, a newcomer gets the oldest place of the holder that has the most, if that has at least
//! two more than the newcomer's own; otherwise it is refused. So one holder can never keep out another.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// The number of a place.
pub(crate) type SlotId = u64;

/// What comes of asking for a place.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum SlotDecision {
    /// A free place.
    Free(SlotId),
    /// A place that another has to leave.
    Evicted {
        /// The place.
        slot: SlotId,
        /// The one that has to be left.
        from: SlotId,
    },
    /// No place.
    Refused,
}

/// A limited number of places.
#[derive(Debug)]
pub(crate) struct FairPool<K> {
    limit: usize,
    next: SlotId,
    slots: BTreeMap<SlotId, K>,
    holders: BTreeMap<K, VecDeque<SlotId>>,
    /// The holders by how many places they have.
    by_count: BTreeSet<(usize, K)>,
}

impl<K: Ord + Clone> FairPool<K> {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            limit,
            next: 0,
            slots: BTreeMap::new(),
            holders: BTreeMap::new(),
            by_count: BTreeSet::new(),
        }
    }

    /// Asks for a place.
    pub(crate) fn acquire(&mut self, key: &K) -> SlotDecision {
        if self.slots.len() < self.limit {
            return SlotDecision::Free(self.slot(key));
        }
        let own = self.holders.get(key).map_or(0, VecDeque::len);
        let most = self.by_count.last().filter(|(count, _)| *count >= own + 2);
        let oldest = most.and_then(|(_, holder)| self.holders.get(holder)?.front().copied());
        let Some(from) = oldest else {
            return SlotDecision::Refused;
        };
        self.release(from);
        SlotDecision::Evicted { slot: self.slot(key), from }
    }

    /// Gives a place back. One that was left already may be given back once more.
    pub(crate) fn release(&mut self, slot: SlotId) {
        let Some(key) = self.slots.remove(&slot) else {
            return;
        };
        if let Some(held) = self.holders.get_mut(&key) {
            let count = held.len();
            held.retain(|one| *one != slot);
            let left = held.len();
            self.by_count.remove(&(count, key.clone()));
            if left == 0 {
                self.holders.remove(&key);
            } else {
                self.by_count.insert((left, key));
            }
        }
    }

    fn slot(&mut self, key: &K) -> SlotId {
        let slot = self.next;
        self.next += 1;
        self.slots.insert(slot, key.clone());
        let held = self.holders.entry(key.clone()).or_default();
        let count = held.len();
        held.push_back(slot);
        self.by_count.remove(&(count, key.clone()));
        self.by_count.insert((count + 1, key.clone()));
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holder_of_many_places_gives_its_oldest_to_a_newcomer_until_all_have_alike() {
        let mut pool = FairPool::new(4);
        let slots: Vec<SlotDecision> = (0..4).map(|_| pool.acquire(&"a")).collect();
        assert_eq!(slots, [0, 1, 2, 3].map(SlotDecision::Free));
        assert_eq!(pool.acquire(&"a"), SlotDecision::Refused, "its own are no reason");
        assert_eq!(pool.acquire(&"b"), SlotDecision::Evicted { slot: 4, from: 0 });
        assert_eq!(pool.acquire(&"b"), SlotDecision::Evicted { slot: 5, from: 1 });
        assert_eq!(pool.acquire(&"b"), SlotDecision::Refused, "two and two");
        assert_eq!(
            pool.acquire(&"c"),
            SlotDecision::Evicted { slot: 6, from: 4 },
            "one of two has two"
        );
        pool.release(0);
        assert_eq!(pool.acquire(&"d"), SlotDecision::Evicted { slot: 7, from: 2 });
        assert_eq!(pool.acquire(&"e"), SlotDecision::Refused, "everybody has one");
        pool.release(7);
        assert_eq!(pool.acquire(&"e"), SlotDecision::Free(8));
    }

    #[test]
    fn pool_is_empty_again_when_all_have_left() {
        let mut pool = FairPool::new(10);
        for round in 0..100_u64 {
            let key = round % 7;
            let _admitted = pool.acquire(&key);
            pool.release(round / 2);
        }
        (0..200).for_each(|slot| pool.release(slot));
        assert!(pool.slots.is_empty() && pool.holders.is_empty() && pool.by_count.is_empty());
    }
}
