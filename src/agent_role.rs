//! Metrics and state of an agent: redirects, the path of each service's flows, and flow explanations.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use tokio::sync::watch;
use weft_agent::kernel::{FlowPath, KernelReconciler, OccupancyLevel, ServiceReport};
use weft_agent::metrics::{self, AgentMetrics};
use weft_agent::plan::AgentPlan;
use weft_agent::redirect::{self, RedirectGuard, RedirectStatus};
use weft_model::{FlowTuple, Transport};
use weft_runtime::metrics::{MetricsPage, WorkerMetrics};

use crate::process::RoleReport;

/// The sources of an agent's metrics and state.
#[derive(Debug)]
pub struct AgentRole {
    /// The workers' counters.
    pub metrics: WorkerMetrics<AgentMetrics>,
    /// The plan in force.
    pub plans: watch::Receiver<Arc<AgentPlan>>,
    /// The guard of the redirects; none without `--redirects`.
    pub guard: Option<RedirectGuard>,
    /// The reconciler of the kernel path.
    pub kernel: KernelReconciler,
}

impl RoleReport for AgentRole {
    fn metrics(&self, page: &mut MetricsPage<'_>) {
        metrics::add_metrics(&self.metrics, &self.kernel.report(), page);
        page.gauge(
            "weft_agent_looping_endpoints",
            "Endpoints that are not used because they lead back to this agent.",
            self.plans.borrow().looping_endpoints() as u64,
        );
        let redirects = self.guard.as_ref().map(RedirectGuard::report).unwrap_or_default();
        add_redirect_metrics(&redirects, page);
    }

    fn ready(&self) -> Result<(), String> {
        let kernel = self.kernel.report();
        if !kernel.settled {
            return Err("kernel rules of services are not installed yet".into());
        }
        if let (OccupancyLevel::Full, Some(occupancy)) = (kernel.level, kernel.occupancy) {
            return Err(format!(
                "conntrack table is full ({occupancy}): the kernel drops new flows"
            ));
        }
        self.guard.as_ref().map_or(Ok(()), |guard| guard.report().ready())
    }

    fn dump(&self) -> Map<String, Value> {
        let mut fields = Map::new();
        if let Some(guard) = &self.guard {
            let report = guard.report();
            let standing = report.statuses.iter().map(|(name, standing)| {
                let dropped = report.dropped.iter().find(|(other, _)| other == name);
                let dropped = dropped.map(|(_, packets)| packets);
                let dns = report.dns.iter().find(|(other, _)| other == name);
                let dns = dns.map(|(_, is_handed_over)| is_handed_over);
                let fields =
                    json!({"standing": standing.to_string(), "dropped": dropped, "dns": dns});
                (name.clone(), fields)
            });
            let standing: Map<_, _> = standing.collect();
            fields.insert("redirects".into(), standing.into());
        }
        let kernel = self.kernel.report();
        let services: Vec<Value> = kernel.services.iter().map(|s| self.service(s)).collect();
        fields.insert("services".into(), services.into());
        if let Some(occupancy) = kernel.occupancy {
            let table = json!({"entries": occupancy.entries, "limit": occupancy.limit});
            fields.insert("kernel_table".into(), table);
        }
        fields
    }

    fn explain(&self, query: &str) -> Result<Value, String> {
        let plan = self.plans.borrow().clone();
        let explanation = plan.explain(&flow_of(query)?, sequence_of(query)?)?;
        let services = self.kernel.report().services;
        let service = services.iter().find(|s| *s.listener == *explanation.listener);
        let mut answer = serde_json::to_value(explanation).map_err(|error| error.to_string())?;
        if let (Value::Object(fields), Some(service)) = (&mut answer, service) {
            let (path, why) = path(&service.path);
            fields.insert("path".into(), path.into());
            fields.insert("why".into(), why.into());
        }
        Ok(answer)
    }
}

impl AgentRole {
    /// A service with the sum of its flows on the kernel path and the proxy path.
    fn service(&self, service: &ServiceReport) -> Value {
        let (path, why) = path(&service.path);
        let (flows, open) = metrics::proxied_flows(&self.metrics, &service.listener);
        json!({
            "listener": &*service.listener, "path": path, "why": why,
            "flows": service.flows + flows, "flows_open": service.flows_open + open,
        })
    }
}

fn path(path: &FlowPath) -> (&'static str, String) {
    match path {
        FlowPath::Kernel => ("kernel", "no feature of the service needs the proxy".into()),
        FlowPath::Proxy(why) => ("proxy", why.to_string()),
    }
}

/// Parses the flow of a query such as `transport=tcp&client=10.0.0.1:4000&destination=10.96.0.1:80`.
fn flow_of(query: &str) -> Result<FlowTuple, String> {
    let value = |name: &str| {
        let value = query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        value.ok_or_else(|| format!("missing parameter {name}"))
    };
    let address = |name: &str| {
        let text = value(name)?;
        text.parse().map_err(|_| format!("invalid {name} {text:?}: must be ADDRESS:PORT"))
    };
    let transport = match value("transport")? {
        "tcp" => Transport::Tcp,
        "udp" => Transport::Udp,
        other => return Err(format!("invalid transport {other:?}: must be tcp or udp")),
    };
    Ok(FlowTuple { transport, client: address("client")?, destination: address("destination")? })
}

/// Parses the optional sequence number of a query.
fn sequence_of(query: &str) -> Result<Option<u32>, String> {
    let value = query.split('&').find_map(|pair| pair.strip_prefix("sequence="));
    let number = |text: &str| {
        text.parse().map_err(|_| format!("invalid sequence {text:?}: must be 0 to 4294967295"))
    };
    value.map(number).transpose()
}

fn add_redirect_metrics(report: &redirect::RedirectReport, page: &mut MetricsPage<'_>) {
    let in_force =
        report.statuses.iter().filter(|(_, standing)| *standing == RedirectStatus::InForce).count();
    page.gauge("weft_agent_redirects", "Desired redirects.", report.statuses.len() as u64);
    page.gauge("weft_agent_redirects_in_force", "Redirects in force.", in_force as u64);
    page.gauge(
        "weft_agent_redirects_with_dns",
        "Redirects that redirect DNS now.",
        report.dns.iter().filter(|(_, is_handed_over)| *is_handed_over).count() as u64,
    );
    page.counter(
        "weft_agent_redirect_repairs",
        "Redirects that the agent restored after another program had changed them.",
        report.repairs,
    );
    page.counter(
        "weft_agent_redirect_dropped_packets",
        "Packets that strict redirects dropped.",
        report.dropped.iter().map(|(_, packets)| packets).sum(),
    );
    page.counter(
        "weft_agent_redirect_probe_failures",
        "Probe connections that a redirect did not capture.",
        report.probe_failures,
    );
    page.counter(
        "weft_agent_redirect_failures",
        "Failed attempts to install or restore a redirect.",
        report.failures,
    );
}
