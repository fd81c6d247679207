//! Finds the connections that rely on a certificate, and ends them once it is revoked, expires, or loses its trust
//! root.
//!
//! Each worker has an index of its mutual TLS connections, to clients and to endpoints, by the certificates that the
//! peer's proof depends on. When a trust store stops accepting a certificate, the index finds the affected
//! connections without visiting the others, and changes their [`ConnectionStatus`]. `stream.rs` checks that before
//! each read and write, whatever protocol runs over the connection. A connection whose peer certificate expired takes
//! no further requests and is closed an hour later.
//!
//! No change is missed: the planner publishes a plan together with its revocations before it wakes the workers, and a
//! connection that registers late is checked against the plan of that moment.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use weft_certs::{LinkId, Proof, TrustStore};
use weft_runtime::connections::{CloseReason, ConnectionStatus};

use crate::metrics::SidecarMetrics;
use crate::plan::SidecarPlan;
use crate::revocation_history::{RevocationEvent, RevocationHistory};

/// Grace period of the requests on a connection whose peer certificate expired.
const EXPIRED_DRAIN: Duration = Duration::from_secs(3600);
/// The number of closed connections whose tasks are woken in one batch. Closing one takes about 20 us.
const CLOSE_BATCH: usize = 2;

/// The connections of a worker whose peer proved its identity.
#[derive(Debug, Default)]
pub(crate) struct CertificateIndex {
    entries: RefCell<HashMap<u64, IndexEntry>>,
    /// The connections by trust store (lineage) and certificate, for each certificate that a proof depends on: the
    /// peer's own, and those of the authorities above it.
    by_link: RefCell<HashMap<(u64, LinkId), BTreeSet<u64>>>,
    /// The connections by the time of their next state change, in seconds since 1970.
    by_deadline: RefCell<BTreeSet<(u64, u64)>>,
    next: Cell<u64>,
    /// The number of revocation events that were applied.
    applied: Cell<u64>,
    /// Closed connections whose tasks were not woken yet.
    to_wake: RefCell<VecDeque<Rc<ConnectionStatus>>>,
}

#[derive(Debug)]
struct IndexEntry {
    status: Rc<ConnectionStatus>,
    proof: Proof,
    /// The trust store that verified the proof; all its versions have one lineage.
    lineage: u64,
    /// Whether a certificate that the proof depends on was revoked.
    revoked: bool,
    /// The time of the next state change, in seconds since 1970.
    deadline: u64,
}

/// A connection in the index. Dropping it removes the entry.
#[derive(Debug)]
pub(crate) struct IndexedConnection {
    pub(crate) status: Rc<ConnectionStatus>,
    index: Rc<CertificateIndex>,
    id: u64,
}

impl Drop for IndexedConnection {
    fn drop(&mut self) {
        self.index.remove(self.id);
    }
}

/// Adds connections to the index, with the revocations that are published at that moment.
#[derive(Debug)]
pub(crate) struct PeerRegistrar {
    index: Rc<CertificateIndex>,
    /// The published plan, since the worker's own may be an older one.
    plans: watch::Receiver<Arc<SidecarPlan>>,
}

impl PeerRegistrar {
    pub(crate) fn new(
        index: Rc<CertificateIndex>,
        plans: watch::Receiver<Arc<SidecarPlan>>,
    ) -> Self {
        Self { index, plans }
    }

    /// Adds a connection whose peer proved its identity to `trust` with `proof`.
    pub(crate) fn register(
        &self,
        status: Rc<ConnectionStatus>,
        proof: Proof,
        trust: &TrustStore,
    ) -> IndexedConnection {
        let latest = self.plans.borrow().revocations.clone();
        self.index.add(status, proof, trust, &latest)
    }
}

impl CertificateIndex {
    /// Adds a connection whose peer proved its identity to `trust` with `proof`. `latest` are the revocations
    /// published up to now.
    pub(crate) fn add(
        self: &Rc<Self>,
        status: Rc<ConnectionStatus>,
        proof: Proof,
        trust: &TrustStore,
        latest: &RevocationHistory,
    ) -> IndexedConnection {
        let id = self.next.get();
        self.next.set(id + 1);
        let lineage = trust.version().lineage;
        let revoked = latest.invalidates(&proof, trust.version());
        if revoked {
            status.close(CloseReason::PeerRevoked);
        }
        let deadline = proof.expires_at().as_secs();
        self.by_deadline.borrow_mut().insert((deadline, id));
        let mut by_link = self.by_link.borrow_mut();
        for link in proof.links() {
            by_link.entry((lineage, *link)).or_default().insert(id);
        }
        let entry = IndexEntry { status: status.clone(), proof, lineage, revoked, deadline };
        self.entries.borrow_mut().insert(id, entry);
        IndexedConnection { status, index: self.clone(), id }
    }

