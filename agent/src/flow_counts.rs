//! How many flows each service has on the proxy path, as the kernel counts them on its own.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use weft_model::Name;
use weft_runtime::metrics::{Counter, Gauge, Opened};

/// One service's flows, TCP and UDP, that one worker carries.
#[derive(Debug, Default)]
pub(crate) struct FlowCounts {
    begun: Counter,
    open: Arc<Gauge>,
}

impl FlowCounts {
    /// Counts a flow that begins; it is open until the result is dropped.
    pub(crate) fn begin(&self) -> Opened<Arc<Gauge>> {
        self.begun.increment();
        Opened::new(self.open.clone())
    }
}

/// One worker's tallies, for others to read.
pub(crate) type SharedFlowCounts = Mutex<HashMap<Name, Arc<FlowCounts>>>;

/// One worker's tallies, for itself: what it counts by takes no lock but the first time.
#[derive(Debug, Default)]
pub(crate) struct WorkerFlowCounts(RefCell<HashMap<Name, Arc<FlowCounts>>>);

impl WorkerFlowCounts {
    /// The tally of a service, which is shown from now on.
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

    /// Forgets the services that are gone, and have no flow any more.
    pub(crate) fn forget(&self, is_gone: impl Fn(&Name) -> bool, shown: &SharedFlowCounts) {
        let has_ended =
            |name: &Name, flow_counts: &FlowCounts| is_gone(name) && flow_counts.open.get() == 0;
        self.0.borrow_mut().retain(|name, flow_counts| !has_ended(name, flow_counts));
        lock(shown).retain(|name, flow_counts| !has_ended(name, flow_counts));
    }
}

/// How many flows of a service there have been and are, of all these workers.
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
    fn flows_of_all_workers_add_up_and_a_service_that_is_gone_is_forgotten_with_its_last() {
        let (a, b) = (WorkerFlowCounts::default(), WorkerFlowCounts::default());
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
        assert_eq!(flows_of("echo", shown.iter()), (3, 1), "the service is there");
        a.forget(|_| true, shown_a);
        assert_eq!(flows_of("echo", shown.iter()), (1, 1));
    }
}
