//! A bounded table of flows with idle expiry. A state machine without I/O: every call takes `now`.
//!
//! Invariants: the table holds at most `limit` flows. A flow keeps its value, and with it its endpoint, while
//! it is in the table. A flow that was silent for its idle timeout is removed by the next call of
//! [`FlowTable::expire`].

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use weft_model::FlowTuple;

/// The error for a new flow when the table is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableFull;

/// Flows, each with a value.
#[derive(Debug)]
pub struct FlowTable<V> {
    flows: HashMap<FlowTuple, FlowEntry<V>>,
    /// When to check each flow for expiry. A flow that was used since is rescheduled by the check, so using a
    /// flow does not touch this map.
    deadlines: BTreeMap<Deadline, FlowTuple>,
    /// The number of deadlines scheduled so far, which makes deadlines of the same instant distinct.
    deadline_count: u64,
    limit: usize,
}

/// When a flow is checked for expiry.
type Deadline = (Instant, u64);

#[derive(Debug)]
struct FlowEntry<V> {
    value: V,
    idle_timeout: Duration,
    last_used: Instant,
    deadline: Deadline,
}

impl<V> FlowTable<V> {
    /// Creates a table of at most `limit` flows.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { flows: HashMap::new(), deadlines: BTreeMap::new(), deadline_count: 0, limit }
    }

    /// Returns the value of a flow, and marks the flow as used.
    pub fn get(&mut self, tuple: &FlowTuple, now: Instant) -> Option<&V> {
        let flow = self.flows.get_mut(tuple)?;
        flow.last_used = now;
        Some(&flow.value)
    }

    /// Marks a flow as used, for traffic from the endpoint.
    pub fn touch(&mut self, tuple: &FlowTuple, now: Instant) {
        if let Some(flow) = self.flows.get_mut(tuple) {
            flow.last_used = now;
        }
    }

    /// Whether the table has room for a new flow.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.flows.len() < self.limit
    }

    /// Adds a flow, or replaces the flow of the same 5-tuple.
    ///
    /// # Errors
    /// [`TableFull`] when the table is at its limit and the flow is new.
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
        self.remove(&tuple);
        let deadline = self.schedule(now + idle_timeout, tuple);
        self.flows.insert(tuple, FlowEntry { value, idle_timeout, last_used: now, deadline });
        debug_assert!(self.flows.len() <= self.limit, "the table holds more flows than its limit");
        debug_assert!(self.deadlines.len() == self.flows.len(), "each flow has one deadline");
        Ok(())
    }

    fn schedule(&mut self, at: Instant, tuple: FlowTuple) -> Deadline {
        self.deadline_count += 1;
        let deadline = (at, self.deadline_count);
        self.deadlines.insert(deadline, tuple);
        deadline
    }

    /// Removes a flow and returns its value.
    pub fn remove(&mut self, tuple: &FlowTuple) -> Option<V> {
        let flow = self.flows.remove(tuple)?;
        self.deadlines.remove(&flow.deadline);
        Some(flow.value)
    }

    /// Removes and returns the flows that were silent for their idle timeout.
    pub fn expire(&mut self, now: Instant) -> Vec<(FlowTuple, V)> {
        let mut removed = Vec::new();
        while let Some(due) = self.deadlines.first_entry().filter(|due| due.key().0 <= now) {
            let tuple = due.remove();
            let Some(until) = self.flows.get(&tuple).map(|flow| flow.last_used + flow.idle_timeout)
            else {
                continue;
            };
            if until > now {
                let deadline = self.schedule(until, tuple);
                self.flows.entry(tuple).and_modify(|flow| flow.deadline = deadline);
            } else if let Some(flow) = self.flows.remove(&tuple) {
                removed.push((tuple, flow.value));
            }
        }
        removed
    }

    /// Removes the flows whose value matches, and returns the values.
    pub fn remove_if(&mut self, should_remove: impl Fn(&V) -> bool) -> Vec<V> {
        let lost = self.flows.extract_if(|_, flow| should_remove(&flow.value));
        let deadlines = &mut self.deadlines;
        lost.map(|(_, flow)| {
            deadlines.remove(&flow.deadline);
            flow.value
        })
        .collect()
    }

    /// The number of flows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    /// Whether the table has no flows.
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

    #[expect(clippy::disallowed_methods, reason = "a starting point for the test's own clock")]
    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn full_table_refuses_new_flow_and_keeps_old_one() {
        let now = start();
        let mut table = FlowTable::new(1);
        assert_eq!(table.insert(tuple(1), "a", IDLE, now), Ok(()));
        assert_eq!(table.insert(tuple(2), "b", IDLE, now), Err(TableFull));
        assert_eq!(table.get(&tuple(1), now), Some(&"a"));
        assert_eq!(table.get(&tuple(2), now), None);
    }

    #[test]
    fn removed_flow_frees_its_slot_and_can_be_added_again() {
        let now = start();
        let mut table = FlowTable::new(2);
        table.insert(tuple(1), "lost", IDLE, now).expect("the table has room");
        table.insert(tuple(2), "kept", IDLE, now).expect("the table has room");
        assert_eq!(table.remove_if(|value| *value == "lost"), ["lost"]);
        table.insert(tuple(1), "new", IDLE, now + IDLE / 2).expect("the table has room");
        assert_eq!(
            table.expire(now + IDLE),
            [(tuple(2), "kept")],
            "a deadline of the removed flow does not expire the new one"
        );
        assert_eq!(table.expire(now + 2 * IDLE), [(tuple(1), "new")]);
    }

    /// The simplest implementation of the same table.
    #[derive(Default)]
    struct Model(HashMap<FlowTuple, (u32, Duration, Instant)>);

    impl Model {
        fn expire(&mut self, now: Instant) -> Vec<(FlowTuple, u32)> {
            let removed = self.0.extract_if(|_, (_, idle, last_used)| *last_used + *idle <= now);
            removed.map(|(tuple, (value, ..))| (tuple, value)).collect()
        }
    }

    /// Runs random operations on a table and its model, and compares their results.
    fn run_against_model(seed: u32) {
        const LIMIT: usize = 40;
        let mut state = seed;
        let mut draw = |below: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % below
        };
        let mut table = FlowTable::new(LIMIT);
        let mut model = Model::default();
        let mut now = start();
        for step in 0..2000 {
            let context = || format!("seed {seed}, step {step}");
            let tuple = tuple(u16::try_from(draw(60)).expect("60 fits into u16"));
            match draw(10) {
                0..=3 if table.get(&tuple, now).is_none() => {
                    let idle = Duration::from_millis([30, 120, 7000][draw(3) as usize]);
                    let taken = table.insert(tuple, step, idle, now);
                    assert_eq!(taken.is_ok(), model.0.len() < LIMIT, "{}", context());
                    if taken.is_ok() {
                        model.0.insert(tuple, (step, idle, now));
                    }
                }
                0..=5 => {
                    let found = table.get(&tuple, now).copied();
                    let known = model.0.get_mut(&tuple);
                    assert_eq!(found, known.as_ref().map(|flow| flow.0), "{}", context());
                    if let Some(flow) = known {
                        flow.2 = now;
                    }
                }
                6 => {
                    table.touch(&tuple, now);
                    if let Some(flow) = model.0.get_mut(&tuple) {
                        flow.2 = now;
                    }
                }
                7 => {
                    let lost = draw(7);
                    let mut removed = table.remove_if(|value| value % 7 == lost);
                    let expected = model.0.extract_if(|_, (value, ..)| *value % 7 == lost);
                    let mut expected: Vec<u32> = expected.map(|(_, (value, ..))| value).collect();
                    removed.sort_unstable();
                    expected.sort_unstable();
                    assert_eq!(removed, expected, "{}", context());
                }
                _ => {
                    now += Duration::from_millis(draw(40).into());
                    let mut removed = table.expire(now);
                    let mut expected = model.expire(now);
                    removed.sort_unstable_by_key(|(_, value)| *value);
                    expected.sort_unstable_by_key(|(_, value)| *value);
                    assert_eq!(removed, expected, "{}", context());
                }
            }
            assert_eq!(table.len(), model.0.len(), "{}", context());
        }
    }

    #[test]
    fn table_behaves_like_the_simplest_implementation() {
        (0..200).for_each(run_against_model);
    }

    #[test]
    fn flow_in_use_does_not_expire() {
        let now = start();
        let mut table = FlowTable::new(10);
        table.insert(tuple(1), "used", IDLE, now).expect("the table has room");
        table.insert(tuple(2), "silent", IDLE, now).expect("the table has room");
        table.insert(tuple(3), "answered", IDLE, now).expect("the table has room");
        let later = now + IDLE - Duration::from_secs(1);
        assert!(table.get(&tuple(1), later).is_some());
        table.touch(&tuple(3), later);
        assert_eq!(table.expire(now + IDLE), [(tuple(2), "silent")]);
        assert_eq!(table.len(), 2);
        assert_eq!(table.expire(later + IDLE).len(), 2);
        assert!(table.is_empty());
    }
}
