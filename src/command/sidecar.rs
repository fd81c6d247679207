//! `weft sidecar`.

use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde_json::{Map, Value, json};
use tokio::sync::watch;
use weft_certs::CrlInfo;
use weft_runtime::metrics::{MetricsPage, WorkerMetrics};
use weft_sidecar::plan::SidecarPlan;
use weft_sidecar::{SidecarLimits, SidecarShared, metrics, planner};

use super::data_plane::{DataPlaneArgs, WorkloadArgs, access_writer};
use super::{CommandError, values};
use crate::process::{self, DataPlaneSetup, RoleReport};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    weft sidecar -c reverse-proxy.yaml\n  \
    weft sidecar --control 10.0.0.2:15010 --trust root.pem --join-token-file token --service web")]
pub(super) struct SidecarArgs {
    #[command(flatten)]
    data_plane: DataPlaneArgs,
    #[command(flatten)]
    workload: WorkloadArgs,
    /// Maximum number of client connections per worker
    #[arg(long, default_value_t = 15_000, value_name = "COUNT", value_parser = values::limit())]
    connection_limit: usize,
    /// Maximum total size of the HTTP/2 receive windows per worker, in MiB
    #[arg(long, default_value_t = 256, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=65_536))]
    window_limit: u64,
}

pub(super) fn run(arguments: &SidecarArgs, log: &str) -> Result<(), CommandError> {
    let identity = arguments.workload.identity()?;
    let Some(options) = arguments.data_plane.resolve(identity, planner::check)? else {
        return Ok(());
    };
    let prepared = process::prepare("sidecar", arguments.data_plane.workers, log);
    let prepared = prepared.map_err(CommandError::Failed)?;
    let worker_metrics = WorkerMetrics::<metrics::SidecarMetrics>::default();
    let access = access_writer()?;
    let plans = watch::Sender::new(Arc::new(SidecarPlan::default()));
    let receiver = plans.subscribe();
    let role = SidecarRole { metrics: worker_metrics.clone(), plans: plans.subscribe() };
    let setup = DataPlaneSetup {
        bootstrap: options.bootstrap,
        enrolment: options.enrolment,
        ports: options.ports,
        grace_period: options.grace_period,
        access: access.clone(),
        role: Arc::new(role),
    };
    let mut process = prepared.start(setup).map_err(CommandError::Failed)?;
    process.spawn(planner::run(process.snapshots(), plans, process.problems(), process.mark()));
    let shared = SidecarShared {
        plans: receiver,
        drain: process.drain(),
        metrics: worker_metrics,
        access,
        limits: SidecarLimits {
            connections: arguments.connection_limit,
            handshake: Duration::from_secs(10),
            window_bytes: arguments.window_limit * 1024 * 1024,
        },
        mark: process.mark(),
        reports: process.reports(),
    };
    process
        .serve(move |worker| weft_sidecar::run(shared.clone(), worker))
        .map_err(CommandError::Failed)
}

/// Metrics and state of a sidecar.
struct SidecarRole {
    metrics: WorkerMetrics<metrics::SidecarMetrics>,
    plans: watch::Receiver<Arc<SidecarPlan>>,
}

impl RoleReport for SidecarRole {
    fn metrics(&self, page: &mut MetricsPage<'_>) {
        let plan = self.plans.borrow().clone();
        metrics::add_metrics(&self.metrics, &plan.crls, page);
    }

    fn dump(&self) -> Map<String, Value> {
        let plan = self.plans.borrow().clone();
        let lists = |lists: &Option<Vec<CrlInfo>>| match lists {
            None => json!({"checked": false}),
            Some(lists) => {
                json!({"checked": true, "lists": lists.iter().map(list).collect::<Vec<_>>()})
            }
        };
        let stores = plan.crls.iter().map(|(name, covered)| (name.clone(), lists(covered)));
        let stores: Map<String, Value> = stores.collect();
        Map::from_iter([("revocation".to_owned(), stores.into())])
    }
}

fn list(list: &CrlInfo) -> Value {
    json!({
        "issuer": list.issuer, "number": list.number, "speaks_of": list.scope,
        "entries": list.entries, "this_update": list.this_update.as_secs(),
        "next_update": list.next_update.as_secs(),
    })
}
