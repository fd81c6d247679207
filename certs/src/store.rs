//! Trust stores: roots, CRLs and accepted names for the verification of peers.

use std::collections::HashSet;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::{DistinguishedName, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use weft_model::{
    ExpiredCrlAction, RevocationDepth, RevocationMode, RevocationPolicy, StringMatch,
};

use crate::certificate::CertificateFields;
use crate::issuer::{self, Bundle, CaCertificate};
use crate::proof::{LinkId, TrustDelta};
use crate::revocation::{
    CertificateRole, CrlError, CrlIndex, CrlSigners, RevocationQuery, RevocationStatus,
};
use crate::{der, profile};

/// The maximum number of learned intermediates, and the maximum size of each in bytes.
const SEEN_LIMIT: usize = 64;
const SEEN_BYTES: usize = 16 * 1024;

/// Roots, CRLs and accepted names. A store is complete and checked when it is built.
#[derive(Debug)]
pub struct TrustStore {
    version: TrustStoreVersion,
    roots: RootCertStore,
    /// The certificates of the trust bundle that are below one of its roots.
    intermediates: Vec<CertificateDer<'static>>,
    /// The intermediates of verified paths. They verify the next CRLs on load.
    seen: RwLock<Vec<CertificateDer<'static>>>,
    /// The trust domain of each root, if its certificate has one.
    domains: Vec<Option<String>>,
    /// The CAs in which a path may end, or could if they were anchors.
    trusted: Arc<HashSet<LinkId>>,
    revocations: Option<Arc<CrlIndex>>,
    names: Vec<StringMatch>,
    policy: RevocationPolicy,
}

/// The parts of a trust store.
#[derive(Debug, Clone)]
pub struct TrustParts<'a> {
    /// The trust bundle, PEM.
    pub roots: &'a [u8],
    /// The CRLs, PEM or DER; none: revocation is not checked.
    pub revocations: Option<&'a [u8]>,
    /// The accepted names: a peer must have one of them. Empty: any name.
    pub names: Vec<StringMatch>,
    /// The revocation policy.
    pub policy: RevocationPolicy,
}

/// The version of a trust store. Each update of a store has the next version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrustStoreVersion {
    /// The same for a store and all its updates; unique among independent stores.
    pub lineage: u64,
    /// Increases by one with each update.
    pub generation: u64,
}

impl TrustStoreVersion {
    fn after(previous: Option<&TrustStore>) -> Self {
        static LINEAGES: AtomicU64 = AtomicU64::new(0);
        match previous {
            Some(TrustStore { version: Self { lineage, generation }, .. }) => {
                Self { lineage: *lineage, generation: generation + 1 }
            }
            None => Self { lineage: LINEAGES.fetch_add(1, Relaxed), generation: 0 },
        }
    }
}

/// An error in building a trust store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// The trust bundle is not PEM, or contains an invalid certificate.
    #[error("the trust bundle cannot be read: {0}")]
    Roots(String),
    /// The trust bundle has no root.
    #[error("no root certificate in the trust bundle")]
    NoRoots,
    /// The CRL file has no CRL.
    #[error(
        "no CRL found: must have at least one; omit crl or set mode off to disable revocation checks"
    )]
    NoCrls,
    /// CRLs were rejected.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Revocations(Vec<CrlError>),
}

impl TrustStore {
    /// Builds a store with the strict revocation policy; see [`Self::build`].
    ///
    /// # Errors
    /// The same as for [`Self::build`].
    pub fn load(
        roots: &[u8],
        revocations: Option<&[u8]>,
        names: Vec<StringMatch>,
        previous: Option<&Self>,
        now: UnixTime,
    ) -> Result<Self, TrustError> {
        let policy = RevocationPolicy::default();
        Self::build(TrustParts { roots, revocations, names, policy }, previous, now)
    }

