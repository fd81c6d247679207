//! Maglev: a table from which every node reads the same endpoint for the same flow.
//!
//! The algorithm is section 3.4 of "Maglev: A Fast and Reliable Software Network Load Balancer"
//! (NSDI 2016), with weights: an endpoint of weight w takes w turns where the heaviest takes its
//! full share. Endpoints are sorted before filling, so two nodes that learn of them in a different
//! order still agree.

use std::fmt;
use std::hash::Hasher;
use std::net::SocketAddr;

use siphasher::sip::SipHasher13;

use crate::Endpoint;
use crate::jhash::slot_of;

/// The table size when nobody asks for another: a prime, 100 times 655 endpoints.
pub const DEFAULT_TABLE_SIZE: u32 = 65_537;

/// The largest table size, as Envoy's (`MaglevLbConfig.table_size`).
const TABLE_SIZE_LIMIT: u32 = 5_000_011;

/// A filled lookup table. Immutable; a change of membership makes a new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Maglev {
    /// For each slot the index of its endpoint in `endpoints`; empty when there is none.
    slots: Vec<u32>,
    /// The endpoints with a share, sorted by address.
    endpoints: Vec<SocketAddr>,
}

impl Maglev {
    /// Fills a table of `size` slots with the usable ones of `endpoints`.
    ///
    /// # Errors
    /// When `size` is not a prime of at most 5,000,011.
    pub fn new(endpoints: &[Endpoint], size: u32, seed: u32) -> Result<Self, InvalidTableSize> {
        if size > TABLE_SIZE_LIMIT || !is_prime(size) {
            return Err(InvalidTableSize { size });
        }
        let mut usable: Vec<(SocketAddr, u32)> = endpoints
            .iter()
            .filter(|e| e.health.takes_new_work())
            .map(|e| (e.address, e.weight.get()))
            .collect();
        usable.sort_unstable();
        usable.dedup_by_key(|(address, _)| *address);
        let slots = fill(&usable, size, seed.into());
        Ok(Self { slots, endpoints: usable.into_iter().map(|(address, _)| address).collect() })
    }

    /// The endpoint of a flow with this hash; none when no endpoint is usable.
    #[must_use]
    pub fn pick(&self, hash: u32) -> Option<SocketAddr> {
        self.pick_after(hash, 0)
    }

    /// The endpoint at the `attempt`th distinct place behind the flow's slot: attempt 0 is the
    /// flow's own endpoint, 1 and up are where it goes when that one cannot be reached.
    #[must_use]
    pub fn pick_after(&self, hash: u32, attempt: usize) -> Option<SocketAddr> {
        if attempt >= self.endpoints.len() {
            return None;
        }
        let start = self.slot(hash)?;
        let mut seen: Vec<u32> = Vec::new();
        for slot in self.slots.iter().cycle().skip(start).take(self.slots.len()) {
            if attempt == 0 || (!seen.contains(slot) && seen.len() == attempt) {
                return self.endpoints.get(usize::try_from(*slot).ok()?).copied();
            }
            if !seen.contains(slot) {
                seen.push(*slot);
            }
        }
        None
    }

    /// The slot of flows with this hash; none when no endpoint is usable.
    #[must_use]
    pub fn slot(&self, hash: u32) -> Option<usize> {
        let size = u32::try_from(self.slots.len()).ok().filter(|size| *size > 0)?;
        usize::try_from(slot_of(hash, size)).ok()
    }

    /// The endpoints that have a share, in order.
    #[must_use]
    pub fn endpoints(&self) -> &[SocketAddr] {
        &self.endpoints
    }

    /// Of each slot the index of its endpoint among [`endpoints`](Self::endpoints).
    #[must_use]
    pub fn owners(&self) -> &[u32] {
        &self.slots
    }

    /// How many slots there are.
    #[must_use]
    pub fn size(&self) -> usize {
        self.slots.len()
    }
}

