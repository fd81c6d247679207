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
    /// When a plan would be another by the clock alone, in seconds since 1970: a list expires, or what could
    /// not be loaded is tried again.
    next_look: Option<u64>,
}

/// How often what could not be loaded is tried again: it may be good a moment later.
const AGAIN: u64 = 2;

/// The store of a validation.
#[derive(Debug, Clone)]
struct Held {
    /// What it was last made of, or tried to be made of.
    validation: Validation,
    stamps: [Stamp; 2],
    /// The last good one.
    store: Option<Arc<TrustStore>>,
    /// Why what there is now could not be loaded, and when that is tried again.
    failed: Option<(String, u64)>,
    is_asked: bool,
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
        let previous = self.held.remove(name);
        let is_same = |held: &Held| held.validation == *validation && held.stamps == stamps;
        let is_final = |held: &Held| held.failed.as_ref().is_none_or(|(_, at)| now.as_secs() < *at);
        let mut held = match previous {
            Some(held) if is_same(&held) && is_final(&held) => held,
            previous => {
                let store = previous.and_then(|held| held.store);
                self.load(validation, stamps, store, (files, now))
            }
        };
        held.is_asked = true;
        let (store, failed) = (held.store.clone(), held.failed.clone());
        self.held.insert(name.to_owned(), held);
        let mut told = Vec::new();
        let store = match (store, failed) {
            (Some(store), None) => store,
            (Some(store), Some((problem, _))) => {
                told.push(format!("{problem}; the last good one stays in force"));
                store
            }
            (None, failed) => return Err(failed.map(|(problem, _)| problem).unwrap_or_default()),
        };
        told.extend(store.warnings(now));
        let told = told.into_iter().map(|told| format!("validation {name:?}: {told}"));
        Ok((store, told.collect()))
    }

    fn load(
        &mut self,
        validation: &Validation,
        stamps: [Stamp; 2],
        before: Option<Arc<TrustStore>>,
        (files, now): (&mut Files, UnixTime),
    ) -> Held {
        let loaded = load(validation, before.as_deref(), files, now);
        let (store, failed) = match loaded {
            Ok(store) => {
                let store = Arc::new(store);
                if let Some(before) = &before {
                    self.withdrawals.add(&store, before);
                }
                (Some(store), None)
            }
            Err(problem) => (before, Some((problem, now.as_secs() + AGAIN))),
        };
        Held { validation: validation.clone(), stamps, store, failed, is_asked: true }
    }

    /// Forgets the stores that nobody asked for: what was checked by them takes its leave. And finds out when
    /// the clock alone makes another plan of the same things.
    pub(crate) fn settle(&mut self, now: UnixTime) {
        let withdrawals = &mut self.withdrawals;
        self.held.retain(|_, held| {
            if !held.is_asked
                && let Some(store) = &held.store
            {
                withdrawals.add_all(store);
            }
            std::mem::take(&mut held.is_asked)
        });
        let stores = self.held.values().filter_map(|held| held.store.as_ref());
        let lists = stores.filter_map(|store| store.revocations());
        let ends = lists.flat_map(CrlIndex::coverage).map(|list| list.next_update);
        let again = self.held.values().filter_map(|held| held.failed.as_ref()).map(|(_, at)| *at);
        self.next_look = ends.filter(|end| *end > now.as_secs()).chain(again).min();
    }

    /// Whether the clock alone has made another plan of the same things since [`Self::settle`].
    pub(crate) fn are_outdated(&self, now: UnixTime) -> bool {
        self.next_look.is_some_and(|at| at <= now.as_secs())
    }

    /// What was trusted and is not any more.
    pub(crate) fn withdrawals(&self) -> &Withdrawals {
        &self.withdrawals
    }

    /// What the lists of each store say of themselves.
    pub(crate) fn coverage(&self) -> Covered {
        let lists = |held: &Held| held.store.as_ref()?.revocations().map(CrlIndex::coverage);
        self.held.iter().map(|(name, held)| (name.clone(), lists(held))).collect()
    }
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
