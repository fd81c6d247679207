//! What the agent counts.

use std::sync::Arc;

use weft_model::Transport;
use weft_runtime::metrics::{Counter, Gauge, Histogram, Page, Registry};

use crate::flow_counts::{SharedFlowCounts, flows_of};
use crate::kernel::{FlowPath, KernelPathReport, ServiceReport};
use crate::refusal::FlowRefusal;

/// The counters of one worker.
#[derive(Debug, Default)]
pub struct Metrics {
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
    /// The flows of each service.
    pub(crate) services: SharedFlowCounts,
}

impl Metrics {
    pub(crate) fn refuse(&self, refusal: FlowRefusal) {
        let position = FlowRefusal::ALL.iter().position(|other| *other == refusal);
        if let Some(counter) = position.and_then(|position| self.refused.get(position)) {
            counter.increment();
        }
    }
}

/// How many flows of a service all workers have begun to carry, and carry now.
#[must_use]
pub fn proxied_flows(registry: &Registry<Metrics>, listener: &str) -> (u64, u64) {
    flows_of(listener, registry.sets().iter().map(|set| &set.services))
}

/// The page of all workers, and of what the kernel carries.
#[must_use]
pub fn page(registry: &Registry<Metrics>, kernel: &KernelPathReport) -> Page {
    let sets = registry.sets();
    let sum =
        |pick: fn(&Metrics) -> u64| sets.iter().map(|set| pick(set)).fold(0, u64::wrapping_add);
    let mut page = Page::default();
    let carried = |transport, pick: fn(&ServiceReport) -> u64| -> u64 {
        let services = kernel.services.iter().filter(|s| s.transport == Some(transport));
        services.map(pick).sum()
    };
    let by_path = |proxy: fn(&Metrics) -> u64, transport, pick: fn(&ServiceReport) -> u64| {
        [("proxy", sum(proxy)), ("kernel", carried(transport, pick))]
    };
    page.counter_by(
        "weft_agent_connections",
        "TCP connections carried.",
        "path",
        &by_path(|m| m.connections.get(), Transport::Tcp, |s| s.flows),
    );
    page.gauge_by(
        "weft_agent_connections_open",
        "TCP connections being carried.",
        "path",
        &by_path(|m| m.connections_open.get(), Transport::Tcp, |s| s.flows_open),
    );
    page.counter_by(
        "weft_agent_bytes",
        "Bytes moved over TCP.",
        "direction",
        &[
            ("to_endpoint", sum(|m| m.bytes_to_endpoint.get())),
            ("to_client", sum(|m| m.bytes_to_client.get())),
        ],
    );
    page.counter_by(
        "weft_agent_flows",
        "UDP flows carried.",
        "path",
        &by_path(|m| m.flows.get(), Transport::Udp, |s| s.flows),
    );
    page.gauge_by(
        "weft_agent_flows_open",
        "UDP flows being carried.",
        "path",
        &by_path(|m| m.flows_open.get(), Transport::Udp, |s| s.flows_open),
    );
    page.counter_by(
        "weft_agent_datagrams",
        "Datagrams moved.",
        "direction",
        &[
            ("to_endpoint", sum(|m| m.datagrams_to_endpoint.get())),
            ("to_client", sum(|m| m.datagrams_to_client.get())),
        ],
    );
    page.counter(
        "weft_agent_datagrams_lost",
        "Datagrams a full socket did not take.",
        sum(|m| m.datagrams_lost.get()),
    );
    refusals(&sets, &mut page);
    let connect = sets.iter().map(|set: &Arc<Metrics>| &set.connect);
    page.histogram(
        "weft_agent_connect_seconds",
        "How long connecting to an endpoint took.",
        connect,
    );
    kernel_path(kernel, &mut page);
    weft_runtime::metrics::process(&mut page);
    page
}

fn refusals(sets: &[Arc<Metrics>], page: &mut Page) {
    let refused: Vec<(&str, u64)> = FlowRefusal::ALL
        .iter()
        .enumerate()
        .map(|(index, refusal)| {
            let total =
                sets.iter().filter_map(|set| set.refused.get(index)).map(Counter::get).sum();
            (refusal.reason(), total)
        })
        .collect();
    page.counter_by("weft_agent_refused", "Connections and flows not carried.", "reason", &refused);
}

fn kernel_path(report: &KernelPathReport, page: &mut Page) {
    let on_kernel =
        report.services.iter().filter(|service| service.path == FlowPath::Kernel).count();
    page.gauge_by(
        "weft_agent_services",
        "Services by the way that their flows go.",
        "path",
        &[("proxy", (report.services.len() - on_kernel) as u64), ("kernel", on_kernel as u64)],
    );
    page.counter(
        "weft_agent_blocked_packets",
        "Packets of new flows that security groups did not let in.",
        report.blocked,
    );
    page.counter(
        "weft_agent_kernel_repairs",
        "Changes of others to the kernel's table of services, undone.",
        report.repairs,
    );
    page.counter("weft_agent_kernel_failures", "Changes that the kernel refused.", report.failures);
    page.counter(
        "weft_agent_kernel_flows_let_go",
        "Flows that the kernel let go of because their endpoint was gone.",
        report.evicted,
    );
    if let Some(occupancy) = report.occupancy {
        page.gauge(
            "weft_conntrack_entries",
            "Connections in the kernel's table.",
            occupancy.entries,
        );
        page.gauge(
            "weft_conntrack_limit",
            "How many the kernel's table may hold: when it is full, new flows are dropped.",
            occupancy.limit,
        );
    }
    page.counter(
        "weft_agent_kernel_records_lost",
        "Times that more connections ended than records could be written of.",
        report.records_lost,
    );
}
