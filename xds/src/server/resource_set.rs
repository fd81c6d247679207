//! Resource sets: the encoded resources that one kind of client gets.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::hash::Hasher;
use std::sync::Arc;

use weft_model::{Discovery, EndpointSet, MissingReference, Name, RouteTable, Snapshot};

use super::read_back;
use crate::translate::{self, Resource, ResourceKind};

/// A resource, encoded once for all streams.
#[derive(Debug, Clone, Eq)]
pub struct EncodedResource {
    /// A hash of the content: the same after a restart and on every control plane.
    pub version: Arc<str>,
    /// The encoded message.
    pub bytes: Arc<[u8]>,
    /// For a cluster: the name its endpoints are served under.
    pub endpoints: Option<Name>,
}

impl PartialEq for EncodedResource {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.bytes, &other.bytes)
            || (self.version == other.version && self.endpoints == other.endpoints)
    }
}

/// Resources that were encoded together. Several sets share a fragment, and it is reused while its source does not
/// change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fragment {
    resources: Vec<(ResourceKind, Name, EncodedResource)>,
    /// The names that its resources refer to and that it does not contain.
    references: Vec<MissingReference>,
}

impl Fragment {
    /// Encodes a part of a configuration. Missing routes and endpoints are published empty, because a client that waits
    /// for them would not become ready.
    ///
    /// # Errors
    /// One message for each resource that a data plane would reject.
    pub fn encode(mut snapshot: Snapshot) -> Result<Self, Vec<String>> {
        let mut references = Vec::new();
        for missing in snapshot.missing() {
            match missing {
                MissingReference::Routes(name) => {
                    let empty = RouteTable::new(name.clone(), Vec::new());
                    snapshot.routes.insert(name, Arc::new(empty));
                }
                MissingReference::Endpoints(name) => {
                    snapshot.endpoints.insert(name, Arc::new(EndpointSet::default()));
                }
                MissingReference::Cluster(_)
                | MissingReference::Addresses(_)
                | MissingReference::Secret(_) => {
                    references.push(missing);
                }
            }
        }
        let mut encoded = Vec::new();
        let mut problems = Vec::new();
        for resource in resources(&snapshot) {
            match publish(&resource) {
                Ok(published) => {
                    encoded.push((resource.kind(), resource.name().clone(), published))
                }
                Err(problem) => problems.push(problem),
            }
        }
        if problems.is_empty() {
            encoded.shrink_to_fit();
            references.shrink_to_fit();
            Ok(Self { resources: encoded, references })
        } else {
            Err(problems)
        }
    }
}

/// Resources by kind and name. Complete: every name that a resource refers to is in the set.
///
/// A set may extend a base that it shares with other sets.
#[derive(Debug, Clone, Default)]
pub struct ResourceSet {
    base: Option<Arc<Self>>,
    kinds: BTreeMap<ResourceKind, Table>,
    /// For each kind, a hash of all versions, including those of the base.
    versions: BTreeMap<ResourceKind, String>,
    changes: BTreeMap<ResourceKind, ResourceChanges>,
}

/// Resources of one kind, sorted by name. One allocation, because sets are rebuilt with each change, and small freed
/// allocations between others would fragment the heap.
type Table = Vec<(Name, EncodedResource)>;

/// The difference between a set and an earlier one, for one kind.
#[derive(Debug, Clone)]
struct ResourceChanges {
    /// The version of the kind in the earlier set.
    from: String,
    /// The names that were added, changed or removed since.
    names: Vec<Name>,
}

impl PartialEq for ResourceSet {
    /// Whether two sets that were assembled in the same way have the same resources.
    fn eq(&self, other: &Self) -> bool {
        ResourceKind::ALL.into_iter().all(|kind| self.of(kind).eq(other.of(kind)))
    }
}

impl Eq for ResourceSet {}

