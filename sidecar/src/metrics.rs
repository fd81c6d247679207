//! What the sidecar counts.

use weft_certs::fault::PeerFault;
use weft_runtime::metrics::{Counter, Gauge, Histogram, Page, Registry};

use crate::denial::Denial;
use crate::http::desync::DesyncReason;
use crate::plan::CrlsByTrustStore;
use crate::tls::failure::TlsFailure;

/// The classes of statuses; the last is that of statuses outside the standard, 600 to 999.
const RESPONSE_CLASSES: [&str; 6] = ["1xx", "2xx", "3xx", "4xx", "5xx", "other"];

/// The counters of one worker.
#[derive(Debug, Default)]
pub struct Metrics {
    pub(crate) connections: Counter,
    pub(crate) connections_open: Gauge,
    pub(crate) connections_refused: Counter,
    pub(crate) connections_revoked: Counter,
    pub(crate) connections_expired: Counter,
    pub(crate) connections_shut_out: Counter,
    pub(crate) floods: Counter,
    pub(crate) windows_refused: Counter,
    pub(crate) spoken_first: Counter,
    pub(crate) handshakes: Counter,
    pub(crate) handshakes_resumed: Counter,
    pub(crate) handshakes_failed: Counter,
    pub(crate) clients_refused: [Counter; PeerFault::ALL.len()],
    pub(crate) requests: Counter,
    pub(crate) requests_open: Gauge,
    pub(crate) requests_withdrawn: Counter,
    pub(crate) requests_dry_run_refused: Counter,
    pub(crate) responses: [Counter; RESPONSE_CLASSES.len()],
    pub(crate) denied: [Counter; Denial::REASONS.len()],
    pub(crate) departed: [Counter; DesyncReason::ALL.len()],
    pub(crate) headers_dropped: Counter,
    pub(crate) upstream_connections: Counter,
    pub(crate) upstream_retries: Counter,
    pub(crate) upstream_handshakes_failed: UpstreamHandshakes,
    pub(crate) duration: Histogram,
}

impl Metrics {
    pub(crate) fn respond(&self, status: u16) {
        let class = usize::from(status / 100).wrapping_sub(1).min(RESPONSE_CLASSES.len() - 1);
        if let Some(counter) = self.responses.get(class) {
            counter.increment();
        }
    }

    pub(crate) fn depart(&self, reason: DesyncReason) {
        if let Some(counter) = self.departed.get(reason.index()) {
            counter.increment();
        }
    }

    pub(crate) fn refuse_client(&self, fault: PeerFault) {
        self.handshakes_failed.increment();
        let at = PeerFault::ALL.iter().position(|known| *known == fault);
        if let Some(counter) = at.and_then(|at| self.clients_refused.get(at)) {
            counter.increment();
        }
    }

    pub(crate) fn fail_upstream_handshake(&self, failure: TlsFailure) {
        if let Some(counter) = self.upstream_handshakes_failed.0.get(failure.index()) {
            counter.increment();
        }
    }

    pub(crate) fn deny(&self, denial: Denial) {
        if let Some(counter) = self.denied.get(denial.index()) {
            counter.increment();
        }
    }
}

/// The page of all workers, and of the revocation lists in force.
#[must_use]
pub fn page(registry: &Registry<Metrics>, covered: &CrlsByTrustStore) -> Page {
    let sets = registry.sets();
    let sum = |pick: &dyn Fn(&Metrics) -> u64| {
        sets.iter().map(|set| pick(set)).fold(0, u64::wrapping_add)
    };
    let mut page = Page::default();
    connections(&sets, &mut page);
    clients(&sets, &mut page);
    endpoints(&sets, &mut page);
    revocation(covered, &mut page);
    page.counter("weft_sidecar_requests", "Requests served.", sum(&|m| m.requests.get()));
    page.gauge(
        "weft_sidecar_requests_open",
        "Requests being served.",
        sum(&|m| m.requests_open.get()),
    );
    page.counter(
        "weft_sidecar_requests_withdrawn",
        "Requests that were ended because a changed policy does not allow them.",
        sum(&|m| m.requests_withdrawn.get()),
    );
    page.counter(
        "weft_sidecar_requests_dry_run_refused",
        "Requests that policies which only watch would refuse.",
        sum(&|m| m.requests_dry_run_refused.get()),
    );
    refusals(&sets, &mut page);
    page.counter(
        "weft_sidecar_headers_dropped",
        "Request headers and trailers dropped because their names have an underscore.",
        sum(&|m| m.headers_dropped.get()),
    );
    page.counter(
        "weft_sidecar_upstream_connections",
        "Connections opened.",
        sum(&|m| m.upstream_connections.get()),
    );
    page.counter(
        "weft_sidecar_upstream_retries",
        "Requests sent again.",
        sum(&|m| m.upstream_retries.get()),
    );
    page.histogram(
        "weft_sidecar_request_seconds",
        "How long requests took.",
        sets.iter().map(|set| &set.duration),
    );
    weft_runtime::metrics::process(&mut page);
    page
}

