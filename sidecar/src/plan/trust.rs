//! The trust stores of a plan: which replaces which, and what was withdrawn by that.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use rustls_pki_types::UnixTime;
use weft_certs::{CrlIndex, CrlInfo, TrustParts, TrustStore};
use weft_model::{Name, RevocationMode, SecretSource, Validation};

use super::files::{FileStamp, WatchedFiles, as_one};
use crate::connection_registry::RevocationHistory;
use crate::crl_store::CrlStore;

/// The lists of each trust store, by its name; none where revocation is not checked.
pub type CrlsByTrustStore = BTreeMap<String, Option<Vec<CrlInfo>>>;

/// The last good store of each validation, so that a bad list leaves it in force.
#[derive(Debug, Default)]
pub(crate) struct TrustStores {
    held: HashMap<SecretId, TrustStoreEntry>,
    revocations: RevocationHistory,
    /// When a plan would be another by the clock alone, in seconds since 1970: a list expires, or what could
    /// not be loaded is tried again.
    next_look: Option<u64>,
    /// How many lists waited for their issuer when the last plan was made.
    waiting: usize,
}

/// What a secret is known by from one plan to the next.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum SecretId {
    /// Its name.
    Name(Name),
    /// The filter chain or cluster whose configuration holds it. The next configuration may hold another
    /// secret in the same place.
    Location(String),
}

impl SecretId {
    /// Of a secret that `place` uses.
    pub(crate) fn of(source: &SecretSource, place: &str) -> Self {
        match source {
            SecretSource::Named(name) => Self::Name(name.clone()),
            SecretSource::Inline(_) => Self::Location(place.to_owned()),
        }
    }

    pub(crate) fn text(&self) -> &str {
        match self {
            Self::Name(name) => name,
            Self::Location(place) => place,
        }
    }

    /// Whether the last good store of one validation may stay in force while the other cannot be loaded.
    fn may_follow(&self, before: &Validation, after: &Validation) -> bool {
        match self {
            Self::Name(_) => true,
            Self::Location(_) => before.roots == after.roots && before.names == after.names,
        }
    }
}

/// How often what could not be loaded is tried again: it may be good a moment later.
const AGAIN: u64 = 2;

/// The store of a validation.
#[derive(Debug, Clone)]
struct TrustStoreEntry {
    /// What it was last made of, or tried to be made of.
    validation: Validation,
    stamps: [FileStamp; 2],
    /// The last good one.
    store: Option<Arc<TrustStore>>,
    /// Why what there is now could not be loaded, and when that is tried again.
    failed: Option<(String, u64)>,
    is_asked: bool,
}

/// What tells the contents of a validation from others: stamps of its roots and lists.
fn stamps(validation: &Validation, files: &mut WatchedFiles, fetched: &CrlStore) -> [FileStamp; 2] {
    let lists = validation.revocations.as_ref();
    let lists = lists.map(|lists| files.stamp(lists)).unwrap_or_default();
    let fetched = validation.points.iter().map(|point| fetched.number(point));
    [files.stamp(&validation.roots), fetched.fold(lists, FileStamp::with)]
}

