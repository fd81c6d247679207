//! Sends one request to an endpoint and forwards the response, with retries on other endpoints and connections.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;

use http::Method;
use weft_model::HttpTimeouts;

use super::http2_exchange;
use super::outcome::ExchangeOutcome;
use super::pinned::{self, PinnedConnection};
use super::pool::Http1Connection;
use super::upgrade;
use super::upload::Upload;
use crate::denial::Denial;
use crate::header_mutation::HeaderChanges;
use crate::http::body::{BodyProgress, BodySink, BodySource, ReplayBuffer, forward_body};
use crate::http::h1::{
    BodyCoding, BodyFraming, BodyReader, BodyWriter, HeadError, ReadResponse, ResponseLimits,
    read_response, write_request,
};
use crate::http::head::{HttpVersion, RequestHead, ResponseHead};
use crate::http::header_filter::HeaderFilter;
use crate::pipeline::Responder;
use crate::plan::PlannedCluster;
use crate::timeouts::RequestProgress;
use crate::tls::Alpn;
use crate::upstream_failure::ResponseFault;
use crate::worker::SidecarWorker;

/// A request to be sent, and where its response is forwarded to.
pub(crate) struct Call<'s, 'r, 'w> {
    pub(crate) head: &'r RequestHead,
    /// Removes trailers that are not forwarded.
    pub(crate) header_filter: HeaderFilter,
    pub(crate) source: BodySource<'s>,
    pub(crate) responder: &'r mut Responder<'w>,
    pub(crate) progress: &'r RequestProgress,
    /// The body pieces sent so far, in case an endpoint does not process the request.
    pub(crate) replay: RefCell<ReplayBuffer>,
    /// Whether weft terminates the CONNECT tunnel that the request asks for.
    pub(crate) ends_tunnel: bool,
    /// The route's changes to the response headers.
    pub(crate) changes: Option<&'r HeaderChanges<'r>>,
    /// How long the endpoint may accept no bytes of the request while some wait to be sent.
    pub(crate) stall: Duration,
    /// The upstream connection that is pinned to this client connection; none when the client connection may carry
    /// requests of several clients.
    pub(crate) pin: Option<&'r RefCell<Option<PinnedConnection>>>,
}

/// Why no response was forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ExchangeFailure {
    /// The endpoint could not be connected to: nothing was sent.
    NotConnected(Denial),
    /// A reused connection was closed when the request was sent.
    Stale(ResponseFault),
    /// The endpoint reported that it did not process the request: it may be sent again, also when it is not idempotent.
    NotProcessed,
    /// The request is refused with this denial.
    Denied(Denial),
}

/// How many times a request is retried on another endpoint or connection.
const MAX_RETRIES: usize = 2;
/// How many times a request is retried that an endpoint did not process: many connections may be closed at the same
/// time, and these retries are safe.
const MAX_UNPROCESSED_RETRIES: usize = 8;
/// How many interim responses an endpoint may send before the final one.
const INTERIM_LIMIT: usize = 16;

