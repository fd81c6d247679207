//! What a snapshot means for the sidecar: TLS configurations, keys and balancers, ready to use.
//!
//! A plan is built once per snapshot, away from the workers, and never changes. What cannot be
//! built (a secret that cannot be read, say) keeps its last good form where there is one; a chain
//! without one serves nobody, which fails closed.

mod build;
mod crl_sources;
mod files;
mod issuers;
mod trust;

pub(crate) use build::Builder;
use build::ClientParts;
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

/// Everything the workers work by.
#[derive(Debug, Default)]
pub struct SidecarPlan {
    /// Which snapshot it was made of.
    pub revision: u64,
    listeners: BTreeMap<Name, Arc<PlannedListener>>,
    by_destination: ConfigMap<SocketAddr, Arc<PlannedListener>>,
    targets: ConfigMap<Name, Arc<PlannedCluster>>,
    /// The numbers of all targets.
    ids: HashSet<u64>,
    /// What was trusted and is not any more.
    pub(crate) revocations: RevocationHistory,
    /// The revocation lists in force.
    pub crls: CrlsByTrustStore,
}

/// A listener with its chains ready.
#[derive(Debug)]
pub(crate) struct PlannedListener {
    pub(crate) listener: Arc<Listener>,
    chains: Vec<Arc<PlannedChain>>,
    default: Option<Arc<PlannedChain>>,
}

/// A filter chain, ready.
#[derive(Debug)]
pub(crate) struct PlannedChain {
    pub(crate) tls: ChainTls,
    /// Which connections are let in.
    pub(crate) rules: Vec<Arc<RbacFilter>>,
    pub(crate) service: PlannedService,
}

/// How TLS with the client is done.
#[derive(Debug, Clone)]
pub(crate) enum ChainTls {
    /// It is not.
    None,
    /// With this configuration.
    Terminate(ServerTls),
    /// It should be and cannot: its secrets are missing or bad. Nobody is served.
    Broken,
}

/// What is done with a connection's bytes.
#[derive(Debug)]
pub(crate) enum PlannedService {
    Tcp(TcpProxy),
    Http(Box<PlannedHttp>),
}

impl PlannedService {
    /// Whether its connections leave lines.
    pub(crate) fn is_logged(&self) -> bool {
        match self {
            Self::Tcp(tcp) => tcp.access_log,
            Self::Http(http) => http.http.access_log,
        }
    }
}

/// An HTTP service, ready.
#[derive(Debug)]
pub(crate) struct PlannedHttp {
    pub(crate) http: Arc<HttpService>,
    /// None when the table is not there.
    pub(crate) routes: Option<RouteIndex>,
    pub(crate) tokens: Option<TokenPolicy>,
    /// Who may call what: the chain's rules for connections, then its own for requests.
    pub(crate) rules: Vec<Arc<RbacFilter>>,
    /// The cluster that a connection goes to whatever comes over it: nothing is asked of its requests, and
    /// all routes lead there.
    pub(crate) only: Option<Name>,
}

/// A cluster, ready.
#[derive(Debug)]
pub(crate) struct PlannedCluster {
    /// The same for as long as connections to it may be used again.
    pub(crate) id: u64,
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) balancer: Balancer,
    pub(crate) tls: PlannedClusterTls,
    secrets: PlannedClusterSecrets,
}

/// What TLS with a target was made of, to tell whether it is the same as before.
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

    /// Whether connections made by the others may go on to be used: we are who we were, and ask for the
    /// same names by the same policy. What the roots and lists take back ends by itself.
    fn is_as(&self, others: &Self) -> bool {
        let asked = |secrets: &Self| {
            let trust = secrets.trust.as_ref()?;
            Some((trust.version().lineage, trust.names().to_vec(), *trust.policy()))
        };
        self.identity == others.identity && asked(self) == asked(others)
    }
}

/// How TLS to an endpoint is done.
#[derive(Debug, Clone)]
pub(crate) enum PlannedClusterTls {
    /// It is not.
    None,
    /// With these configurations, which differ in the protocol they ask for.
    Originate { http1: ClientTls, http2: ClientTls, plain: ClientTls, tls: Box<UpstreamTls> },
    /// It should be and cannot: its secrets are missing or bad. Nothing is sent.
    Broken,
}

impl SidecarPlan {
    /// The listeners that bind a socket.
    pub(crate) fn bound(&self) -> impl Iterator<Item = &Arc<PlannedListener>> {
        self.listeners.values().filter(|planned| planned.listener.bind)
    }

    /// The listener of this name.
    pub(crate) fn listener(&self, name: &str) -> Option<&Arc<PlannedListener>> {
        self.listeners.get(name)
    }

    /// The listener that answers for `destination`: a service's own, or `accepted`, which took it in.
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

    /// Whether connections to the target of this number may still be used.
    pub(crate) fn has_target(&self, id: u64) -> bool {
        self.ids.contains(&id)
    }

    /// The cluster of this name.
    pub(crate) fn target(&self, name: &str) -> Option<&Arc<PlannedCluster>> {
        self.targets.get(name)
    }
}

impl PlannedListener {
    /// The chain that serves a connection.
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

/// Whether a listener is this tier's.
fn is_servable(listener: &Listener) -> bool {
    listener.transport == Transport::Tcp
}
