//! Revocation lists whose issuer is not known when they are loaded.
//!
//! In many private PKIs the trust bundle holds the root alone, and peers show the intermediate that signed them.
//! The intermediate's list waits here until a chain that was verified up to a root brings its issuer: then its
//! signature is verified, once, and the list counts like any other. A chain that is not verified never gets
//! here, so a certificate that only has the issuer's name binds nothing.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use aws_lc_rs::digest::{SHA256, digest};
use rustls_pki_types::{CertificateRevocationListDer, UnixTime};

use super::loading::ParsedCrl;
use super::{Crl, CrlIndex};
use crate::issuer::Issuer;

/// The most lists that wait for their issuer.
pub(super) const PENDING_LIMIT: usize = 256;
/// The most keys that are tried on one list. An authority that is trusted could otherwise make any number of
/// issuers of one name, each of which costs the digest of the whole list.
const KEYS_LIMIT: usize = 256;

/// CrlsByIssuer by the name of their issuer.
pub(super) type CrlsByIssuer = BTreeMap<Vec<u8>, Vec<Arc<Crl>>>;

/// The lists that wait, and those that were verified since they were loaded.
#[derive(Default)]
pub(super) struct PendingCrls {
    /// The names of all issuers that were waited for, so that others take no lock.
    names: Box<[Vec<u8>]>,
    /// Whether any list still waits, so that no lock is taken once none does.
    is_open: AtomicBool,
    waiting: Mutex<Waiting>,
    verified: RwLock<CrlsByIssuer>,
}

#[derive(Default)]
struct Waiting {
    lists: Vec<PendingCrl>,
    /// Why lists that were verified do not count all the same.
    problems: Vec<String>,
}

/// A list that was read, and whose signature was not verified.
pub(super) struct PendingCrl {
    pub(super) read: ParsedCrl,
    pub(super) der: CertificateRevocationListDer<'static>,
    /// Why no known authority has signed it.
    pub(super) reason: String,
    /// The SHA-256 of each key that was tried.
    tried: HashSet<[u8; 32]>,
}

impl fmt::Debug for PendingCrls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} lists wait for their issuer", self.waiting().lists.len())
    }
}

impl PendingCrls {
    /// Takes the lists that wait, why some that were verified do not count, and from `in_force` all lists that one
    /// of those that wait may replace.
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

    /// Whether no list waited, and none was verified that does not count.
    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty() && self.waiting().problems.is_empty()
    }

    /// Whether a list waits for an issuer of this name.
    pub(super) fn has_pending_from(&self, issuer: &[u8]) -> bool {
        self.is_open.load(Acquire) && self.names.iter().any(|name| name == issuer)
    }

    /// Verifies the lists that have the name of an authority by its key, unless that was done before. The
    /// authority must be on a path that was verified.
    pub(super) fn verify_pending(&self, issuer: &Issuer, now: UnixTime) {
        if !self.has_pending_from(&issuer.name) {
            return;
        }
        // Locked while signatures are verified: another handshake with the same issuer needs the outcome.
        let mut waiting = self.waiting();
        let signed = take_signed(&mut waiting.lists, issuer, now);
        if signed.is_empty() {
            return;
        }
        // With the lists that count already, since of several of a kind only the newest counts.
        let issuers = CrlsByIssuer::from([(issuer.name.clone(), self.verified(&issuer.name))]);
        let mut index = CrlIndex { issuers, ..CrlIndex::default() };
        let errors = index.take(signed);
        waiting.problems.extend(errors.iter().map(ToString::to_string).chain(index.warnings));
        let mut verified = self.verified.write().unwrap_or_else(PoisonError::into_inner);
        verified.extend(index.issuers);
        // After the lists count: who sees that none waits sees these as well.
        self.is_open.store(!waiting.lists.is_empty(), Release);
    }

    /// The verified lists of an issuer of this name.
    pub(super) fn verified(&self, issuer: &[u8]) -> Vec<Arc<Crl>> {
        if !self.names.iter().any(|name| name == issuer) {
            return Vec::new();
        }
        let verified = self.verified.read().unwrap_or_else(PoisonError::into_inner);
        verified.get(issuer).cloned().unwrap_or_default()
    }

    /// All verified lists.
    pub(super) fn all_verified(&self) -> CrlsByIssuer {
        if self.is_empty() {
            return CrlsByIssuer::new();
        }
        self.verified.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What an operator should know of the lists that still wait.
    pub(super) fn warnings(&self) -> Vec<String> {
        let one = |list: &PendingCrl| {
            let (position, reason) = (list.read.position, &list.reason);
            format!(
                "revocation list {position}: {reason}; the list counts as soon as a verified chain brings \
                 the authority that signed it"
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

    /// Whether the list is of this issuer, not from the future, and signed by the issuer's key. The same key is
    /// tried once.
    fn is_signed_by(&mut self, issuer: &Issuer, now: UnixTime) -> bool {
        let is_due = self.read.issuer == issuer.name && self.read.list.this_update <= now.as_secs();
        is_due
            && self.tried.len() < KEYS_LIMIT
            && self.tried.insert(sha256(&issuer.public_key))
            && issuer.signed(&self.der)
    }
}

/// Takes the lists that this issuer signed out of those that wait. The issuer must be on a path that was verified.
pub(super) fn take_signed(
    lists: &mut Vec<PendingCrl>,
    issuer: &Issuer,
    now: UnixTime,
) -> Vec<ParsedCrl> {
    if issuer.may_sign_crls().is_err() {
        return Vec::new();
    }
    let signed = lists.extract_if(.., |list| list.is_signed_by(issuer, now));
    signed.map(|list| list.read.signed_by(issuer)).collect()
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.iter_mut().zip(digest(&SHA256, bytes).as_ref()).for_each(|(to, from)| *to = *from);
    hash
}
