//! `weft agent`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use tokio::sync::watch;
use weft_agent::kernel::{KernelLimits, KernelReconciler, PathChoice};
use weft_agent::metrics::AgentMetrics;
use weft_agent::node::NodeInfo;
use weft_agent::plan::{AgentPlan, AgentPlanProblem};
use weft_agent::{AgentLimits, AgentShared};
use weft_model::{Snapshot, SpiffeId};
use weft_runtime::memory;
use weft_runtime::metrics::WorkerMetrics;
use weft_runtime::problems::Problems;

use super::data_plane::{DataPlaneArgs, access_writer};
use super::{CommandError, values};
use crate::agent_role::AgentRole;
use crate::process::{self, DataPlaneSetup};
use crate::redirects;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    weft agent -c tcp-proxy.yaml\n  \
    weft agent --control 10.0.0.2:15010 --trust root.pem --join-token-file token --trust-domain mesh.local")]
pub(super) struct AgentArgs {
    #[command(flatten)]
    data_plane: DataPlaneArgs,
    /// Trust domain of the mesh; the agent's SPIFFE ID is spiffe://TRUST_DOMAIN/ns/weft/sa/agent
    #[arg(long, default_value = "mesh.local", value_name = "NAME", conflicts_with = "config")]
    trust_domain: String,
    /// Seed of the flow hash; overrides the seed that the control plane sends to all agents
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u32>,
    /// YAML file of the redirects to maintain on this node, per network namespace
    #[arg(long, value_name = "FILE")]
    redirects: Option<PathBuf>,
    /// Path of flows: auto forwards the services at virtual IPs in the kernel unless a feature needs the proxy; kernel
    /// also forwards services on the agent's own listeners there; proxy forwards everything in the agent
    #[arg(long, value_enum, default_value_t = PathArg::Auto)]
    path: PathArg,
    /// Local source addresses for proxied connections to endpoints, used in turn [default: chosen by the kernel].
    /// Each address adds one range of ephemeral ports per endpoint
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',', value_parser = values::source_address)]
    source_addresses: Vec<IpAddr>,
    /// Maximum number of hash-table slots in the kernel for all services; a slot takes about 100 bytes
    #[arg(long, default_value_t = 4_194_304, value_name = "COUNT", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 30))]
    slot_limit: usize,
    /// Grace period for TCP connections to a removed endpoint on the kernel path, in seconds
    #[arg(long, default_value_t = 300, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=86_400))]
    endpoint_drain: u64,
    /// Maximum number of TCP connections per worker
    #[arg(long, default_value_t = 40_000, value_name = "COUNT", value_parser = values::limit())]
    connection_limit: usize,
    /// Maximum number of UDP flows per worker
    #[arg(long, default_value_t = 10_000, value_name = "COUNT", value_parser = values::limit())]
    flow_limit: usize,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PathArg {
    Auto,
    Kernel,
    Proxy,
}

impl From<PathArg> for PathChoice {
    fn from(path: PathArg) -> Self {
        match path {
            PathArg::Auto => Self::Auto,
            PathArg::Kernel => Self::Kernel,
            PathArg::Proxy => Self::Proxy,
        }
    }
}

pub(super) fn run(arguments: &AgentArgs, log: &str) -> Result<(), CommandError> {
    let id = weft_control::resources::agent_identity(&arguments.trust_domain);
    let id = SpiffeId::parse(&id)
        .map_err(|error| CommandError::Usage(format!("--trust-domain: {error}")))?;
    let check = |snapshot: &Snapshot| {
        let node = NodeInfo { seed: arguments.seed, ..NodeInfo::default() };
        AgentPlanProblem::classify(&AgentPlan::new(snapshot, &node, None).1)
    };
    let Some(options) = arguments.data_plane.resolve(Some(id), check)? else {
        return Ok(());
    };
    let prepared = process::prepare("agent", arguments.data_plane.workers, log);
    let prepared = prepared.map_err(CommandError::Failed)?;
    let guard = arguments.redirects.as_deref().map(redirects::guard);
    let guard = guard.transpose().map_err(CommandError::Usage)?;
    let worker_metrics = WorkerMetrics::<AgentMetrics>::default();
    let plans = watch::Sender::new(Arc::new(AgentPlan::default()));
    let kernel_limits = KernelLimits {
        slots: arguments.slot_limit,
        endpoint_drain: Duration::from_secs(arguments.endpoint_drain),
    };
    let access = access_writer()?;
    let kernel = KernelReconciler::start(arguments.path.into(), kernel_limits, &access);
    let kernel = kernel
        .map_err(|error| CommandError::Failed(format!("cannot start the kernel path: {error}")))?;
    let role = AgentRole {
        metrics: worker_metrics.clone(),
        plans: plans.subscribe(),
        guard,
        kernel: kernel.clone(),
    };
    let setup = DataPlaneSetup {
        bootstrap: options.bootstrap,
        enrolment: options.enrolment,
        ports: options.ports,
        grace_period: options.grace_period,
        access: access.clone(),
        role: Arc::new(role),
    };
    let mut process = prepared.start(setup).map_err(CommandError::Failed)?;
    let receiver = plans.subscribe();
    let snapshots = process.snapshots();
    let problems = process.problems();
    process.spawn(plan_all(snapshots, plans, problems, kernel, arguments.seed));
    let shared = AgentShared {
        plans: receiver,
        drain: process.drain(),
        metrics: worker_metrics,
        access,
        limits: AgentLimits {
            connections: arguments.connection_limit,
            flows: arguments.flow_limit,
        },
        mark: process.mark(),
        sources: arguments.source_addresses.clone().into(),
        reports: process.reports(),
    };
    process
        .serve(move |worker| weft_agent::run(shared.clone(), worker))
        .map_err(CommandError::Failed)
}

/// Builds and publishes a plan for every snapshot.
async fn plan_all(
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    plans: watch::Sender<Arc<AgentPlan>>,
    problems: watch::Sender<Problems>,
    kernel: KernelReconciler,
    seed: Option<u32>,
) {
    let mut last: Option<(Arc<Snapshot>, Arc<AgentPlan>)> = None;
    loop {
        let snapshot = snapshots.borrow_and_update().clone();
        let node = NodeInfo::now(seed).unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot read the addresses of this host; endpoints that lead back to this agent are not detected");
            NodeInfo { seed, ..NodeInfo::default() }
        });
        let (plan, found) = AgentPlan::new(&snapshot, &node, last.as_ref());
        let found = AgentPlanProblem::classify(&found);
        let is_known = |problem: &&String| problems.borrow().all().any(|known| known == *problem);
        for problem in found.all().filter(|problem| !is_known(problem)) {
            tracing::warn!("{problem}");
        }
        problems.send_replace(found);
        let plan = Arc::new(plan);
        plans.send_replace(plan.clone());
        kernel.set_plan(plan.clone());
        last = Some((snapshot, plan));
        memory::trim_heap();
        if snapshots.changed().await.is_err() {
            return;
        }
    }
}
