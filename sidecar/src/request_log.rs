//! The request log: what the access log says of a request, gathered from its head to its end.

use std::net::SocketAddr;
use std::time::Instant;

use weft_certs::VerifiedPeer;
use weft_model::{MatchedRoute, Name, RbacEvaluation, SpiffeId};

use crate::clock::{now, unix_ms};
use crate::connection::ClientConnection;
use crate::denial::Denial;
use crate::http::desync::DesyncReason;
use crate::http::head::{HttpVersion, RequestHead};
use crate::record::HttpAccessRecord;
use crate::request_metrics::{RequestLabels, RequestResult};
use crate::upstream::ExchangeOutcome;
use crate::worker::SidecarWorker;

/// What the access log says of a request.
#[derive(Default)]
pub(crate) struct RequestLog {
    line: Option<Line>,
    /// The policy that decided.
    pub(crate) rule: Option<Name>,
    /// The policy in dry-run mode that would deny the request; `Some(None)`: no policy would allow it.
    dry_run: Option<Option<Name>>,
    /// The virtual host that matched.
    service: Option<Name>,
    /// The upstream cluster.
    pub(crate) cluster: Option<Name>,
    subject: Option<String>,
    pub(crate) endpoint: Option<SocketAddr>,
    /// How the request deviates from strict HTTP/1.1.
    pub(crate) desync: Option<DesyncReason>,
}

/// The parts of a request that its access log line repeats.
#[derive(Default)]
struct Line {
    method: String,
    authority: String,
    path: String,
    version: &'static str,
}

impl RequestLog {
    /// The log of a request whose head was not read.
    pub(crate) fn unread(version: HttpVersion, desync: Option<DesyncReason>, logged: bool) -> Self {
        let line = logged.then(|| Line { version: version.word(), ..Line::default() });
        Self { line, desync, ..Self::default() }
    }

    pub(crate) fn new(head: &RequestHead, logged: bool) -> Self {
        let line = logged.then(|| Line {
            method: head.method.to_string(),
            authority: head.authority.clone(),
            path: head.path().to_owned(),
            version: head.version.word(),
        });
        Self { line, desync: head.desync, ..Self::default() }
    }

    /// Notes the route that matched, and the subject of the request's token.
    pub(crate) fn route(&mut self, found: &MatchedRoute<'_>, subject: Option<&String>) {
        self.service = Some(found.host.name.clone());
        self.subject = subject.cloned();
    }

    /// Notes the decision of policies.
    pub(crate) fn judged(&mut self, judgement: &RbacEvaluation<'_>, worker: &SidecarWorker) {
        let refusing = judgement.shadow.filter(|shadow| shadow.refused);
        if refusing.is_some() {
            worker.metrics.dry_run_denials.increment();
        }
        if self.line.is_some() {
            self.rule = judgement.enforced.policy.cloned();
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
        let (status, outcome) = match result {
            Ok(outcome) => (outcome.status, outcome),
            Err(denial) => {
                worker.metrics.count_denial(denial);
                (denial.status(), ExchangeOutcome::default())
            }
        };
        if let Some(reason) = self.desync {
            worker.metrics.count_noncompliant(reason);
        }
        let peer = connection.peer.as_ref().and_then(VerifiedPeer::identity).map(SpiffeId::as_str);
        let labels = RequestLabels {
            listener: &connection.listener,
            service: self.service.as_ref(),
            cluster: self.cluster.as_ref(),
            peer,
        };
        let result_counted = RequestResult { status, duration };
        worker.series.count(labels, result_counted, &connection.series, &worker.metrics.requests);
        let Some(line) = self.line else {
            return;
        };
        worker.access.line(&HttpAccessRecord {
            kind: "http",
            time_ms: unix_ms(),
            client: connection.client,
            original_destination: connection.destination,
            conn_trace_id: connection.trace,
            peer,
            subject: self.subject.as_deref(),
            version: line.version,
            method: &line.method,
            authority: &line.authority,
            path: &line.path,
            status,
            denial: result.err().map(Denial::reason),
            detail: result
                .err()
                .map(Denial::detail)
                .filter(|detail| !detail.is_empty())
                .or(outcome.detail),
            rule: self.rule.as_deref(),
            dry_run: self
                .dry_run
                .as_ref()
                .map(|rule| rule.as_deref().unwrap_or("no rule allows it")),
            desync: self.desync.map(DesyncReason::word),
            service: self.cluster.as_deref(),
            endpoint: self.endpoint,
            bytes_sent: outcome.bytes_sent,
            bytes_received: outcome.bytes_received,
            duration_us: duration.as_micros(),
            outcome: match (outcome.aborted, result) {
                (Some(aborted), _) => aborted,
                (None, Ok(_)) => "served",
                (None, Err(_)) => "denied",
            },
        });
    }
}
