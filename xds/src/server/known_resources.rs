//! Tracks which resource versions a client has. Most clients have all subscribed resources of one set, so a reference to
//! the shared set is stored instead of a list of versions.

use std::collections::BTreeMap;
use std::sync::Arc;

use weft_model::Name;

use super::ResourceSet;
use crate::translate::ResourceKind;

/// The resources of one kind that a client has, as far as the server knows.
#[derive(Debug, Default)]
pub(super) struct KnownResources {
    /// The client has the resources of this set that it subscribes to.
    set: Option<Arc<ResourceSet>>,
    /// Names with other versions than in the set.
    listed: BTreeMap<Name, Arc<str>>,
}

impl KnownResources {
    /// Records a version that the client reports.
    pub(super) fn report(&mut self, name: Name, version: Arc<str>) {
        self.listed.insert(name, version);
    }

    /// The client's version of a resource.
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

    /// The names that the client has and `now` does not contain. A name may occur twice.
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

    /// Records that the client has all subscribed resources of a set.
    pub(super) fn take_set(&mut self, set: Arc<ResourceSet>) {
        self.set = Some(set);
        self.listed.clear();
    }

    /// The same, with names that the client still has and the set does not contain.
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

    /// Replaces the set by a list of versions. Needed before the subscription changes to names that the client does not
    /// have, or when the client has dropped names that it subscribes to.
    pub(super) fn list(&mut self, kind: ResourceKind, wants: impl Fn(&str) -> bool) {
        let Some(set) = self.set.take() else {
            return;
        };
        for (name, published) in set.of(kind).filter(|(name, _)| wants(name)) {
            let version = || published.version.clone();
            self.listed.entry(name.clone()).or_insert_with(version);
        }
    }

    /// Removes a name that the client no longer subscribes to.
    pub(super) fn forget(&mut self, name: &str) {
        self.listed.remove(name);
    }

    /// Removes the listed names for which `is_kept` is false.
    pub(super) fn retain(&mut self, is_kept: impl Fn(&str) -> bool) {
        self.listed.retain(|name, _| is_kept(name));
    }
}
