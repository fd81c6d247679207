//! The trust stores of a plan, and the certificates that a new version of a store no longer accepts.

use std::collections::HashMap;
use std::sync::Arc;

use rustls_pki_types::UnixTime;
use weft_certs::{CrlIndex, TrustParts, TrustStore};
use weft_model::{Name, RevocationMode, SecretSource, Validation};

use super::crls_in_force::CrlsByTrustStore;
use super::files::{WatchedFileStamp, WatchedFiles, as_one};
use crate::crl_store::CrlStore;
use crate::revocation_history::RevocationHistory;

/// The last good trust store of each validation, which stays in force when a CRL or root is invalid.
#[derive(Debug, Default)]
pub(crate) struct TrustStores {
    stores: HashMap<SecretId, TrustStoreEntry>,
    revocations: RevocationHistory,
    /// When the clock alone results in another plan, in seconds since 1970: a CRL expires, or loading is retried.
    next_change: Option<u64>,
    /// The number of CRLs that waited for their issuer when the last plan was built.
    waiting: usize,
}

/// Identifies a secret across plans.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum SecretId {
    /// Its name.
    Name(Name),
    /// The filter chain or cluster that holds the inline secret. The next configuration may have another secret in the same
    /// place.
    Location(String),
}

impl SecretId {
    /// The identifier of a secret that `place` uses.
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

/// The interval at which loading is retried, in seconds.
const RETRY_INTERVAL_SECONDS: u64 = 2;

/// The trust store of a validation.
#[derive(Debug, Clone)]
struct TrustStoreEntry {
    /// What was last loaded, or tried to be.
    validation: Validation,
    stamps: [WatchedFileStamp; 2],
    /// The last good store.
    store: Option<Arc<TrustStore>>,
    /// Why loading failed, and when to retry in seconds since 1970.
    failed: Option<(String, u64)>,
    is_used: bool,
}

/// Identifies the version of a validation's contents: the stamps of its roots and its CRLs.
fn stamps(
    validation: &Validation,
    files: &mut WatchedFiles,
    fetched: &CrlStore,
) -> [WatchedFileStamp; 2] {
    let crls = validation.revocations.as_ref();
    let crls = crls.map(|crls| files.stamp(crls)).unwrap_or_default();
    let fetched = validation.points.iter().map(|point| fetched.number(point));
    [files.stamp(&validation.roots), fetched.fold(crls, WatchedFileStamp::with)]
}

/// What trust stores are loaded from, apart from the configuration.
pub(crate) struct ValidationInputs<'a> {
    pub(crate) files: &'a mut WatchedFiles,
    /// The fetched CRLs.
    pub(crate) crls: &'a CrlStore,
    pub(crate) now: UnixTime,
}

impl TrustStores {
    /// The trust store of a validation, with warnings for operators.
    ///
    /// # Errors
    /// When loading fails without a last good store.
    pub(crate) fn store(
        &mut self,
        id: &SecretId,
        validation: &Validation,
        inputs: &mut ValidationInputs<'_>,
    ) -> Result<(Arc<TrustStore>, Vec<String>), String> {
        let now = inputs.now;
        let fetched = inputs.crls;
        let stamps = stamps(validation, inputs.files, fetched);
        let previous = self.stores.remove(id);
        let is_same =
            |entry: &TrustStoreEntry| entry.validation == *validation && entry.stamps == stamps;
        let is_retry_due = |entry: &TrustStoreEntry| {
            entry.failed.as_ref().is_some_and(|(_, at)| now.as_secs() >= *at)
        };
        let mut entry = match previous {
            Some(entry) if is_same(&entry) && !is_retry_due(&entry) => entry,
            previous => {
                let previous =
                    previous.filter(|entry| id.may_follow(&entry.validation, validation));
                let store = previous.and_then(|entry| entry.store);
                self.replace(validation, stamps, store, inputs)
            }
        };
        entry.is_used = true;
        let store = entry.store.clone();
        let failed = entry.failed.clone();
        self.stores.insert(id.clone(), entry);
        let mut warnings = Vec::new();
        for point in &validation.points {
            let until = match fetched.list(point) {
                Some(_) => "the last CRL stays in force",
                None => "no certificate is checked against this CRL until it is fetched",
            };
            if let Some(problem) = fetched.problem(point) {
                warnings.push(format!("{:?}: {problem}; {until}", point.uri));
            }
        }
        let store = match (store, failed) {
            (Some(store), None) => store,
            (Some(store), Some((problem, _))) => {
                warnings.push(format!("{problem}; the last good one stays in force"));
                store
            }
            (None, failed) => return Err(failed.map(|(problem, _)| problem).unwrap_or_default()),
        };
        warnings.extend(store.warnings(now));
        let warnings =
            warnings.into_iter().map(|text| format!("validation {:?}: {text}", id.text()));
        Ok((store, warnings.collect()))
    }