/// What became of connections.
fn connections(sets: &[std::sync::Arc<Metrics>], page: &mut Page) {
    let sum = |pick: &dyn Fn(&Metrics) -> u64| {
        sets.iter().map(|set| pick(set)).fold(0, u64::wrapping_add)
    };
    page.counter("weft_sidecar_connections", "Connections served.", sum(&|m| m.connections.get()));
    page.gauge(
        "weft_sidecar_connections_open",
        "Connections being served.",
        sum(&|m| m.connections_open.get()),
    );
    page.counter(
        "weft_sidecar_connections_refused",
        "Connections refused.",
        sum(&|m| m.connections_refused.get()),
    );
    page.counter(
        "weft_sidecar_connections_revoked",
        "Connections ended because what their peers had proved was withdrawn.",
        sum(&|m| m.connections_revoked.get()),
    );
    page.counter(
        "weft_sidecar_connections_expired",
        "Connections that took no more requests because a certificate of their peers had ended.",
        sum(&|m| m.connections_expired.get()),
    );
    page.counter(
        "weft_sidecar_connections_shut_out",
        "Opaque connections that were ended because a changed policy does not let them in.",
        sum(&|m| m.connections_shut_out.get()),
    );
    page.counter(
        "weft_sidecar_floods",
        "HTTP/2 connections ended because they sent too many frames that carry nothing.",
        sum(&|m| m.floods.get()),
    );
    page.counter(
        "weft_sidecar_windows_refused",
        "Request bodies over HTTP/2 refused because the window limit was in use.",
        sum(&|m| m.windows_refused.get()),
    );
    page.counter(
        "weft_sidecar_spoken_first",
        "Connections to an HTTP port whose service spoke first, carried as they are.",
        sum(&|m| m.spoken_first.get()),
    );
    page.counter(
        "weft_sidecar_handshakes",
        "TLS handshakes finished.",
        sum(&|m| m.handshakes.get()),
    );
    page.counter(
        "weft_sidecar_handshakes_resumed",
        "TLS handshakes that went on with an earlier session; who came was checked again.",
        sum(&|m| m.handshakes_resumed.get()),
    );
    page.counter(
        "weft_sidecar_handshakes_failed",
        "TLS handshakes refused.",
        sum(&|m| m.handshakes_failed.get()),
    );
}

/// Handshakes with endpoints that failed, by their cause.
#[derive(Debug)]
pub(crate) struct UpstreamHandshakes([Counter; TlsFailure::COUNT]);

impl Default for UpstreamHandshakes {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Counter::default()))
    }
}

/// Why TLS with endpoints did not come about.
fn endpoints(sets: &[std::sync::Arc<Metrics>], page: &mut Page) {
    let count = |at: usize| {
        let counter = |set: &std::sync::Arc<Metrics>| {
            set.upstream_handshakes_failed.0.get(at).map_or(0, Counter::get)
        };
        sets.iter().map(counter).fold(0, u64::wrapping_add)
    };
    let failed: Vec<_> =
        TlsFailure::words().enumerate().map(|(at, word)| (word, count(at))).collect();
    page.counter_by(
        "weft_sidecar_upstream_handshakes_failed",
        "TLS handshakes with endpoints that failed.",
        "reason",
        &failed,
    );
}

/// Why clients were refused in the handshake.
fn clients(sets: &[std::sync::Arc<Metrics>], page: &mut Page) {
    let count = |at: usize| {
        let counted = sets.iter().map(|set| set.clients_refused.get(at).map_or(0, Counter::get));
        counted.fold(0, u64::wrapping_add)
    };
    let refused: Vec<(&str, u64)> =
        PeerFault::ALL.iter().enumerate().map(|(at, fault)| (fault.word(), count(at))).collect();
    page.counter_by(
        "weft_sidecar_clients_refused",
        "Clients whose handshake was refused.",
        "reason",
        &refused,
    );
}

/// The revocation lists in force, of all trust stores together.
fn revocation(covered: &CrlsByTrustStore, page: &mut Page) {
    let lists: Vec<_> = covered.values().flatten().flatten().collect();
    let entries = lists.iter().map(|list| list.entries as u64).sum();
    let next = lists.iter().map(|list| list.next_update).min().unwrap_or_default();
    page.gauge("weft_sidecar_revocation_lists", "Revocation lists in force.", lists.len() as u64);
    page.gauge("weft_sidecar_revoked_certificates", "Certificates that they revoke.", entries);
    page.gauge(
        "weft_sidecar_revocation_next_update_seconds",
        "When the first of them expires, in seconds since 1970; 0 without any.",
        next,
    );
}

/// What became of requests, by status and by reason.
fn refusals(sets: &[std::sync::Arc<Metrics>], page: &mut Page) {
    let sum = |pick: &dyn Fn(&Metrics) -> u64| {
        sets.iter().map(|set| pick(set)).fold(0, u64::wrapping_add)
    };
    let responses: Vec<(&str, u64)> = RESPONSE_CLASSES
        .iter()
        .enumerate()
        .map(|(index, class)| (*class, sum(&|m| m.responses.get(index).map_or(0, Counter::get))))
        .collect();
    page.counter_by("weft_sidecar_responses", "Responses sent.", "class", &responses);
    let denied: Vec<(&str, u64)> = Denial::REASONS
        .iter()
        .enumerate()
        .map(|(index, reason)| (*reason, sum(&|m| m.denied.get(index).map_or(0, Counter::get))))
        .collect();
    page.counter_by("weft_sidecar_denied", "Requests refused by us.", "reason", &denied);
    let departed: Vec<(&str, u64)> = DesyncReason::ALL
        .iter()
        .map(|reason| {
            let count = |m: &Metrics| m.departed.get(reason.index()).map_or(0, Counter::get);
            (reason.word(), sum(&count))
        })
        .collect();
    page.counter_by(
        "weft_sidecar_noncompliant_requests",
        "Requests that departed from strict HTTP/1.1, let through or not.",
        "reason",
        &departed,
    );
}