impl ResourceSet {
    /// Encodes a whole configuration. `local_secrets` are secrets that clients create themselves.
    ///
    /// # Errors
    /// One message for each missing name, and for each resource that a data plane would reject.
    pub fn new(snapshot: Snapshot, local_secrets: &[&str]) -> Result<Self, Vec<String>> {
        let fragment = Fragment::encode(snapshot)?;
        Self::assemble(None, [&fragment], local_secrets)
    }

    /// Assembles a set from fragments and an optional base, which must have no base itself. `local_secrets` are secrets
    /// that clients create themselves.
    ///
    /// # Errors
    /// One message for each name that is missing or defined twice.
    pub fn assemble<'f>(
        base: Option<Arc<Self>>,
        fragments: impl IntoIterator<Item = &'f Fragment>,
        local_secrets: &[&str],
    ) -> Result<Self, Vec<String>> {
        let mut problems = Vec::new();
        let mut references = Vec::new();
        debug_assert!(base.as_ref().is_none_or(|base| base.base.is_none()), "one base at most");
        let mut set = Self { base, ..Self::default() };
        for fragment in fragments {
            references.extend(&fragment.references);
            for (kind, name, published) in &fragment.resources {
                set.kinds.entry(*kind).or_default().push((name.clone(), published.clone()));
            }
        }
        for (kind, table) in &mut set.kinds {
            table.sort_by(|(one, _), (other, _)| one.cmp(other));
            let twice = table.windows(2).filter_map(|pair| match pair {
                [(one, _), (other, _)] if one == other => Some(other),
                _ => None,
            });
            let base = set.base.as_ref();
            let in_base = table.iter().map(|(name, _)| name);
            let in_base = in_base.filter(|name| base.is_some_and(|b| b.get(*kind, name).is_some()));
            let names = twice.chain(in_base);
            problems.extend(names.map(|name| format!("{kind} {name:?} is defined twice")));
            table.shrink_to_fit();
        }
        for reference in references {
            let is_known = match reference {
                MissingReference::Cluster(name) | MissingReference::Addresses(name) => {
                    set.get(ResourceKind::Cluster, name).is_some()
                }
                MissingReference::Routes(name) => set.get(ResourceKind::Routes, name).is_some(),
                MissingReference::Endpoints(name) => {
                    set.get(ResourceKind::Endpoints, name).is_some()
                }
                MissingReference::Secret(name) => {
                    local_secrets.contains(&&**name)
                        || set.get(ResourceKind::Secret, name).is_some()
                }
            };
            if !is_known {
                problems.push(format!("missing {reference}: a resource refers to it"));
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        for kind in ResourceKind::ALL {
            let version = set.hash_of(kind);
            set.versions.insert(kind, version);
        }
        Ok(set)
    }

    /// Records the difference from the set that clients were sent before, so that each stream need not compare all
    /// resources.
    pub fn compare(&mut self, earlier: &Self) {
        for kind in ResourceKind::ALL {
            let base = match (&self.base, &earlier.base) {
                (None, None) => Some(&[][..]),
                (Some(base), Some(before)) => base.changed_since(kind, before.version(kind)),
                (Some(_), None) | (None, Some(_)) => None,
            };
            // Without the changes of the base, streams compare all resources.
            let Some(base) = base else {
                self.changes.remove(&kind);
                continue;
            };
            let own = different(self.own(kind), earlier.own(kind));
            let names = base.iter().cloned().chain(own).collect();
            let from = earlier.version(kind).to_owned();
            self.changes.insert(kind, ResourceChanges { from, names });
        }
    }

    /// The names that changed since an earlier version of the kind; none when that is not known.
    pub(super) fn changed_since(&self, kind: ResourceKind, version: &str) -> Option<&[Name]> {
        if self.version(kind) == version {
            return Some(&[]);
        }
        let changes = self.changes.get(&kind).filter(|changes| changes.from == version)?;
        Some(&changes.names)
    }

    fn hash_of(&self, kind: ResourceKind) -> String {
        let mut hasher = siphasher::sip::SipHasher13::new();
        if let Some(base) = &self.base {
            hasher.write(base.version(kind).as_bytes());
        }
        for (name, published) in self.own(kind) {
            for part in [name.as_bytes(), b"=", published.version.as_bytes(), b"\n"] {
                hasher.write(part);
            }
        }
        format!("{:016x}", hasher.finish())
    }

    /// The set that this one extends.
    #[must_use]
    pub fn base(&self) -> Option<&Self> {
        self.base.as_deref()
    }

    /// The resources of a kind: those of the base first.
    pub fn of(&self, kind: ResourceKind) -> impl Iterator<Item = (&Name, &EncodedResource)> {
        let base = self.base.iter().flat_map(move |base| base.own(kind));
        base.chain(self.own(kind)).map(|(name, published)| (name, published))
    }

    /// The resources of a kind, without those of the base.
    fn own(&self, kind: ResourceKind) -> &[(Name, EncodedResource)] {
        self.kinds.get(&kind).map(Vec::as_slice).unwrap_or_default()
    }

    /// A resource by name.
    #[must_use]
    pub fn get(&self, kind: ResourceKind, name: &str) -> Option<&EncodedResource> {
        self.entry(kind, name).map(|(_, published)| published)
    }

    /// The name, sharing the allocation of the resource's name when the set contains it.
    pub(super) fn shared_name(&self, kind: ResourceKind, name: &str) -> Name {
        self.entry(kind, name).map_or_else(|| name.into(), |(name, _)| name.clone())
    }

    fn entry(&self, kind: ResourceKind, name: &str) -> Option<&(Name, EncodedResource)> {
        let own = find(self.own(kind), name);
        own.or_else(|| find(self.base.as_ref()?.own(kind), name))
    }

    /// The version of all resources of a kind.
    #[must_use]
    pub fn version(&self, kind: ResourceKind) -> &str {
        self.versions.get(&kind).map_or("", String::as_str)
    }
}

fn find<'t>(
    table: &'t [(Name, EncodedResource)],
    name: &str,
) -> Option<&'t (Name, EncodedResource)> {
    let index = table.binary_search_by(|(known, _)| (**known).cmp(name)).ok()?;
    table.get(index)
}

