//! The revocation lists that the validations of a plan want from distribution points.

use std::collections::HashMap;
use std::sync::Arc;

use weft_model::{DistributionPoint, Validation};
use weft_runtime::problems::Problems;

use super::{PlannedCluster, SidecarPlan};
use crate::crl_store::CrlStore;

/// What validations want of each point.
#[derive(Debug, Default)]
pub(crate) struct CrlSources(HashMap<DistributionPoint, CrlSource>);

#[derive(Debug, Default)]
struct CrlSource {
    /// The most bytes.
    limit: usize,
    /// Whether what came was refused by a validation.
    is_refused: bool,
}

/// A revocation list to fetch.
#[derive(Debug, Clone)]
pub(crate) struct CrlDownload {
    pub(crate) point: DistributionPoint,
    /// The cluster that serves it.
    pub(crate) target: Arc<PlannedCluster>,
    /// The most bytes.
    pub(crate) limit: usize,
}

impl CrlSources {
    /// Takes those of a validation, and whether its lists were refused.
    pub(crate) fn add(&mut self, validation: &Validation, is_refused: bool) {
        for point in &validation.points {
            let source = self.0.entry(point.clone()).or_default();
            source.limit = source.limit.max(validation.policy.bytes_limit);
            source.is_refused |= is_refused;
        }
    }

    /// Whether a validation names a point.
    pub(crate) fn name(&self, point: &DistributionPoint) -> bool {
        self.0.contains_key(point)
    }

    /// The points whose list was refused.
    pub(crate) fn refused(&self) -> impl Iterator<Item = &DistributionPoint> {
        self.0.iter().filter(|(_, source)| source.is_refused).map(|(point, _)| point)
    }

    /// The lists to fetch, as far as their clusters are there. Where one is missing, what was `fetched` before
    /// stays in force.
    pub(super) fn lists(
        &self,
        plan: &SidecarPlan,
        fetched: &CrlStore,
        problems: &mut Problems,
    ) -> Vec<CrlDownload> {
        let mut lists = Vec::with_capacity(self.0.len());
        for (point, CrlSource { limit, .. }) in &self.0 {
            match plan.targets.get(&point.cluster) {
                Some(target) => lists.push(CrlDownload {
                    point: point.clone(),
                    target: target.clone(),
                    limit: *limit,
                }),
                None => {
                    let DistributionPoint { uri, cluster, .. } = point;
                    let problem = format!("list {uri:?}: there is no cluster {cluster:?}");
                    match fetched.list(point) {
                        Some(_) => {
                            problems.warn(format!("{problem}; the last list stays in force"));
                        }
                        None => problems.unserved.push(problem),
                    }
                }
            }
        }
        lists
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crl_store::tests::{answer, list, point, start, validation};

    #[test]
    fn missing_cluster_is_a_warning_once_its_list_was_fetched() {
        let mut crl_sources = CrlSources::default();
        let point = point();
        crl_sources.add(&validation(&point), false);
        let mut store = CrlStore::default();
        let problems = |store: &CrlStore| {
            let mut problems = Problems::default();
            assert!(crl_sources.lists(&SidecarPlan::default(), store, &mut problems).is_empty());
            problems
        };
        let missing = "list \"http://crl.test/a\": there is no cluster \"crl\"";
        assert_eq!(problems(&store).unserved, [missing]);
        store.fetched(&point, answer(Some(&list(1)), None), start());
        let kept = problems(&store);
        assert_eq!(kept.warnings, [format!("{missing}; the last list stays in force")]);
        assert!(kept.unserved.is_empty());
    }
}
