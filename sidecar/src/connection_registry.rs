//! Whether a connection still stands: for as long as what its peer proved is true.
//!
//! Each worker has a registry of its connections whose peer proved who it is, clients and endpoints alike, by
//! what the proof idle on. When a trust store withdraws something, those that rest on it are found without
//! a look at the others. Such a connection gives and takes nothing any more, whatever is spoken over it:
//! that is asked in `stream.rs`, below everything else. One whose peer's certificate has ended takes no
//! more requests, and has an hour to finish.
//!
//! A change is never missed: the plan is published with what it withdraws before workers hear of it, and
//! who is enrolled late is checked against the plan of that moment.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::os::fd::RawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};
use tokio::sync::Notify;
use weft_certs::{LinkId, Proof, TrustDelta, TrustStore};

use crate::metrics::Metrics;

/// How long what goes on over a connection may last once its peer's certificate has ended.
const EXPIRED_DRAIN: Duration = Duration::from_secs(3600);
/// How long a connection may last once nothing of the configuration says how its peer is checked.
const REMOVED_STORE_DRAIN: Duration = Duration::from_secs(600);
/// How many withdrawals a plan tells of. A worker that missed more than that many in a row ends everything
/// that they could concern.
const DELTA_LIMIT: usize = 64;
/// How many connections are told at once that they have ended. To close one takes some 20 us.
const CLOSE_BATCH: usize = 2;

/// What trust stores have withdrawn, as a plan tells it. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct RevocationDeltas {
    /// How many there have been in all.
    count: u64,
    /// The latest, the newest last.
    latest: Arc<[RevocationDelta]>,
}

#[derive(Debug, Clone)]
struct RevocationDelta {
    line: u64,
    /// The first generation of the store that does not vouch for it.
    generation: u64,
    /// None: everything.
    links: Option<Arc<TrustDelta>>,
    /// How long what has begun may last.
    drain: Duration,
}

impl RevocationDeltas {
    /// Adds what `store` does not vouch for and `previous`, which it replaces, did.
    pub(crate) fn add(&mut self, store: &TrustStore, previous: &TrustStore) {
        let links = store.delta_since(previous);
        if links.is_empty() {
            return;
        }
        let standing = store.version();
        let (line, generation) = (standing.lineage, standing.generation);
        let drain = store.policy().drain;
        self.push(RevocationDelta { line, generation, links: Some(Arc::new(links)), drain });
    }

    /// Adds all that a store vouched for by which nobody is checked any more.
    pub(crate) fn add_all(&mut self, store: &TrustStore) {
        let line = store.version().lineage;
        let drain = store.policy().drain.max(REMOVED_STORE_DRAIN);
        self.push(RevocationDelta { line, generation: u64::MAX, links: None, drain });
    }

    fn push(&mut self, new: RevocationDelta) {
        let kept =
            self.latest.iter().skip((self.latest.len() + 1).saturating_sub(DELTA_LIMIT)).cloned();
        self.latest = kept.chain([new]).collect();
        self.count += 1;
    }

    /// Whether a proof that a store accepted does not stand any more.
    pub(crate) fn affect(&self, proof: &Proof, store: weft_certs::TrustStoreVersion) -> bool {
        let weft_certs::TrustStoreVersion { lineage, generation } = store;
        let mut later =
            self.latest.iter().filter(|w| w.line == lineage && w.generation > generation);
        later.any(|withdrawal| withdrawal.affects(proof))
    }

    /// Those that came behind the first `seen`; none when they are not told any more.
    fn since(&self, seen: u64) -> Option<&[RevocationDelta]> {
        let missed = usize::try_from(self.count.saturating_sub(seen)).unwrap_or(usize::MAX);
        self.latest.get(self.latest.len().checked_sub(missed)?..)
    }
}

impl RevocationDelta {
    fn affects(&self, proof: &Proof) -> bool {
        self.links.as_ref().is_none_or(|links| links.invalidates(proof))
    }
}

/// How it stands with one connection.
#[derive(Debug, Default)]
pub(crate) struct ConnectionStatus {
    state: Cell<ConnectionState>,
    /// Whether its end is told by whoever serves it, who then writes for a moment more.
    stays_writable: Cell<bool>,
    /// Whether nothing is under way, so that who is to leave may be ended.
    idle: Cell<bool>,
    changed: Notify,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum ConnectionState {
    #[default]
    Open,
    /// What has begun may be finished.
    Draining,
    /// Nothing is taken from it or given to it.
    Closed,
}

impl ConnectionStatus {
    /// Whether nothing may be read any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.state.get() == ConnectionState::Closed
    }

