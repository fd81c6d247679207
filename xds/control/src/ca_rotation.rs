//! How one authority follows another, so that nobody notices.
//!
//! A new authority is announced: everybody is told to trust it, and it signs nothing. Once all who could be
//! met know it, it signs. Once nothing that the former one signed is good any more, that one is taken back.
//! Each step is taken by itself when its time has come, or earlier by an operator's word, as long as it
//! harms nobody.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use weft_certs::request::CheckedRequest;
use weft_certs::{
    Authority, AuthorityError, AuthorityFiles, ExternalCaFiles, IssuedCertificate,
    RevokedCertificate, RootSigner,
};

use crate::audit;
use crate::store::{AuthoritySet, Store};

/// How long what a peer has begun may last once its certificate has ended: as long as data planes give it.
const DRAIN_LIMIT: Duration = Duration::from_secs(3600);

/// What an operator may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RotationStep {
    /// Announce a new authority with a new root.
    Root,
    /// Announce one with the same root.
    Intermediate,
    /// Take the next step now.
    Next,
    /// Tell how it stands.
    Status,
}

/// The authorities of a control plane.
#[derive(Debug)]
pub struct Authorities {
    signing: Authority,
    next: Option<Authority>,
    former: Vec<Authority>,
    /// What they were made of.
    authority_set: AuthoritySet,
}

impl Authorities {
    /// Reads them.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn load(authority_set: AuthoritySet) -> Result<Self, AuthorityError> {
        let load =
            |files: &AuthorityFiles| Authority::load(files.clone(), &authority_set.trust_domain);
        let signing = load(&authority_set.signing)?;
        let next = authority_set.next.as_ref().map(|(files, _)| load(files)).transpose()?;
        let former = authority_set.former.iter().map(|(files, _)| load(files));
        let former = former.collect::<Result<_, _>>()?;
        Ok(Self { signing, next, former, authority_set })
    }

    /// What they were made of.
    #[must_use]
    pub fn authority_set(&self) -> &AuthoritySet {
        &self.authority_set
    }

    /// The one that signs.
    #[must_use]
    pub fn signing(&self) -> &Authority {
        &self.signing
    }

    /// Signs for the control plane itself: by the oldest that is trusted, which everybody knows, also who
    /// was away for long.
    ///
    /// # Errors
    /// When signing fails.
    pub fn issue_own(
        &self,
        request: &CheckedRequest,
        life: Duration,
        now: SystemTime,
    ) -> Result<IssuedCertificate, AuthorityError> {
        // One that has ended, or is about to, is of no use.
        let lasting = self.former.iter().find(|former| former.expires_at() >= now + life);
        lasting.unwrap_or(&self.signing).issue(request, life, now)
    }

    /// Whether one of them signed a chain: leaf, intermediate, root.
    pub(crate) fn signed(&self, chain: &[String]) -> bool {
        let signer = chain.get(1);
        self.all().iter().any(|one| signer.is_some_and(|signer| *signer == one.certificate()))
    }

    /// The roots, PEM, each once.
    #[must_use]
    pub fn trust_bundle(&self) -> String {
        let mut known = BTreeSet::new();
        let roots = self.all().into_iter().map(Authority::trust_bundle);
        roots.filter(|root| known.insert(*root)).collect()
    }

    /// The revocation lists of all of them, PEM.
    ///
    /// # Errors
    /// When a serial number is none, or signing fails.
    pub fn crls(
        &self,
        revoked: &[RevokedCertificate],
        number: u64,
        now: SystemTime,
        life: Duration,
    ) -> Result<String, AuthorityError> {
        Authority::crls_of(&self.all(), revoked, number, now, life)
    }

    fn all(&self) -> Vec<&Authority> {
        self.former.iter().chain([&self.signing]).chain(&self.next).collect()
    }
}

/// The authorities in force, which change while the process runs.
#[derive(Debug)]
pub struct CurrentAuthorities(Mutex<Arc<Authorities>>);

impl CurrentAuthorities {
    /// From now on.
    #[must_use]
    pub fn new(authorities: Authorities) -> Self {
        Self(Mutex::new(Arc::new(authorities)))
    }