impl TrustStores {
    /// The store of a validation, and what an operator should know of it.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn store(
        &mut self,
        id: &SecretId,
        validation: &Validation,
        (files, fetched): (&mut WatchedFiles, &CrlStore),
        now: UnixTime,
    ) -> Result<(Arc<TrustStore>, Vec<String>), String> {
        let stamps = stamps(validation, files, fetched);
        let previous = self.held.remove(id);
        let is_same =
            |held: &TrustStoreEntry| held.validation == *validation && held.stamps == stamps;
        let is_final =
            |held: &TrustStoreEntry| held.failed.as_ref().is_none_or(|(_, at)| now.as_secs() < *at);
        let mut held = match previous {
            Some(held) if is_same(&held) && is_final(&held) => held,
            previous => {
                let previous = previous.filter(|held| id.may_follow(&held.validation, validation));
                let store = previous.and_then(|held| held.store);
                self.load(validation, stamps, store, (files, fetched, now))
            }
        };
        held.is_asked = true;
        let store = held.store.clone();
        let failed = held.failed.clone();
        self.held.insert(id.clone(), held);
        let mut told = Vec::new();
        for point in &validation.points {
            let until = match fetched.list(point) {
                Some(_) => "the last list stays in force",
                None => "until it comes nobody is refused by it",
            };
            if let Some(problem) = fetched.problem(point) {
                told.push(format!("{:?}: {problem}; {until}", point.uri));
            }
        }
        let store = match (store, failed) {
            (Some(store), None) => store,
            (Some(store), Some((problem, _))) => {
                told.push(format!("{problem}; the last good one stays in force"));
                store
            }
            (None, failed) => return Err(failed.map(|(problem, _)| problem).unwrap_or_default()),
        };
        told.extend(store.warnings(now));
        let told = told.into_iter().map(|told| format!("validation {:?}: {told}", id.text()));
        Ok((store, told.collect()))
    }

    /// Whether what there was for a validation when it was last asked for could not be loaded.
    pub(crate) fn has_failed(&self, id: &SecretId) -> bool {
        self.held.get(id).is_some_and(|held| held.failed.is_some())
    }

    fn load(
        &mut self,
        validation: &Validation,
        stamps: [FileStamp; 2],
        before: Option<Arc<TrustStore>>,
        (files, fetched, now): (&mut WatchedFiles, &CrlStore, UnixTime),
    ) -> TrustStoreEntry {
        let loaded = load(validation, before.as_deref(), (files, fetched), now);
        let (store, failed) = match loaded {
            Ok(store) => {
                let store = Arc::new(store);
                if let Some(before) = &before {
                    self.revocations.add(&store, before);
                }
                (Some(store), None)
            }
            Err(problem) => (before, Some((problem, now.as_secs() + AGAIN))),
        };
        TrustStoreEntry { validation: validation.clone(), stamps, store, failed, is_asked: true }
    }

    /// Forgets the stores that nobody asked for: what was checked by them takes its leave. And finds out when
    /// the clock alone makes another plan of the same things.
    pub(crate) fn settle(&mut self, now: UnixTime) {
        let revocations = &mut self.revocations;
        self.held.retain(|_, held| {
            if !held.is_asked
                && let Some(store) = &held.store
            {
                revocations.add_all(store);
            }
            std::mem::take(&mut held.is_asked)
        });
        let stores = self.held.values().filter_map(|held| held.store.as_ref());
        let lists = stores.filter_map(|store| store.revocations());
        self.waiting = self.waiting_lists();
        let ends = lists.flat_map(CrlIndex::crl_infos).map(|list| list.next_update);
        let again = self.held.values().filter_map(|held| held.failed.as_ref()).map(|(_, at)| *at);
        self.next_look = ends.filter(|end| *end > now.as_secs()).chain(again).min();
    }

    /// Whether the clock, or a peer that showed the issuer of a waiting list, has made another plan of the same
    /// things since [`Self::settle`].
    pub(crate) fn are_outdated(&self, now: UnixTime) -> bool {
        self.next_look.is_some_and(|at| at <= now.as_secs()) || self.waiting != self.waiting_lists()
    }

    fn waiting_lists(&self) -> usize {
        let stores = self.held.values().filter_map(|held| held.store.as_ref());
        stores.filter_map(|store| store.revocations()).map(CrlIndex::pending_count).sum()
    }

    /// What was trusted and is not any more.
    pub(crate) fn revocations(&self) -> &RevocationHistory {
        &self.revocations
    }

    /// What the lists of each store say of themselves.
    pub(crate) fn coverage(&self) -> CrlsByTrustStore {
        let lists =
            |held: &TrustStoreEntry| held.store.as_ref()?.revocations().map(CrlIndex::crl_infos);
        self.held.iter().map(|(id, held)| (id.text().to_owned(), lists(held))).collect()
    }
}