    /// Whether nothing may be written any more.
    pub(crate) fn is_write_closed(&self) -> bool {
        self.is_closed() && !self.stays_writable.get()
    }

    /// Whether no request may be begun.
    pub(crate) fn is_draining(&self) -> bool {
        self.state.get() != ConnectionState::Open
    }

    /// Says whether nothing is under way.
    pub(crate) fn set_idle(&self, idle: bool) {
        self.idle.set(idle);
    }

    /// Says that whoever serves the connection tells the peer of its end, and then closes it.
    pub(crate) fn keep_writable(&self) {
        self.stays_writable.set(true);
    }

    /// Resolves when no request may be begun any more.
    pub(crate) async fn draining(&self) {
        while !self.is_draining() {
            self.changed.notified().await;
        }
    }

    /// Resolves when the connection must end now, whether or not anybody reads from it.
    pub(crate) async fn closed(&self) {
        while !self.is_closed() {
            self.changed.notified().await;
        }
    }

    /// Resolves when the connection must end now. What wakes its task is the socket, whose reading side is
    /// shut.
    pub(crate) async fn closed_at_next_poll(&self) {
        std::future::poll_fn(|_| match self.is_closed() {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        })
        .await;
    }
}

/// The connections of a worker whose peer proved who it is.
#[derive(Debug, Default)]
pub(crate) struct ConnectionRegistry {
    members: RefCell<HashMap<u64, RegistryEntry>>,
    /// The members by what their proofs rest on. Most links are of one client, and few of everybody.
    by_link: RefCell<HashMap<(u64, LinkId), BTreeSet<u64>>>,
    /// The members by when their state changes next, in seconds since 1970.
    by_end: RefCell<BTreeSet<(u64, u64)>>,
    next: Cell<u64>,
    /// How many withdrawals were applied.
    seen: Cell<u64>,
    /// Those that have ended and do not know it yet.
    to_notify: RefCell<VecDeque<u64>>,
}

#[derive(Debug)]
struct RegistryEntry {
    standing: Rc<ConnectionStatus>,
    proof: Proof,
    line: u64,
    socket: RawFd,
    /// Whether something that it idle on was withdrawn.
    revoked: bool,
    /// When its state changes next.
    due: u64,
}

/// A connection's place on the registry.
#[derive(Debug)]
pub(crate) struct RegisteredConnection {
    pub(crate) standing: Rc<ConnectionStatus>,
    registry: Rc<ConnectionRegistry>,
    id: u64,
}

impl Drop for RegisteredConnection {
    fn drop(&mut self) {
        self.registry.remove(self.id);
    }
}

impl ConnectionRegistry {
    /// Puts a connection on the registry whose peer `trust` accepted by `proof`. Its place must not outlive
    /// `socket`. `latest` is what was withdrawn up to this moment.
    pub(crate) fn register(
        self: &Rc<Self>,
        socket: RawFd,
        proof: Proof,
        trust: &TrustStore,
        latest: &RevocationDeltas,
    ) -> RegisteredConnection {
        let (id, standing) = (self.next.get(), Rc::new(ConnectionStatus::default()));
        self.next.set(id + 1);
        let line = trust.version().lineage;
        if latest.affect(&proof, trust.version()) {
            standing.state.set(ConnectionState::Closed);
        }
        let due = proof.expires_at();
        self.by_end.borrow_mut().insert((due, id));
        let mut by_link = self.by_link.borrow_mut();
        for link in proof.links() {
            by_link.entry((line, *link)).or_default().insert(id);
        }
        let revoked = standing.is_closed();
        let member =
            RegistryEntry { standing: standing.clone(), proof, line, socket, revoked, due };
        self.members.borrow_mut().insert(id, member);
        RegisteredConnection { standing, registry: self.clone(), id }
    }

    fn remove(&self, id: u64) {
        let Some(member) = self.members.borrow_mut().remove(&id) else {
            return;
        };
        self.by_end.borrow_mut().remove(&(member.due, id));
        let mut by_link = self.by_link.borrow_mut();
        for link in member.proof.links() {
            let key = (member.line, *link);
            if let Some(held) = by_link.get_mut(&key) {
                held.remove(&id);
                if held.is_empty() {
                    by_link.remove(&key);
                }
            }
        }
    }

