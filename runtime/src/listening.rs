//! Whether the workers listen where the configuration says, for readiness.
//!
//! Each worker binds its own sockets, a moment after a configuration came into force. A process is
//! ready once the last of them has: an orchestrator that sent traffic earlier would see it refused.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

/// What a worker tells when it has bound what a plan asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenReport {
    /// The worker's number.
    pub worker: usize,
    /// The revision of the plan; 0 is the empty one before the first configuration.
    pub revision: u64,
    /// The listeners that could not be bound, each with its reason.
    pub failures: Vec<String>,
}

/// What the workers have told.
#[derive(Debug)]
pub struct ListenStatus {
    workers: NonZeroUsize,
    last: BTreeMap<usize, ListenReport>,
}

impl ListenStatus {
    /// Before any worker has told anything.
    #[must_use]
    pub fn new(workers: NonZeroUsize) -> Self {
        Self { workers, last: BTreeMap::new() }
    }

    /// Takes in what a worker told; gives the failures that it had not told before.
    pub fn record(&mut self, report: ListenReport) -> Vec<String> {
        let failures = report.failures.clone();
        let known = self.last.insert(report.worker, report);
        let known = known.map(|report| report.failures).unwrap_or_default();
        failures.into_iter().filter(|failure| !known.contains(failure)).collect()
    }

    /// Whether every worker listens by a configuration.
    ///
    /// # Errors
    /// What is missing.
    pub fn ready(&self) -> Result<(), String> {
        let listening = self.last.values().filter(|report| report.revision > 0).count();
        if listening < self.workers.get() {
            return Err(format!("{listening} of {} workers listen", self.workers));
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
    fn a_process_is_ready_when_its_last_worker_listens() {
        let mut listening = ListenStatus::new(NonZeroUsize::MIN.saturating_add(1));
        assert_eq!(listening.ready(), Err("0 of 2 workers listen".into()));
        assert!(listening.record(report(0, 1, "")).is_empty());
        assert!(listening.record(report(1, 0, "")).is_empty());
        assert_eq!(listening.ready(), Err("1 of 2 workers listen".into()));
        assert!(listening.record(report(1, 1, "")).is_empty());
        assert_eq!(listening.ready(), Ok(()));
    }

    #[test]
    fn a_failure_of_one_worker_stands_until_that_worker_has_bound_it() {
        let mut listening = ListenStatus::new(NonZeroUsize::MIN.saturating_add(1));
        assert_eq!(listening.record(report(0, 1, "port 80: taken")), ["port 80: taken"]);
        assert!(listening.record(report(0, 1, "port 80: taken")).is_empty(), "it is no news");
        assert!(listening.record(report(1, 1, "")).is_empty());
        assert_eq!(listening.ready(), Err("port 80: taken".into()));
        assert!(listening.record(report(0, 2, "")).is_empty());
        assert_eq!(listening.ready(), Ok(()));
    }
}
