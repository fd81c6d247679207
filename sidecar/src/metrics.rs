//! The sidecar's metrics. `docs/metrics.md` lists them all.

use std::sync::Arc;

use weft_certs::fault::PeerFault;
use weft_runtime::metrics::{Counter, Gauge, MetricsPage, WorkerMetrics};

use crate::denial::Denial;
use crate::http::desync::DesyncReason;
use crate::plan::CrlsByTrustStore;
use crate::request_metrics::{SharedSeries, add_request_metrics};
use crate::tls::failure::TlsFailure;

/// The metrics of one worker.
#[derive(Debug, Default)]
pub struct SidecarMetrics {
    pub(crate) connections: Counter,
    pub(crate) connections_open: Gauge,
    pub(crate) connections_refused: Counter,
    pub(crate) connections_revoked: Counter,
    pub(crate) connections_expired: Counter,
    pub(crate) connections_policy_changed: Counter,
    pub(crate) http2_floods: Counter,
    pub(crate) http2_window_refusals: Counter,
    pub(crate) server_first_connections: Counter,
    pub(crate) handshakes: Counter,
    pub(crate) handshakes_resumed: Counter,
    handshake_failures: [Counter; PeerFault::ALL.len()],
    pub(crate) requests_open: Gauge,
    pub(crate) requests_policy_changed: Counter,
    pub(crate) dry_run_denials: Counter,
    denied: [Counter; Denial::COUNT],
    noncompliant: [Counter; DesyncReason::ALL.len()],
    pub(crate) headers_dropped: Counter,
    pub(crate) upstream_connections: Counter,
    pub(crate) upstream_retries: Counter,
    upstream_handshake_failures: UpstreamHandshakeFailures,
    /// Requests by listener, service, upstream cluster and peer.
    pub(crate) requests: SharedSeries,
}

/// Failed TLS handshakes with endpoints, by reason.
#[derive(Debug)]
struct UpstreamHandshakeFailures([Counter; TlsFailure::COUNT]);

impl Default for UpstreamHandshakeFailures {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Counter::default()))
    }
}

impl SidecarMetrics {
    pub(crate) fn count_noncompliant(&self, reason: DesyncReason) {
        increment(self.noncompliant.get(reason.index()));
    }

    pub(crate) fn count_handshake_failure(&self, fault: PeerFault) {
        let index = PeerFault::ALL.iter().position(|known| *known == fault);
        increment(index.and_then(|index| self.handshake_failures.get(index)));
    }

    pub(crate) fn count_upstream_handshake_failure(&self, failure: TlsFailure) {
        increment(self.upstream_handshake_failures.0.get(failure.index()));
    }

    pub(crate) fn count_denial(&self, denial: Denial) {
        increment(self.denied.get(denial.index()));
    }
}

fn increment(counter: Option<&Counter>) {
    if let Some(counter) = counter {
        counter.increment();
    }
}

/// Adds the metrics of all workers, and of the CRLs in force, to a page.
pub fn add_metrics(
    metrics: &WorkerMetrics<SidecarMetrics>,
    covered: &CrlsByTrustStore,
    page: &mut MetricsPage<'_>,
) {
    let workers = SidecarTotals(metrics.sets());
    workers.add_connections(page);
    workers.add_http2(page);
    workers.add_handshakes(page);
    add_request_metrics(workers.0.iter().map(|worker| &worker.requests), page);
    workers.add_requests(page);
    workers.add_upstream(page);
    add_crls(covered, page);
}

/// The metrics of all workers, to be added up.
struct SidecarTotals(Vec<Arc<SidecarMetrics>>);

impl SidecarTotals {
    fn sum(&self, counter: impl Fn(&SidecarMetrics) -> u64) -> u64 {
        self.0.iter().map(|worker| counter(worker)).fold(0, u64::wrapping_add)
    }