    /// Those of this moment.
    #[must_use]
    pub fn get(&self) -> Arc<Authorities> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set(&self, authorities: Authorities) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(authorities);
    }
}

/// What a control plane knows of those it serves.
pub(crate) trait TrustDistribution: Send + Sync {
    /// Who has not taken yet what these authorities are; none: nobody is behind. `holders` are those that
    /// have a certificate which is good: who of them is to be told, and is not there, is behind as well.
    fn pending_clients(
        &self,
        authority_set: &AuthoritySet,
        holders: &BTreeSet<String>,
    ) -> Vec<String>;
}

/// Where no control plane runs nobody is served, and who will be is told all at once.
pub(crate) struct NoClients;

impl TrustDistribution for NoClients {
    fn pending_clients(&self, _: &AuthoritySet, _: &BTreeSet<String>) -> Vec<String> {
        Vec::new()
    }
}

/// Carries a step out; the lines that tell of it.
///
/// # Errors
/// Why not.
pub(crate) fn rotate(
    store: &Store,
    step: RotationStep,
    distribution: &dyn TrustDistribution,
    now: SystemTime,
) -> Result<Vec<String>, String> {
    let mut change = AuthorityChange::begin(store)?;
    match step {
        RotationStep::Status => {}
        RotationStep::Root | RotationStep::Intermediate => {
            let authority_set = &change.authority_set;
            check_no_rotation(authority_set)?;
            let domain = &authority_set.trust_domain;
            let files = if step == RotationStep::Root {
                Authority::create(domain, now)
            } else {
                Authority::load(authority_set.signing.clone(), domain)
                    .and_then(|signing| signing.renew_intermediate(now))
            };
            let files = files.map_err(|error| error.to_string())?;
            change.announce(files, now)?;
        }
        RotationStep::Next => change.advance(distribution, now, Duration::ZERO)?,
    }
    Ok(status(&change.authority_set))
}

/// Takes the step whose time has come; whether there was one.
pub(crate) fn advance_if_due(
    store: &Store,
    distribution: &dyn TrustDistribution,
    now: SystemTime,
) -> bool {
    let Ok(mut change) = AuthorityChange::begin(store) else {
        return false;
    };
    let is_due = match (&change.authority_set.next, change.authority_set.former.first()) {
        (Some((_, due)), _) => *due <= now,
        (None, Some((_, due))) => *due + DRAIN_LIMIT <= now,
        (None, None) => false,
    };
    is_due && change.advance(distribution, now, DRAIN_LIMIT).is_ok()
}

/// Announces an authority that somebody else's root has signed; the lines that tell of it.
///
/// # Errors
/// Why not.
pub(crate) fn import(
    store: &Store,
    given: ExternalCaFiles,
    now: SystemTime,
) -> Result<Vec<String>, String> {
    let mut change = AuthorityChange::begin(store)?;
    let authority_set = &mut change.authority_set;
    check_no_rotation(authority_set)?;
    let domain = authority_set.trust_domain.clone();
    let mut files = given.into_authority(&domain, now).map_err(|error| error.to_string())?;
    let signing = &mut authority_set.signing;
    if files.root_certificate == signing.root_certificate {
        // It is one root, so it has the same lists.
        match (&mut files.root, &mut signing.root) {
            (_, RootSigner::Local { .. }) => {
                let reason =
                    "that root is ours: weft ca rotate intermediate makes another below it";
                return Err(reason.into());
            }
            (RootSigner::External { crls }, RootSigner::External { crls: held })
                if crls.is_empty() =>
            {
                crls.clone_from(held);
                files.self_test(&domain, now).map_err(|error| error.to_string())?;
            }
            (RootSigner::External { crls }, RootSigner::External { crls: held }) => {
                held.clone_from(crls);
                signing.self_test(&domain, now).map_err(|error| error.to_string())?;
            }
            (RootSigner::Local { .. }, RootSigner::External { .. }) => {}
        }
    }
    change.announce(files, now)?;
    Ok(status(&change.authority_set))
}

