//! Collects the access log record of a request, from its head to its end.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use weft_certs::VerifiedPeer;
use weft_model::{AccessLogSinks, MatchedRoute, Name, RbacEvaluation, SpiffeId};
use weft_runtime::access::{AccessRecord, RecordKind, ResponseFlag, WordInfo};
use weft_runtime::clock::{now, unix_ms};

use crate::connection::ClientConnection;
use crate::denial::Denial;
use crate::http::desync::DesyncReason;
use crate::http::head::{HttpVersion, RequestHead};
use crate::request_metrics::{RequestLabels, RequestResult};
use crate::upstream::{ExchangeAbort, ExchangeOutcome};
use crate::worker::SidecarWorker;

/// The header with the ID of a request.
const REQUEST_ID: &str = "x-request-id";

/// The `response_code_details` of requests that were not refused.
pub(crate) const OUTCOME_DETAILS: &[WordInfo] = &[
    WordInfo { word: VIA_UPSTREAM, meaning: &[" The response of the endpoint."] },
    WordInfo {
        word: DIRECT_RESPONSE,
        meaning: &[" A redirect or response that the configuration defines."],
    },
    WordInfo {
        word: UPSTREAM_RESET,
        meaning: &[
            " The endpoint closed or reset the connection or stream after the response had begun.",
        ],
    },
    WordInfo {
        word: CLIENT_DISCONNECT,
        meaning: &[" The client closed the connection or stream during the response."],
    },
];
const VIA_UPSTREAM: &str = "via_upstream";
const DIRECT_RESPONSE: &str = "direct_response";
const UPSTREAM_RESET: &str = "upstream_reset_after_response_started";
const CLIENT_DISCONNECT: &str = "downstream_remote_disconnect";

/// The access log record of a request, as far as it is known.
#[derive(Default)]
pub(crate) struct RequestLog {
    sinks: AccessLogSinks,
    head: Option<LoggedHead>,
    /// The policy that decided.
    pub(crate) policy: Option<Name>,
    /// Whether the policies in dry-run mode would deny the request.
    is_denied_by_dry_run: bool,
    /// The policy in dry-run mode that would deny the request; `Some(None)`: no policy would allow it.
    dry_run: Option<Option<Name>>,
    /// The virtual host that matched.
    service: Option<Name>,
    route: Option<Name>,
    /// The upstream cluster.
    pub(crate) cluster: Option<Name>,
    subject: Option<String>,
    pub(crate) endpoint: Option<SocketAddr>,
    /// How the request deviates from strict HTTP/1.1.
    pub(crate) desync: Option<DesyncReason>,
}

/// The parts of a request's head that its record repeats, copied because the head changes on its way.
#[derive(Default)]
struct LoggedHead {
    /// Method, authority, path and request ID in one allocation.
    text: String,
    method_end: usize,
    authority_end: usize,
    path_end: usize,
    version: &'static str,
}

impl LoggedHead {
    fn new(head: &RequestHead) -> Self {
        let id = head.headers.get(REQUEST_ID).and_then(|id| std::str::from_utf8(id).ok());
        let parts = [head.method.as_str(), &head.authority, head.path(), id.unwrap_or_default()];
        let [method, authority, path, _] = parts;
        let method_end = method.len();
        let authority_end = method_end + authority.len();
        let path_end = authority_end + path.len();
        Self {
            text: parts.concat(),
            method_end,
            authority_end,
            path_end,
            version: head.version.word(),
        }
    }

    fn part(&self, start: usize, end: usize) -> Option<&str> {
        self.text.get(start..end).filter(|part| !part.is_empty())
    }
}

impl RequestLog {
    /// The log of a request without a usable head.
    pub(crate) fn unread(
        version: HttpVersion,
        desync: Option<DesyncReason>,
        sinks: AccessLogSinks,
    ) -> Self {
        let head = LoggedHead { version: version.word(), ..LoggedHead::default() };
        let head = (!sinks.is_off()).then_some(head);
        Self { sinks, head, desync, ..Self::default() }
    }

    pub(crate) fn new(head: &RequestHead, sinks: AccessLogSinks) -> Self {
        let logged = (!sinks.is_off()).then(|| LoggedHead::new(head));
        Self { sinks, head: logged, desync: head.desync, ..Self::default() }
    }

    /// Notes the route that matched, and the subject of the request's token.
    pub(crate) fn route(&mut self, found: &MatchedRoute<'_>, subject: Option<&String>) {
        self.service = Some(found.host.name.clone());
        if self.head.is_some() && !found.route.name.is_empty() {
            self.route = Some(found.route.name.clone());
        }
        self.subject = subject.cloned();
    }