    /// One value for each word of a closed set, whose counters are in the order of the words.
    fn sums<'w>(
        &self,
        words: impl Iterator<Item = &'w str>,
        counters: impl Fn(&SidecarMetrics) -> &[Counter],
    ) -> Vec<(&'w str, u64)> {
        words
            .enumerate()
            .map(|(index, word)| {
                (word, self.sum(|worker| counters(worker).get(index).map_or(0, Counter::get)))
            })
            .collect()
    }

    fn add_connections(&self, page: &mut MetricsPage<'_>) {
        page.counter(
            "weft_sidecar_connections",
            "Connections accepted from clients.",
            self.sum(|m| m.connections.get()),
        );
        page.gauge(
            "weft_sidecar_connections_open",
            "Open connections from clients.",
            self.sum(|m| m.connections_open.get()),
        );
        page.counter(
            "weft_sidecar_connections_refused",
            "Connections refused because of the connection limit, or because no listener serves their destination.",
            self.sum(|m| m.connections_refused.get()),
        );
        let closed = [
            ("certificate_revoked", self.sum(|m| m.connections_revoked.get())),
            ("certificate_expired", self.sum(|m| m.connections_expired.get())),
            ("policy_changed", self.sum(|m| m.connections_policy_changed.get())),
        ];
        page.counter_by(
            "weft_sidecar_connections_closed",
            "Connections closed because their peer or their policy changed.",
            "reason",
            &closed,
        );
        page.counter(
            "weft_sidecar_server_first_connections",
            "Connections to an HTTP port whose server sent bytes first, relayed as TCP.",
            self.sum(|m| m.server_first_connections.get()),
        );
    }

    fn add_http2(&self, page: &mut MetricsPage<'_>) {
        page.counter(
            "weft_sidecar_http2_flood_disconnects",
            "HTTP/2 connections closed because the client sent too many frames without content.",
            self.sum(|m| m.http2_floods.get()),
        );
        page.counter(
            "weft_sidecar_http2_window_refusals",
            "HTTP/2 request bodies refused because the window limit was reached.",
            self.sum(|m| m.http2_window_refusals.get()),
        );
    }

    fn add_handshakes(&self, page: &mut MetricsPage<'_>) {
        page.counter(
            "weft_sidecar_tls_handshakes",
            "Completed TLS handshakes with clients.",
            self.sum(|m| m.handshakes.get()),
        );
        page.counter(
            "weft_sidecar_tls_handshakes_resumed",
            "Completed TLS handshakes with clients that resumed a session.",
            self.sum(|m| m.handshakes_resumed.get()),
        );
        let faults = PeerFault::ALL.iter().map(|fault| fault.word());
        page.counter_by(
            "weft_sidecar_tls_handshake_failures",
            "Failed TLS handshakes with clients.",
            "reason",
            &self.sums(faults, |m| &m.handshake_failures),
        );
        page.counter_by(
            "weft_sidecar_upstream_tls_handshake_failures",
            "Failed TLS handshakes with endpoints.",
            "reason",
            &self.sums(TlsFailure::words(), |m| &m.upstream_handshake_failures.0),
        );
    }

    fn add_requests(&self, page: &mut MetricsPage<'_>) {
        page.gauge(
            "weft_sidecar_requests_open",
            "Requests in progress.",
            self.sum(|m| m.requests_open.get()),
        );
        page.counter_by(
            "weft_sidecar_requests_aborted",
            "Requests aborted while in progress.",
            "reason",
            &[("policy_changed", self.sum(|m| m.requests_policy_changed.get()))],
        );
        page.counter_by(
            "weft_sidecar_requests_denied",
            "Requests that the sidecar answered with an error of its own.",
            "reason",
            &self.sums(Denial::reasons(), |m| &m.denied),
        );
        page.counter(
            "weft_sidecar_requests_dry_run_denied",
            "Requests that a policy in dry-run mode would deny.",
            self.sum(|m| m.dry_run_denials.get()),
        );
        page.counter_by(
            "weft_sidecar_requests_noncompliant",
            "Requests that do not follow HTTP strictly, forwarded or refused.",
            "reason",
            &self.sums(DesyncReason::ALL.iter().map(|reason| reason.word()), |m| &m.noncompliant),
        );
        page.counter_by(
            "weft_sidecar_headers_dropped",
            "Request headers and trailers dropped.",
            "reason",
            &[("underscore", self.sum(|m| m.headers_dropped.get()))],
        );
    }

    fn add_upstream(&self, page: &mut MetricsPage<'_>) {
        page.counter(
            "weft_sidecar_upstream_connections",
            "Connections opened to endpoints.",
            self.sum(|m| m.upstream_connections.get()),
        );
        page.counter(
            "weft_sidecar_upstream_retries",
            "Requests sent to an endpoint again.",
            self.sum(|m| m.upstream_retries.get()),
        );
    }
}

/// Adds the CRLs in force, of all trust bundles together.
fn add_crls(covered: &CrlsByTrustStore, page: &mut MetricsPage<'_>) {
    let crls: Vec<_> = covered.values().flatten().flatten().collect();
    let entries = crls.iter().map(|crl| crl.entries as u64).sum();
    let next = crls.iter().map(|crl| crl.next_update.as_secs()).min().unwrap_or_default();
    page.gauge("weft_sidecar_crls", "CRLs in force.", crls.len() as u64);
    page.gauge(
        "weft_sidecar_crl_revoked_certificates",
        "Certificates that the CRLs in force revoke.",
        entries,
    );
    page.gauge(
        "weft_sidecar_crl_next_update_timestamp_seconds",
        "Unix time of the earliest next update of a CRL in force; 0 without any.",
        next,
    );
}