/// Replaces the lists of somebody else's root, whichever of those that are trusted they fit; the lines that
/// tell of it.
///
/// # Errors
/// Why not.
pub(crate) fn replace_root_crls(
    store: &Store,
    text: &str,
    now: SystemTime,
) -> Result<Vec<String>, String> {
    let mut change = AuthorityChange::begin(store)?;
    let authority_set = &mut change.authority_set;
    weft_certs::check_crls(text.as_bytes())?;
    let domain = authority_set.trust_domain.clone();
    let mut refused = "the root's key is ours, and so are its lists".to_owned();
    let mut fits = None;
    for files in authority_set.all_mut() {
        if let RootSigner::External { .. } = files.root {
            let given = RootSigner::External { crls: text.to_owned() };
            let tried = AuthorityFiles { root: given, ..files.clone() };
            match tried.self_test(&domain, now) {
                Ok(()) => fits = fits.or_else(|| Some(files.root_certificate.clone())),
                Err(error) => refused = error.to_string(),
            }
        }
    }
    let root = fits.ok_or(refused)?;
    for files in authority_set.all_mut().filter(|files| files.root_certificate == root) {
        files.root = RootSigner::External { crls: text.to_owned() };
    }
    change.store("root_lists_replaced")?;
    Ok(vec!["the lists of the root are in force".into()])
}

/// Whose certificates are good now.
fn holders(store: &Store, now: SystemTime) -> Result<BTreeSet<String>, String> {
    let records = store.list().map_err(|error| error.to_string())?;
    let good = records.into_iter().filter(|one| one.revoked.is_none() && one.not_after > now);
    Ok(good.map(|one| one.identity).collect())
}

fn check_no_rotation(authority_set: &AuthoritySet) -> Result<(), String> {
    if authority_set.next.is_some() || !authority_set.former.is_empty() {
        return Err(format!(
            "one authority follows another already:\n{}",
            status(authority_set).join("\n")
        ));
    }
    Ok(())
}

/// A change of the authorities, which is stored only where nobody else has changed them meanwhile: the publisher takes
/// steps by itself while an operator orders others.
struct AuthorityChange<'s> {
    store: &'s Store,
    before: AuthoritySet,
    authority_set: AuthoritySet,
}

impl<'s> AuthorityChange<'s> {
    fn begin(store: &'s Store) -> Result<Self, String> {
        let before = store.authority_set().map_err(|error| error.to_string())?;
        Ok(Self { store, authority_set: before.clone(), before })
    }

    fn announce(&mut self, files: AuthorityFiles, now: SystemTime) -> Result<(), String> {
        // By then everybody has renewed a certificate, and was told at the same time.
        let due = self.store.latest_expiry(now).map_err(|error| error.to_string())?.unwrap_or(now);
        self.authority_set.next = Some((files, due));
        self.store("authority_announced")
    }

    fn advance(
        &mut self,
        distribution: &dyn TrustDistribution,
        now: SystemTime,
        grace: Duration,
    ) -> Result<(), String> {
        let authority_set = &mut self.authority_set;
        if let Some((files, _)) = authority_set.next.clone() {
            let pending = distribution.pending_clients(authority_set, &holders(self.store, now)?);
            if !pending.is_empty() {
                return Err(format!(
                    "these do not know the new authority yet: {}",
                    pending.join(", ")
                ));
            }
            let until = self.store.latest_expiry(now).map_err(|error| error.to_string())?;
            authority_set.next = None;
            let former = std::mem::replace(&mut authority_set.signing, files);
            authority_set.former.push((former, until.unwrap_or(now)));
            return self.store("authority_signs");
        }
        let Some((_, until)) = authority_set.former.first() else {
            return Err("no authority follows another; begin with root or intermediate".into());
        };
        if *until + grace > now {
            return Err(format!(
                "what the former authority signed is good until {}",
                Timestamp(*until)
            ));
        }
        authority_set.former.remove(0);
        self.store("authority_retired")
    }

    fn store(&self, event: &str) -> Result<(), String> {
        let stored = self.store.replace_authority_set(&self.before, &self.authority_set);
        stored.map_err(|error| error.to_string())?;
        audit::line(self.store.path(), event, &[]);
        tracing::info!(event, "the authorities changed");
        Ok(())
    }
}