    /// Ends the connections that rest on what was withdrawn since the last time, or lets them leave where
    /// the policy gives them time. From then on nothing passes over them; [`Self::tell`] has them close.
    /// `now` is in seconds since 1970.
    pub(crate) fn apply(&self, withdrawals: &RevocationDeltas, now: u64, metrics: &Metrics) {
        let seen = self.seen.replace(withdrawals.count);
        let ended: BTreeMap<u64, Duration> = match withdrawals.since(seen) {
            Some(new) => {
                let resting = |w: &RevocationDelta| {
                    self.affected_by(w).into_iter().zip(std::iter::repeat(w.drain))
                };
                let mut ended = BTreeMap::new();
                for (id, drain) in new.iter().flat_map(resting) {
                    let shortest = ended.entry(id).or_insert(drain);
                    *shortest = drain.min(*shortest);
                }
                ended
            }
            None => self.members.borrow().keys().map(|id| (*id, Duration::ZERO)).collect(),
        };
        for (id, drain) in &ended {
            let mut members = self.members.borrow_mut();
            let Some(member) = members.get_mut(id).filter(|member| !member.revoked) else {
                continue;
            };
            member.revoked = true;
            metrics.connections_revoked.increment();
            if drain.is_zero() {
                if member.standing.state.replace(ConnectionState::Closed) != ConnectionState::Closed
                {
                    self.to_notify.borrow_mut().push_back(*id);
                }
            } else {
                self.drain_until(*id, member, now + drain.as_secs());
            }
        }
        if !ended.is_empty() {
            tracing::info!(
                connections = ended.len(),
                "ended connections whose peers are trusted no more"
            );
        }
    }

    /// Has some of those that have ended close, so few that nobody else waits for long; whether there are
    /// more.
    pub(crate) fn notify_closed(&self) -> bool {
        let mut to_notify = self.to_notify.borrow_mut();
        let some = to_notify.len().min(CLOSE_BATCH);
        let members = self.members.borrow();
        to_notify.drain(..some).filter_map(|id| members.get(&id)).for_each(RegistryEntry::notify);
        !to_notify.is_empty()
    }

    fn affected_by(&self, withdrawal: &RevocationDelta) -> Vec<u64> {
        let (by_link, line) = (self.by_link.borrow(), withdrawal.line);
        let members = self.members.borrow();
        if let Some(links) = withdrawal.links.as_ref().filter(|all| all.len() < by_link.len()) {
            let held = links.links().filter_map(|link| by_link.get(&(line, *link)));
            let is_closed = |id: &u64| members.get(id).is_some_and(|m| links.invalidates(&m.proof));
            return held.flatten().copied().filter(is_closed).collect();
        }
        // A whole list at once, say the first one: the connections are fewer.
        let gone = members.iter().filter(|(_, m)| m.line == line && withdrawal.affects(&m.proof));
        gone.map(|(id, _)| *id).collect()
    }

    /// Lets those leave whose peers' certificates have ended, and ends those that had their time.
    pub(crate) fn tick(&self, now: u64, metrics: &Metrics) {
        let mut by_end = self.by_end.borrow_mut();
        let mut members = self.members.borrow_mut();
        while let Some((due, id)) = by_end.first().copied().filter(|(due, _)| *due <= now) {
            by_end.remove(&(due, id));
            let Some(member) = members.get_mut(&id) else {
                continue;
            };
            if member.standing.is_draining() {
                member.end();
                continue;
            }
            metrics.connections_expired.increment();
            member.drain();
            member.due = now + EXPIRED_DRAIN.as_secs();
            by_end.insert((member.due, id));
        }
    }

    fn drain_until(&self, id: u64, member: &mut RegistryEntry, until: u64) {
        member.drain();
        let mut by_end = self.by_end.borrow_mut();
        by_end.remove(&(member.due, id));
        // Who is leaving already gets no more time by this.
        member.due = member.due.min(until);
        by_end.insert((member.due, id));
    }
}