/// Lets the endpoints take turns until every slot is theirs.
fn fill(endpoints: &[(SocketAddr, u32)], size: u32, seed: u64) -> Vec<u32> {
    let Some(heaviest) = endpoints.iter().map(|(_, weight)| u64::from(*weight)).max() else {
        return Vec::new();
    };
    struct Turn {
        next: u64,
        step: u64,
        weight: u64,
        credit: u64,
    }
    let width = u64::from(size);
    let mut turns: Vec<Turn> = endpoints
        .iter()
        .map(|(address, weight)| Turn {
            next: keyed(*address, seed) % width,
            step: keyed(*address, !seed) % (width - 1) + 1,
            weight: u64::from(*weight),
            credit: 0,
        })
        .collect();
    const FREE: u32 = u32::MAX;
    let mut slots = vec![FREE; size as usize];
    let mut taken = 0;
    loop {
        for (index, turn) in (0u32..).zip(turns.iter_mut()) {
            turn.credit += turn.weight;
            if turn.credit < heaviest {
                continue;
            }
            turn.credit -= heaviest;
            // A step that is coprime to the (prime) size visits every slot, so a free one is found.
            while let Some(slot) = usize::try_from(turn.next).ok().and_then(|at| slots.get_mut(at))
            {
                turn.next = (turn.next + turn.step) % width;
                if *slot == FREE {
                    *slot = index;
                    break;
                }
            }
            taken += 1;
            if taken == size {
                return slots;
            }
        }
    }
}

fn keyed(address: SocketAddr, key: u64) -> u64 {
    let mut hasher = SipHasher13::new_with_keys(key, 0x6d61_676c_6576);
    match address {
        SocketAddr::V4(v4) => hasher.write(&v4.ip().octets()),
        SocketAddr::V6(v6) => hasher.write(&v6.ip().octets()),
    }
    hasher.write(&address.port().to_be_bytes());
    hasher.finish()
}

fn is_prime(n: u32) -> bool {
    n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

/// A table size that Maglev cannot use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InvalidTableSize {
    /// The size.
    pub size: u32,
}

impl fmt::Display for InvalidTableSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "table size {} is not a prime of at most {TABLE_SIZE_LIMIT}", self.size)
    }
}

impl std::error::Error for InvalidTableSize {}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::Health;

    fn endpoints(weights: &[u32]) -> Vec<Endpoint> {
        let address =
            |i: usize| SocketAddr::from(([10, 0, 0, u8::try_from(i + 1).expect("few")], 80));
        weights
            .iter()
            .enumerate()
            .filter_map(|(i, w)| Endpoint::new(address(i), *w, Health::Healthy))
            .collect()
    }

    fn shares(table: &Maglev) -> BTreeMap<SocketAddr, usize> {
        let mut shares = BTreeMap::new();
        for slot in &table.slots {
            *shares.entry(table.endpoints[*slot as usize]).or_default() += 1;
        }
        shares
    }

    #[test]
    fn the_order_of_the_endpoints_changes_nothing() {
        let forward = endpoints(&[1, 2, 3, 4]);
        let backward: Vec<_> = forward.iter().rev().cloned().collect();
        let table = |e: &[Endpoint]| Maglev::new(e, 2039, 5).expect("a prime");
        assert_eq!(table(&forward), table(&backward));
        assert_ne!(
            table(&forward),
            Maglev::new(&forward, 2039, 6).expect("a prime"),
            "the seed counts"
        );
    }

    #[test]
    fn shares_follow_the_weights() {
        let table = Maglev::new(&endpoints(&[1, 3]), 16_381, 5).expect("a prime");
        let shares: Vec<usize> = shares(&table).into_values().collect();
        assert!(shares[1].abs_diff(shares[0] * 3) < 16, "{shares:?}");
    }

    #[test]
    fn losing_one_endpoint_moves_few_of_the_others_flows() {
        let all = endpoints(&[1; 10]);
        let before = Maglev::new(&all, DEFAULT_TABLE_SIZE, 5).expect("a prime");
        let after = Maglev::new(&all[1..], DEFAULT_TABLE_SIZE, 5).expect("a prime");
        let lost = all[0].address;
        let (mut survivors, mut moved) = (0u32, 0u32);
        for hash in (0..u32::MAX).step_by(65_521) {
            let old = before.pick(hash).expect("an endpoint");
            if old != lost {
                survivors += 1;
                moved += u32::from(after.pick(hash) != Some(old));
            }
        }
        assert!(moved * 100 < survivors, "{moved} of {survivors} moved");
    }

    #[test]
    fn further_attempts_are_other_endpoints_and_end() {
        let table = Maglev::new(&endpoints(&[1, 1, 1]), 251, 5).expect("a prime");
        let mut picks: Vec<_> =
            (0..3).filter_map(|attempt| table.pick_after(99, attempt)).collect();
        picks.sort_unstable();
        picks.dedup();
        assert_eq!(picks.len(), 3);
        assert_eq!(table.pick_after(99, 3), None);
        assert_eq!(Maglev::new(&[], 251, 5).expect("a prime").pick(1), None);
        assert_eq!(Maglev::new(&[], 250, 5), Err(InvalidTableSize { size: 250 }));
    }
}
