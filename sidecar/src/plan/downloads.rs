//! What a plan needs to be fetched: CRLs and key sets.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use weft_model::{Discovery, DistributionPoint, Name, Validation};
use weft_runtime::problems::Problems;

use super::planned_cluster::PlannedCluster;
use crate::authenticate::key_store::KeyOrigin;
use crate::config_map::ConfigMap;

/// A key set to fetch.
#[derive(Debug, Clone)]
pub(crate) struct KeySetDownload {
    pub(crate) origin: KeyOrigin,
    /// The cluster that serves the key set.
    pub(crate) cluster: Arc<PlannedCluster>,
    pub(crate) timeout: Duration,
    pub(crate) cache: Duration,
}

impl KeySetDownload {
    /// Whether an address belongs to the cluster. For DNS clusters every address does: successive answers may have different
    /// addresses without a change of the keys.
    pub(crate) fn has_endpoint(&self, address: SocketAddr) -> bool {
        let PlannedCluster { settings, balancer, .. } = &*self.cluster;
        matches!(settings.discovery, Discovery::Dns(_)) || balancer.has(address)
    }
}

/// The key sets of all token providers.
#[derive(Debug, Default)]
pub(crate) struct KeySetSources {
    /// The key sets to fetch.
    pub(crate) downloads: Vec<KeySetDownload>,
    /// The origins of all key sets, including those whose cluster is missing.
    pub(crate) origins: Vec<KeyOrigin>,
}

/// The distribution points of all validations.
#[derive(Debug, Default)]
pub(crate) struct CrlSources(HashMap<DistributionPoint, CrlSource>);

#[derive(Debug, Default)]
struct CrlSource {
    /// The largest size of the CRL, in bytes.
    limit: usize,
    /// Whether a validation refused the fetched CRL.
    is_refused: bool,
}

/// A CRL to fetch.
#[derive(Debug, Clone)]
pub(crate) struct CrlDownload {
    pub(crate) point: DistributionPoint,
    /// The cluster that serves it.
    pub(crate) cluster: Arc<PlannedCluster>,
    /// The largest size, in bytes.
    pub(crate) limit: usize,
}

impl CrlSources {
    /// Adds the distribution points of a validation, and whether its CRLs were refused.
    pub(crate) fn add(&mut self, validation: &Validation, is_refused: bool) {
        for point in &validation.points {
            let source = self.0.entry(point.clone()).or_default();
            source.limit = source.limit.max(validation.policy.bytes_limit);
            source.is_refused |= is_refused;
        }
    }

    /// Whether a validation uses a distribution point.
    pub(crate) fn contains(&self, point: &DistributionPoint) -> bool {
        self.0.contains_key(point)
    }

    /// The distribution points whose CRLs were refused.
    pub(crate) fn refused(&self) -> impl Iterator<Item = &DistributionPoint> {
        self.0.iter().filter(|(_, source)| source.is_refused).map(|(point, _)| point)
    }

    /// The CRLs to fetch, where their clusters exist in `clusters`. Where a cluster is missing, a CRL that `is_fetched` stays in
    /// force.
    pub(super) fn downloads(
        &self,
        clusters: &ConfigMap<Name, Arc<PlannedCluster>>,
        is_fetched: impl Fn(&DistributionPoint) -> bool,
        problems: &mut Problems,
    ) -> Vec<CrlDownload> {
        let mut downloads = Vec::with_capacity(self.0.len());
        for (point, CrlSource { limit, .. }) in &self.0 {
            match clusters.get(&point.cluster) {
                Some(cluster) => downloads.push(CrlDownload {
                    point: point.clone(),
                    cluster: cluster.clone(),
                    limit: *limit,
                }),
                None => {
                    let DistributionPoint { uri, cluster, .. } = point;
                    let problem = format!("CRL {uri:?}: cluster {cluster:?} does not exist");
                    if is_fetched(point) {
                        problems.warn(format!("{problem}; the last CRL stays in force"));
                    } else {
                        problems.unserved.push(problem);
                    }
                }
            }
        }
        downloads
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crl_store::tests::{point, validation};

    #[test]
    fn missing_cluster_is_only_a_warning_once_its_crl_was_fetched() {
        let mut crl_sources = CrlSources::default();
        crl_sources.add(&validation(&point()), false);
        let problems = |is_fetched| {
            let mut problems = Problems::default();
            let clusters = ConfigMap::default();
            assert!(crl_sources.downloads(&clusters, |_| is_fetched, &mut problems).is_empty());
            problems
        };
        let missing = "CRL \"http://crl.test/a\": cluster \"crl\" does not exist";
        assert_eq!(problems(false).unserved, [missing]);
        let kept = problems(true);
        assert_eq!(kept.warnings, [format!("{missing}; the last CRL stays in force")]);
        assert!(kept.unserved.is_empty());
    }
}
