//! The agent's metrics. `docs/metrics.md` lists them all.

use std::sync::Arc;

use weft_model::Transport;
use weft_runtime::metrics::{Counter, Gauge, Histogram, MetricsPage, WorkerMetrics};

use crate::flow_counts::{SharedFlowCounts, flows_of};
use crate::kernel::{FlowPath, KernelPathReport, ServiceReport};
use crate::refusal::FlowRefusal;

/// The metrics of one worker.
#[derive(Debug, Default)]
pub struct AgentMetrics {
    pub(crate) connections: Counter,
    pub(crate) connections_open: Gauge,
    pub(crate) bytes_to_endpoint: Counter,
    pub(crate) bytes_to_client: Counter,
    pub(crate) connect: Histogram,
    pub(crate) flows: Counter,
    pub(crate) flows_open: Arc<Gauge>,
    pub(crate) datagrams_to_endpoint: Counter,
    pub(crate) datagrams_to_client: Counter,
    pub(crate) datagrams_lost: Counter,
    refused: [Counter; FlowRefusal::ALL.len()],
    /// Flows by service.
    pub(crate) services: SharedFlowCounts,
}

impl AgentMetrics {
    pub(crate) fn count_refusal(&self, refusal: FlowRefusal) {
        if let Some(counter) = self.refused.get(refusal as usize) {
            counter.increment();
        }
    }
}

/// Flows of a service on the proxy path: how many have begun, and how many are open.
#[must_use]
pub fn proxied_flows(metrics: &WorkerMetrics<AgentMetrics>, listener: &str) -> (u64, u64) {
    flows_of(listener, metrics.sets().iter().map(|set| &set.services))
}

/// Adds the metrics of all workers, and of what the kernel carries, to a page.
pub fn add_metrics(
    metrics: &WorkerMetrics<AgentMetrics>,
    kernel: &KernelPathReport,
    page: &mut MetricsPage<'_>,
) {
    let workers = AgentTotals(metrics.sets());
    workers.add_flows(kernel, page);
    workers.add_traffic(page);
    workers.add_refusals(page);
    page.histogram(
        "weft_agent_connect_duration_seconds",
        "Duration of connecting to an endpoint.",
        workers.0.iter().map(|worker| &worker.connect),
    );
    add_kernel_path(kernel, page);
}

/// The metrics of all workers, to be added up.
struct AgentTotals(Vec<Arc<AgentMetrics>>);

impl AgentTotals {
    fn sum(&self, counter: impl Fn(&AgentMetrics) -> u64) -> u64 {
        self.0.iter().map(|worker| counter(worker)).fold(0, u64::wrapping_add)
    }

    fn add_flows(&self, kernel: &KernelPathReport, page: &mut MetricsPage<'_>) {
        let in_kernel = |transport, count: fn(&ServiceReport) -> u64| -> u64 {
            let services = kernel.services.iter().filter(|s| s.transport == Some(transport));
            services.map(count).sum()
        };
        let by_path =
            |proxy: fn(&AgentMetrics) -> u64, transport, count: fn(&ServiceReport) -> u64| {
                [("proxy", self.sum(proxy)), ("kernel", in_kernel(transport, count))]
            };
        page.counter_by(
            "weft_agent_connections",
            "TCP connections to services.",
            "path",
            &by_path(|m| m.connections.get(), Transport::Tcp, |s| s.flows),
        );
        page.gauge_by(
            "weft_agent_connections_open",
            "Open TCP connections to services.",
            "path",
            &by_path(|m| m.connections_open.get(), Transport::Tcp, |s| s.flows_open),
        );
        page.counter_by(
            "weft_agent_flows",
            "UDP flows to services.",
            "path",
            &by_path(|m| m.flows.get(), Transport::Udp, |s| s.flows),
        );
        page.gauge_by(
            "weft_agent_flows_open",
            "Open UDP flows to services.",
            "path",
            &by_path(|m| m.flows_open.get(), Transport::Udp, |s| s.flows_open),
        );
    }

    fn add_traffic(&self, page: &mut MetricsPage<'_>) {
        page.counter_by(
            "weft_agent_bytes",
            "Bytes forwarded over TCP by the proxy path.",
            "direction",
            &[
                ("to_endpoint", self.sum(|m| m.bytes_to_endpoint.get())),
                ("to_client", self.sum(|m| m.bytes_to_client.get())),
            ],
        );
        page.counter_by(
            "weft_agent_datagrams",
            "Datagrams forwarded by the proxy path.",
            "direction",
            &[
                ("to_endpoint", self.sum(|m| m.datagrams_to_endpoint.get())),
                ("to_client", self.sum(|m| m.datagrams_to_client.get())),
            ],
        );
        page.counter(
            "weft_agent_datagrams_dropped",
            "Datagrams dropped because a socket's send buffer was full.",
            self.sum(|m| m.datagrams_lost.get()),
        );
    }

    fn add_refusals(&self, page: &mut MetricsPage<'_>) {
        let refused: Vec<(&str, u64)> = FlowRefusal::ALL
            .iter()
            .map(|&refusal| {
                let count =
                    |m: &AgentMetrics| m.refused.get(refusal as usize).map_or(0, Counter::get);
                (refusal.reason(), self.sum(count))
            })
            .collect();
        page.counter_by(
            "weft_agent_refused",
            "Connections and datagrams refused by the proxy path.",
            "reason",
            &refused,
        );
    }
}

fn add_kernel_path(report: &KernelPathReport, page: &mut MetricsPage<'_>) {
    let on_kernel =
        report.services.iter().filter(|service| service.path == FlowPath::Kernel).count();
    page.gauge_by(
        "weft_agent_services",
        "Services by the path that their flows take.",
        "path",
        &[("proxy", (report.services.len() - on_kernel) as u64), ("kernel", on_kernel as u64)],
    );
    page.counter(
        "weft_agent_security_group_dropped_packets",
        "First packets of flows that a security group dropped.",
        report.blocked,
    );
    page.counter(
        "weft_agent_kernel_table_repairs",
        "Changes of other programs to the agent's nftables table that the agent reverted.",
        report.repairs,
    );
    page.counter(
        "weft_agent_kernel_table_failures",
        "Changes of the agent's nftables table that the kernel refused.",
        report.failures,
    );
    page.counter(
        "weft_agent_conntrack_evictions",
        "Conntrack entries deleted because their endpoint was removed.",
        report.evicted,
    );
    if let Some(occupancy) = report.occupancy {
        page.gauge(
            "weft_agent_conntrack_entries",
            "Conntrack entries of the network namespace.",
            occupancy.entries,
        );
        page.gauge(
            "weft_agent_conntrack_limit",
            "Most conntrack entries that the network namespace may have. At the limit the kernel drops new flows.",
            occupancy.limit,
        );
    }
    page.counter(
        "weft_agent_kernel_access_log_overruns",
        "Times that flows of the kernel path ended faster than their access log lines could be written.",
        report.records_lost,
    );
}