    fn remove(&self, id: u64) {
        let Some(entry) = self.entries.borrow_mut().remove(&id) else {
            return;
        };
        self.by_deadline.borrow_mut().remove(&(entry.deadline, id));
        let mut by_link = self.by_link.borrow_mut();
        for link in entry.proof.links() {
            let key = (entry.lineage, *link);
            if let Some(held) = by_link.get_mut(&key) {
                held.remove(&id);
                if held.is_empty() {
                    by_link.remove(&key);
                }
            }
        }
    }

    /// Closes the connections that depend on certificates revoked since the last call, or drains them where the
    /// revocation policy sets a grace period. Closed connections pass no further bytes; [`Self::wake_closed`] wakes
    /// their tasks. `now` is in seconds since 1970.
    pub(crate) fn apply(&self, history: &RevocationHistory, now: u64, metrics: &SidecarMetrics) {
        let applied = self.applied.replace(history.count);
        let affected: BTreeMap<u64, Duration> = match history.since(applied) {
            Some(new) => {
                let with_drain = |event: &RevocationEvent| {
                    self.affected_by(event).into_iter().zip(std::iter::repeat(event.drain))
                };
                let mut affected = BTreeMap::new();
                for (id, drain) in new.iter().flat_map(with_drain) {
                    let shortest = affected.entry(id).or_insert(drain);
                    *shortest = drain.min(*shortest);
                }
                affected
            }
            None => self.entries.borrow().keys().map(|id| (*id, Duration::ZERO)).collect(),
        };
        let mut closed = 0;
        let mut draining = 0;
        for (id, drain) in &affected {
            let mut entries = self.entries.borrow_mut();
            let Some(entry) = entries.get_mut(id).filter(|entry| !entry.revoked) else {
                continue;
            };
            entry.revoked = true;
            metrics.connections_revoked.increment();
            if drain.is_zero() {
                closed += 1;
                if entry.status.mark_closed(CloseReason::PeerRevoked) {
                    self.to_wake.borrow_mut().push_back(entry.status.clone());
                }
            } else {
                draining += 1;
                self.drain_until(*id, entry, now + drain.as_secs());
            }
        }
        if closed + draining > 0 {
            tracing::info!(closed, draining, "peer certificates of connections revoked");
        }
    }

    /// Wakes the tasks of one batch of closed connections, small enough that other connections are not delayed. Returns
    /// whether more are waiting.
    pub(crate) fn wake_closed(&self) -> bool {
        let mut to_wake = self.to_wake.borrow_mut();
        let some = to_wake.len().min(CLOSE_BATCH);
        to_wake.drain(..some).for_each(|status| status.wake());
        !to_wake.is_empty()
    }

    fn affected_by(&self, event: &RevocationEvent) -> Vec<u64> {
        let by_link = self.by_link.borrow();
        let lineage = event.lineage;
        let entries = self.entries.borrow();
        if let Some(links) = event.links.as_ref().filter(|all| all.len() < by_link.len()) {
            let held = links.links().filter_map(|link| by_link.get(&(lineage, *link)));
            let is_affected =
                |id: &u64| entries.get(id).is_some_and(|entry| links.invalidates(&entry.proof));
            return held.flatten().copied().filter(is_affected).collect();
        }
        // With a long list, for instance the first one of a store, visiting the connections is cheaper.
        let gone = entries
            .iter()
            .filter(|(_, entry)| entry.lineage == lineage && event.invalidates(&entry.proof));
        gone.map(|(id, _)| *id).collect()
    }

    /// Drains the connections whose peer certificates expired, and closes those whose grace period has expired.
    pub(crate) fn tick(&self, now: u64, metrics: &SidecarMetrics) {
        let mut by_deadline = self.by_deadline.borrow_mut();
        let mut entries = self.entries.borrow_mut();
        while let Some((deadline, id)) =
            by_deadline.first().copied().filter(|(deadline, _)| *deadline <= now)
        {
            by_deadline.remove(&(deadline, id));
            let Some(entry) = entries.get_mut(&id) else {
                continue;
            };
            if entry.status.refuses_requests() {
                entry.status.close(entry.reason());
                continue;
            }
            metrics.connections_expired.increment();
            entry.status.drain(entry.reason());
            entry.deadline = now + EXPIRED_DRAIN.as_secs();
            by_deadline.insert((entry.deadline, id));
        }
    }

    fn drain_until(&self, id: u64, entry: &mut IndexEntry, until: u64) {
        entry.status.drain(entry.reason());
        let mut by_deadline = self.by_deadline.borrow_mut();
        by_deadline.remove(&(entry.deadline, id));
        // A connection that is draining already gets no extension.
        entry.deadline = entry.deadline.min(until);
        by_deadline.insert((entry.deadline, id));
    }
}

