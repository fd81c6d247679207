//! Snapshots: the whole configuration at one moment. Immutable; a new snapshot replaces the old one as a whole.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::{
    Cluster, Discovery, EndpointSet, Filter, HttpFilter, KeySource, Listener, Name, RouteAction,
    RouteSource, RouteTable, Secret, SecretSource, Transport,
};

/// The whole configuration of a data plane. A request or a flow uses one snapshot from start to end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The number of the snapshot in this process, from 1.
    pub revision: u64,
    /// The listeners by name.
    pub listeners: BTreeMap<Name, Arc<Listener>>,
    /// The route tables by name.
    pub routes: BTreeMap<Name, Arc<RouteTable>>,
    /// The clusters by name.
    pub clusters: BTreeMap<Name, Arc<Cluster>>,
    /// The endpoints of EDS clusters, by `ClusterLoadAssignment` name.
    pub endpoints: BTreeMap<Name, Arc<EndpointSet>>,
    /// The endpoints of DNS clusters, by cluster name.
    pub resolved: BTreeMap<Name, Arc<EndpointSet>>,
    /// The secrets by name.
    pub secrets: BTreeMap<Name, Arc<Secret>>,
}

/// A name that a resource refers to and that the snapshot does not contain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum MissingReference {
    /// A route table.
    Routes(Name),
    /// A cluster.
    Cluster(Name),
    /// The endpoints of a cluster.
    Endpoints(Name),
    /// The addresses of a cluster's host names, by cluster name.
    Addresses(Name),
    /// A secret.
    Secret(Name),
}

impl fmt::Display for MissingReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Routes(name) => write!(f, "route configuration {name:?}"),
            Self::Cluster(name) => write!(f, "cluster {name:?}"),
            Self::Endpoints(name) => write!(f, "endpoints {name:?}"),
            Self::Addresses(name) => write!(f, "DNS addresses of cluster {name:?}"),
            Self::Secret(name) => write!(f, "secret {name:?}"),
        }
    }
}

impl Snapshot {
    /// The listener for an original destination: one with that address first, then one with the unspecified address
    /// and that port.
    #[must_use]
    pub fn virtual_listener(
        &self,
        transport: Transport,
        destination: SocketAddr,
    ) -> Option<&Arc<Listener>> {
        let candidates =
            || self.listeners.values().filter(move |l| !l.bind && l.transport == transport);
        candidates().find(|l| l.address == destination).or_else(|| {
            candidates()
                .find(|l| l.address.ip().is_unspecified() && l.address.port() == destination.port())
        })
    }

    /// The endpoints of a cluster; none when they are not known yet or the cluster uses the original destination.
    #[must_use]
    pub fn endpoints_of<'a>(&'a self, cluster: &'a Cluster) -> Option<&'a EndpointSet> {
        match &cluster.discovery {
            Discovery::Static(set) => Some(set),
            Discovery::Endpoints(name) => self.endpoints.get(name).map(Arc::as_ref),
            Discovery::Dns(_) => self.resolved.get(&cluster.name).map(Arc::as_ref),
            Discovery::OriginalDestination => None,
        }
    }

    /// The secret of a source, inline or by name; none when the name is unknown.
    #[must_use]
    pub fn secret<'a>(&'a self, source: &'a SecretSource) -> Option<&'a Arc<Secret>> {
        match source {
            SecretSource::Inline(secret) => Some(secret),
            SecretSource::Named(name) => self.secrets.get(name),
        }
    }

    /// Every missing name, once, in order. DNS addresses are not listed: no configuration contains them.
    #[must_use]
    pub fn missing(&self) -> Vec<MissingReference> {
        let mut missing = BTreeSet::new();
        let mut clusters: Vec<&Name> = Vec::new();
        for listener in self.listeners.values() {
            missing.extend(self.missing_secrets(listener.secret_names()));
            for name in listener.table_names().filter(|name| !self.routes.contains_key(*name)) {
                missing.insert(MissingReference::Routes(name.clone()));
            }
            let tables = listener.table_names().filter_map(|name| self.routes.get(name));
            clusters.extend(tables.flat_map(|table| table.cluster_names()));
            clusters.extend(listener.cluster_names());
        }
        for cluster in self.clusters.values() {
            missing.extend(self.missing_of_cluster(cluster));
        }
        let lacking = clusters.into_iter().filter(|name| !self.clusters.contains_key(*name));
        missing.extend(lacking.map(|name| MissingReference::Cluster(name.clone())));
        missing
            .into_iter()
            .filter(|missing| !matches!(missing, MissingReference::Addresses(_)))
            .collect()
    }

