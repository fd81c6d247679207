//! CRLs whose issuer is not known on load.
//!
//! In many private PKIs the trust bundle has only the root, and peers present the intermediate that signed them. The
//! CRL of the intermediate waits until a chain that was verified up to a root contains its issuer. Its signature is
//! then verified once, and the CRL is used like any other. Chains that are not verified have no effect here, so a
//! certificate with only the issuer's name cannot activate a CRL.

use std::collections::HashSet;
use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use rustls_pki_types::{CertificateRevocationListDer, UnixTime};

use super::crl::Crl;
use super::crl_set::{CrlSet, CrlsByIssuer};
use super::parse::ParsedCrl;
use crate::digest::sha256;
use crate::issuer::CaCertificate;

/// The maximum number of CRLs that wait for their issuer.
pub(super) const PENDING_LIMIT: usize = 256;
/// The maximum number of keys tried on one CRL. Otherwise a trusted CA could create any number of issuers with the
/// same name, each of which costs a digest of the whole CRL.
const KEYS_LIMIT: usize = 256;

/// The CRLs that wait for their issuer, and those verified since the load.
#[derive(Default)]
pub(super) struct PendingCrls {
    /// The names of all issuers that CRLs waited for. Lookups of other issuers take no lock.
    names: Box<[Vec<u8>]>,
    /// Whether any CRL still waits. If not, lookups take no lock.
    is_open: AtomicBool,
    waiting: Mutex<Waiting>,
    verified: RwLock<CrlsByIssuer>,
}

#[derive(Default)]
struct Waiting {
    lists: Vec<PendingCrl>,
    /// Why some verified CRLs are not used.
    problems: Vec<String>,
}

/// A parsed CRL whose signature is not verified.
pub(super) struct PendingCrl {
    pub(super) read: ParsedCrl,
    pub(super) der: CertificateRevocationListDer<'static>,
    /// Why none of the known CAs signed it.
    pub(super) reason: String,
    /// The SHA-256 of each key that was tried.
    tried: HashSet<[u8; 32]>,
}

impl fmt::Debug for PendingCrls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} CRLs wait for their issuer", self.waiting().lists.len())
    }
}

impl PendingCrls {
    /// Creates the set from the CRLs that wait and the problems of verified CRLs. Moves all CRLs out of `in_force`
    /// that one of the waiting CRLs may replace.
    pub(super) fn new(
        lists: Vec<PendingCrl>,
        problems: Vec<String>,
        in_force: &mut CrlsByIssuer,
    ) -> Self {
        let mut names: Vec<_> = lists.iter().map(|list| list.read.issuer.clone()).collect();
        names.sort_unstable();
        names.dedup();
        let verified: CrlsByIssuer =
            names.iter().filter_map(|name| in_force.remove_entry(name)).collect();
        Self {
            names: names.into(),
            is_open: AtomicBool::new(!lists.is_empty()),
            waiting: Mutex::new(Waiting { lists, problems }),
            verified: RwLock::new(verified),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.waiting().lists.len()
    }

    /// Whether no CRL waited, and no verified CRL has a problem.
    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty() && self.waiting().problems.is_empty()
    }

    /// Whether a CRL waits for an issuer of this name.
    pub(super) fn has_pending_from(&self, issuer: &[u8]) -> bool {
        self.is_open.load(Acquire) && self.names.iter().any(|name| name == issuer)
    }

    /// Verifies the CRLs with the name of a CA with its key, once. The CA must be on a verified path.
    pub(super) fn verify_pending(&self, issuer: &CaCertificate, now: UnixTime) {
        if !self.has_pending_from(&issuer.name) {
            return;
        }
        // The lock is held during verification: another handshake with the same issuer needs the result.
        let mut waiting = self.waiting();
        let signed = take_signed(&mut waiting.lists, issuer, now);
        if signed.is_empty() {
            return;
        }
        // The CRLs that are already in use are included, because only the newest with the same key and scope is used.
        let by_issuer = CrlsByIssuer::from([(issuer.name.clone(), self.verified(&issuer.name))]);
        let mut in_force = CrlSet { by_issuer, ..CrlSet::default() };
        let errors = in_force.take(signed);
        waiting.problems.extend(errors.iter().map(ToString::to_string).chain(in_force.warnings));
        let mut verified = self.verified.write().unwrap_or_else(PoisonError::into_inner);
        verified.extend(in_force.by_issuer);
        // The store follows the update of the CRLs: a thread that sees no waiting CRL also sees these CRLs.
        self.is_open.store(!waiting.lists.is_empty(), Release);
    }

    /// The verified CRLs of an issuer of this name.
    pub(super) fn verified(&self, issuer: &[u8]) -> Vec<Arc<Crl>> {
        if !self.names.iter().any(|name| name == issuer) {
            return Vec::new();
        }
        let verified = self.verified.read().unwrap_or_else(PoisonError::into_inner);
        verified.get(issuer).cloned().unwrap_or_default()
    }

    /// All verified CRLs.
    pub(super) fn all_verified(&self) -> CrlsByIssuer {
        if self.is_empty() {
            return CrlsByIssuer::new();
        }
        self.verified.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Warnings about the CRLs that still wait.
    pub(super) fn warnings(&self) -> Vec<String> {
        let one = |list: &PendingCrl| {
            format!(
                "CRL {}: {}; the CRL is used once a verified chain contains its signer",
                list.read.position, list.reason
            )
        };
        let waiting = self.waiting();
        waiting.lists.iter().map(one).chain(waiting.problems.iter().cloned()).collect()
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PendingCrl {
    pub(super) fn new(
        read: ParsedCrl,
        der: CertificateRevocationListDer<'static>,
        reason: String,
    ) -> Self {
        Self { read, der, reason, tried: HashSet::new() }
    }

    /// Whether this issuer signed the CRL and its `thisUpdate` is not in the future. Each key is tried once.
    fn is_signed_by(&mut self, issuer: &CaCertificate, now: UnixTime) -> bool {
        let is_due = self.read.issuer == issuer.name && self.read.list.this_update <= now;
        is_due
            && self.tried.len() < KEYS_LIMIT
            && self.tried.insert(sha256([&issuer.public_key[..]]))
            && issuer.signed(&self.der)
    }
}

/// Removes the CRLs that this issuer signed from those that wait. The issuer must be on a verified path.
pub(super) fn take_signed(
    lists: &mut Vec<PendingCrl>,
    issuer: &CaCertificate,
    now: UnixTime,
) -> Vec<ParsedCrl> {
    if issuer.may_sign_crls().is_err() {
        return Vec::new();
    }
    let signed = lists.extract_if(.., |list| list.is_signed_by(issuer, now));
    signed.map(|list| list.read.signed_by(issuer)).collect()
}
