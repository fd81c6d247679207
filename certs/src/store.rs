//! What the certificates of peers are checked against.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use rustls::{DistinguishedName, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use weft_model::StringMatch;

use crate::proof::{LinkId, Withdrawn};
use crate::{CrlError, CrlIndex, Revocation, RevocationPolicy, Role};

/// Roots, revocation lists and names, read and checked: never half-built.
#[derive(Debug)]
pub struct TrustStore {
    standing: Standing,
    roots: RootCertStore,
    revocations: Option<Arc<CrlIndex>>,
    names: Vec<StringMatch>,
    policy: RevocationPolicy,
}

/// Which store it is of those that replace one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// The same for all that replace one another, and nobody else's.
    pub line: u64,
    /// One more each time.
    pub generation: u64,
}

impl Standing {
    fn after(previous: Option<&TrustStore>) -> Self {
        static LINES: AtomicU64 = AtomicU64::new(0);
        match previous {
            Some(TrustStore { standing: Self { line, generation }, .. }) => {
                Self { line: *line, generation: generation + 1 }
            }
            None => Self { line: LINES.fetch_add(1, Relaxed), generation: 0 },
        }
    }
}

/// Why a trust store cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// The roots are no PEM, or one is no certificate.
    #[error("the roots cannot be read: {0}")]
    Roots(String),
    /// There is no root, so nobody could be trusted.
    #[error("there is no root certificate")]
    NoRoots,
    /// A list cannot be used.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Revocations(Vec<CrlError>),
}

impl TrustStore {
    /// Builds a store from PEM roots and, if given, revocation lists. `previous` is the store that
    /// this one replaces: a list in it that is newer stays.
    ///
    /// # Errors
    /// Why it cannot be built; the previous store should then stay in force.
    pub fn load(
        roots_pem: &[u8],
        revocations: Option<&[u8]>,
        names: Vec<StringMatch>,
        previous: Option<&Self>,
        now: UnixTime,
    ) -> Result<Self, TrustError> {
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(roots_pem)
            .collect::<Result<_, _>>()
            .map_err(|error| TrustError::Roots(error.to_string()))?;
        let mut roots = RootCertStore::empty();
        for certificate in &certificates {
            roots.add(certificate.clone()).map_err(|error| TrustError::Roots(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(TrustError::NoRoots);
        }
        let held = previous.and_then(|store| store.revocations.as_deref());
        let revocations = revocations
            .map(|bytes| CrlIndex::load(bytes, &certificates, held, now).map(Arc::new))
            .transpose()
            .map_err(TrustError::Revocations)?;
        let standing = Standing::after(previous);
        Ok(Self { standing, roots, revocations, names, policy: RevocationPolicy::STRICT })
    }

    /// The same store under another revocation policy.
    #[must_use]
    pub fn with_policy(mut self, policy: RevocationPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// What the lists say; none when revocation is not checked at all.
    #[must_use]
    pub fn revocation(
        &self,
        issuer: &[u8],
        serial: &[u8],
        role: Role,
        now: UnixTime,
    ) -> Option<Revocation> {
        self.revocations.as_ref().map(|index| index.status(issuer, serial, role, now))
    }

    /// Which store it is.
    #[must_use]
    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// What `previous` vouched for and this one does not: what the lists revoke now, and the roots that are
    /// gone or have another key.
    #[must_use]
    pub fn withdrawn_since(&self, previous: &Self) -> Withdrawn {
        let revoked = self
            .revocations
            .iter()
            .flat_map(|lists| lists.revoked_since(previous.revocations.as_deref()));
        let is_root = |old: &TrustAnchor<'_>| {
            let same = |new: &TrustAnchor<'_>| {
                new.subject == old.subject
                    && new.subject_public_key_info == old.subject_public_key_info
                    && new.name_constraints == old.name_constraints
            };
            self.roots.roots.iter().any(same)
        };
        let gone = previous.roots.roots.iter().filter(|old| !is_root(old));
        revoked.chain(gone.map(LinkId::root)).collect()
    }

    /// The revocation lists.
    #[must_use]
    pub fn revocations(&self) -> Option<&CrlIndex> {
        self.revocations.as_deref()
    }

    pub(crate) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.roots.roots
    }

    pub(crate) fn hints(&self) -> Vec<DistinguishedName> {
        self.roots.subjects()
    }

    pub(crate) fn names(&self) -> &[StringMatch] {
        &self.names
    }

    pub(crate) fn policy(&self) -> RevocationPolicy {
        self.policy
    }
}