    /// Builds a store. `previous` is the store that this one replaces: its CRLs stay in force where they are newer.
    ///
    /// # Errors
    /// The trust bundle cannot be read or has no root, or a CRL is missing or rejected. The caller should then keep
    /// the previous store.
    pub fn build(
        parts: TrustParts<'_>,
        previous: Option<&Self>,
        now: UnixTime,
    ) -> Result<Self, TrustError> {
        let TrustParts { roots, revocations, names, policy } = parts;
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(roots)
            .collect::<Result<_, _>>()
            .map_err(|error| TrustError::Roots(error.to_string()))?;
        let mut roots = RootCertStore::empty();
        let mut domains = Vec::new();
        let bundle = Bundle::of(certificates);
        for certificate in &bundle.anchors {
            roots.add(certificate.clone()).map_err(|error| TrustError::Roots(error.to_string()))?;
            domains.push(domain(certificate).map_err(|reason| TrustError::Roots(reason.into()))?);
        }
        if roots.is_empty() {
            return Err(TrustError::NoRoots);
        }
        let held = previous.and_then(|store| store.revocations.as_deref());
        let seen = previous.map(Self::seen).unwrap_or_default();
        let signers = CrlSigners {
            roots: &bundle.anchors,
            intermediates: &bundle.intermediates,
            seen: &seen,
        };
        let revocations = revocations
            .filter(|_| policy.mode != RevocationMode::Off)
            .map(|bytes| CrlIndex::load(bytes, &signers, held, &policy, now).map(Arc::new))
            .transpose()
            .map_err(TrustError::Revocations)?;
        if revocations.as_ref().is_some_and(|lists| lists.is_empty()) {
            // The file may be incomplete. A user who needs no CRLs omits the setting.
            return Err(TrustError::NoCrls);
        }
        let version = TrustStoreVersion::after(previous);
        let intermediates = bundle.intermediates;
        let seen = RwLock::new(seen);
        let trusted = Arc::default();
        let mut store = Self {
            version,
            roots,
            intermediates,
            seen,
            domains,
            trusted,
            revocations,
            names,
            policy,
        };
        store.trusted = Arc::new(store.find_trusted(&bundle.anchors, now));
        Ok(store)
    }

