//! A limited number of connection slots, shared fairly between holders (addresses or identities). A state machine
//! without I/O.
//!
//! When all slots are in use, a new connection takes the oldest slot of the holder with the most slots, if that holder
//! has at least two more than the holder of the new connection. Otherwise the new connection is refused. So no holder
//! can keep others out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Identifies a slot. Numbers are not reused.
pub(crate) type SlotId = u64;

/// The result of a request for a slot.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum SlotDecision {
    /// A free slot.
    Free(SlotId),
    /// A slot that was taken from another connection.
    Evicted {
        /// The new slot.
        slot: SlotId,
        /// The slot of the connection that must close.
        from: SlotId,
    },
    /// No slot: the limit is reached.
    Refused,
}

/// A limited number of slots.
#[derive(Debug)]
pub(crate) struct FairPool<K> {
    limit: usize,
    next: SlotId,
    slots: BTreeMap<SlotId, K>,
    holders: BTreeMap<K, VecDeque<SlotId>>,
    /// The holders, ordered by the number of their slots.
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

    /// Requests a slot for a holder.
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

    /// Releases a slot. Releasing it again has no effect.
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
    fn full_pool_takes_the_oldest_slot_of_the_largest_holder_until_shares_are_equal() {
        let mut pool = FairPool::new(4);
        let slots: Vec<SlotDecision> = (0..4).map(|_| pool.acquire(&"a")).collect();
        assert_eq!(slots, [0, 1, 2, 3].map(SlotDecision::Free));
        assert_eq!(pool.acquire(&"a"), SlotDecision::Refused, "the holder itself has the most");
        assert_eq!(pool.acquire(&"b"), SlotDecision::Evicted { slot: 4, from: 0 });
        assert_eq!(pool.acquire(&"b"), SlotDecision::Evicted { slot: 5, from: 1 });
        assert_eq!(pool.acquire(&"b"), SlotDecision::Refused, "both holders have two");
        assert_eq!(
            pool.acquire(&"c"),
            SlotDecision::Evicted { slot: 6, from: 4 },
            "the largest holder has two"
        );
        pool.release(0);
        assert_eq!(pool.acquire(&"d"), SlotDecision::Evicted { slot: 7, from: 2 });
        assert_eq!(pool.acquire(&"e"), SlotDecision::Refused, "each holder has one");
        pool.release(7);
        assert_eq!(pool.acquire(&"e"), SlotDecision::Free(8));
    }

    #[test]
    fn pool_is_empty_after_every_slot_is_released() {
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