fn status(authority_set: &AuthoritySet) -> Vec<String> {
    let mut lines = Vec::new();
    for (_, until) in &authority_set.former {
        let (until, forgotten) = (Timestamp(*until), Timestamp(*until + DRAIN_LIMIT));
        lines.push(format!(
            "former   what it signed is good until {until}; taken back at {forgotten}"
        ));
    }
    let root = weft_certs::digest(authority_set.signing.root_certificate.as_bytes());
    lines.push(format!("signing  below the root {}", root.get(..16).unwrap_or_default()));
    if let Some((_, due)) = &authority_set.next {
        lines.push(format!("next     trusted already; signs from {} on", Timestamp(*due)));
    }
    lines
}

/// A moment, for people.
pub(crate) struct Timestamp(pub(crate) SystemTime);

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.0.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let at = i64::try_from(since).ok();
        let at = at.and_then(|at| time::OffsetDateTime::from_unix_timestamp(at).ok());
        let text = at.and_then(|at| at.format(&time::format_description::well_known::Rfc3339).ok());
        f.write_str(text.as_deref().unwrap_or("the end of time"))
    }
}

#[cfg(test)]
mod tests {
    use weft_certs::request;
    use weft_model::SpiffeId;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const DOMAIN: &str = "mesh.test";

    struct PendingClients(&'static [&'static str]);

    impl TrustDistribution for PendingClients {
        fn pending_clients(&self, _: &AuthoritySet, _: &BTreeSet<String>) -> Vec<String> {
            self.0.iter().map(|&who| who.to_owned()).collect()
        }
    }

    /// A store, and the moment at which all of it happens.
    fn store() -> (tempfile::TempDir, Store, SystemTime) {
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let folder = tempfile::tempdir().expect("a folder");
        let files = Authority::create(DOMAIN, now).expect("an authority");
        let store = Store::create(folder.path(), DOMAIN, &files).expect("a store");
        (folder, store, now)
    }

    fn authorities(store: &Store) -> Authorities {
        Authorities::load(store.authority_set().expect("they are there")).expect("they are good")
    }

    fn request() -> (SpiffeId, CheckedRequest) {
        let id = SpiffeId::parse("spiffe://mesh.test/ns/a/sa/web").expect("an id");
        let pending = request::make(&id).expect("a request");
        (id, CheckedRequest::parse(&pending.request_pem).expect("a good one"))
    }

    fn roots(store: &Store) -> usize {
        authorities(store).trust_bundle().matches("BEGIN CERTIFICATE").count()
    }

    #[test]
    fn a_root_follows_another_when_nothing_depends_on_it_any_more() {
        let (_folder, store, now) = store();
        let (id, asked) = request();
        let issue = |at| {
            let issued = authorities(&store).signing().issue(&asked, HOUR, at).expect("it signs");
            store
                .record_issued(&issued.serial, &id, issued.not_after, now)
                .expect("it is remembered");
            issued.chain[2].clone()
        };
        let first = issue(now);
        rotate(&store, RotationStep::Root, &NoClients, now).expect("announced");
        assert_eq!(roots(&store), 2, "both are trusted");
        assert_eq!(issue(now + HOUR / 2), first, "the first signs");
        let again = rotate(&store, RotationStep::Intermediate, &NoClients, now).unwrap_err();
        assert!(again.starts_with("one authority follows another already"), "{again}");
        // Those who have a certificate of the first renew it within the hour, and are told.
        let before = |at, distribution: &PendingClients| advance_if_due(&store, distribution, at);
        assert!(!before(now + HOUR - Duration::from_secs(1), &PendingClients(&[])));
        assert!(!before(now + HOUR, &PendingClients(&["web"])));
        assert!(before(now + HOUR, &PendingClients(&[])));
        let second = issue(now + HOUR);
        assert_ne!(second, first);
        let own = authorities(&store).issue_own(&asked, HOUR, now + HOUR).expect("it signs");
        assert_eq!(own.chain[2], first, "everybody knows the first");
        assert_eq!(roots(&store), 2, "what the first signed is still good");
        // The last of them is over then, and what it began an hour later.
        let last = now + 3 * HOUR / 2;
        let early = rotate(&store, RotationStep::Next, &NoClients, last - HOUR / 4).unwrap_err();
        assert!(early.contains("is good until 2027-01-15T09:30:00Z"), "{early}");
        assert!(!before(last + HOUR - Duration::from_secs(1), &PendingClients(&["web"])));
        assert!(before(last + HOUR, &PendingClients(&["web"])));
        assert_eq!(roots(&store), 1);
        assert_eq!(authorities(&store).trust_bundle(), second);
        let done = rotate(&store, RotationStep::Next, &NoClients, last + HOUR).unwrap_err();
        assert!(done.starts_with("no authority follows another"), "{done}");
        assert!(!before(last + 100 * HOUR, &PendingClients(&[])));
    }

    #[test]
    fn change_by_authorities_that_were_replaced_meanwhile_stores_nothing() {
        let (_folder, store, now) = store();
        let mut late = AuthorityChange::begin(&store).expect("they are there");
        rotate(&store, RotationStep::Root, &NoClients, now).expect("announced");
        rotate(&store, RotationStep::Next, &NoClients, now).expect("it signs");
        let stored = store.authority_set().expect("they are there");
        let files = Authority::create(DOMAIN, now).expect("an authority");
        let refused = late.announce(files, now).unwrap_err();
        assert!(refused.contains("have been changed meanwhile"), "{refused}");
        assert_eq!(store.authority_set().expect("they are there"), stored);
    }

    #[test]
    fn one_that_has_ended_is_not_needed_any_more() {
        let (_folder, store, now) = store();
        let (id, asked) = request();
        let end = authorities(&store).signing().expires_at();
        let late = end - HOUR / 2;
        let issued = authorities(&store).signing().issue(&asked, HOUR, late).expect("it signs");
        assert_eq!(issued.not_after, end, "for no longer than it lasts");
        store.record_issued(&issued.serial, &id, issued.not_after, now).expect("it is remembered");
        rotate(&store, RotationStep::Root, &NoClients, late).expect("announced");
        rotate(&store, RotationStep::Next, &NoClients, late).expect("it signs");
        let first = authorities(&store).former[0].trust_bundle().to_owned();
        let own = |at| authorities(&store).issue_own(&asked, HOUR / 4, at).expect("it signs");
        assert_eq!(own(late).chain[2], first, "everybody knows the first");
        assert_ne!(own(end - HOUR / 8).chain[2], first, "it would end before its time");
        let lists = |at| {
            let lists = authorities(&store).crls(&[], 1, at, HOUR).expect("lists");
            lists.matches("BEGIN X509 CRL").count()
        };
        assert_eq!((lists(late), lists(end)), (4, 2), "those of two, then of one");
        assert!(now < late);
    }

    #[test]
    fn an_operator_hurries_what_harms_nobody() {
        let (_folder, store, now) = store();
        let (id, asked) = request();
        let issued = authorities(&store).signing().issue(&asked, HOUR, now).expect("it signs");
        store.record_issued(&issued.serial, &id, issued.not_after, now).expect("it is remembered");
        rotate(&store, RotationStep::Intermediate, &NoClients, now).expect("announced");
        assert_eq!(roots(&store), 1, "it is the same");
        let step =
            |distribution: &PendingClients| rotate(&store, RotationStep::Next, distribution, now);
        let pending = step(&PendingClients(&["web", "api"])).unwrap_err();
        assert_eq!(pending, "these do not know the new authority yet: web, api");
        step(&PendingClients(&[])).expect("all know it");
        assert!(step(&PendingClients(&[])).unwrap_err().contains("is good until"));
        // Who lost what the former signed has nothing to lose by its end.
        store.revoke(std::slice::from_ref(&issued.serial), now).expect("it is revoked");
        let revoked = store.revoked().expect("they can be read");
        let lists = authorities(&store).crls(&revoked, 1, now, HOUR).expect("lists");
        assert_eq!(lists.matches("BEGIN X509 CRL").count(), 3, "a root and two intermediates");
        let told = rotate(&store, RotationStep::Next, &NoClients, now + HOUR).expect("it is over");
        assert_eq!(told.len(), 1, "{told:?}");
    }
}
