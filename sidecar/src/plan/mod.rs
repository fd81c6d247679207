//! A configuration snapshot prepared for serving: TLS configurations, keys and load balancers.
//!
//! A plan is built on the control thread for each snapshot, and never changes. What cannot be built (for instance because a
//! secret is unreadable) keeps its last good form where there is one. A filter chain without one serves no client: it fails
//! closed.

mod build;
mod crl_sources;
mod files;
mod issuers;
mod trust;

use build::ClientParts;
pub(crate) use build::{Builder, FetchedData};
pub(crate) use crl_sources::{CrlDownload, CrlSources};
pub use trust::CrlsByTrustStore;

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use weft_certs::TrustStore;
use weft_certs::tls::{ClientTls, LoadedIdentity, ServerTls};
use weft_model::{
    Cluster, FilterChain, HttpService, Listener, Name, RbacFilter, RouteIndex, TcpProxy, Transport,
    TransportKind, UpstreamTls,
};

use crate::authenticate::TokenPolicy;
use crate::config_map::ConfigMap;
use crate::connection_registry::RevocationHistory;
use crate::load_balancer::Balancer;

/// What the workers serve connections and requests with.
#[derive(Debug, Default)]
pub struct SidecarPlan {
    /// The revision of the snapshot.
    pub revision: u64,
    listeners: BTreeMap<Name, Arc<PlannedListener>>,
    by_destination: ConfigMap<SocketAddr, Arc<PlannedListener>>,
    targets: ConfigMap<Name, Arc<PlannedCluster>>,
    /// The numbers of all targets.
    ids: HashSet<u64>,
    /// The certificates that trust stores stopped accepting.
    pub(crate) revocations: RevocationHistory,
    /// The CRLs in force.
    pub crls: CrlsByTrustStore,
}

/// A listener with its filter chains prepared.
#[derive(Debug)]
pub(crate) struct PlannedListener {
    pub(crate) listener: Arc<Listener>,
    chains: Vec<Arc<PlannedChain>>,
    default: Option<Arc<PlannedChain>>,
}

/// A filter chain prepared for serving.
#[derive(Debug)]
pub(crate) struct PlannedChain {
    pub(crate) tls: ChainTls,
    /// The policies for connections.
    pub(crate) rules: Vec<Arc<RbacFilter>>,
    pub(crate) service: PlannedService,
}

/// TLS on the client side of a filter chain.
#[derive(Debug, Clone)]
pub(crate) enum ChainTls {
    /// Plaintext.
    None,
    /// TLS with this configuration.
    Terminate(ServerTls),
    /// TLS is configured, but its secrets are missing or invalid. No client is served.
    Broken,
}

/// How the connections of a filter chain are served.
#[derive(Debug)]
pub(crate) enum PlannedService {
    Tcp(TcpProxy),
    Http(Box<PlannedHttp>),
}

impl PlannedService {
    /// Whether its connections are logged.
    pub(crate) fn is_logged(&self) -> bool {
        match self {
            Self::Tcp(tcp) => tcp.access_log,
            Self::Http(http) => http.http.access_log,
        }
    }
}

/// An HTTP service prepared for serving.
#[derive(Debug)]
pub(crate) struct PlannedHttp {
    pub(crate) http: Arc<HttpService>,
    /// None when the route table does not exist.
    pub(crate) routes: Option<RouteIndex>,
    pub(crate) tokens: Option<TokenPolicy>,
    /// The policies: the chain's policies for connections, then the service's own for requests.
    pub(crate) rules: Vec<Arc<RbacFilter>>,
    /// The one cluster that serves every request, where all routes lead to it and no policy applies to requests.
    pub(crate) only: Option<Name>,
}

/// A cluster prepared for serving.
#[derive(Debug)]
pub(crate) struct PlannedCluster {
    /// Stays the same as long as pooled connections to the cluster may be reused.
    pub(crate) id: u64,
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) balancer: Balancer,
    pub(crate) tls: PlannedClusterTls,
    secrets: PlannedClusterSecrets,
}

/// What TLS to a cluster was made from, to detect changes.
#[derive(Debug, Default)]
pub(crate) struct PlannedClusterSecrets {
    identity: Option<LoadedIdentity>,
    trust: Option<Arc<TrustStore>>,
}

impl PartialEq for PlannedClusterSecrets {
    fn eq(&self, other: &Self) -> bool {
        let same_trust = match (&self.trust, &other.trust) {
            (Some(own), Some(other)) => Arc::ptr_eq(own, other),
            (None, None) => true,
            _ => false,
        };
        same_trust && self.identity == other.identity
    }
}

impl PlannedClusterSecrets {
    fn new(parts: Option<&ClientParts>) -> Self {
        let identity = parts.and_then(|parts| parts.identity.clone());
        Self { identity, trust: parts.and_then(|parts| parts.trust.clone()) }
    }

    /// Whether connections made with `others` may be reused: our certificate is the same, and the endpoint's certificate is checked
    /// for the same names under the same policy. Connections with revoked certificates are closed separately.
    fn is_as(&self, others: &Self) -> bool {
        let asked = |secrets: &Self| {
            let trust = secrets.trust.as_ref()?;
            Some((trust.version().lineage, trust.names().to_vec(), *trust.policy()))
        };
        self.identity == others.identity && asked(self) == asked(others)
    }
}

/// TLS to the endpoints of a cluster.
#[derive(Debug, Clone)]
pub(crate) enum PlannedClusterTls {
    /// Plaintext.
    None,
    /// TLS with these configurations, which differ in the ALPN protocols that they offer.
    Originate { http1: ClientTls, http2: ClientTls, plain: ClientTls, tls: Box<UpstreamTls> },
    /// TLS is configured, but its secrets are missing or invalid. No request is sent.
    Broken,
}

impl SidecarPlan {
    /// The listeners that bind a socket.
    pub(crate) fn bound(&self) -> impl Iterator<Item = &Arc<PlannedListener>> {
        self.listeners.values().filter(|planned| planned.listener.bind)
    }

    /// The listener with this name.
    pub(crate) fn listener(&self, name: &str) -> Option<&Arc<PlannedListener>> {
        self.listeners.get(name)
    }

    /// The listener for `destination`: a virtual listener for it, or else `accepted`, which accepted the connection.
    pub(crate) fn listener_for<'a>(
        &'a self,
        accepted: &'a Arc<PlannedListener>,
        destination: SocketAddr,
    ) -> &'a Arc<PlannedListener> {
        if !accepted.listener.use_original_destination {
            return accepted;
        }
        self.by_destination.get(&destination).unwrap_or(accepted)
    }

    /// Whether connections to the target with this number may be reused.
    pub(crate) fn has_target(&self, id: u64) -> bool {
        self.ids.contains(&id)
    }

    /// The cluster with this name.
    pub(crate) fn target(&self, name: &str) -> Option<&Arc<PlannedCluster>> {
        self.targets.get(name)
    }
}

impl PlannedListener {
    /// The filter chain that serves a connection.
    pub(crate) fn chain(
        &self,
        destination: SocketAddr,
        kind: TransportKind,
    ) -> Option<&Arc<PlannedChain>> {
        let chosen = self.listener.chain_for(destination, kind)?;
        let is = |chain: &FilterChain| std::ptr::eq(chain, chosen);
        match self.listener.chains.iter().position(is) {
            Some(index) => self.chains.get(index),
            None => self.default.as_ref(),
        }
    }
}

/// Whether a sidecar serves a listener.
fn is_servable(listener: &Listener) -> bool {
    listener.transport == Transport::Tcp
}
