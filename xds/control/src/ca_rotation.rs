//! Rotation of the certificate authority without failed handshakes.
//!
//! 1. Announce: the new authority is added to the trust bundle of all clients, and signs nothing yet.
//! 2. Sign: once every client has the new trust bundle, the new authority signs.
//! 3. Retire: once all certificates of the former authority have expired, it is removed from the trust bundle.
//!
//! The publisher takes each step when it is due. An operator may take it earlier (`weft ca rotate next`), unless that
//! would break connections.

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

/// How long data planes let open requests and connections continue after a peer's certificate has expired.
const DRAIN_LIMIT: Duration = Duration::from_secs(3600);

/// A command of an operator about the rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RotationStep {
    /// Announce a new authority with a new root.
    Root,
    /// Announce a new intermediate of the same root.
    Intermediate,
    /// Take the next step now.
    Next,
    /// Print the state of the rotation.
    Status,
}

/// The authorities of a control plane.
#[derive(Debug)]
pub struct Authorities {
    signing: Authority,
    next: Option<Authority>,
    former: Vec<Authority>,
    /// The keys and certificates that they were loaded from.
    authority_set: AuthoritySet,
}

impl Authorities {
    /// Loads the authorities of a store.
    ///
    /// # Errors
    /// A key or a certificate is invalid.
    pub fn load(authority_set: AuthoritySet) -> Result<Self, AuthorityError> {
        let load =
            |files: &AuthorityFiles| Authority::load(files.clone(), &authority_set.trust_domain);
        let signing = load(&authority_set.signing)?;
        let next = authority_set.next.as_ref().map(|(files, _)| load(files)).transpose()?;
        let former = authority_set.former.iter().map(|(files, _)| load(files));
        let former = former.collect::<Result<_, _>>()?;
        Ok(Self { signing, next, former, authority_set })
    }

    /// The keys and certificates that the authorities were loaded from.
    #[must_use]
    pub fn authority_set(&self) -> &AuthoritySet {
        &self.authority_set
    }

    /// The authority that signs certificates.
    #[must_use]
    pub fn signing(&self) -> &Authority {
        &self.signing
    }

    /// Issues a certificate for the control plane itself, by the oldest authority: clients that were disconnected during
    /// the rotation trust that one only.
    ///
    /// # Errors
    /// Signing fails.
    pub fn issue_own(
        &self,
        request: &CheckedRequest,
        life: Duration,
        now: SystemTime,
    ) -> Result<IssuedCertificate, AuthorityError> {
        // Not by an authority that expires before the certificate would.
        let lasting = self.former.iter().find(|former| former.expires_at() >= now + life);
        lasting.unwrap_or(&self.signing).issue(request, life, now)
    }

    /// Whether one of the authorities signed the first certificate of a chain (leaf, intermediate, root).
    pub(crate) fn signed(&self, chain: &[String]) -> bool {
        let signer = chain.get(1);
        self.all().iter().any(|one| signer.is_some_and(|signer| *signer == one.certificate()))
    }

    /// The root certificates of all authorities, PEM, without duplicates.
    #[must_use]
    pub fn trust_bundle(&self) -> String {
        let mut known = BTreeSet::new();
        let roots = self.all().into_iter().map(Authority::trust_bundle);
        roots.filter(|root| known.insert(*root)).collect()
    }

    /// Signs the CRLs of all authorities, PEM.
    ///
    /// # Errors
    /// A serial number is invalid, or signing fails.
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

/// The authorities in force. They change while the process runs.
#[derive(Debug)]
pub struct CurrentAuthorities(Mutex<Arc<Authorities>>);

impl CurrentAuthorities {
    /// The authorities to begin with.
    #[must_use]
    pub fn new(authorities: Authorities) -> Self {
        Self(Mutex::new(Arc::new(authorities)))
    }

    /// The authorities that are in force now.
    #[must_use]
    pub fn get(&self) -> Arc<Authorities> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set(&self, authorities: Authorities) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(authorities);
    }
}

/// Which clients have received the trust bundle in force.
pub(crate) trait TrustDistribution: Send + Sync {
    /// The clients that have not acknowledged the trust bundle of these authorities yet. `holders` are the identities with
    /// a valid certificate: those that receive a trust bundle and are not connected count as pending.
    fn pending_clients(
        &self,
        authority_set: &AuthoritySet,
        holders: &BTreeSet<String>,
    ) -> Vec<String>;
}

/// A store without a running control plane. No clients are connected, and each gets the whole trust bundle when it connects.
pub(crate) struct NoClients;

impl TrustDistribution for NoClients {
    fn pending_clients(&self, _: &AuthoritySet, _: &BTreeSet<String>) -> Vec<String> {
        Vec::new()
    }
}

/// Executes a command of an operator, and returns the lines to print.
///
/// # Errors
/// The step would break connections, no rotation or another one is in progress, or the store fails.
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

/// Takes the next step if it is due. Returns whether a step was taken.
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