    /// The missing names of a cluster: its endpoints or DNS addresses, and its secrets.
    #[must_use]
    pub fn missing_of_cluster(&self, cluster: &Cluster) -> Vec<MissingReference> {
        let mut missing: Vec<MissingReference> =
            self.missing_secrets(cluster.secret_names()).collect();
        match &cluster.discovery {
            Discovery::Endpoints(name) if !self.endpoints.contains_key(name) => {
                missing.push(MissingReference::Endpoints(name.clone()));
            }
            Discovery::Dns(_) if !self.resolved.contains_key(&cluster.name) => {
                missing.push(MissingReference::Addresses(cluster.name.clone()));
            }
            Discovery::Static(_)
            | Discovery::Endpoints(_)
            | Discovery::Dns(_)
            | Discovery::OriginalDestination => {}
        }
        missing
    }

    /// The secrets among `names` that are missing.
    pub fn missing_secrets<'n>(
        &self,
        names: impl Iterator<Item = &'n Name>,
    ) -> impl Iterator<Item = MissingReference> {
        names
            .filter(|n| !self.secrets.contains_key(*n))
            .map(|name| MissingReference::Secret(name.clone()))
    }
}

/// Two listeners with the same address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressConflict {
    /// The listener that is served.
    pub first: Name,
    /// The listener that is not served.
    pub second: Name,
    /// Their address.
    pub address: SocketAddr,
}

impl fmt::Display for AddressConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, second, address } = self;
        write!(f, "listener {second:?}: address {address} is already used by listener {first:?}")
    }
}

impl Snapshot {
    /// The listeners with the address of an earlier one. With two bound sockets, connections would go to either;
    /// with two unbound listeners, one would get none.
    #[must_use]
    pub fn address_conflicts(&self) -> Vec<AddressConflict> {
        let mut taken = BTreeMap::new();
        let mut conflicts = Vec::new();
        for (name, listener) in &self.listeners {
            let is_udp = listener.transport == Transport::Udp;
            match taken.entry((listener.bind, is_udp, listener.address)) {
                Entry::Vacant(free) => {
                    free.insert(name);
                }
                Entry::Occupied(first) => conflicts.push(AddressConflict {
                    first: Name::clone(first.get()),
                    second: name.clone(),
                    address: listener.address,
                }),
            }
        }
        conflicts
    }
}

impl Cluster {
    /// The names of the secrets that it refers to.
    pub fn secret_names(&self) -> impl Iterator<Item = &Name> {
        let sources = self.tls.iter().flat_map(|tls| tls.identity.iter().chain(&tls.validation));
        sources.filter_map(SecretSource::name)
    }
}

impl RouteTable {
    /// The names of the clusters that its routes refer to.
    pub fn cluster_names(&self) -> impl Iterator<Item = &Name> {
        let routes = self.hosts.iter().flat_map(|host| &host.routes);
        let clusters = routes.flat_map(|route| match &route.action {
            RouteAction::Forward { clusters, .. } => clusters.as_slice(),
            RouteAction::Redirect(_) | RouteAction::Respond { .. } => &[],
        });
        clusters.map(|cluster| &cluster.name)
    }
}

impl Listener {
    /// The names of the secrets that it refers to.
    pub fn secret_names(&self) -> impl Iterator<Item = &Name> {
        let tls = self.all_chains().filter_map(|chain| chain.tls.as_ref());
        let sources = tls.flat_map(|tls| {
            [&tls.identity].into_iter().chain(tls.client_certificates.validation())
        });
        sources.filter_map(SecretSource::name)
    }

    /// The names of the route tables that it refers to.
    pub fn table_names(&self) -> impl Iterator<Item = &Name> {
        self.all_chains().filter_map(|chain| match &chain.filter {
            Filter::Tcp(_) => None,
            Filter::Http(http) => match &http.routes {
                RouteSource::Named(name) => Some(name),
                RouteSource::Inline(_) => None,
            },
        })
    }

    /// The clusters from which keys of token issuers are fetched.
    pub fn key_cluster_names(&self) -> impl Iterator<Item = &Name> {
        let filters = self.all_chains().flat_map(|chain| match &chain.filter {
            Filter::Tcp(_) => &[],
            Filter::Http(http) => http.filters.as_slice(),
        });
        let policies = filters.filter_map(|filter| match filter {
            HttpFilter::Jwt(policy) => Some(policy),
            HttpFilter::Rbac(_) => None,
        });
        let providers = policies.flat_map(|policy| policy.providers.values());
        providers.filter_map(|provider| match &provider.keys {
            KeySource::Http { cluster, .. } => Some(cluster),
            KeySource::Local(_) => None,
        })
    }

    /// The clusters of its TCP and UDP proxies and of its inline route tables.
    pub fn cluster_names(&self) -> impl Iterator<Item = &Name> {
        let inline = self.all_chains().filter_map(|chain| match &chain.filter {
            Filter::Tcp(_) => None,
            Filter::Http(http) => match &http.routes {
                RouteSource::Inline(table) => Some(table),
                RouteSource::Named(_) => None,
            },
        });
        self.flow_clusters().chain(inline.flat_map(|table| table.cluster_names()))
    }
}
