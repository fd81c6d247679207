//! The revocation lists that the validations of a plan want from distribution points.

use std::collections::HashMap;
use std::sync::Arc;

use weft_model::{DistributionPoint, Validation};
use weft_runtime::problems::Problems;

use super::{Plan, Target};

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

    /// The lists to fetch, as far as their clusters are there.
    pub(super) fn lists(&self, plan: &Plan, problems: &mut Problems) -> Vec<WantedList> {
        let mut lists = Vec::with_capacity(self.0.len());
        for (point, Demand { limit, .. }) in &self.0 {
            match plan.targets.get(&point.cluster) {
                Some(target) => lists.push(WantedList {
                    point: point.clone(),
                    target: target.clone(),
                    limit: *limit,
                }),
                None => problems
                    .unserved
                    .push(format!("list {:?}: there is no cluster {:?}", point.uri, point.cluster)),
            }
        }
        lists
    }
}
