//! What a client has. Most clients have all that they want of one set, so the set is kept, which they share.

use std::collections::BTreeMap;
use std::sync::Arc;

use weft_model::Name;

use super::ResourceSet;
use crate::translate::ResourceKind;

/// The resources of one kind that a client has, as far as the server knows.
#[derive(Debug, Default)]
pub(super) struct KnownResources {
    /// The client has those resources of this set that it wants.
    set: Option<Arc<ResourceSet>>,
    /// Beside these names, each with its version, whatever the set says of them.
    listed: BTreeMap<Name, Arc<str>>,
}

impl KnownResources {
    /// Notes a version that the client reports.
    pub(super) fn report(&mut self, name: Name, version: Arc<str>) {
        self.listed.insert(name, version);
    }

    /// The version that the client has of a name.
    pub(super) fn version(
        &self,
        kind: ResourceKind,
        name: &str,
        is_wanted: bool,
    ) -> Option<&Arc<str>> {
        self.listed.get(name).or_else(|| {
            let set = self.set.as_ref().filter(|_| is_wanted)?;
            set.get(kind, name).map(|published| &published.version)
        })
    }

    /// The names that the client has and `now` does not hold. A name may come twice.
    pub(super) fn gone<'k>(
        &'k self,
        kind: ResourceKind,
        now: &'k ResourceSet,
        wants: impl Fn(&str) -> bool + 'k,
    ) -> impl Iterator<Item = &'k Name> {
        let set = self.set.as_deref().filter(|set| !std::ptr::eq(*set, now));
        let of_set = set.into_iter().flat_map(move |set| set.of(kind)).map(|(name, _)| name);
        let of_set = of_set.filter(move |name| wants(name));
        self.listed.keys().chain(of_set).filter(move |name| now.get(kind, name).is_none())
    }

    /// Notes that the client has all that it wants of a set.
    pub(super) fn take_set(&mut self, set: Arc<ResourceSet>) {
        self.set = Some(set);
        self.listed.clear();
    }

    /// The same, with names that the set does not hold and the client still has.
    pub(super) fn take_set_beside(
        &mut self,
        kind: ResourceKind,
        set: Arc<ResourceSet>,
        gone: Vec<(Name, Arc<str>)>,
    ) {
        self.listed.retain(|name, _| set.get(kind, name).is_none());
        self.listed.extend(gone);
        self.set = Some(set);
    }

    /// Lists each name: needed before the client wants names that it does not have, or forgets some that it wants.
    pub(super) fn list(&mut self, kind: ResourceKind, wants: impl Fn(&str) -> bool) {
        let Some(set) = self.set.take() else {
            return;
        };
        for (name, published) in set.of(kind).filter(|(name, _)| wants(name)) {
            let version = || published.version.clone();
            self.listed.entry(name.clone()).or_insert_with(version);
        }
    }

    /// Forgets a name that the client no longer wants.
    pub(super) fn forget(&mut self, name: &str) {
        self.listed.remove(name);
    }

    /// Forgets the listed names that are not kept.
    pub(super) fn retain(&mut self, is_kept: impl Fn(&str) -> bool) {
        self.listed.retain(|name, _| is_kept(name));
    }
}
