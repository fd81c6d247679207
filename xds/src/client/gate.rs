//! When a configuration is complete enough to serve.
//!
//! A route may arrive before the cluster it names, whatever order the control plane keeps. Serving
//! it at once would fail requests that the old configuration served well, so the old one stays
//! until every name is resolved (gRFC A74), for 15 s at most. After that the new one is served as it
//! is, and what is missing fails closed.

use std::time::{Duration, Instant};

use weft_model::{Missing, Snapshot};

/// How long an incomplete configuration is held back: gRPC's and Envoy's does-not-exist timer.
const PATIENCE: Duration = Duration::from_secs(15);

/// Holds back what is not complete. Sans-io: every call takes `now`.
#[derive(Debug, Default)]
pub struct Gate {
    held: Option<Held>,
    revision: u64,
}

#[derive(Debug)]
struct Held {
    candidate: Snapshot,
    until: Instant,
}

impl Gate {
    /// A gate that has let nothing through.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Offers a configuration; gives back the one to serve, if it is time. `is_absent` tells of
    /// names that the server has said do not exist: nobody waits for those.
    pub fn offer(
        &mut self,
        candidate: Snapshot,
        is_absent: impl Fn(&Missing) -> bool,
        now: Instant,
    ) -> Option<Snapshot> {
        if candidate.missing().iter().all(is_absent) {
            return Some(self.pass(candidate));
        }
        let until = self.held.as_ref().map_or(now + PATIENCE, |held| held.until);
        self.held = Some(Held { candidate, until });
        self.tick(now)
    }

    /// Lets through what has waited long enough.
    pub fn tick(&mut self, now: Instant) -> Option<Snapshot> {
        let held = self.held.take_if(|held| held.until <= now)?;
        Some(self.pass(held.candidate))
    }

    /// When [`Gate::tick`] should be called.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.held.as_ref().map(|held| held.until)
    }

    /// What the configuration that is held back waits for.
    #[must_use]
    pub fn waiting_for(&self) -> Vec<Missing> {
        self.held.as_ref().map(|held| held.candidate.missing()).unwrap_or_default()
    }

    fn pass(&mut self, mut snapshot: Snapshot) -> Snapshot {
        self.held = None;
        self.revision += 1;
        snapshot.revision = self.revision;
        snapshot
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use weft_model::{
        Balance, Cluster, DEFAULT_RESPONSE_HEAD_BYTES, DEFAULT_UPSTREAM_IDLE, Discovery,
        UpstreamProtocol,
    };

    fn incomplete() -> Snapshot {
        let cluster = Cluster {
            name: "c".into(),
            discovery: Discovery::Endpoints("c".into()),
            balance: Balance::RoundRobin,
            connect_timeout: PATIENCE,
            protocol: UpstreamProtocol::Http1,
            tls: None,
            connection_limit: 1,
            request_limit: 1,
            response_head_bytes: DEFAULT_RESPONSE_HEAD_BYTES,
            idle_timeout: DEFAULT_UPSTREAM_IDLE,
        };
        let mut snapshot = Snapshot::default();
        snapshot.clusters.insert("c".into(), Arc::new(cluster));
        snapshot
    }

    #[test]
    fn the_old_configuration_serves_until_the_new_one_is_complete() {
        #[allow(clippy::disallowed_methods, reason = "a starting point for the test's own clock")]
        let start = Instant::now();
        let mut gate = Gate::new();
        assert_eq!(gate.offer(incomplete(), |_| false, start), None);
        assert_eq!(gate.waiting_for(), [Missing::Endpoints("c".into())]);
        let mut complete = incomplete();
        complete.endpoints.insert("c".into(), Arc::default());
        assert_eq!(gate.offer(complete, |_| false, start).map(|s| s.revision), Some(1));
        assert_eq!(gate.deadline(), None);
    }

    #[test]
    fn patience_ends_and_known_absence_needs_none() {
        #[allow(clippy::disallowed_methods, reason = "a starting point for the test's own clock")]
        let start = Instant::now();
        let mut gate = Gate::new();
        assert!(gate.offer(incomplete(), |_| true, start).is_some());
        assert!(gate.offer(incomplete(), |_| false, start).is_none());
        // A later offer does not move the deadline, or a busy control plane would move it for ever.
        assert!(gate.offer(incomplete(), |_| false, start + PATIENCE / 2).is_none());
        assert!(gate.tick(start + PATIENCE - Duration::from_millis(1)).is_none());
        assert_eq!(gate.tick(start + PATIENCE).map(|s| s.revision), Some(2));
        assert!(gate.tick(start + PATIENCE).is_none());
    }
}
