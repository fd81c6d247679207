//! Counters of the flows of each service on the proxy path. The kernel path has its own.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use weft_model::Name;
use weft_runtime::metrics::{Counter, Gauge, GaugeGuard};

/// The TCP and UDP flows of one service that one worker carries.
#[derive(Debug, Default)]
pub(crate) struct FlowCounts {
    begun: Counter,
    open: Arc<Gauge>,
}

impl FlowCounts {
    /// Counts a new flow; it counts as open until the result is dropped.
    pub(crate) fn begin(&self) -> GaugeGuard<Arc<Gauge>> {
        self.begun.increment();
        GaugeGuard::new(self.open.clone())
    }
}

/// The counters of one worker, for readers on other threads.
pub(crate) type SharedFlowCounts = Mutex<HashMap<Name, Arc<FlowCounts>>>;

/// The counters of one worker, for the worker itself: counting takes the lock only for the first flow of a service.
#[derive(Debug, Default)]
pub(crate) struct WorkerFlowCounts(RefCell<HashMap<Name, Arc<FlowCounts>>>);

impl WorkerFlowCounts {
    /// The counters of a service, which readers see from now on.
    pub(crate) fn of(&self, service: &Name, shown: &SharedFlowCounts) -> Arc<FlowCounts> {
        let mut own = self.0.borrow_mut();
        if let Some(flow_counts) = own.get(service) {
            return flow_counts.clone();
        }
        let flow_counts = Arc::<FlowCounts>::default();
        own.insert(service.clone(), flow_counts.clone());
        lock(shown).insert(service.clone(), flow_counts.clone());
        flow_counts
    }

    /// Removes the counters of services that are removed and have no open flow.
    pub(crate) fn forget(&self, is_gone: impl Fn(&Name) -> bool, shown: &SharedFlowCounts) {
        let has_ended =
            |name: &Name, flow_counts: &FlowCounts| is_gone(name) && flow_counts.open.get() == 0;
        self.0.borrow_mut().retain(|name, flow_counts| !has_ended(name, flow_counts));
        lock(shown).retain(|name, flow_counts| !has_ended(name, flow_counts));
    }
}

/// The number of flows that a service has had and has now, over all these workers.
pub(crate) fn flows_of<'a>(
    service: &str,
    workers: impl Iterator<Item = &'a SharedFlowCounts>,
) -> (u64, u64) {
    workers.fold((0, 0), |(begun, open), shown| {
        let shown = lock(shown);
        let flow_counts = shown.get(service);
        let [more, more_open] = [|t: &FlowCounts| t.begun.get(), |t: &FlowCounts| t.open.get()]
            .map(|pick| flow_counts.map_or(0, |flow_counts| pick(flow_counts)));
        (begun + more, open + more_open)
    })
}

fn lock(shown: &SharedFlowCounts) -> std::sync::MutexGuard<'_, HashMap<Name, Arc<FlowCounts>>> {
    shown.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_of_workers_are_summed_and_counters_of_a_removed_service_go_with_its_last_flow() {
        let a = WorkerFlowCounts::default();
        let b = WorkerFlowCounts::default();
        let shown = [SharedFlowCounts::default(), SharedFlowCounts::default()];
        let [shown_a, shown_b] = &shown;
        let echo: Name = "echo".into();
        let first = a.of(&echo, shown_a).begin();
        let second = a.of(&echo, shown_a).begin();
        let _third = b.of(&echo, shown_b).begin();
        drop(first);
        assert_eq!(flows_of("echo", shown.iter()), (3, 2));
        assert_eq!(flows_of("other", shown.iter()), (0, 0));

        a.forget(|_| true, shown_a);
        assert_eq!(flows_of("echo", shown.iter()), (3, 2), "a flow is open");
        drop(second);
        a.forget(|_| false, shown_a);
        assert_eq!(flows_of("echo", shown.iter()), (3, 1), "the service exists");
        a.forget(|_| true, shown_a);
        assert_eq!(flows_of("echo", shown.iter()), (1, 1));
    }
}