/// Announces an authority whose certificate was issued by an external root, and returns the lines to print.
///
/// # Errors
/// The files are invalid, a rotation is in progress, or the store fails.
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
        // The root is the same, so its CRLs are as well.
        match (&mut files.root, &mut signing.root) {
            (_, RootSigner::Local { .. }) => {
                let reason =
                    "the key of this root is in the store: use weft ca rotate intermediate";
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

/// Replaces the CRLs of the trusted external root that they belong to, and returns the lines to print.
///
/// # Errors
/// The CRLs are invalid or of no trusted external root, or the store fails.
pub(crate) fn replace_root_crls(
    store: &Store,
    text: &str,
    now: SystemTime,
) -> Result<Vec<String>, String> {
    let mut change = AuthorityChange::begin(store)?;
    let authority_set = &mut change.authority_set;
    weft_certs::check_crls(text.as_bytes())?;
    let domain = authority_set.trust_domain.clone();
    let mut refused =
        "no external root: the root's key is in the store, so the control plane signs its CRLs"
            .to_owned();
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
    Ok(vec!["root CRLs replaced".into()])
}

/// The identities that have a valid certificate.
fn valid_identities(store: &Store, now: SystemTime) -> Result<BTreeSet<String>, String> {
    let records = store.list().map_err(|error| error.to_string())?;
    let good = records.into_iter().filter(|one| one.revoked.is_none() && one.not_after > now);
    Ok(good.map(|one| one.identity).collect())
}

fn check_no_rotation(authority_set: &AuthoritySet) -> Result<(), String> {
    if authority_set.next.is_some() || !authority_set.former.is_empty() {
        return Err(format!("a rotation is in progress:\n{}", status(authority_set).join("\n")));
    }
    Ok(())
}

/// A change of the authorities. It is stored only if they are still those that were read: the publisher and an operator
/// may take steps at the same time.
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
        // By then each client has renewed its certificate, and has received the trust bundle.
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
            let pending =
                distribution.pending_clients(authority_set, &valid_identities(self.store, now)?);
            if !pending.is_empty() {
                return Err(format!(
                    "clients without the new trust bundle: {}",
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
            return Err(
                "no rotation is in progress: begin with weft ca rotate root or intermediate".into(),
            );
        };
        if *until + grace > now {
            return Err(format!(
                "certificates of the former authority are valid until {}",
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
        tracing::info!(event, "authorities changed");
        Ok(())
    }
}

fn status(authority_set: &AuthoritySet) -> Vec<String> {
    let mut lines = Vec::new();
    for (_, until) in &authority_set.former {
        let removed = Timestamp(*until + DRAIN_LIMIT);
        let until = Timestamp(*until);
        lines.push(format!(
            "former   its certificates are valid until {until}; removed from the trust bundle at {removed}"
        ));
    }
    let root = weft_certs::digest(authority_set.signing.root_certificate.as_bytes());
    lines.push(format!("signing  root {}", root.get(..16).unwrap_or_default()));
    if let Some((_, due)) = &authority_set.next {
        lines.push(format!("next     trusted; signs from {}", Timestamp(*due)));
    }
    lines
}

/// Formats a time in RFC 3339.
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
            self.0.iter().map(|&name| name.to_owned()).collect()
        }
    }

    /// A store, and a fixed time.
    fn store() -> (tempfile::TempDir, Store, SystemTime) {
        let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let folder = tempfile::tempdir().expect("a folder");
        let files = Authority::create(DOMAIN, now).expect("an authority");
        let store = Store::create(folder.path(), DOMAIN, &files).expect("a store");
        (folder, store, now)
    }

    fn authorities(store: &Store) -> Authorities {
        Authorities::load(store.authority_set().expect("stored")).expect("valid")
    }

    fn request() -> (SpiffeId, CheckedRequest) {
        let id = SpiffeId::parse("spiffe://mesh.test/ns/a/sa/web").expect("an id");
        let pending = request::make(&id).expect("a request");
        (id, CheckedRequest::parse(&pending.request_pem).expect("valid"))
    }

    fn roots(store: &Store) -> usize {
        authorities(store).trust_bundle().matches("BEGIN CERTIFICATE").count()
    }

    #[test]
    fn new_root_signs_and_the_former_retires_when_no_certificate_depends_on_it() {
        let (_folder, store, now) = store();
        let (id, asked) = request();
        let issue = |at| {
            let issued = authorities(&store).signing().issue(&asked, HOUR, at).expect("signed");
            store.record_issued(&issued.serial, &id, issued.not_after, now).expect("stored");
            issued.chain[2].clone()
        };
        let first = issue(now);
        rotate(&store, RotationStep::Root, &NoClients, now).expect("announced");
        assert_eq!(roots(&store), 2, "both roots are trusted");
        assert_eq!(issue(now + HOUR / 2), first, "the first root signs");
        let again = rotate(&store, RotationStep::Intermediate, &NoClients, now).unwrap_err();
        assert!(again.starts_with("a rotation is in progress"), "{again}");
        // Each client renews its certificate within the hour, and receives the trust bundle then.
        let before = |at, distribution: &PendingClients| advance_if_due(&store, distribution, at);
        assert!(!before(now + HOUR - Duration::from_secs(1), &PendingClients(&[])));
        assert!(!before(now + HOUR, &PendingClients(&["web"])));
        assert!(before(now + HOUR, &PendingClients(&[])));
        let second = issue(now + HOUR);
        assert_ne!(second, first);
        let own = authorities(&store).issue_own(&asked, HOUR, now + HOUR).expect("signed");
        assert_eq!(own.chain[2], first, "all clients trust the first root");
        assert_eq!(roots(&store), 2, "certificates of the first root are still valid");
        // The last certificate expires then, and its connections end an hour later.
        let last = now + 3 * HOUR / 2;
        let early = rotate(&store, RotationStep::Next, &NoClients, last - HOUR / 4).unwrap_err();
        assert!(early.contains("are valid until 2027-01-15T09:30:00Z"), "{early}");
        assert!(!before(last + HOUR - Duration::from_secs(1), &PendingClients(&["web"])));
        assert!(before(last + HOUR, &PendingClients(&["web"])));
        assert_eq!(roots(&store), 1);
        assert_eq!(authorities(&store).trust_bundle(), second);
        let done = rotate(&store, RotationStep::Next, &NoClients, last + HOUR).unwrap_err();
        assert!(done.starts_with("no rotation is in progress"), "{done}");
        assert!(!before(last + 100 * HOUR, &PendingClients(&[])));
    }

    #[test]
    fn change_of_authorities_that_were_replaced_meanwhile_is_not_stored() {
        let (_folder, store, now) = store();
        let mut late = AuthorityChange::begin(&store).expect("stored");
        rotate(&store, RotationStep::Root, &NoClients, now).expect("announced");
        rotate(&store, RotationStep::Next, &NoClients, now).expect("signed");
        let stored = store.authority_set().expect("stored");
        let files = Authority::create(DOMAIN, now).expect("an authority");
        let refused = late.announce(files, now).unwrap_err();
        assert!(refused.contains("changed meanwhile"), "{refused}");
        assert_eq!(store.authority_set().expect("stored"), stored);
    }

    #[test]
    fn expired_authority_signs_neither_certificates_nor_crls() {
        let (_folder, store, now) = store();
        let (id, asked) = request();
        let end = authorities(&store).signing().expires_at();
        let late = end - HOUR / 2;
        let issued = authorities(&store).signing().issue(&asked, HOUR, late).expect("signed");
        assert_eq!(issued.not_after, end, "not after the authority itself");
        store.record_issued(&issued.serial, &id, issued.not_after, now).expect("stored");
        rotate(&store, RotationStep::Root, &NoClients, late).expect("announced");
        rotate(&store, RotationStep::Next, &NoClients, late).expect("signed");
        let first = authorities(&store).former[0].trust_bundle().to_owned();
        let own = |at| authorities(&store).issue_own(&asked, HOUR / 4, at).expect("signed");
        assert_eq!(own(late).chain[2], first, "all clients trust the first root");
        assert_ne!(own(end - HOUR / 8).chain[2], first, "the authority expires first");
        let lists = |at| {
            let lists = authorities(&store).crls(&[], 1, at, HOUR).expect("CRLs");
            lists.matches("BEGIN X509 CRL").count()
        };
        assert_eq!((lists(late), lists(end)), (4, 2), "CRLs of two authorities, then of one");
        assert!(now < late);
    }

    #[test]
    fn operator_may_take_a_step_early_when_no_client_depends_on_the_former_authority() {
        let (_folder, store, now) = store();
        let (id, asked) = request();
        let issued = authorities(&store).signing().issue(&asked, HOUR, now).expect("signed");
        store.record_issued(&issued.serial, &id, issued.not_after, now).expect("stored");
        rotate(&store, RotationStep::Intermediate, &NoClients, now).expect("announced");
        assert_eq!(roots(&store), 1, "the same root");
        let step =
            |distribution: &PendingClients| rotate(&store, RotationStep::Next, distribution, now);
        let pending = step(&PendingClients(&["web", "api"])).unwrap_err();
        assert_eq!(pending, "clients without the new trust bundle: web, api");
        step(&PendingClients(&[])).expect("no client is pending");
        assert!(step(&PendingClients(&[])).unwrap_err().contains("are valid until"));
        // A revoked certificate does not keep the former authority.
        store.revoke(std::slice::from_ref(&issued.serial), now).expect("revoked");
        let revoked = store.revoked().expect("readable");
        let lists = authorities(&store).crls(&revoked, 1, now, HOUR).expect("CRLs");
        assert_eq!(lists.matches("BEGIN X509 CRL").count(), 3, "a root and two intermediates");
        let lines = rotate(&store, RotationStep::Next, &NoClients, now + HOUR).expect("retired");
        assert_eq!(lines.len(), 1, "{lines:?}");
    }
}
