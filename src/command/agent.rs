//! `weft agent`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use tokio::sync::watch;
use weft_agent::kernel::{KernelLimits, KernelReconciler, PathChoice};
use weft_agent::metrics::Metrics;
use weft_agent::node::NodeInfo;
use weft_agent::plan::{AgentPlan, AgentPlanProblem};
use weft_agent::{AgentLimits, AgentShared};
use weft_model::{Snapshot, SpiffeId};
use weft_runtime::memory;
use weft_runtime::metrics::WorkerMetrics;
use weft_runtime::problems::Problems;

use super::data_plane::{DataPlane, access_writer};
use super::{Failure, values};
use crate::agent_role::AgentRole;
use crate::process::{self, Setup};
use crate::redirects;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    weft agent -c tcp-proxy.yaml\n  \
    weft agent --control 10.0.0.2:15010 --trust root.pem --join-token-file token --trust-domain mesh.local")]
pub(super) struct Arguments {
    #[command(flatten)]
    data_plane: DataPlane,
    /// The trust domain; the agent's identity is spiffe://TRUST_DOMAIN/ns/weft/sa/agent.
    #[arg(long, default_value = "mesh.local", value_name = "NAME", conflicts_with = "config")]
    trust_domain: String,
    /// The seed of the flow hash, in place of the one that a control plane of weft gives all agents.
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u32>,
    /// The redirects to keep in force on this node, in which network namespaces: a YAML file.
    #[arg(long, value_name = "FILE")]
    redirects: Option<PathBuf>,
    /// Which way flows go: auto leaves services at virtual addresses to the kernel when nothing needs
    /// their bytes; kernel also those at which this agent listens itself.
    #[arg(long, value_enum, default_value_t = Path::Auto)]
    path: Path,
    /// Addresses of this host from which the proxy path connects to endpoints, in turn; between one and
    /// an endpoint there are as many connections as the host gives ports. The kernel's choice when none
    /// is given.
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',', value_parser = values::source_address)]
    source_addresses: Vec<IpAddr>,
    /// How many slots the kernel's tables have at most, all services together; one takes about 100
    /// bytes.
    #[arg(long, default_value_t = 4_194_304, value_name = "COUNT", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 30))]
    slot_limit: usize,
    /// How long an endpoint that is gone may keep its TCP connections on the kernel path, in seconds.
    #[arg(long, default_value_t = 300, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=86_400))]
    endpoint_drain: u64,
    /// How many TCP connections one worker carries at most.
    #[arg(long, default_value_t = 40_000, value_name = "COUNT", value_parser = values::limit())]
    connection_limit: usize,
    /// How many UDP flows one worker carries at most.
    #[arg(long, default_value_t = 10_000, value_name = "COUNT", value_parser = values::limit())]
    flow_limit: usize,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Path {
    Auto,
    Kernel,
    Proxy,
}

impl From<Path> for PathChoice {
    fn from(path: Path) -> Self {
        match path {
            Path::Auto => Self::Auto,
            Path::Kernel => Self::Kernel,
            Path::Proxy => Self::Proxy,
        }
    }
}

pub(super) fn run(arguments: &Arguments, log: &str) -> Result<(), Failure> {
    let id = weft_control::resources::agent_identity(&arguments.trust_domain);
    let id =
        SpiffeId::parse(&id).map_err(|error| Failure::Usage(format!("--trust-domain: {error}")))?;
    let check = |snapshot: &Snapshot| {
        let node = NodeInfo { seed: arguments.seed, ..NodeInfo::default() };
        AgentPlanProblem::classify(&AgentPlan::new(snapshot, &node, None).1)
    };
    let Some(understood) = arguments.data_plane.understand(Some(id), check)? else {
        return Ok(());
    };
    let begun = process::begin("agent", arguments.data_plane.workers, log);
    let begun = begun.map_err(Failure::Failed)?;
    let guard = arguments.redirects.as_deref().map(redirects::guard);
    let guard = guard.transpose().map_err(Failure::Usage)?;
    let worker_metrics = WorkerMetrics::<Metrics>::default();
    let plans = watch::Sender::new(Arc::new(AgentPlan::default()));
    let kernel_limits = KernelLimits {
        slots: arguments.slot_limit,
        endpoint_drain: Duration::from_secs(arguments.endpoint_drain),
    };
    let access = access_writer()?;
    let kernel = KernelReconciler::start(arguments.path.into(), kernel_limits, access.clone());
    let kernel = kernel.map_err(|error| Failure::Failed(format!("the kernel path: {error}")))?;
    let role = AgentRole {
        metrics: worker_metrics.clone(),
        plans: plans.subscribe(),
        guard,
        kernel: kernel.clone(),
    };
    let setup = Setup {
        bootstrap: understood.bootstrap,
        enrolment: understood.enrolment,
        ports: understood.ports,
        patience: understood.patience,
        access: access.clone(),
        particulars: Arc::new(role),
    };
    let mut process = begun.start(setup).map_err(Failure::Failed)?;
    let receiver = plans.subscribe();
    let (snapshots, problems) = (process.snapshots(), process.problems());
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
    process.serve(move |worker| weft_agent::run(shared.clone(), worker)).map_err(Failure::Failed)
}

/// Publishes a plan for every snapshot.
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
            tracing::warn!(%error, "this host's addresses are not known; loops are not seen");
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
