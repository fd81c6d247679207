//! Which flows exist, and what each one has. A state machine without I/O: every call takes `now`.
//!
//! Invariants: at most `limit` flows; a flow keeps its value, and with it its endpoint, while it
//! lives; a flow that is silent for its idle timeout is gone at the next call of
//! [`FlowTable::expire`] behind that moment.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use weft_model::FlowTuple;

/// The table is full, and the flow is new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableFull;

/// Flows with what belongs to each.
#[derive(Debug)]
pub struct FlowTable<V> {
    flows: HashMap<FlowTuple, Flow<V>>,
    /// When to look at a flow again, in order for each timeout: a flow that was used since is put
    /// back, so using a flow costs nothing here.
    visits: HashMap<Duration, VecDeque<(Instant, FlowTuple)>>,
    limit: usize,
}

#[derive(Debug)]
struct Flow<V> {
    value: V,
    idle_timeout: Duration,
    used: Instant,
}

impl<V> FlowTable<V> {
    /// A table of at most `limit` flows.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { flows: HashMap::new(), visits: HashMap::new(), limit }
    }

    /// A flow that exists, which is thereby used.
    pub fn get(&mut self, tuple: &FlowTuple, now: Instant) -> Option<&V> {
        let flow = self.flows.get_mut(tuple)?;
        flow.used = now;
        Some(&flow.value)
    }

    /// Notes that a flow was used from its other side.
    pub fn touch(&mut self, tuple: &FlowTuple, now: Instant) {
        if let Some(flow) = self.flows.get_mut(tuple) {
            flow.used = now;
        }
    }

    /// Whether a new flow would find room.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.flows.len() < self.limit
    }

    /// Remembers a new flow.
    ///
    /// # Errors
    /// [`TableFull`] at the limit: the old flows are kept, the new one is not.
    pub fn insert(
        &mut self,
        tuple: FlowTuple,
        value: V,
        idle_timeout: Duration,
        now: Instant,
    ) -> Result<(), TableFull> {
        if !self.has_room() && !self.flows.contains_key(&tuple) {
            return Err(TableFull);
        }
        self.flows.insert(tuple, Flow { value, idle_timeout, used: now });
        self.visits.entry(idle_timeout).or_default().push_back((now + idle_timeout, tuple));
        debug_assert!(self.flows.len() <= self.limit, "the table holds more flows than its limit");
        Ok(())
    }

    /// Forgets a flow.
    pub fn remove(&mut self, tuple: &FlowTuple) -> Option<V> {
        self.flows.remove(tuple).map(|flow| flow.value)
    }

    /// Forgets the flows that were silent for too long, and gives them back.
    pub fn expire(&mut self, now: Instant) -> Vec<(FlowTuple, V)> {
        let mut gone = Vec::new();
        for visits in self.visits.values_mut() {
            while let Some((at, tuple)) = visits.front().copied().filter(|(at, _)| *at <= now) {
                visits.pop_front();
                let Some(flow) = self.flows.get(&tuple) else {
                    continue;
                };
                let until = flow.used + flow.idle_timeout;
                debug_assert!(
                    until >= at || flow.used <= at,
                    "a visit is never later than the flow's end"
                );
                if until > now {
                    visits.push_back((until, tuple));
                } else if let Some(flow) = self.flows.remove(&tuple) {
                    gone.push((tuple, flow.value));
                }
            }
        }
        self.visits.retain(|_, visits| !visits.is_empty());
        gone
    }

    /// Forgets the flows that are lost, and gives them back.
    pub fn forget(&mut self, is_lost: impl Fn(&V) -> bool) -> Vec<V> {
        let lost = self.flows.extract_if(|_, flow| is_lost(&flow.value));
        lost.map(|(_, flow)| flow.value).collect()
    }

    /// How many flows there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    /// Whether there is no flow.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_model::Transport;

    const IDLE: Duration = Duration::from_secs(120);

    fn tuple(port: u16) -> FlowTuple {
        FlowTuple {
            transport: Transport::Udp,
            client: ([10, 0, 0, 1], port).into(),
            destination: ([10, 96, 0, 1], 53).into(),
        }
    }

    #[allow(clippy::disallowed_methods, reason = "a starting point for the test's own clock")]
    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn a_full_table_refuses_the_new_flow_and_keeps_the_old_one() {
        let now = start();
        let mut table = FlowTable::new(1);
        assert_eq!(table.insert(tuple(1), "a", IDLE, now), Ok(()));
        assert_eq!(table.insert(tuple(2), "b", IDLE, now), Err(TableFull));
        assert_eq!(table.get(&tuple(1), now), Some(&"a"));
        assert_eq!(table.get(&tuple(2), now), None);
    }

    #[test]
    fn a_lost_flow_makes_room_and_may_come_again() {
        let now = start();
        let mut table = FlowTable::new(2);
        table.insert(tuple(1), "lost", IDLE, now).expect("room");
        table.insert(tuple(2), "kept", IDLE, now).expect("room");
        assert_eq!(table.forget(|value| *value == "lost"), ["lost"]);
        table.insert(tuple(1), "new", IDLE, now + IDLE / 2).expect("room");
        assert_eq!(table.expire(now + IDLE), [(tuple(2), "kept")], "an old visit ends no new flow");
        assert_eq!(table.expire(now + 2 * IDLE), [(tuple(1), "new")]);
    }

    #[test]
    fn a_flow_lives_as_long_as_it_is_used() {
        let now = start();
        let mut table = FlowTable::new(10);
        table.insert(tuple(1), "used", IDLE, now).expect("room");
        table.insert(tuple(2), "silent", IDLE, now).expect("room");
        table.insert(tuple(3), "answered", IDLE, now).expect("room");
        let later = now + IDLE - Duration::from_secs(1);
        assert!(table.get(&tuple(1), later).is_some());
        table.touch(&tuple(3), later);
        assert_eq!(table.expire(now + IDLE), [(tuple(2), "silent")]);
        assert_eq!(table.len(), 2);
        assert_eq!(table.expire(later + IDLE).len(), 2);
        assert!(table.is_empty());
    }
}
