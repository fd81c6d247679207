//! The trust stores of a plan: which replaces which, and what was withdrawn by that.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use rustls_pki_types::UnixTime;
use weft_certs::{Coverage, CrlIndex, TrustParts, TrustStore};
use weft_model::Validation;

use super::files::{Files, Stamp};
use crate::standing::Withdrawals;

/// The lists of each trust store, by its name; none where revocation is not checked.
pub type Covered = BTreeMap<String, Option<Vec<Coverage>>>;

/// The last good store of each validation, so that a bad list leaves it in force.
#[derive(Debug, Default)]
pub(crate) struct TrustStores {
    held: HashMap<String, Held>,
    withdrawals: Withdrawals,
    /// When the first list that is in force expires, in seconds since 1970.
    next_expiry: Option<u64>,
}

/// A store, and what it was made of.
#[derive(Debug, Clone)]
struct Held {
    validation: Validation,
    stamps: [Stamp; 2],
    store: Arc<TrustStore>,
}

/// What tells the contents of a validation from others: stamps of its roots and lists.
pub(crate) fn stamps(validation: &Validation, files: &mut Files) -> [Stamp; 2] {
    let lists = validation.revocations.as_ref();
    let lists = lists.map(|lists| files.stamp(lists)).unwrap_or_default();
    [files.stamp(&validation.roots), lists]
}

impl TrustStores {
    /// The store of a validation, by a name of it that stays when its content changes; and what an operator
    /// should know of it.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn store(
        &mut self,
        name: &str,
        validation: &Validation,
        files: &mut Files,
        now: UnixTime,
    ) -> Result<(Arc<TrustStore>, Vec<String>), String> {
        let stamps = stamps(validation, files);
        let previous = self.held.get(name).cloned();
        let is_same = |held: &&Held| held.validation == *validation && held.stamps == stamps;
        if let Some(held) = previous.as_ref().filter(is_same) {
            let warnings = held.store.warnings(now);
            return Ok((held.store.clone(), told(name, warnings)));
        }
        let before = previous.as_ref().map(|held| held.store.as_ref());
        match load(validation, before, files, now) {
            Ok(store) => {
                let store = Arc::new(store);
                if let Some(before) = before {
                    self.withdrawals.add(&store, before);
                }
                let held = Held { validation: validation.clone(), stamps, store: store.clone() };
                self.held.insert(name.to_owned(), held);
                let warnings = store.warnings(now);
                Ok((store, told(name, warnings)))
            }
            Err(problem) => {
                let held = previous.ok_or_else(|| problem.clone())?;
                let problem = format!("{problem}; the last good one stays in force");
                Ok((held.store, told(name, vec![problem])))
            }
        }
    }

    /// Forgets the stores that nothing was made with, and looks when the first list expires.
    pub(crate) fn settle(&mut self, now: UnixTime) {
        self.held.retain(|_, held| Arc::strong_count(&held.store) > 1);
        let lists = self.held.values().filter_map(|held| held.store.revocations());
        let ends = lists.flat_map(CrlIndex::coverage).map(|list| list.next_update);
        self.next_expiry = ends.filter(|end| *end > now.as_secs()).min();
    }

    /// Whether a list has expired since [`Self::settle`].
    pub(crate) fn are_outdated(&self, now: UnixTime) -> bool {
        self.next_expiry.is_some_and(|end| end <= now.as_secs())
    }

    /// What was trusted and is not any more.
    pub(crate) fn withdrawals(&self) -> &Withdrawals {
        &self.withdrawals
    }

    /// What the lists of each store say of themselves.
    pub(crate) fn coverage(&self) -> Covered {
        let lists = |held: &Held| held.store.revocations().map(CrlIndex::coverage);
        self.held.iter().map(|(name, held)| (name.clone(), lists(held))).collect()
    }
}

fn told(name: &str, warnings: Vec<String>) -> Vec<String> {
    warnings.into_iter().map(|warning| format!("validation {name:?}: {warning}")).collect()
}

fn load(
    validation: &Validation,
    previous: Option<&TrustStore>,
    files: &mut Files,
    now: UnixTime,
) -> Result<TrustStore, String> {
    let roots = files.read(&validation.roots)?;
    let lists = validation.revocations.as_ref();
    let lists =
        lists.map(|lists| files.read_all(lists, validation.policy.bytes_limit)).transpose()?;
    let parts = TrustParts {
        roots: &roots,
        revocations: lists.as_deref(),
        names: validation.names.clone(),
        policy: validation.policy,
    };
    TrustStore::build(parts, previous, now).map_err(|error| error.to_string())
}