    /// Learns the intermediates of a path that was verified up to a root, and verifies the CRLs that wait for one of
    /// them.
    pub(crate) fn learn(&self, above: &[CertificateDer<'_>], now: UnixTime) {
        self.note_seen(above);
        let Some(lists) = &self.revocations else {
            return;
        };
        for certificate in above {
            let subject = CertificateFields::read(certificate).map(|fields| fields.subject);
            if subject.is_some_and(|subject| lists.has_pending_from(subject))
                && let Some(authority) = CaCertificate::of(certificate)
            {
                lists.verify_pending(&authority, now);
            }
        }
    }

    /// Records the intermediates. Most are known already, and a shared lock is enough for these.
    fn note_seen(&self, above: &[CertificateDer<'_>]) {
        let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
        let is_new = |one: &&CertificateDer<'_>| one.len() <= SEEN_BYTES && !seen.contains(one);
        let new: Vec<_> = above.iter().filter(is_new).collect();
        drop(seen);
        if new.is_empty() {
            return;
        }
        let mut seen = self.seen.write().unwrap_or_else(PoisonError::into_inner);
        for certificate in new {
            if !seen.contains(certificate) {
                if seen.len() >= SEEN_LIMIT {
                    seen.remove(0);
                }
                seen.push(certificate.clone().into_owned());
            }
        }
    }

    fn seen(&self) -> Vec<CertificateDer<'static>> {
        self.seen.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The certificates of the trust bundle that are below one of its roots.
    pub(crate) fn intermediates(&self) -> &[CertificateDer<'static>] {
        &self.intermediates
    }

    /// The revocation status of a certificate; none when revocation is not checked.
    #[must_use]
    pub fn revocation_status(
        &self,
        asked: &RevocationQuery<'_>,
        now: UnixTime,
    ) -> Option<RevocationStatus> {
        self.revocations.as_ref().map(|index| index.status(asked, now))
    }

    /// Checks a certificate against the CRLs and the revocation policy.
    ///
    /// # Errors
    /// The revocation status, if the policy rejects it.
    pub fn check_revocation(
        &self,
        asked: &RevocationQuery<'_>,
        now: UnixTime,
    ) -> Result<(), RevocationStatus> {
        let policy = &self.policy;
        if asked.role == CertificateRole::Authority && policy.depth == RevocationDepth::Leaf {
            return Ok(());
        }
        match self.revocation_status(asked, now) {
            None | Some(RevocationStatus::Good) => Ok(()),
            Some(RevocationStatus::Unknown) if policy.mode == RevocationMode::Soft => Ok(()),
            Some(RevocationStatus::Expired) if policy.on_expired != ExpiredCrlAction::Deny => {
                Ok(())
            }
            Some(refused) => Err(refused),
        }
    }

    /// Warnings about the CRLs for the operator.
    #[must_use]
    pub fn warnings(&self, now: UnixTime) -> Vec<String> {
        let Some(lists) = &self.revocations else {
            return Vec::new();
        };
        let expired = match self.policy.on_expired {
            ExpiredCrlAction::Ignore => Vec::new(),
            ExpiredCrlAction::Warn | ExpiredCrlAction::Deny => lists.expired(now),
        };
        [lists.warnings(), expired].concat()
    }

    /// The version of the store.
    #[must_use]
    pub fn version(&self) -> TrustStoreVersion {
        self.version
    }

    /// The certificates and CAs that `previous` accepted and this store does not: new revocations, and CAs that were
    /// removed or have another key.
    #[must_use]
    pub fn delta_since(&self, previous: &Self) -> TrustDelta {
        let revoked = self
            .revocations
            .iter()
            .flat_map(|lists| lists.revoked_since(previous.revocations.as_deref()));
        TrustDelta {
            revoked: revoked.collect(),
            gone: previous.trusted.difference(&self.trusted).copied().collect(),
            trusted: self.trusted.clone(),
        }
    }

    /// The anchors, and the intermediates of the bundle that are valid now. A path that ended in such an intermediate
    /// while it was an anchor still ends in an anchor.
    fn find_trusted(&self, anchors: &[CertificateDer<'_>], now: UnixTime) -> HashSet<LinkId> {
        let mut trusted: HashSet<_> = self.roots.roots.iter().map(LinkId::authority).collect();
        if self.roots.roots.iter().any(|anchor| anchor.name_constraints.is_some()) {
            // A path that ended in the intermediate was not checked against these constraints.
            return trusted;
        }
        let anchors = CertificateFields::read_all(anchors);
        let own = CertificateFields::read_all(&self.intermediates);
        let is_valid = |one: &CertificateFields<'_>, above: &CertificateFields<'_>| {
            self.is_valid_authority(one, above, now)
        };
        let valid = issuer::take_below(anchors, own, is_valid);
        trusted.extend(valid.iter().filter_map(|one| LinkId::authority_of(one.whole)));
        trusted
    }

    /// Whether an intermediate that `above` signed may be on a path now, and has the same trust domain as each
    /// anchor.
    fn is_valid_authority(
        &self,
        one: &CertificateFields<'_>,
        above: &CertificateFields<'_>,
        now: UnixTime,
    ) -> bool {
        let asked = RevocationQuery {
            issuer: one.issuer,
            issuer_key: Some(above.key),
            serial: one.serial,
            role: CertificateRole::Authority,
            certificate: one.whole,
        };
        let is_of_domain = |domain: Option<String>| {
            self.domains.iter().flatten().all(|of_anchor| domain.as_ref() == Some(of_anchor))
        };
        one.validity().is_some_and(|validity| validity.contains(now))
            && profile::check_authority(one).is_ok()
            && self.check_revocation(&asked, now).is_ok()
            && domain(one.whole).is_ok_and(is_of_domain)
    }

    /// The CRLs.
    #[must_use]
    pub fn revocations(&self) -> Option<&CrlIndex> {
        self.revocations.as_deref()
    }

    pub(crate) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.roots.roots
    }

    /// The trust domain of a root; none if its certificate has none.
    pub(crate) fn domain_of(&self, root: &TrustAnchor<'_>) -> Option<&str> {
        let is_it = |known: &TrustAnchor<'_>| {
            known.subject == root.subject
                && known.subject_public_key_info == root.subject_public_key_info
        };
        let at = self.roots.roots.iter().position(is_it)?;
        self.domains.get(at)?.as_deref()
    }

    pub(crate) fn hints(&self) -> Vec<DistinguishedName> {
        let below = self
            .intermediates
            .iter()
            .filter_map(|certificate| CertificateFields::read(certificate));
        let below = below.map(|fields| DistinguishedName::from(der::sequence(fields.subject)));
        self.roots.subjects().into_iter().chain(below).collect()
    }

    /// The accepted names: a peer must have one of them. Empty: any name.
    #[must_use]
    pub fn names(&self) -> &[StringMatch] {
        &self.names
    }

    /// The revocation policy.
    #[must_use]
    pub fn policy(&self) -> &RevocationPolicy {
        &self.policy
    }
}

/// The trust domain in a root certificate (X.509-SVID, section 3.2).
fn domain(root: &[u8]) -> Result<Option<String>, &'static str> {
    let id = profile::identity(root)?;
    Ok(id.map(|id| id.trust_domain().to_owned()))
}
