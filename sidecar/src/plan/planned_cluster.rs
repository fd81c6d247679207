//! Clusters prepared for serving.

use std::sync::Arc;

use weft_certs::TrustStore;
use weft_certs::tls::{ClientTls, LoadedIdentity};
use weft_model::{Cluster, UpstreamTls};

use crate::load_balancer::Balancer;

/// A cluster prepared for serving.
#[derive(Debug)]
pub(crate) struct PlannedCluster {
    /// Stays the same as long as pooled connections to the cluster may be reused.
    pub(crate) id: u64,
    pub(crate) settings: Arc<Cluster>,
    pub(crate) balancer: Balancer,
    pub(crate) tls: PlannedClusterTls,
    pub(super) secrets: PlannedClusterSecrets,
}

/// The certificate and trust store for TLS to a cluster, kept to detect changes.
#[derive(Debug, Clone, Default)]
pub(crate) struct PlannedClusterSecrets {
    pub(super) identity: Option<LoadedIdentity>,
    /// None: any server certificate is accepted.
    pub(super) trust: Option<Arc<TrustStore>>,
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
    /// Whether connections made with `others` may be reused: our certificate is the same, and the endpoint's certificate is checked
    /// for the same names under the same policy. Connections with revoked certificates are closed separately.
    pub(super) fn is_as(&self, others: &Self) -> bool {
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
