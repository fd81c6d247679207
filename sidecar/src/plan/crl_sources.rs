//! The CRL distribution points that the validations of a plan use.

use std::collections::HashMap;
use std::sync::Arc;

use weft_model::{DistributionPoint, Validation};
use weft_runtime::problems::Problems;

use super::{PlannedCluster, SidecarPlan};
use crate::crl_store::CrlStore;

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
    pub(crate) target: Arc<PlannedCluster>,
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

    /// The CRLs to fetch, where their clusters exist. Where a cluster is missing, the CRL in `fetched` stays in force.
    pub(super) fn downloads(
        &self,
        plan: &SidecarPlan,
        fetched: &CrlStore,
        problems: &mut Problems,
    ) -> Vec<CrlDownload> {
        let mut downloads = Vec::with_capacity(self.0.len());
        for (point, CrlSource { limit, .. }) in &self.0 {
            match plan.targets.get(&point.cluster) {
                Some(target) => downloads.push(CrlDownload {
                    point: point.clone(),
                    target: target.clone(),
                    limit: *limit,
                }),
                None => {
                    let DistributionPoint { uri, cluster, .. } = point;
                    let problem = format!("CRL {uri:?}: cluster {cluster:?} does not exist");
                    match fetched.list(point) {
                        Some(_) => {
                            problems.warn(format!("{problem}; the last CRL stays in force"));
                        }
                        None => problems.unserved.push(problem),
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
    use crate::crl_store::tests::{answer, list, point, start, validation};

    #[test]
    fn missing_cluster_is_only_a_warning_once_its_crl_was_fetched() {
        let mut crl_sources = CrlSources::default();
        let point = point();
        crl_sources.add(&validation(&point), false);
        let mut store = CrlStore::default();
        let problems = |store: &CrlStore| {
            let mut problems = Problems::default();
            assert!(
                crl_sources.downloads(&SidecarPlan::default(), store, &mut problems).is_empty()
            );
            problems
        };
        let missing = "CRL \"http://crl.test/a\": cluster \"crl\" does not exist";
        assert_eq!(problems(&store).unserved, [missing]);
        store.fetched(&point, answer(Some(&list(1)), None), start());
        let kept = problems(&store);
        assert_eq!(kept.warnings, [format!("{missing}; the last CRL stays in force")]);
        assert!(kept.unserved.is_empty());
    }
}