    /// Notes the decision of policies.
    pub(crate) fn judged(&mut self, judgement: &RbacEvaluation<'_>) {
        let refusing = judgement.shadow.filter(|shadow| shadow.refused);
        self.is_denied_by_dry_run = refusing.is_some();
        if self.head.is_some() {
            self.policy = judgement.enforced.policy.cloned();
            self.dry_run = refusing.map(|shadow| shadow.policy.cloned());
        }
    }

    /// Counts the request and writes its access log line.
    pub(crate) fn finish(
        self,
        result: Result<ExchangeOutcome, Denial>,
        started: Instant,
        connection: &ClientConnection,
        worker: &SidecarWorker,
    ) {
        let duration = now() - started;
        if let Err(denial) = result {
            worker.metrics.count_denial(denial);
        }
        if let Some(reason) = self.desync {
            worker.metrics.count_noncompliant(reason);
        }
        if self.is_denied_by_dry_run {
            worker.metrics.dry_run_denials.increment();
        }
        let status = result.map_or_else(Denial::status, |outcome| outcome.status);
        let labels = RequestLabels {
            listener: &connection.listener,
            service: self.service.as_ref(),
            cluster: self.cluster.as_ref(),
            peer: peer(connection),
        };
        let result_counted = RequestResult { status, duration };
        worker.series.count(labels, result_counted, &connection.series, &worker.metrics.requests);
        if let Some(head) = &self.head {
            let record = self.record(head, result, duration, connection);
            worker.access.line(&self.sinks, &record);
        }
    }

    fn record<'a>(
        &'a self,
        head: &'a LoggedHead,
        result: Result<ExchangeOutcome, Denial>,
        duration: Duration,
        connection: &'a ClientConnection,
    ) -> AccessRecord<'a> {
        let record = AccessRecord::new(RecordKind::Http, unix_ms(), duration, connection.client);
        let outcome = result.unwrap_or_default();
        let denial = result.err();
        AccessRecord {
            downstream_local_address: Some(connection.destination),
            protocol: Some(head.version),
            method: head.part(0, head.method_end),
            authority: head.part(head.method_end, head.authority_end),
            path: head.part(head.authority_end, head.path_end),
            request_id: head.part(head.path_end, head.text.len()),
            response_code: Some(denial.map_or(outcome.status, Denial::status)),
            response_flags: denial.map_or_else(|| flag(outcome), Denial::flag),
            response_code_details: Some(match denial {
                Some(denial) => denial.info().details,
                None => details(outcome, self.endpoint),
            }),
            upstream_failure_reason: denial.and_then(Denial::upstream_failure),
            error_detail: denial
                .map(Denial::detail)
                .filter(|detail| !detail.is_empty())
                .or(outcome.detail),
            bytes_received: Some(outcome.bytes_to_endpoint),
            bytes_sent: Some(outcome.bytes_to_client),
            service: self.service.as_deref(),
            route_name: self.route.as_deref(),
            upstream_cluster: self.cluster.as_deref(),
            upstream_host: self.endpoint,
            matched_policy: self.policy.as_deref(),
            dry_run_denied: self.dry_run.as_ref().map(|_| true),
            dry_run_policy: self.dry_run.as_ref().and_then(|policy| policy.as_deref()),
            jwt_subject: self.subject.as_deref(),
            desync_reason: self.desync.map(DesyncReason::word),
            downstream_tls_version: connection.tls_version,
            downstream_peer_uri_san: peer(connection),
            conn_trace_id: connection.trace,
            ..record
        }
    }
}

#[cfg(test)]
impl RequestLog {
    /// Whether policies in dry-run mode would deny the request: none if not, otherwise the policy, if one matched.
    pub(crate) fn dry_run_denial(&self) -> Option<Option<&Name>> {
        assert_eq!(self.is_denied_by_dry_run, self.dry_run.is_some());
        self.dry_run.as_ref().map(Option::as_ref)
    }
}

fn peer(connection: &ClientConnection) -> Option<&str> {
    connection.peer.as_ref().and_then(VerifiedPeer::identity).map(SpiffeId::as_str)
}

/// The response flag of a request that was not refused.
fn flag(outcome: ExchangeOutcome) -> Option<ResponseFlag> {
    outcome.aborted.map(|side| match side {
        ExchangeAbort::Upstream => ResponseFlag::UpstreamConnectionTermination,
        ExchangeAbort::Downstream => ResponseFlag::DownstreamConnectionTermination,
    })
}

/// The response code details of a request that was not refused.
fn details(outcome: ExchangeOutcome, endpoint: Option<SocketAddr>) -> &'static str {
    match (outcome.aborted, endpoint) {
        (Some(ExchangeAbort::Upstream), _) => UPSTREAM_RESET,
        (Some(ExchangeAbort::Downstream), _) => CLIENT_DISCONNECT,
        (None, Some(_)) => VIA_UPSTREAM,
        (None, None) => DIRECT_RESPONSE,
    }
}
