//! The revocation lists that the validations of a plan want from distribution points.

use std::collections::HashMap;
use std::sync::Arc;

use weft_model::{DistributionPoint, Validation};
use weft_runtime::problems::Problems;

use super::{Plan, Target};
use crate::list_store::ListStore;

/// What validations want of each point.
#[derive(Debug, Default)]
pub(crate) struct Demands(HashMap<DistributionPoint, Demand>);

#[derive(Debug, Default)]
struct Demand {
    /// The most bytes.
    limit: usize,
    /// Whether what came was refused by a validation.
    is_refused: bool,
}

/// A revocation list to fetch.
#[derive(Debug, Clone)]
pub(crate) struct WantedList {
    pub(crate) point: DistributionPoint,
    /// The cluster that serves it.
    pub(crate) target: Arc<Target>,
    /// The most bytes.
    pub(crate) limit: usize,
}

impl Demands {
    /// Takes those of a validation, and whether its lists were refused.
    pub(crate) fn add(&mut self, validation: &Validation, is_refused: bool) {
        for point in &validation.points {
            let demand = self.0.entry(point.clone()).or_default();
            demand.limit = demand.limit.max(validation.policy.bytes_limit);
            demand.is_refused |= is_refused;
        }
    }

    /// Whether a validation names a point.
    pub(crate) fn name(&self, point: &DistributionPoint) -> bool {
        self.0.contains_key(point)
    }

    /// The points whose list was refused.
    pub(crate) fn refused(&self) -> impl Iterator<Item = &DistributionPoint> {
        self.0.iter().filter(|(_, demand)| demand.is_refused).map(|(point, _)| point)
    }

    /// The lists to fetch, as far as their clusters are there. Where one is missing, what was `fetched` before
    /// stays in force.
    pub(super) fn lists(
        &self,
        plan: &Plan,
        fetched: &ListStore,
        problems: &mut Problems,
    ) -> Vec<WantedList> {
        let mut lists = Vec::with_capacity(self.0.len());
        for (point, Demand { limit, .. }) in &self.0 {
            match plan.targets.get(&point.cluster) {
                Some(target) => lists.push(WantedList {
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
    use crate::list_store::tests::{answer, list, point, start, validation};

    #[test]
    fn missing_cluster_is_a_warning_once_its_list_was_fetched() {
        let (mut demands, point) = (Demands::default(), point());
        demands.add(&validation(&point), false);
        let mut store = ListStore::default();
        let problems = |store: &ListStore| {
            let mut problems = Problems::default();
            assert!(demands.lists(&Plan::default(), store, &mut problems).is_empty());
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