/// Sends the request to an endpoint of `target` and forwards the response. Sets `endpoint` to the chosen endpoint.
///
/// When an endpoint cannot be reached, another is tried. A request that an endpoint may have processed is retried only
/// when it is idempotent and has no body.
///
/// # Errors
/// The denial to respond with, when no endpoint gave a valid response or a limit was reached.
pub(crate) async fn exchange(
    call: &mut Call<'_, '_, '_>,
    target: &PlannedCluster,
    worker: &SidecarWorker,
    endpoint: &mut Option<SocketAddr>,
) -> Result<ExchangeOutcome, Denial> {
    if target.balancer.open() >= target.cluster.request_limit {
        return Err(Denial::Overloaded);
    }
    let alpn = call.protocol(target)?;
    let mut tried = Vec::new();
    let mut last = Denial::NoEndpoint;
    let mut retries = 0;
    let mut unprocessed = 0;
    let mut fresh = false;
    loop {
        let pinned = PinnedConnection::take(call.pin, target).filter(|_| alpn != Alpn::Http2);
        let pinned_endpoint = pinned.as_ref().and_then(|pinned| target.balancer.at(pinned.address));
        let pinned = pinned.filter(|_| pinned_endpoint.is_some());
        let Some(chosen) = pinned_endpoint.or_else(|| target.balancer.choose(&tried)) else {
            return Err(last);
        };
        *endpoint = Some(chosen.address);
        if let Some(changes) = call.changes {
            changes.note_endpoint(chosen.address);
        }
        let result = match alpn {
            _ if call.ends_tunnel => {
                Box::pin(upgrade::terminate_tunnel(call, target, chosen.address, worker)).await
            }
            Alpn::Http2 => http2_exchange::over_http2(call, target, chosen.address, worker).await,
            Alpn::Http1 | Alpn::None => {
                let connection = match pinned {
                    Some(pinned) => Ok(pinned.connection),
                    None => worker.pools.http1(target, chosen.address, fresh, worker).await,
                };
                over_http1(call, target, chosen.address, connection, worker).await
            }
        };
        match result {
            Ok(outcome) => return Ok(outcome),
            Err(ExchangeFailure::Denied(denial)) => return Err(denial),
            Err(ExchangeFailure::NotConnected(denial)) if retries < MAX_RETRIES => {
                tried.push(chosen.address);
                last = denial;
            }
            // Other idle connections may be closed too, so the retry uses a new one.
            Err(ExchangeFailure::Stale(_)) if retries < MAX_RETRIES && call.is_retriable() => {
                fresh = true
            }
            Err(ExchangeFailure::NotProcessed)
                if unprocessed < MAX_UNPROCESSED_RETRIES && call.rewind() =>
            {
                unprocessed += 1;
                worker.metrics.upstream_retries.increment();
                continue;
            }
            Err(ExchangeFailure::NotConnected(denial)) => return Err(denial),
            Err(ExchangeFailure::Stale(fault)) => return Err(Denial::UpstreamBroken(fault)),
            Err(ExchangeFailure::NotProcessed) => {
                let refused = ResponseFault::Http2Reset(h2::Reason::REFUSED_STREAM);
                return Err(Denial::UpstreamBroken(refused));
            }
        }
        retries += 1;
        worker.metrics.upstream_retries.increment();
    }
}

impl<'s, 'r, 'w> Call<'s, 'r, 'w> {
    /// A request with the default settings.
    pub(crate) fn new(
        head: &'r RequestHead,
        source: BodySource<'s>,
        responder: &'r mut Responder<'w>,
        progress: &'r RequestProgress,
    ) -> Self {
        Self {
            head,
            header_filter: HeaderFilter::default(),
            source,
            responder,
            progress,
            replay: RefCell::default(),
            ends_tunnel: false,
            changes: None,
            stall: HttpTimeouts::default().stall_limit(),
            pin: None,
        }
    }

    /// The HTTP version to speak with the endpoint.
    ///
    /// # Errors
    /// When a gRPC call over HTTP/2 would be forwarded over HTTP/1.1.
    fn protocol(&self, target: &PlannedCluster) -> Result<Alpn, Denial> {
        use weft_model::UpstreamProtocol;
        let http2 = match target.cluster.protocol {
            UpstreamProtocol::Http1 => false,
            UpstreamProtocol::Http2 => true,
            UpstreamProtocol::AsDownstream => self.head.version == HttpVersion::Http2,
        };
        if !http2 && self.head.is_grpc() && self.head.version == HttpVersion::Http2 {
            return Err(Denial::ProtocolMismatch("gRPC requires a service that speaks HTTP/2"));
        }
        Ok(if http2 { Alpn::Http2 } else { Alpn::Http1 })
    }

    /// Whether the request is idempotent (RFC 9110, section 9.2.2) and has no body, so that it can be retried.
    fn is_retriable(&self) -> bool {
        let idempotent = [
            Method::GET,
            Method::HEAD,
            Method::OPTIONS,
            Method::PUT,
            Method::DELETE,
            Method::TRACE,
        ];
        matches!(self.source, BodySource::Empty) && idempotent.contains(&self.head.method)
    }

    /// Rewinds the body. Returns whether that was possible.
    fn rewind(&mut self) -> bool {
        let source = std::mem::replace(&mut self.source, BodySource::Empty);
        let rewound = source.rewound(self.replay.take());
        let is_rewound = rewound.is_ok();
        self.source = rewound.unwrap_or_else(|rest| rest);
        is_rewound
    }

