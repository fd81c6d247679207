//! What the agent counts.

use std::sync::Arc;

use weft_runtime::metrics::{Counter, Histogram, Page, Registry};

use crate::refusal::Refusal;

/// The counters of one worker.
#[derive(Debug, Default)]
pub struct Metrics {
    pub(crate) connections: Counter,
    pub(crate) connections_open: Counter,
    pub(crate) bytes_to_endpoint: Counter,
    pub(crate) bytes_to_client: Counter,
    pub(crate) connect: Histogram,
    pub(crate) flows: Counter,
    pub(crate) flows_open: Counter,
    pub(crate) datagrams_to_endpoint: Counter,
    pub(crate) datagrams_to_client: Counter,
    pub(crate) datagrams_lost: Counter,
    refused: [Counter; Refusal::ALL.len()],
}

impl Metrics {
    pub(crate) fn refuse(&self, refusal: Refusal) {
        let position = Refusal::ALL.iter().position(|other| *other == refusal);
        if let Some(counter) = position.and_then(|position| self.refused.get(position)) {
            counter.increment();
        }
    }
}

/// The page of all workers.
#[must_use]
pub fn page(registry: &Registry<Metrics>) -> Page {
    let sets = registry.sets();
    let sum = |pick: fn(&Metrics) -> &Counter| {
        sets.iter().map(|set| pick(set).get()).fold(0, u64::wrapping_add)
    };
    let mut page = Page::default();
    page.counter("weft_agent_connections", "TCP connections carried.", sum(|m| &m.connections));
    page.gauge(
        "weft_agent_connections_open",
        "TCP connections being carried.",
        sum(|m| &m.connections_open),
    );
    page.counter_by(
        "weft_agent_bytes",
        "Bytes moved over TCP.",
        "direction",
        &[
            ("to_endpoint", sum(|m| &m.bytes_to_endpoint)),
            ("to_client", sum(|m| &m.bytes_to_client)),
        ],
    );
    page.counter("weft_agent_flows", "UDP flows carried.", sum(|m| &m.flows));
    page.gauge("weft_agent_flows_open", "UDP flows being carried.", sum(|m| &m.flows_open));
    page.counter_by(
        "weft_agent_datagrams",
        "Datagrams moved.",
        "direction",
        &[
            ("to_endpoint", sum(|m| &m.datagrams_to_endpoint)),
            ("to_client", sum(|m| &m.datagrams_to_client)),
        ],
    );
    page.counter(
        "weft_agent_datagrams_lost",
        "Datagrams a full socket did not take.",
        sum(|m| &m.datagrams_lost),
    );
    let refused: Vec<(&str, u64)> = Refusal::ALL
        .iter()
        .enumerate()
        .map(|(index, refusal)| {
            let total =
                sets.iter().filter_map(|set| set.refused.get(index)).map(Counter::get).sum();
            (refusal.reason(), total)
        })
        .collect();
    page.counter_by("weft_agent_refused", "Connections and flows not carried.", "reason", &refused);
    let connect = sets.iter().map(|set: &Arc<Metrics>| &set.connect);
    page.histogram(
        "weft_agent_connect_seconds",
        "How long connecting to an endpoint took.",
        connect,
    );
    weft_runtime::metrics::process(&mut page);
    page
}
