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

use super::data_plane::{DataPlane, Workload, access_writer};
use super::{Failure, values};
use crate::process::{self, Particulars, Setup};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    weft sidecar -c reverse-proxy.yaml\n  \
    weft sidecar --control 10.0.0.2:15010 --trust root.pem --join-token-file token --service web")]
pub(super) struct Arguments {
    #[command(flatten)]
    data_plane: DataPlane,
    #[command(flatten)]
    workload: Workload,
    /// How many connections one worker serves at most.
    #[arg(long, default_value_t = 15_000, value_name = "COUNT", value_parser = values::limit())]
    connection_limit: usize,
    /// How many MiB one worker's connections of HTTP/2 may make it hold at most: their windows together.
    #[arg(long, default_value_t = 256, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=65_536))]
    window_limit: u64,
}

pub(super) fn run(arguments: &Arguments, log: &str) -> Result<(), Failure> {
    let identity = arguments.workload.identity()?;
    let Some(understood) = arguments.data_plane.understand(identity, planner::check)? else {
        return Ok(());
    };
    let begun = process::begin("sidecar", arguments.data_plane.workers, log);
    let begun = begun.map_err(Failure::Failed)?;
    let worker_metrics = WorkerMetrics::<metrics::Metrics>::default();
    let access = access_writer()?;
    let plans = watch::Sender::new(Arc::new(SidecarPlan::default()));
    let receiver = plans.subscribe();
    let particulars = SidecarRole { metrics: worker_metrics.clone(), plans: plans.subscribe() };
    let setup = Setup {
        bootstrap: understood.bootstrap,
        enrolment: understood.enrolment,
        ports: understood.ports,
        patience: understood.patience,
        access: access.clone(),
        particulars: Arc::new(particulars),
    };
    let mut process = begun.start(setup).map_err(Failure::Failed)?;
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
    process.serve(move |worker| weft_sidecar::run(shared.clone(), worker)).map_err(Failure::Failed)
}

/// What a sidecar tells of itself.
struct SidecarRole {
    metrics: WorkerMetrics<metrics::Metrics>,
    plans: watch::Receiver<Arc<SidecarPlan>>,
}

impl Particulars for SidecarRole {
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
        "entries": list.entries, "this_update": list.this_update, "next_update": list.next_update,
    })
}