impl IndexEntry {
    /// Why the connection ends.
    fn reason(&self) -> CloseReason {
        if self.revoked { CloseReason::PeerRevoked } else { CloseReason::PeerExpired }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use rustls_pki_types::pem::PemObject;
    use rustls_pki_types::{CertificateDer, UnixTime};
    use weft_certs::request::{self, CheckedRequest};
    use weft_certs::{Authority, RevokedCertificate, TrustParts, tls};
    use weft_model::RevocationPolicy;

    use super::*;
    use crate::revocation_history::EVENT_LIMIT;

    struct TestPki {
        authority: Authority,
        now: SystemTime,
    }

    impl TestPki {
        fn new() -> Self {
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(UnixTime::now().as_secs());
            let files = Authority::create("mesh.test", now).unwrap();
            Self { authority: Authority::load(files, "mesh.test").unwrap(), now }
        }

        /// A certificate chain and the serial number of its leaf.
        fn sign(&self) -> (Vec<CertificateDer<'static>>, String) {
            let id = weft_model::SpiffeId::parse("spiffe://mesh.test/ns/a/sa/web").unwrap();
            let pending = request::make(&id).unwrap();
            let asked = CheckedRequest::parse(&pending.request_pem).unwrap();
            let issued = self.authority.issue(&asked, EXPIRED_DRAIN, self.now).unwrap();
            let chain = issued.chain.concat();
            let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).map(Result::unwrap);
            (chain.collect(), issued.serial)
        }

        fn store(
            &self,
            revoked: &[&str],
            number: u64,
            previous: Option<&Arc<TrustStore>>,
        ) -> Arc<TrustStore> {
            self.store_under(RevocationPolicy::default(), revoked, number, previous)
        }

        fn store_under(
            &self,
            policy: RevocationPolicy,
            revoked: &[&str],
            number: u64,
            previous: Option<&Arc<TrustStore>>,
        ) -> Arc<TrustStore> {
            let revocation =
                |serial: &&str| RevokedCertificate { serial: (*serial).to_owned(), at: self.now };
            let revoked: Vec<_> = revoked.iter().map(revocation).collect();
            let lists = self.authority.crls(&revoked, number, self.now, EXPIRED_DRAIN).unwrap();
            let roots = self.authority.trust_bundle().as_bytes();
            let revocations = Some(lists.as_bytes());
            let names = Vec::new();
            let parts = TrustParts { roots, revocations, names, policy };
            let previous = previous.map(Arc::as_ref);
            Arc::new(TrustStore::build(parts, previous, UnixTime::now()).unwrap())
        }
    }

