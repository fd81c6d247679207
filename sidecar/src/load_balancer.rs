//! Chooses the endpoint of a request.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use weft_model::{Balance, Endpoint};

/// The endpoints of a cluster that accept new requests, with the number of requests in flight at each.
#[derive(Debug, Default)]
pub(crate) struct Balancer {
    endpoints: Vec<Candidate>,
    /// The addresses of the endpoints that accept no new requests.
    unavailable: Vec<SocketAddr>,
    /// One round of smooth weighted round robin, as indexes into `endpoints`.
    turns: Vec<usize>,
    /// The number of turns taken, shared by all workers, so that each endpoint gets its exact share.
    turn: Arc<AtomicUsize>,
    kind: Option<Balance>,
    /// The number of requests in flight at all endpoints.
    open: Arc<AtomicU32>,
    /// The number of connections from all workers to all endpoints.
    connections: Arc<AtomicU32>,
}

#[derive(Debug, Clone)]
struct Candidate {
    address: SocketAddr,
    weight: u32,
    open: Arc<AtomicU32>,
}

/// The most turns in a round. Weights are scaled down to fit.
const TURN_LIMIT: u64 = 4096;

/// An endpoint chosen for a request. Counts as one request in flight until it is dropped.
#[derive(Debug)]
pub(crate) struct ChosenEndpoint {
    pub(crate) address: SocketAddr,
    open: Arc<AtomicU32>,
    total: Arc<AtomicU32>,
}

impl Drop for ChosenEndpoint {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
        self.total.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Balancer {
    /// Whether an address is an endpoint, including endpoints that accept no new requests. Every address is one of a
    /// cluster without known endpoints.
    pub(crate) fn has(&self, address: SocketAddr) -> bool {
        let mut all = self.addresses().chain(self.unavailable.iter().copied()).peekable();
        all.peek().is_none() || all.any(|one| one == address)
    }

    /// The addresses of the endpoints that accept new requests.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.endpoints.iter().map(|candidate| candidate.address)
    }

    /// A balancer over the usable ones of `endpoints`. Keeps the counters of the endpoints that `previous` has too.
    pub(crate) fn new(endpoints: &[Endpoint], kind: Balance, previous: Option<&Self>) -> Self {
        let previous_candidates: HashMap<SocketAddr, &Candidate> = previous
            .iter()
            .flat_map(|balancer| &balancer.endpoints)
            .map(|candidate| (candidate.address, candidate))
            .collect();
        let open = |address: SocketAddr| {
            previous_candidates
                .get(&address)
                .map_or_else(Arc::default, |candidate| candidate.open.clone())
        };
        let (usable, unavailable): (Vec<&Endpoint>, Vec<&Endpoint>) =
            endpoints.iter().partition(|endpoint| endpoint.health.accepts_new_traffic());
        let unavailable = unavailable.iter().map(|endpoint| endpoint.address).collect();
        let endpoints: Vec<Candidate> = usable
            .iter()
            .map(|e| Candidate {
                address: e.address,
                weight: e.weight.get(),
                open: open(e.address),
            })
            .collect();
        let turns = turns(&endpoints);
        let total = previous.map_or_else(Arc::default, |balancer| balancer.open.clone());
        let turn = previous.map_or_else(Arc::default, |balancer| balancer.turn.clone());
        let connections = previous.map_or_else(Arc::default, |old| old.connections.clone());
        Self { endpoints, unavailable, turns, turn, kind: Some(kind), open: total, connections }
    }

    /// The number of requests in flight at all endpoints.
    pub(crate) fn open(&self) -> u32 {
        self.open.load(Ordering::Relaxed)
    }

    /// The number of connections from all workers to all endpoints, which [`Slots`] maintains.
    ///
    /// [`Slots`]: crate::upstream::Slots
    pub(crate) fn connections(&self) -> &Arc<AtomicU32> {
        &self.connections
    }

    /// The endpoint for a request. None when every endpoint is in `tried`.
    pub(crate) fn choose(&self, tried: &[SocketAddr]) -> Option<ChosenEndpoint> {
        let candidate = match self.kind? {
            Balance::LeastRequests => self.least_open(tried),
            Balance::RoundRobin | Balance::Maglev { .. } => self.next_in_turn(tried),
        }?;
        Some(self.chosen(candidate))
    }

    /// The endpoint at an address, for a request that must go there. None when it accepts no new requests.
    pub(crate) fn at(&self, address: SocketAddr) -> Option<ChosenEndpoint> {
        let candidate = self.endpoints.iter().find(|candidate| candidate.address == address)?;
        Some(self.chosen(candidate))
    }

    fn chosen(&self, candidate: &Candidate) -> ChosenEndpoint {
        candidate.open.fetch_add(1, Ordering::Relaxed);
        self.open.fetch_add(1, Ordering::Relaxed);
        ChosenEndpoint {
            address: candidate.address,
            open: candidate.open.clone(),
            total: self.open.clone(),
        }
    }

    fn next_in_turn(&self, tried: &[SocketAddr]) -> Option<&Candidate> {
        for _ in 0..self.turns.len() {
            let now = self.turn.fetch_add(1, Ordering::Relaxed);
            let index = self.turns.get(now % self.turns.len())?;
            let candidate = self.endpoints.get(*index)?;
            if !tried.contains(&candidate.address) {
                return Some(candidate);
            }
        }
        None
    }

