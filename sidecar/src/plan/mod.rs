//! A configuration snapshot prepared for serving: TLS configurations, keys and load balancers.
//!
//! A plan is built on the control thread for each snapshot, and never changes. What cannot be built (for instance because a
//! secret is unreadable) keeps its last good form where there is one. A filter chain without one serves no client: it fails
//! closed.

pub(crate) mod build;
mod crls_in_force;
pub(crate) mod downloads;
mod files;
mod issuers;
mod listener;
mod planned_cluster;
#[cfg(test)]
pub(crate) mod test_model;
#[cfg(test)]
pub(crate) mod test_pki;
mod trust;

pub use crls_in_force::CrlsByTrustStore;
pub(crate) use listener::{ChainTls, PlannedChain, PlannedHttp, PlannedListener, PlannedService};
pub(crate) use planned_cluster::{PlannedCluster, PlannedClusterTls};

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use weft_model::Name;

use crate::config_map::ConfigMap;
use crate::revocation_history::RevocationHistory;

/// What the workers serve connections and requests with.
#[derive(Debug, Default)]
pub struct SidecarPlan {
    /// The revision of the snapshot.
    pub revision: u64,
    listeners: BTreeMap<Name, Arc<PlannedListener>>,
    by_destination: ConfigMap<SocketAddr, Arc<PlannedListener>>,
    clusters: ConfigMap<Name, Arc<PlannedCluster>>,
    /// The IDs of all clusters.
    ids: HashSet<u64>,
    /// The certificates that trust stores stopped accepting.
    pub(crate) revocations: RevocationHistory,
    /// The CRLs in force.
    pub crls: CrlsByTrustStore,
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

    /// Whether connections to the cluster with this ID may be reused.
    pub(crate) fn has_target(&self, id: u64) -> bool {
        self.ids.contains(&id)
    }

    /// The cluster with this name.
    pub(crate) fn cluster(&self, name: &str) -> Option<&Arc<PlannedCluster>> {
        self.clusters.get(name)
    }
}