fn load(
    validation: &Validation,
    previous: Option<&TrustStore>,
    (files, fetched): (&mut WatchedFiles, &CrlStore),
    now: UnixTime,
) -> Result<TrustStore, String> {
    let roots = files.read(&validation.roots)?;
    let lists = lists(validation, files, fetched)?;
    let parts = TrustParts {
        roots: &roots,
        revocations: lists.as_deref(),
        names: validation.names.clone(),
        policy: validation.policy,
    };
    TrustStore::build(parts, previous, now).map_err(|error| error.to_string())
}

/// All lists of a validation; none where revocation is not checked.
///
/// # Errors
/// Why one of them is not there.
fn lists(
    validation: &Validation,
    files: &mut WatchedFiles,
    fetched: &CrlStore,
) -> Result<Option<Vec<u8>>, String> {
    let mut all = Vec::new();
    if let Some(source) = &validation.revocations {
        all.push(files.read_all(source, validation.policy.bytes_limit)?);
    }
    for point in &validation.points {
        match fetched.list(point) {
            Some(list) => all.push(list.to_vec()),
            // It may say of anybody that he is revoked.
            None if validation.policy.mode == RevocationMode::Strict => {
                let reason = fetched.problem(point).unwrap_or("it is being fetched");
                return Err(format!("the list at {:?} is not there yet: {reason}", point.uri));
            }
            None => {}
        }
    }
    Ok((!all.is_empty()).then(|| as_one(all)))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use rustls_pki_types::CertificateDer;
    use rustls_pki_types::pem::PemObject;
    use weft_certs::request::{self, CheckedRequest};
    use weft_certs::{Authority, Proof, RevokedCertificate, tls};
    use weft_model::{DataSource, RevocationPolicy, SpiffeId};

    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn at(seconds: u64) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(NOW + seconds))
    }

    fn trust() -> SecretId {
        SecretId::Name("trust".into())
    }

    struct TestAuthority {
        authority: Authority,
        now: SystemTime,
    }

    impl TestAuthority {
        fn new() -> Self {
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(NOW);
            let files = Authority::create("mesh.test", now).unwrap();
            Self { authority: Authority::load(files, "mesh.test").unwrap(), now }
        }

        /// A validation with a list that revokes `serials`, which is there from so many seconds on.
        fn validation(&self, number: u64, serials: &[&str], from: u64) -> Validation {
            let entry =
                |serial: &&str| RevokedCertificate { serial: (*serial).to_owned(), at: self.now };
            let revoked: Vec<_> = serials.iter().map(entry).collect();
            // The authority dates its lists back by five minutes.
            let issued = self.now + Duration::from_secs(from + 300);
            let life = Duration::from_secs(3600);
            let lists = self.authority.crls(&revoked, number, issued, life).unwrap();
            let inline = |text: &str| DataSource::inline(text);
            Validation {
                roots: inline(self.authority.trust_bundle()),
                revocations: Some(inline(&lists)),
                points: Vec::new(),
                policy: RevocationPolicy::default(),
                names: Vec::new(),
            }
        }

        fn proof(&self, store: &Arc<TrustStore>) -> (Proof, String) {
            let id = SpiffeId::parse("spiffe://mesh.test/ns/a/sa/web").unwrap();
            let pending = request::make(&id).unwrap();
            let asked = CheckedRequest::parse(&pending.request_pem).unwrap();
            let life = Duration::from_secs(3600);
            let issued = self.authority.issue(&asked, life, self.now).unwrap();
            let chain = issued.chain.concat();
            let chain: Vec<CertificateDer<'_>> =
                CertificateDer::pem_slice_iter(chain.as_bytes()).map(Result::unwrap).collect();
            (tls::prove_client(store.clone(), &chain, at(0)).unwrap(), issued.serial)
        }
    }

    #[test]
    fn what_cannot_be_loaded_leaves_the_last_good_one_is_told_and_is_tried_again() {
        let world = TestAuthority::new();
        let mut stores = TrustStores::default();
        let mut files = WatchedFiles::default();
        let mut ask = |validation: &Validation, seconds| {
            let got =
                stores.store(&trust(), validation, (&mut files, &CrlStore::default()), at(seconds));
            stores.settle(at(seconds));
            let outdated = stores.are_outdated(at(seconds + AGAIN));
            got.map(|(store, told)| (store.version().generation, told.join("; "), outdated))
        };
        // The list is of the future, as of a clock that goes ahead of ours.
        let early = world.validation(1, &[], 3);
        assert!(ask(&early, 0).unwrap_err().contains("in the future"));
        assert!(ask(&early, 1).unwrap_err().contains("in the future"));
        assert_eq!(ask(&early, 3), Ok((0, String::new(), false)));
        let next = world.validation(2, &["0a"], 5);
        let (generation, told, outdated) = ask(&next, 3).unwrap();
        assert!(told.contains("the last good one stays in force"), "{told}");
        assert_eq!((generation, outdated), (0, true));
        let (_, told, _) = ask(&next, 4).unwrap();
        assert!(told.contains("stays in force"), "it is told as long as it is so: {told}");
        assert_eq!(ask(&next, 6), Ok((1, String::new(), false)));
    }

    #[test]
    fn what_nobody_asks_for_any_more_takes_its_leave() {
        let world = TestAuthority::new();
        let mut stores = TrustStores::default();
        let mut files = WatchedFiles::default();
        let fetched = CrlStore::default();
        let first = world.validation(1, &[], 0);
        let (store, _) = stores.store(&trust(), &first, (&mut files, &fetched), at(0)).unwrap();
        let (proof, serial) = world.proof(&store);
        stores.settle(at(0));
        let standing = store.version();
        let ends = |stores: &TrustStores| stores.revocations().invalidates(&proof, standing);
        // Another list, that names somebody else, and then it.
        let other = world.validation(2, &["0a"], 0);
        stores.store(&trust(), &other, (&mut files, &fetched), at(1)).unwrap();
        stores.settle(at(1));
        assert!(!ends(&stores));
        let revoking = world.validation(3, &["0a", &serial], 0);
        stores.store(&trust(), &revoking, (&mut files, &fetched), at(2)).unwrap();
        assert!(ends(&stores));

        let mut stores = TrustStores::default();
        let (store, _) = stores.store(&trust(), &first, (&mut files, &fetched), at(0)).unwrap();
        stores.settle(at(0));
        let proof = world.proof(&store).0;
        let standing = store.version();
        assert!(!stores.revocations().invalidates(&proof, standing));
        stores.settle(at(1));
        assert!(stores.revocations().invalidates(&proof, standing), "nobody asked for it");
        let (again, _) = stores.store(&trust(), &first, (&mut files, &fetched), at(2)).unwrap();
        assert_ne!(again.version().lineage, standing.lineage);
    }

    #[test]
    fn broken_validation_of_a_filter_chain_does_not_inherit_the_roots_of_the_last_one_there() {
        let world = TestAuthority::new();
        let other = TestAuthority::new();
        let mut stores = TrustStores::default();
        let mut files = WatchedFiles::default();
        let fetched = CrlStore::default();
        let place = SecretId::Location("listener a chain 0".into());
        let first = world.validation(1, &[], 0);
        let broken = |roots: &Validation| Validation {
            revocations: Some(DataSource::inline("no list")),
            ..roots.clone()
        };
        let mut is_served = |id: &SecretId, validation: &Validation| {
            let got = stores.store(id, validation, (&mut files, &fetched), at(0));
            stores.settle(at(0));
            got.is_ok()
        };
        assert!(is_served(&place, &first));
        assert!(is_served(&place, &broken(&first)), "the roots are the same");
        assert!(!is_served(&place, &broken(&other.validation(1, &[], 0))));
        // A secret keeps its name whatever it holds, and no place has that name.
        let named = SecretId::Name("listener a chain 0".into());
        assert!(!is_served(&named, &broken(&first)));
        assert!(is_served(&named, &first));
        assert!(is_served(&named, &broken(&other.validation(1, &[], 0))));
    }
}
