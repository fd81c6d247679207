//! A whole configuration at one moment. Immutable; the next one replaces it whole.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::{
    Action, Cluster, Discovery, EndpointSet, Filter, FilterChain, Listener, Name, RouteSource,
    RouteTable, Secret, SecretSource, Transport,
};

/// Everything a data plane works by. A request or a flow sees one snapshot from start to end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Counts the snapshots of this process, from 1.
    pub revision: u64,
    /// The listeners by name.
    pub listeners: BTreeMap<Name, Arc<Listener>>,
    /// The route tables by name.
    pub routes: BTreeMap<Name, Arc<RouteTable>>,
    /// The clusters by name.
    pub clusters: BTreeMap<Name, Arc<Cluster>>,
    /// The endpoints of the clusters that discover them, by `ClusterLoadAssignment` name.
    pub endpoints: BTreeMap<Name, Arc<EndpointSet>>,
    /// The secrets by name.
    pub secrets: BTreeMap<Name, Arc<Secret>>,
}

/// A name that something refers to and that is not there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Missing {
    /// A route table.
    Routes(Name),
    /// A cluster.
    Cluster(Name),
    /// The endpoints of a cluster.
    Endpoints(Name),
    /// A secret.
    Secret(Name),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Routes(name) => write!(f, "route configuration {name:?}"),
            Self::Cluster(name) => write!(f, "cluster {name:?}"),
            Self::Endpoints(name) => write!(f, "endpoints {name:?}"),
            Self::Secret(name) => write!(f, "secret {name:?}"),
        }
    }
}

impl Snapshot {
    /// The listener that answers for an original destination: its own address first, then one
    /// bound to every address at that port.
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

    /// The endpoints of a cluster; none when they are unknown or the cluster has no fixed ones.
    #[must_use]
    pub fn endpoints_of<'a>(&'a self, cluster: &'a Cluster) -> Option<&'a EndpointSet> {
        match &cluster.discovery {
            Discovery::Static(set) => Some(set),
            Discovery::Endpoints(name) => self.endpoints.get(name).map(Arc::as_ref),
            Discovery::Dns(_) | Discovery::OriginalDestination => None,
        }
    }

    /// A secret in place or by name.
    #[must_use]
    pub fn secret<'a>(&'a self, source: &'a SecretSource) -> Option<&'a Arc<Secret>> {
        match source {
            SecretSource::Inline(secret) => Some(secret),
            SecretSource::Named(name) => self.secrets.get(name),
        }
    }

    /// Every name that is referred to and not there, each once, in order.
    #[must_use]
    pub fn missing(&self) -> Vec<Missing> {
        let mut missing = Vec::new();
        for listener in self.listeners.values() {
            for chain in listener.all_chains() {
                self.missing_of_chain(chain, &mut missing);
            }
            if let Some(udp) = &listener.udp {
                self.expect_cluster(&udp.cluster, &mut missing);
            }
        }
        for cluster in self.clusters.values() {
            self.missing_of_cluster(cluster, &mut missing);
        }
        missing.sort_unstable();
        missing.dedup();
        missing
    }

    fn missing_of_chain(&self, chain: &FilterChain, missing: &mut Vec<Missing>) {
        if let Some(tls) = &chain.tls {
            self.expect_secret(&tls.identity, missing);
            if let Some(validation) = tls.clients.validation() {
                self.expect_secret(validation, missing);
            }
        }
        match &chain.filter {
            Filter::Tcp(tcp) => {
                tcp.clusters.iter().for_each(|c| self.expect_cluster(&c.name, missing))
            }
            Filter::Http(http) => match &http.routes {
                RouteSource::Inline(table) => self.missing_of_routes(table, missing),
                RouteSource::Named(name) => match self.routes.get(name) {
                    Some(table) => self.missing_of_routes(table, missing),
                    None => missing.push(Missing::Routes(name.clone())),
                },
            },
        }
    }

    fn missing_of_routes(&self, table: &RouteTable, missing: &mut Vec<Missing>) {
        for route in table.hosts.iter().flat_map(|host| &host.routes) {
            if let Action::Forward { clusters, .. } = &route.action {
                clusters.iter().for_each(|c| self.expect_cluster(&c.name, missing));
            }
        }
    }

    fn missing_of_cluster(&self, cluster: &Cluster, missing: &mut Vec<Missing>) {
        if let Discovery::Endpoints(name) = &cluster.discovery
            && !self.endpoints.contains_key(name)
        {
            missing.push(Missing::Endpoints(name.clone()));
        }
        if let Some(tls) = &cluster.tls {
            tls.identity.iter().chain(&tls.validation).for_each(|s| self.expect_secret(s, missing));
        }
    }

    fn expect_cluster(&self, name: &Name, missing: &mut Vec<Missing>) {
        if !self.clusters.contains_key(name) {
            missing.push(Missing::Cluster(name.clone()));
        }
    }

    fn expect_secret(&self, source: &SecretSource, missing: &mut Vec<Missing>) {
        if let SecretSource::Named(name) = source
            && !self.secrets.contains_key(name)
        {
            missing.push(Missing::Secret(name.clone()));
        }
    }
}