    /// Whether the last attempt to load a validation failed.
    pub(crate) fn has_failed(&self, id: &SecretId) -> bool {
        self.stores.get(id).is_some_and(|entry| entry.failed.is_some())
    }

    /// Loads a new store, and adds what it no longer accepts to the revocations. If that fails, `before` stays.
    fn replace(
        &mut self,
        validation: &Validation,
        stamps: [WatchedFileStamp; 2],
        before: Option<Arc<TrustStore>>,
        inputs: &mut ValidationInputs<'_>,
    ) -> TrustStoreEntry {
        let loaded = load(validation, before.as_deref(), inputs);
        let (store, failed) = match loaded {
            Ok(store) => {
                let store = Arc::new(store);
                if let Some(before) = &before {
                    self.revocations.add(&store, before);
                }
                (Some(store), None)
            }
            Err(problem) => {
                (before, Some((problem, inputs.now.as_secs() + RETRY_INTERVAL_SECONDS)))
            }
        };
        TrustStoreEntry { validation: validation.clone(), stamps, store, failed, is_used: true }
    }

    /// Drops the stores that the plan does not use, whose connections are then drained, and computes when the clock
    /// alone results in another plan.
    pub(crate) fn settle(&mut self, now: UnixTime) {
        let revocations = &mut self.revocations;
        self.stores.retain(|_, entry| {
            if !entry.is_used
                && let Some(store) = &entry.store
            {
                revocations.add_all(store);
            }
            std::mem::take(&mut entry.is_used)
        });
        let stores = self.stores.values().filter_map(|entry| entry.store.as_ref());
        let indexes = stores.filter_map(|store| store.revocations());
        self.waiting = self.pending_crls();
        let ends = indexes.flat_map(CrlIndex::crl_infos).map(|crl| crl.next_update.as_secs());
        let again =
            self.stores.values().filter_map(|entry| entry.failed.as_ref()).map(|(_, at)| *at);
        self.next_change = ends.filter(|end| *end > now.as_secs()).chain(again).min();
    }

    /// Whether the clock, or a peer that presented the issuer of a waiting CRL, results in another plan since
    /// [`Self::settle`].
    pub(crate) fn is_outdated(&self, now: UnixTime) -> bool {
        self.next_change.is_some_and(|at| at <= now.as_secs())
            || self.waiting != self.pending_crls()
    }

    fn pending_crls(&self) -> usize {
        let stores = self.stores.values().filter_map(|entry| entry.store.as_ref());
        stores.filter_map(|store| store.revocations()).map(CrlIndex::pending_count).sum()
    }

    /// The certificates that trust stores stopped accepting.
    pub(crate) fn revocations(&self) -> &RevocationHistory {
        &self.revocations
    }

    /// The CRLs of each store.
    pub(crate) fn coverage(&self) -> CrlsByTrustStore {
        let crls =
            |entry: &TrustStoreEntry| entry.store.as_ref()?.revocations().map(CrlIndex::crl_infos);
        self.stores.iter().map(|(id, entry)| (id.text().to_owned(), crls(entry))).collect()
    }
}

fn load(
    validation: &Validation,
    previous: Option<&TrustStore>,
    inputs: &mut ValidationInputs<'_>,
) -> Result<TrustStore, String> {
    let roots = inputs.files.read(&validation.roots)?;
    let crls = crls(validation, inputs.files, inputs.crls)?;
    let parts = TrustParts {
        roots: &roots,
        revocations: crls.as_deref(),
        names: validation.names.clone(),
        policy: validation.policy,
    };
    TrustStore::build(parts, previous, inputs.now).map_err(|error| error.to_string())
}

/// All CRLs of a validation; none where revocation is not checked.
///
/// # Errors
/// When a file cannot be read, or a CRL was not fetched yet in strict mode.
fn crls(
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
            // The missing CRL may revoke any certificate.
            None if validation.policy.mode == RevocationMode::Strict => {
                let reason = fetched.problem(point).unwrap_or("the first fetch is not complete");
                return Err(format!("CRL {:?} not fetched yet: {reason}", point.uri));
            }
            None => {}
        }
    }
    Ok((!all.is_empty()).then(|| as_one(all)))
}

#[cfg(test)]
mod tests {
    use weft_model::DataSource;

    use super::super::test_pki::{TestPki, at};
    use super::*;

    fn trust() -> SecretId {
        SecretId::Name("trust".into())
    }