    /// The framing of the body over HTTP/1.1.
    fn framing(&self) -> BodyFraming {
        match (self.source.is_empty(), self.head.content_length) {
            _ if self.head.upgrade.is_some() => BodyFraming::None,
            // HTTP/1.1 has trailers only with the chunked coding.
            (false, Some(_)) if self.head.headers.has("trailer") => BodyFraming::Chunked,
            (_, Some(length)) => BodyFraming::Length(length),
            // These methods define a meaning for a body, so an empty one is announced (RFC 9110, section 8.6).
            (true, None)
                if [Method::POST, Method::PUT, Method::PATCH].contains(&self.head.method) =>
            {
                BodyFraming::Length(0)
            }
            (true, None) => BodyFraming::None,
            (false, None) => BodyFraming::Chunked,
        }
    }
}

async fn over_http1(
    call: &mut Call<'_, '_, '_>,
    target: &PlannedCluster,
    address: SocketAddr,
    connection: std::io::Result<Http1Connection>,
    worker: &SidecarWorker,
) -> Result<ExchangeOutcome, ExchangeFailure> {
    let mut connection = connection.map_err(|error| connect_failure(address, &error))?;
    let used = connection.used;
    let limits = ResponseLimits::of(&target.cluster);
    connection.writer.stall = call.stall;
    connection.is_personal |= pinned::has_connection_login(call.head);
    let done = match call.head.upgrade {
        // Boxed, because it is rare and would enlarge the future of every request.
        Some(upgrade) => {
            Box::pin(upgrade::over_http1(call, &mut connection, upgrade, limits)).await
        }
        None => {
            let framing = call.framing();
            write_request(call.head, framing, connection.writer.output());
            exchange_http1(call, &mut connection, framing, limits).await
        }
    };
    let done = done.map_err(|error| {
        let fault = match error {
            HeadError::Refused(denial) => return ExchangeFailure::Denied(denial),
            HeadError::Closed => ResponseFault::Closed,
            HeadError::ConnectionLost(None) => ResponseFault::Lost,
            HeadError::ConnectionLost(Some(failure)) => ResponseFault::Tls(failure),
        };
        if used {
            return ExchangeFailure::Stale(fault);
        }
        if let ResponseFault::Tls(failure) = fault {
            worker.metrics.count_upstream_handshake_failure(failure);
        }
        ExchangeFailure::Denied(Denial::UpstreamBroken(fault))
    })?;
    match call.pin {
        _ if !done.is_reusable || call.head.is_isolated => {}
        _ if !connection.is_personal => worker.pools.return_idle(target, address, connection),
        Some(pin) => drop(pin.replace(Some(PinnedConnection::new(target, address, connection)))),
        None => {
            tracing::debug!(%address, "closed upstream connection with NTLM login: its client connection is shared")
        }
    }
    Ok(done.outcome)
}

/// A finished exchange over HTTP/1.1, and whether its connection can be reused.
pub(super) struct Http1Exchange {
    pub(super) outcome: ExchangeOutcome,
    pub(super) is_reusable: bool,
}

/// Sends the request's body and forwards the response over HTTP/1.1 at the same time: either may end first.
async fn exchange_http1(
    call: &mut Call<'_, '_, '_>,
    connection: &mut Http1Connection,
    framing: BodyFraming,
    limits: ResponseLimits,
) -> Result<Http1Exchange, HeadError> {
    let Http1Connection { reader, writer, keep_alive_timeout, is_personal, .. } = connection;
    let Call { head, header_filter, source, responder, progress, changes, .. } = call;
    let mut outcome = ExchangeOutcome::default();
    let coding = BodyCoding::of(framing);
    let mut sink = BodySink::Http1(BodyWriter { writer: &mut *writer, coding });
    let forwarding_body =
        pin!(forward_body(source, &mut sink, header_filter, BodyProgress::of_request(progress)));
    let mut upload = Upload::new(forwarding_body, progress);
    let mut interim = 0;
    let response = loop {
        let response = pin!(read_response(reader, &head.method, limits));
        let response = upload.until_response(response, responder).await;
        let response = response.map_err(HeadError::Refused)??;
        if !response.is_interim() {
            break response;
        }
        interim += 1;
        let forwarding = Box::pin(forward_interim(response.head, interim, responder));
        forwarding.await.map_err(HeadError::Refused)?;
    };
    if response.head.status == 101 {
        // The request did not ask for an upgrade.
        return Err(HeadError::Refused(Denial::UpstreamBroken(ResponseFault::BadUpgrade)));
    }
    outcome.status = response.head.status;
    let keep_alive = response.keep_alive;
    *is_personal |= pinned::requests_connection_login(&response.head);
    *keep_alive_timeout = response.keep_alive_timeout.or(*keep_alive_timeout);
    let mut body = BodySource::Http1(BodyReader::new(reader, response.framing));
    if !upload.is_whole() {
        responder.record_early_response();
    }
    let (header_filter, mut downstream) = responder.start(response.head, &body, head, *changes);
    {
        let forwarding_body = pin!(forward_body(
            &mut body,
            &mut downstream,
            &header_filter,
            BodyProgress::of_response(progress)
        ));
        outcome.record_download(upload.until_downloaded(forwarding_body).await, progress);
    }
    outcome.bytes_sent = upload.bytes();
    let is_whole = outcome.aborted.is_none();
    if !is_whole {
        downstream.flush_and_abort().await;
    }
    // When the response was complete before the request's body, the rest of the body must not be interpreted as the
    // next request, so neither connection is reused.
    responder.record_end(is_whole && upload.is_whole());
    let is_reusable = is_whole && upload.is_whole() && keep_alive;
    Ok(Http1Exchange { outcome, is_reusable })
}

