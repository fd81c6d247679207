//! The certificates that trust stores stopped accepting, as plain data that is published with a plan.

use std::sync::Arc;
use std::time::Duration;

use weft_certs::{Proof, TrustDelta, TrustStore};

/// Grace period of a connection once the configuration no longer contains the trust store that verified its peer.
const REMOVED_STORE_DRAIN: Duration = Duration::from_secs(600);
/// The number of revocation events that a plan carries. A worker that missed more of them in a row closes every
/// connection.
pub(crate) const EVENT_LIMIT: usize = 64;

/// The certificates that trust stores stopped accepting, as published with a plan. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct RevocationHistory {
    /// The number of events since the process started.
    pub(crate) count: u64,
    /// The latest events, oldest first.
    latest: Arc<[RevocationEvent]>,
}

/// Certificates that one trust store stopped accepting at one time.
#[derive(Debug, Clone)]
pub(crate) struct RevocationEvent {
    /// The trust store; all its versions have one lineage.
    pub(crate) lineage: u64,
    /// The first generation of the trust store that does not accept the certificates.
    pub(crate) generation: u64,
    /// The certificates; none: all that the trust store accepted.
    pub(crate) links: Option<Arc<TrustDelta>>,
    /// Grace period of the requests in flight.
    pub(crate) drain: Duration,
}

impl RevocationHistory {
    /// Adds the certificates that `previous` accepted and `store`, its replacement, does not.
    pub(crate) fn add(&mut self, store: &TrustStore, previous: &TrustStore) {
        let links = store.delta_since(previous);
        if links.is_empty() {
            return;
        }
        let version = store.version();
        let lineage = version.lineage;
        let generation = version.generation;
        let drain = store.policy().drain;
        self.push(RevocationEvent { lineage, generation, links: Some(Arc::new(links)), drain });
    }

    /// Adds everything that `store` accepted, because the configuration no longer contains this store.
    pub(crate) fn add_all(&mut self, store: &TrustStore) {
        let lineage = store.version().lineage;
        let drain = store.policy().drain.max(REMOVED_STORE_DRAIN);
        self.push(RevocationEvent { lineage, generation: u64::MAX, links: None, drain });
    }

    fn push(&mut self, new: RevocationEvent) {
        let kept =
            self.latest.iter().skip((self.latest.len() + 1).saturating_sub(EVENT_LIMIT)).cloned();
        self.latest = kept.chain([new]).collect();
        self.count += 1;
    }

    /// Whether a proof that a trust store accepted at `store` has become invalid.
    pub(crate) fn invalidates(&self, proof: &Proof, store: weft_certs::TrustStoreVersion) -> bool {
        let weft_certs::TrustStoreVersion { lineage, generation } = store;
        let mut later = self
            .latest
            .iter()
            .filter(|event| event.lineage == lineage && event.generation > generation);
        later.any(|event| event.invalidates(proof))
    }

    /// The events after the first `applied` ones; none when some of them were dropped.
    pub(crate) fn since(&self, applied: u64) -> Option<&[RevocationEvent]> {
        let missed = usize::try_from(self.count.saturating_sub(applied)).unwrap_or(usize::MAX);
        self.latest.get(self.latest.len().checked_sub(missed)?..)
    }
}

impl RevocationEvent {
    /// Whether a proof depends on one of the certificates.
    pub(crate) fn invalidates(&self, proof: &Proof) -> bool {
        self.links.as_ref().is_none_or(|links| links.invalidates(proof))
    }
}