impl RegistryEntry {
    /// Lets what has begun be finished, and nothing more begin.
    fn drain(&self) {
        if self.standing.state.get() == ConnectionState::Open {
            self.standing.state.set(ConnectionState::Draining);
            self.standing.changed.notify_waiters();
            if self.standing.idle.get() {
                // It waits for its peer alone.
                self.shutdown_read();
            }
        }
    }

    /// Ends the connection.
    fn end(&self) {
        if self.standing.state.replace(ConnectionState::Closed) == ConnectionState::Closed {
            return;
        }
        self.notify();
    }

    /// Has whoever serves the connection look at how it stands.
    fn notify(&self) {
        self.standing.changed.notify_waiters();
        self.shutdown_read();
    }

    /// Wakes whoever waits for the peer.
    fn shutdown_read(&self) {
        if let Err(error) = shutdown(self.socket, Shutdown::Read) {
            tracing::debug!(%error, "a connection to be ended was gone");
        }
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

    struct TestAuthority {
        authority: Authority,
        now: SystemTime,
    }

    impl TestAuthority {
        fn new() -> Self {
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(UnixTime::now().as_secs());
            let files = Authority::create("mesh.test", now).unwrap();
            Self { authority: Authority::load(files, "mesh.test").unwrap(), now }
        }

        /// A chain, and its leaf's serial number.
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
            let entry =
                |serial: &&str| RevokedCertificate { serial: (*serial).to_owned(), at: self.now };
            let revoked: Vec<_> = revoked.iter().map(entry).collect();
            let lists = self.authority.crls(&revoked, number, self.now, EXPIRED_DRAIN).unwrap();
            let roots = self.authority.trust_bundle().as_bytes();
            let (revocations, names) = (Some(lists.as_bytes()), Vec::new());
            let parts = TrustParts { roots, revocations, names, policy };
            let previous = previous.map(Arc::as_ref);
            Arc::new(TrustStore::build(parts, previous, UnixTime::now()).unwrap())
        }
    }

