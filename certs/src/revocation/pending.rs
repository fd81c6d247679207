//! Revocation lists whose issuer is not known when they are loaded.
//!
//! In many private PKIs the trust bundle holds the root alone, and peers show the intermediate that signed them.
//! The intermediate's list waits here until a chain that was verified up to a root brings its issuer: then its
//! signature is verified, once, and the list counts like any other. A chain that is not verified never gets
//! here, so a certificate that only has the issuer's name binds nothing.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use aws_lc_rs::digest::{Context, SHA256};
use rustls_pki_types::{CertificateRevocationListDer, UnixTime};

use super::loading::Read;
use super::{CrlIndex, IssuerList};
use crate::issuer::Issuer;

/// The most lists that wait for their issuer.
pub(super) const PENDING_LIMIT: usize = 256;
/// The most keys that are tried on the waiting lists of one load. An authority that is trusted could otherwise
/// make any number of issuers of one name, each of which costs the digest of a whole list.
const KEYS_LIMIT: usize = 256;

/// Lists by the name of their issuer.
type Lists = BTreeMap<Vec<u8>, Vec<Arc<IssuerList>>>;

/// The lists that wait, and those that were proved since they were loaded.
#[derive(Default)]
pub(super) struct Pending {
    /// The names of all issuers that were waited for, so that others take no lock.
    names: Box<[Vec<u8>]>,
    waiting: Mutex<Waiting>,
    proved: RwLock<Lists>,
}

#[derive(Default)]
struct Waiting {
    lists: Vec<PendingList>,
    /// The SHA-256 of each issuer's name and key that was tried.
    tried: HashSet<[u8; 32]>,
    /// Why lists that were proved do not count all the same.
    problems: Vec<String>,
}

/// A list that was read, and whose signature was not verified.
pub(super) struct PendingList {
    pub(super) read: Read,
    pub(super) der: CertificateRevocationListDer<'static>,
    /// Why no known authority has signed it.
    pub(super) reason: String,
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} lists wait for their issuer", self.waiting().lists.len())
    }
}

impl Pending {
    pub(super) fn new(lists: Vec<PendingList>) -> Self {
        let mut names: Vec<_> = lists.iter().map(|list| list.read.issuer.clone()).collect();
        names.sort_unstable();
        names.dedup();
        let waiting = Waiting { lists, ..Waiting::default() };
        Self { names: names.into(), waiting: Mutex::new(waiting), proved: RwLock::default() }
    }

    pub(super) fn len(&self) -> usize {
        self.waiting().lists.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Verifies the lists that bear the name of an authority by its key, unless that was done before. The
    /// authority must be on a path that was verified.
    pub(super) fn prove(&self, issuer: &Issuer, now: UnixTime) {
        if !self.names.contains(&issuer.name) || issuer.may_sign_lists().is_err() {
            return;
        }
        // Held while signatures are verified: whoever comes with the same issuer needs the outcome.
        let mut waiting = self.waiting();
        let is_named = |list: &PendingList| list.read.issuer == issuer.name;
        let is_early = |list: &PendingList| list.read.list.this_update > now.as_secs();
        let id = id(issuer);
        if waiting.tried.len() >= KEYS_LIMIT || waiting.tried.contains(&id) {
            return;
        }
        if !waiting.lists.iter().any(|list| is_named(list) && is_early(list)) {
            waiting.tried.insert(id);
        }
        let all = std::mem::take(&mut waiting.lists);
        let (signed, others) = all.into_iter().partition(|list: &PendingList| {
            is_named(list) && !is_early(list) && issuer.signed(&list.der)
        });
        waiting.lists = others;
        let signed: Vec<PendingList> = signed;
        let mut index = CrlIndex::default();
        let signed = signed.into_iter().map(|list| list.read.signed_by(issuer));
        let errors = index.take(signed.collect());
        waiting.problems.extend(errors.iter().map(ToString::to_string));
        let mut proved = self.proved.write().unwrap_or_else(PoisonError::into_inner);
        for (name, lists) in index.issuers {
            proved.entry(name).or_default().extend(lists);
        }
    }

    /// The proved lists of an issuer of this name.
    pub(super) fn proved(&self, issuer: &[u8]) -> Vec<Arc<IssuerList>> {
        if !self.names.iter().any(|name| name == issuer) {
            return Vec::new();
        }
        let proved = self.proved.read().unwrap_or_else(PoisonError::into_inner);
        proved.get(issuer).cloned().unwrap_or_default()
    }

    /// All proved lists.
    pub(super) fn all_proved(&self) -> Lists {
        if self.is_empty() {
            return Lists::new();
        }
        self.proved.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What an operator should know of the lists that still wait.
    pub(super) fn warnings(&self) -> Vec<String> {
        let one = |list: &PendingList| {
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

/// What tells one authority from another: its name and key.
fn id(issuer: &Issuer) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    context.update(&issuer.name.len().to_be_bytes());
    context.update(&issuer.name);
    context.update(&issuer.public_key);
    let mut id = [0; 32];
    id.iter_mut().zip(context.finish().as_ref()).for_each(|(to, from)| *to = *from);
    id
}