    #[test]
    fn validation_that_cannot_be_loaded_leaves_the_last_good_one_and_is_retried() {
        let authority = TestPki::new();
        let mut stores = TrustStores::default();
        let mut files = WatchedFiles::default();
        let mut ask = |validation: &Validation, seconds| {
            let got = stores.store(
                &trust(),
                validation,
                &mut ValidationInputs {
                    files: &mut files,
                    crls: &CrlStore::default(),
                    now: at(seconds),
                },
            );
            stores.settle(at(seconds));
            let outdated = stores.is_outdated(at(seconds + RETRY_INTERVAL_SECONDS));
            got.map(|(store, warnings)| (store.version().generation, warnings.join("; "), outdated))
        };
        // The CRL is from the future, as if the issuer's clock were ahead.
        let early = authority.validation(1, &[], 3);
        assert!(ask(&early, 0).unwrap_err().contains("in the future"));
        assert!(ask(&early, 1).unwrap_err().contains("in the future"));
        assert_eq!(ask(&early, 3), Ok((0, String::new(), false)));
        let next = authority.validation(2, &["0a"], 5);
        let (generation, warnings, outdated) = ask(&next, 3).unwrap();
        assert!(warnings.contains("the last good one stays in force"), "{warnings}");
        assert_eq!((generation, outdated), (0, true));
        let (_, warnings, _) = ask(&next, 4).unwrap();
        assert!(
            warnings.contains("stays in force"),
            "the problem is reported while it exists: {warnings}"
        );
        assert_eq!(ask(&next, 6), Ok((1, String::new(), false)));
    }

    #[test]
    fn store_that_the_configuration_no_longer_uses_is_dropped_and_its_proofs_are_invalidated() {
        let authority = TestPki::new();
        let mut stores = TrustStores::default();
        let mut files = WatchedFiles::default();
        let fetched = CrlStore::default();
        let first = authority.validation(1, &[], 0);
        let (store, _) = stores
            .store(
                &trust(),
                &first,
                &mut ValidationInputs { files: &mut files, crls: &fetched, now: at(0) },
            )
            .unwrap();
        let certificate = authority.certificate();
        let proof = certificate.proof(&store).unwrap();
        stores.settle(at(0));
        let version = store.version();
        let ends = |stores: &TrustStores| stores.revocations().invalidates(&proof, version);
        // A CRL with another certificate, and then with this one.
        let other = authority.validation(2, &["0a"], 0);
        stores
            .store(
                &trust(),
                &other,
                &mut ValidationInputs { files: &mut files, crls: &fetched, now: at(1) },
            )
            .unwrap();
        stores.settle(at(1));
        assert!(!ends(&stores));
        let revoking = authority.validation(3, &["0a", &certificate.serial], 0);
        stores
            .store(
                &trust(),
                &revoking,
                &mut ValidationInputs { files: &mut files, crls: &fetched, now: at(2) },
            )
            .unwrap();
        assert!(ends(&stores));

        let mut stores = TrustStores::default();
        let (store, _) = stores
            .store(
                &trust(),
                &first,
                &mut ValidationInputs { files: &mut files, crls: &fetched, now: at(0) },
            )
            .unwrap();
        stores.settle(at(0));
        let proof = certificate.proof(&store).unwrap();
        let version = store.version();
        assert!(!stores.revocations().invalidates(&proof, version));
        stores.settle(at(1));
        assert!(
            stores.revocations().invalidates(&proof, version),
            "the plan did not use the store"
        );
        let (again, _) = stores
            .store(
                &trust(),
                &first,
                &mut ValidationInputs { files: &mut files, crls: &fetched, now: at(2) },
            )
            .unwrap();
        assert_ne!(again.version().lineage, version.lineage);
    }

    #[test]
    fn broken_validation_of_a_filter_chain_does_not_inherit_the_roots_of_the_last_one_there() {
        let authority = TestPki::new();
        let other = TestPki::new();
        let mut stores = TrustStores::default();
        let mut files = WatchedFiles::default();
        let fetched = CrlStore::default();
        let place = SecretId::Location("listener a chain 0".into());
        let first = authority.validation(1, &[], 0);
        let broken = |roots: &Validation| Validation {
            revocations: Some(DataSource::inline("no list")),
            ..roots.clone()
        };
        let mut is_served = |id: &SecretId, validation: &Validation| {
            let got = stores.store(
                id,
                validation,
                &mut ValidationInputs { files: &mut files, crls: &fetched, now: at(0) },
            );
            stores.settle(at(0));
            got.is_ok()
        };
        assert!(is_served(&place, &first));
        assert!(is_served(&place, &broken(&first)), "the roots are the same");
        assert!(!is_served(&place, &broken(&other.validation(1, &[], 0))));
        // A named secret keeps its last good store whatever it contains; a location never has the same identifier.
        let named = SecretId::Name("listener a chain 0".into());
        assert!(!is_served(&named, &broken(&first)));
        assert!(is_served(&named, &first));
        assert!(is_served(&named, &broken(&other.validation(1, &[], 0))));
    }
}