    fn prove(chain: &[CertificateDer<'_>], trust: &Arc<TrustStore>) -> Proof {
        tls::prove_client(trust.clone(), chain, UnixTime::now()).unwrap()
    }

    /// A store with these certificates and without revocation lists.
    fn bundle(roots: &str, previous: Option<&Arc<TrustStore>>) -> Arc<TrustStore> {
        let (previous, now) = (previous.map(Arc::as_ref), UnixTime::now());
        Arc::new(TrustStore::load(roots.as_bytes(), None, Vec::new(), previous, now).unwrap())
    }

    /// A descriptor that nobody has.
    const NOWHERE: RawFd = -1;

    #[test]
    fn those_that_rest_on_what_is_withdrawn_end_and_no_others() {
        let (world, registry, metrics) =
            (TestAuthority::new(), Rc::<ConnectionRegistry>::default(), Metrics::default());
        let first = world.store(&[], 1, None);
        let mut told = RevocationDeltas::default();
        let (chain, serial) = world.sign();
        let enrol = |chain: &[_], trust: &TrustStore, told: &RevocationDeltas| {
            registry.register(NOWHERE, prove(chain, &first), trust, told)
        };
        let [one, same] = [0; 2].map(|_| enrol(&chain, &first, &told));
        let other = enrol(&world.sign().0, &first, &told);
        let second = world.store(&[&serial], 2, Some(&first));
        told.add(&second, &first);
        registry.apply(&told, 0, &metrics);
        let fallen = [&one, &same, &other].map(|enrolled| enrolled.standing.is_closed());
        assert_eq!(fallen, [true, true, false]);
        // One whose handshake was done by the store before, and who is enrolled late, and one that the
        // store of now has accepted, whatever it says.
        assert!(enrol(&chain, &first, &told).standing.is_closed());
        assert!(!enrol(&chain, &second, &told).standing.is_closed());
        assert_eq!(metrics.connections_revoked.get(), 2);
        // Another store's withdrawals are no business of this one's.
        let mut others = told.clone();
        let elsewhere = world.store(&[], 1, None);
        others.add(&world.store(&[&serial], 2, Some(&elsewhere)), &elsewhere);
        let again = enrol(&chain, &second, &told);
        registry.apply(&others, 0, &metrics);
        assert!(!again.standing.is_closed());
        drop((one, same, other, again));
        assert!(registry.members.borrow().is_empty() && registry.by_link.borrow().is_empty());
        assert!(registry.by_end.borrow().is_empty());
    }

    #[test]
    fn connection_through_an_intermediate_that_stays_outlives_the_root_above_it() {
        let (world, registry, metrics) =
            (TestAuthority::new(), Rc::<ConnectionRegistry>::default(), Metrics::default());
        let (root, below) = (world.authority.trust_bundle(), world.authority.certificate());
        let chain = world.sign().0;
        let both = bundle(&format!("{root}{below}"), None);
        let through_below =
            registry.register(NOWHERE, prove(&chain, &both), &both, &RevocationDeltas::default());
        let mut told = RevocationDeltas::default();
        let mut apply = |roots: &str, previous| {
            let next = bundle(roots, Some(previous));
            told.add(&next, previous);
            registry.apply(&told, 0, &metrics);
            next
        };
        let lone = apply(below, &both);
        assert!(!through_below.standing.is_closed());
        apply(TestAuthority::new().authority.trust_bundle(), &lone);
        assert!(through_below.standing.is_closed());
        assert_eq!(metrics.connections_revoked.get(), 1);
    }

    #[test]
    fn who_missed_too_much_ends_everything() {
        let (world, metrics) = (TestAuthority::new(), Metrics::default());
        let (chain, _) = world.sign();
        let check = |missed: u64, expected: bool| {
            let registry = Rc::<ConnectionRegistry>::default();
            let (mut store, mut told) = (world.store(&[], 1, None), RevocationDeltas::default());
            let enrolled = registry.register(NOWHERE, prove(&chain, &store), &store, &told);
            for number in 0..missed {
                let serial = format!("{number:04x}");
                let next = world.store(&[&serial], number + 2, Some(&store));
                told.add(&next, &store);
                store = next;
            }
            registry.apply(&told, 0, &metrics);
            assert_eq!(enrolled.standing.is_closed(), expected, "{missed}");
        };
        check(DELTA_LIMIT as u64, false);
        check(DELTA_LIMIT as u64 + 1, true);
    }

    #[test]
    fn where_the_policy_gives_time_what_has_begun_is_finished() {
        let (world, registry, metrics) =
            (TestAuthority::new(), Rc::<ConnectionRegistry>::default(), Metrics::default());
        let policy = RevocationPolicy { drain: Duration::from_secs(30), ..Default::default() };
        let (first, mut told) = (world.store(&[], 1, None), RevocationDeltas::default());
        let (chain, serial) = world.sign();
        let proof = prove(&chain, &first);
        let enrolled = registry.register(NOWHERE, proof.clone(), &first, &told);
        let second = world.store_under(policy, &[&serial], 2, Some(&first));
        told.add(&second, &first);
        registry.apply(&told, 1000, &metrics);
        let check = |now, leaving, ended| {
            registry.tick(now, &metrics);
            let standing = &enrolled.standing;
            assert_eq!((standing.is_draining(), standing.is_closed()), (leaving, ended), "{now}");
        };
        check(1000, true, false);
        check(1029, true, false);
        check(1030, true, true);
        // Who comes now has begun nothing.
        assert!(registry.register(NOWHERE, proof, &first, &told).standing.is_closed());
        let counted = (metrics.connections_revoked.get(), metrics.connections_expired.get());
        assert_eq!(counted, (1, 0));
    }

    #[test]
    fn whose_certificate_has_ended_leaves_and_is_ended_in_an_hour() {
        let (world, registry, metrics) =
            (TestAuthority::new(), Rc::<ConnectionRegistry>::default(), Metrics::default());
        let store = world.store(&[], 1, None);
        let proof = prove(&world.sign().0, &store);
        let ends = proof.expires_at();
        let enrolled = registry.register(NOWHERE, proof, &store, &RevocationDeltas::default());
        let check = |now, leaving, ended| {
            registry.tick(now, &metrics);
            let standing = &enrolled.standing;
            assert_eq!((standing.is_draining(), standing.is_closed()), (leaving, ended), "{now}");
        };
        check(ends - 1, false, false);
        check(ends, true, false);
        // A clock that goes back gives nobody a new life.
        check(ends - 1000, true, false);
        check(ends + EXPIRED_DRAIN.as_secs() - 1, true, false);
        check(ends + EXPIRED_DRAIN.as_secs(), true, true);
        assert_eq!(metrics.connections_expired.get(), 1);
    }
}