/// The names that only one of two sorted tables contains, or that have different content.
fn different(now: &[(Name, EncodedResource)], before: &[(Name, EncodedResource)]) -> Vec<Name> {
    let mut names = Vec::new();
    let mut now = now.iter().peekable();
    let mut before = before.iter().peekable();
    loop {
        let order = match (now.peek(), before.peek()) {
            (None, None) => return names,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            // Most are the same allocation.
            (Some((one, _)), Some((other, _))) if Arc::ptr_eq(one, other) => Ordering::Equal,
            (Some((one, _)), Some((other, _))) => one.cmp(other),
        };
        let new = if order.is_le() { now.next() } else { None };
        let old = if order.is_ge() { before.next() } else { None };
        let name = match (new, old) {
            (Some((_, new)), Some((_, old))) if new == old => continue,
            (Some((name, _)), _) | (None, Some((name, _))) => name,
            (None, None) => return names,
        };
        names.push(name.clone());
    }
}

fn publish(resource: &Resource) -> Result<EncodedResource, String> {
    let bytes = resource.encode();
    let version = hash(&bytes);
    // A resource that a data plane would reject is never sent.
    if cfg!(debug_assertions) || read_back::is_needed(resource) {
        translate::decode(resource.kind(), &bytes).map_err(|rejection| rejection.to_string())?;
    }
    let endpoints = match resource {
        Resource::Cluster(cluster) => match &cluster.discovery {
            Discovery::Endpoints(name) => Some(name.clone()),
            Discovery::Static(_) | Discovery::Dns(_) | Discovery::OriginalDestination => None,
        },
        Resource::Endpoints(..)
        | Resource::Secret(..)
        | Resource::Listener(_)
        | Resource::Routes(_) => None,
    };
    Ok(EncodedResource { version: version.into(), bytes: bytes.into(), endpoints })
}