    fn prove(chain: &[CertificateDer<'_>], trust: &Arc<TrustStore>) -> Proof {
        tls::prove_client(trust.clone(), chain, UnixTime::now()).unwrap()
    }

    /// A store with these root certificates and without CRLs.
    fn bundle(roots: &str, previous: Option<&Arc<TrustStore>>) -> Arc<TrustStore> {
        let previous = previous.map(Arc::as_ref);
        let now = UnixTime::now();
        Arc::new(TrustStore::load(roots.as_bytes(), None, Vec::new(), previous, now).unwrap())
    }

    #[test]
    fn connections_of_a_revoked_certificate_are_closed_and_others_stay_open() {
        let authority = TestPki::new();
        let index = Rc::<CertificateIndex>::default();
        let metrics = SidecarMetrics::default();
        let first = authority.store(&[], 1, None);
        let mut history = RevocationHistory::default();
        let (chain, serial) = authority.sign();
        let register = |chain: &[_], trust: &TrustStore, history: &RevocationHistory| {
            index.add(Rc::default(), prove(chain, &first), trust, history)
        };
        let [one, same] = [0; 2].map(|_| register(&chain, &first, &history));
        let other = register(&authority.sign().0, &first, &history);
        let second = authority.store(&[&serial], 2, Some(&first));
        history.add(&second, &first);
        index.apply(&history, 0, &metrics);
        let closed = [&one, &same, &other].map(|registered| registered.status.is_closed());
        assert_eq!(closed, [true, true, false]);
        // A handshake that the previous store accepted registers late and is closed. A connection that the
        // current store accepted stays open, whatever the list says.
        assert!(register(&chain, &first, &history).status.is_closed());
        assert!(!register(&chain, &second, &history).status.is_closed());
        assert_eq!(metrics.connections_revoked.get(), 2);
        // Revocations of another store do not apply to this one.
        let mut others = history.clone();
        let elsewhere = authority.store(&[], 1, None);
        others.add(&authority.store(&[&serial], 2, Some(&elsewhere)), &elsewhere);
        let again = register(&chain, &second, &history);
        index.apply(&others, 0, &metrics);
        assert!(!again.status.is_closed());
        drop((one, same, other, again));
        assert!(index.entries.borrow().is_empty() && index.by_link.borrow().is_empty());
        assert!(index.by_deadline.borrow().is_empty());
    }

    #[test]
    fn connection_through_an_intermediate_that_stays_outlives_the_root_above_it() {
        let authority = TestPki::new();
        let index = Rc::<CertificateIndex>::default();
        let metrics = SidecarMetrics::default();
        let root = authority.authority.trust_bundle();
        let below = authority.authority.certificate();
        let chain = authority.sign().0;
        let both = bundle(&format!("{root}{below}"), None);
        let through_below =
            index.add(Rc::default(), prove(&chain, &both), &both, &RevocationHistory::default());
        let mut history = RevocationHistory::default();
        let mut apply = |roots: &str, previous| {
            let next = bundle(roots, Some(previous));
            history.add(&next, previous);
            index.apply(&history, 0, &metrics);
            next
        };
        let lone = apply(below, &both);
        assert!(!through_below.status.is_closed());
        apply(TestPki::new().authority.trust_bundle(), &lone);
        assert!(through_below.status.is_closed());
        assert_eq!(metrics.connections_revoked.get(), 1);
    }

    #[test]
    fn worker_that_missed_too_many_revocations_closes_every_connection() {
        let authority = TestPki::new();
        let metrics = SidecarMetrics::default();
        let (chain, _) = authority.sign();
        let check = |missed: u64, expected: bool| {
            let index = Rc::<CertificateIndex>::default();
            let mut store = authority.store(&[], 1, None);
            let mut history = RevocationHistory::default();
            let registered = index.add(Rc::default(), prove(&chain, &store), &store, &history);
            for number in 0..missed {
                let serial = format!("{number:04x}");
                let next = authority.store(&[&serial], number + 2, Some(&store));
                history.add(&next, &store);
                store = next;
            }
            index.apply(&history, 0, &metrics);
            assert_eq!(registered.status.is_closed(), expected, "{missed}");
        };
        check(EVENT_LIMIT as u64, false);
        check(EVENT_LIMIT as u64 + 1, true);
    }

    #[test]
    fn requests_in_flight_may_finish_within_the_grace_period_of_the_policy() {
        let authority = TestPki::new();
        let index = Rc::<CertificateIndex>::default();
        let metrics = SidecarMetrics::default();
        let policy = RevocationPolicy { drain: Duration::from_secs(30), ..Default::default() };
        let first = authority.store(&[], 1, None);
        let mut history = RevocationHistory::default();
        let (chain, serial) = authority.sign();
        let proof = prove(&chain, &first);
        let registered = index.add(Rc::default(), proof.clone(), &first, &history);
        let second = authority.store_under(policy, &[&serial], 2, Some(&first));
        history.add(&second, &first);
        index.apply(&history, 1000, &metrics);
        let check = |now, draining, closed| {
            index.tick(now, &metrics);
            let status = &registered.status;
            assert_eq!((status.is_draining(), status.is_closed()), (draining, closed), "{now}");
        };
        check(1000, true, false);
        check(1029, true, false);
        check(1030, true, true);
        // A connection that registers now has no request in flight.
        assert!(index.add(Rc::default(), proof, &first, &history).status.is_closed());
        let counted = (metrics.connections_revoked.get(), metrics.connections_expired.get());
        assert_eq!(counted, (1, 0));
    }

    #[test]
    fn connection_with_an_expired_peer_certificate_drains_and_is_closed_after_an_hour() {
        let authority = TestPki::new();
        let index = Rc::<CertificateIndex>::default();
        let metrics = SidecarMetrics::default();
        let store = authority.store(&[], 1, None);
        let proof = prove(&authority.sign().0, &store);
        let ends = proof.expires_at().as_secs();
        let registered = index.add(Rc::default(), proof, &store, &RevocationHistory::default());
        let check = |now, draining, closed| {
            index.tick(now, &metrics);
            let status = &registered.status;
            assert_eq!((status.is_draining(), status.is_closed()), (draining, closed), "{now}");
        };
        check(ends - 1, false, false);
        check(ends, true, false);
        // A clock that is set back does not reopen the connection.
        check(ends - 1000, true, false);
        check(ends + EXPIRED_DRAIN.as_secs() - 1, true, false);
        check(ends + EXPIRED_DRAIN.as_secs(), true, true);
        assert_eq!(metrics.connections_expired.get(), 1);
    }
}