    /// The endpoint with the fewest requests in flight relative to its weight. The turn decides among equals; otherwise the
    /// first endpoint of the list would get every request at low load.
    fn least_open(&self, tried: &[SocketAddr]) -> Option<&Candidate> {
        let count = self.endpoints.len();
        let start = self.turn.fetch_add(1, Ordering::Relaxed) % count.max(1);
        let load = |candidate: &Candidate| {
            // In units of 2^-16 per unit of weight, so that the result is an integer.
            (u64::from(candidate.open.load(Ordering::Relaxed)) + 1) * 65_536
                / u64::from(candidate.weight)
        };
        let in_turn = self.endpoints.iter().cycle().skip(start).take(count);
        in_turn
            .filter(|candidate| !tried.contains(&candidate.address))
            .min_by_key(|candidate| load(candidate))
    }
}

/// One round of smooth weighted round robin.
fn turns(endpoints: &[Candidate]) -> Vec<usize> {
    if endpoints.windows(2).all(|pair| matches!(pair, [a, b] if a.weight == b.weight)) {
        return (0..endpoints.len()).collect();
    }
    let total: u64 = endpoints.iter().map(|e| u64::from(e.weight)).sum();
    let divisor =
        endpoints.iter().map(|e| u64::from(e.weight)).fold(0, greatest_common_divisor).max(1);
    let scale = (total / divisor).div_ceil(TURN_LIMIT).max(1) * divisor;
    let weights: Vec<i64> = endpoints
        .iter()
        .map(|e| i64::try_from(u64::from(e.weight).div_ceil(scale)).unwrap_or(1))
        .collect();
    let round: i64 = weights.iter().sum();
    let mut credit = vec![0i64; weights.len()];
    let mut turns = Vec::new();
    for _ in 0..round {
        for (credit, weight) in credit.iter_mut().zip(&weights) {
            *credit += weight;
        }
        // The first of those with the highest credit, so that equal weights take turns in order.
        let richest = credit
            .iter()
            .enumerate()
            .rev()
            .max_by_key(|(_, credit)| **credit)
            .map(|(index, _)| index);
        let Some(index) = richest else {
            break;
        };
        if let Some(credit) = credit.get_mut(index) {
            *credit -= round;
        }
        turns.push(index);
    }
    turns
}

fn greatest_common_divisor(a: u64, b: u64) -> u64 {
    if a == 0 { b } else { greatest_common_divisor(b % a, a) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_model::Health;

    fn balancer(weights: &[u32], kind: Balance) -> Balancer {
        let endpoint = |(i, weight): (usize, &u32)| {
            let address = SocketAddr::from(([10, 0, 0, u8::try_from(i).expect("few")], 80));
            Endpoint::new(address, *weight, Health::Healthy)
        };
        Balancer::new(
            &weights.iter().enumerate().filter_map(endpoint).collect::<Vec<_>>(),
            kind,
            None,
        )
    }

    fn last(chosen: &ChosenEndpoint) -> u8 {
        match chosen.address.ip() {
            std::net::IpAddr::V4(v4) => v4.octets()[3],
            std::net::IpAddr::V6(_) => panic!("expected an IPv4 address"),
        }
    }

    #[test]
    fn round_robin_takes_turns_by_weight() {
        let equal = balancer(&[1, 1, 1], Balance::RoundRobin);
        let order: Vec<u8> = (0..6).filter_map(|_| equal.choose(&[])).map(|c| last(&c)).collect();
        assert_eq!(order, [0, 1, 2, 0, 1, 2]);
        let weighted = balancer(&[20, 10], Balance::RoundRobin);
        let order: Vec<u8> =
            (0..6).filter_map(|_| weighted.choose(&[])).map(|c| last(&c)).collect();
        assert_eq!(order, [0, 1, 0, 0, 1, 0]);
        assert!(balancer(&[u32::MAX, 1], Balance::RoundRobin).turns.len() <= 4097);
    }

    #[test]
    fn endpoint_that_accepts_no_new_requests_still_belongs_to_the_cluster() {
        let address = |last| SocketAddr::from(([10, 0, 0, last], 80));
        let endpoint = |(last, health)| Endpoint::new(address(last), 1, health);
        let endpoints = [(1, Health::Healthy), (2, Health::Unhealthy)].into_iter();
        let endpoints: Vec<Endpoint> = endpoints.filter_map(endpoint).collect();
        let balancer = Balancer::new(&endpoints, Balance::RoundRobin, None);
        assert!(balancer.has(address(1)) && balancer.has(address(2)) && !balancer.has(address(3)));
        assert_eq!(balancer.addresses().collect::<Vec<_>>(), [address(1)]);
        assert!(
            Balancer::default().has(address(3)),
            "a cluster without known endpoints has every address"
        );
    }

    #[test]
    fn endpoint_with_fewest_requests_is_chosen_and_released_on_drop() {
        let balancer = balancer(&[1, 1], Balance::LeastRequests);
        let first = balancer.choose(&[]).expect("one");
        let second = balancer.choose(&[]).expect("one");
        assert_ne!(first.address, second.address);
        let freed = first.address;
        drop(first);
        assert_eq!(balancer.choose(&[]).expect("one").address, freed);
    }

    #[test]
    fn endpoints_already_tried_are_not_chosen_again() {
        for kind in [Balance::RoundRobin, Balance::LeastRequests] {
            let balancer = balancer(&[1, 1], kind);
            let first = balancer.choose(&[]).expect("one").address;
            let second = balancer.choose(&[first]).expect("another").address;
            assert_ne!(first, second);
            assert!(balancer.choose(&[first, second]).is_none());
        }
    }
}
