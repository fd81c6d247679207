//! Whether the workers listen on the configured addresses, for readiness.
//!
//! Each worker binds its own sockets, a moment after a configuration comes into force. A process is ready
//! once every worker has bound them: traffic that an orchestrator sent earlier would be refused.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

/// What a worker reports after it has bound the sockets of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenReport {
    /// The number of the worker.
    pub worker: usize,
    /// The revision of the plan; 0 is the empty plan before the first configuration.
    pub revision: u64,
    /// The listeners that could not be bound, each with its error.
    pub failures: Vec<String>,
}

/// The last report of each worker.
#[derive(Debug)]
pub struct ListenStatus {
    workers: NonZeroUsize,
    last: BTreeMap<usize, ListenReport>,
}

impl ListenStatus {
    /// No worker has reported yet.
    #[must_use]
    pub fn new(workers: NonZeroUsize) -> Self {
        Self { workers, last: BTreeMap::new() }
    }

    /// Records a report. Returns its failures that the previous report of this worker did not have.
    pub fn record(&mut self, report: ListenReport) -> Vec<String> {
        let failures = report.failures.clone();
        let known = self.last.insert(report.worker, report);
        let known = known.map(|report| report.failures).unwrap_or_default();
        failures.into_iter().filter(|failure| !known.contains(failure)).collect()
    }

    /// Checks whether every worker listens on the sockets of a configuration.
    ///
    /// # Errors
    /// The number of workers that listen, or the listeners that could not be bound.
    pub fn ready(&self) -> Result<(), String> {
        let listening = self.last.values().filter(|report| report.revision > 0).count();
        if listening < self.workers.get() {
            return Err(format!("{listening} of {} workers are listening", self.workers));
        }
        let mut failures: Vec<&str> =
            self.last.values().flat_map(|report| &report.failures).map(String::as_str).collect();
        failures.sort_unstable();
        failures.dedup();
        if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(worker: usize, revision: u64, failure: &str) -> ListenReport {
        let failures = [failure].into_iter().filter(|text| !text.is_empty()).map(str::to_owned);
        ListenReport { worker, revision, failures: failures.collect() }
    }

    #[test]
    fn process_is_ready_when_the_last_worker_listens() {
        let mut listening = ListenStatus::new(NonZeroUsize::MIN.saturating_add(1));
        assert_eq!(listening.ready(), Err("0 of 2 workers are listening".into()));
        assert!(listening.record(report(0, 1, "")).is_empty());
        assert!(listening.record(report(1, 0, "")).is_empty());
        assert_eq!(listening.ready(), Err("1 of 2 workers are listening".into()));
        assert!(listening.record(report(1, 1, "")).is_empty());
        assert_eq!(listening.ready(), Ok(()));
    }

    #[test]
    fn bind_failure_of_a_worker_is_reported_until_that_worker_has_bound_it() {
        let mut listening = ListenStatus::new(NonZeroUsize::MIN.saturating_add(1));
        assert_eq!(listening.record(report(0, 1, "port 80: taken")), ["port 80: taken"]);
        assert!(listening.record(report(0, 1, "port 80: taken")).is_empty(), "reported before");
        assert!(listening.record(report(1, 1, "")).is_empty());
        assert_eq!(listening.ready(), Err("port 80: taken".into()));
        assert!(listening.record(report(0, 2, "")).is_empty());
        assert_eq!(listening.ready(), Ok(()));
    }
}