/// Forwards the response of an endpoint that did not accept an upgrade.
pub(super) async fn forward_declined_upgrade(
    call: &mut Call<'_, '_, '_>,
    connection: &mut Http1Connection,
    response: ReadResponse,
) -> Http1Exchange {
    let mut outcome =
        ExchangeOutcome { status: response.head.status, ..ExchangeOutcome::default() };
    connection.is_personal |= pinned::requests_connection_login(&response.head);
    let mut body = BodySource::Http1(BodyReader::new(&mut connection.reader, response.framing));
    let (header_filter, mut downstream) =
        call.responder.start(response.head, &body, call.head, call.changes);
    outcome.record_download(
        forward_body(
            &mut body,
            &mut downstream,
            &header_filter,
            BodyProgress::of_response(call.progress),
        )
        .await,
        call.progress,
    );
    let is_whole = outcome.aborted.is_none();
    if !is_whole {
        downstream.flush_and_abort().await;
    }
    call.responder.record_end(is_whole);
    Http1Exchange { outcome, is_reusable: is_whole && response.keep_alive }
}

/// Forwards an interim response. `number` counts them from 1.
///
/// # Errors
/// When there are too many, or the client is gone.
pub(super) async fn forward_interim(
    mut head: ResponseHead,
    number: usize,
    responder: &mut Responder<'_>,
) -> Result<(), Denial> {
    if number > INTERIM_LIMIT {
        return Err(Denial::UpstreamBroken(ResponseFault::TooManyInterim));
    }
    HeaderFilter::of_response(&head.headers).strip(&mut head.headers);
    responder.interim(head).await.map_err(|_| Denial::ClientGone)
}

/// Logs a failed connection attempt and converts it. A full connection pool is not retried: other endpoints of the
/// cluster share its limit.
pub(super) fn connect_failure(address: SocketAddr, error: &std::io::Error) -> ExchangeFailure {
    tracing::debug!(%address, %error, "connecting to an endpoint failed");
    match Denial::unreached(error) {
        Denial::Overloaded => ExchangeFailure::Denied(Denial::Overloaded),
        denial => ExchangeFailure::NotConnected(denial),
    }
}

impl Responder<'_> {
    /// Begins the response. The head is sent with the first bytes of the body. Returns the filter for the response's
    /// trailers, and the sink for its body.
    pub(crate) fn start(
        &mut self,
        mut head: ResponseHead,
        body: &BodySource<'_>,
        request: &RequestHead,
        changes: Option<&HeaderChanges<'_>>,
    ) -> (HeaderFilter, BodySink<'_>) {
        let header_filter = HeaderFilter::of_response(&head.headers);
        header_filter.strip(&mut head.headers);
        if let Some(changes) = changes {
            changes.apply_to_response(request, &mut head);
        }
        let bodiless = request.method == Method::HEAD || head.status == 204 || head.status == 304;
        let may_follow = bodiless || (body.may_have_trailers() && self.takes_trailers());
        header_filter.strip_trailer_announcements(&mut head.headers, may_follow);
        (header_filter, self.begin(head, bodiless, body.is_empty()))
    }
}