fn resources(snapshot: &Snapshot) -> Vec<Resource> {
    let mut all = Vec::new();
    all.extend(snapshot.clusters.values().cloned().map(Resource::Cluster));
    all.extend(
        snapshot.endpoints.iter().map(|(name, set)| Resource::Endpoints(name.clone(), set.clone())),
    );
    all.extend(
        snapshot
            .secrets
            .iter()
            .map(|(name, secret)| Resource::Secret(name.clone(), secret.clone())),
    );
    all.extend(snapshot.listeners.values().cloned().map(Resource::Listener));
    all.extend(snapshot.routes.values().cloned().map(Resource::Routes));
    all
}

fn hash(bytes: &[u8]) -> String {
    let mut hasher = siphasher::sip::SipHasher13::new();
    hasher.write(bytes);
    format!("{:016x}", hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_model::{
        ChainMatch, Filter, FilterChain, HttpFilter, HttpService, Listener, Permission, Principal,
        Rbac, RbacAction, RbacFilter, RbacPolicy, RouteSource, SourceAddress, Transport,
    };

    /// A listener with policies, which are an unordered map on the wire.
    fn guarded() -> Snapshot {
        let policy =
            RbacPolicy { permissions: vec![Permission::Any], principals: vec![Principal::Any] };
        let rbac = Rbac {
            action: RbacAction::Allow,
            policies: (0..20).map(|n| (n.to_string().into(), policy.clone())).collect(),
        };
        let http = HttpService {
            filters: vec![HttpFilter::Rbac(RbacFilter { rules: Some(rbac), shadow: None }.into())],
            ..HttpService::new(RouteSource::Named("r".into()))
        };
        let chain = FilterChain {
            name: "".into(),
            matches: ChainMatch::default(),
            tls: None,
            rules: Vec::new(),
            filter: Filter::Http(http.into()),
        };
        let listener = Listener {
            name: "l".into(),
            address: ([0, 0, 0, 0], 80).into(),
            transport: Transport::Tcp,
            bind: true,
            use_original_destination: false,
            transparent: false,
            chains: vec![chain],
            default_chain: None,
            udp: None,
            allow_from: None,
            idle_end: None,
            flow_seed: None,
            source_address: SourceAddress::Agent,
        };
        let mut snapshot = Snapshot::default();
        snapshot.listeners.insert("l".into(), listener.into());
        snapshot
    }

    #[test]
    fn equal_configurations_have_equal_versions() {
        let set = ResourceSet::new(guarded(), &[]).expect("a closed configuration");
        let replica = ResourceSet::new(guarded(), &[]).expect("a closed configuration");
        let version =
            |set: &ResourceSet| set.get(ResourceKind::Listener, "l").map(|p| p.version.clone());
        assert_eq!(version(&set), version(&replica));
        assert_eq!(set, replica);
    }

    #[test]
    fn missing_routes_are_published_empty_and_missing_clusters_are_refused() {
        let set = ResourceSet::new(guarded(), &[]).expect("a closed configuration");
        assert!(set.get(ResourceKind::Routes, "r").is_some());

        let mut snapshot = guarded();
        let listener = snapshot.listeners.get_mut("l").map(Arc::make_mut).expect("it is there");
        listener.udp = Some(weft_model::UdpProxy {
            cluster: "nowhere".into(),
            idle_timeout: std::time::Duration::ZERO,
            flow_key: weft_model::FlowKey::FiveTuple,
            access_log: weft_model::AccessLogSinks::Off,
        });
        listener.transport = Transport::Udp;
        listener.chains.clear();
        let problems = ResourceSet::new(snapshot, &[]).expect_err("refused");
        assert_eq!(problems, ["missing cluster \"nowhere\": a resource refers to it"]);
    }
}
