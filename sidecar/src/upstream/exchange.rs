//! One request and its response, over one connection to one endpoint.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use http::Method;
use weft_model::HttpTimeouts;

use super::connect;
use super::outcome::ExchangeOutcome;
use super::pinned::{self, PinnedConnection};
use super::pool::{Http1Connection, StreamLease};
use super::upload::Upload;
use super::upstream_response::{UpstreamResponse, next_response};
use crate::denial::Denial;
use crate::header_mutation::HeaderChanges;
use crate::http::body::{BodyProgress, BodySink, BodySource, ReplayBuffer, forward_body};
use crate::http::h1::{
    BodyCoding, BodyFraming, BodyReader, BodyWriter, HeadError, ReadResponse, ResponseLimits,
    read_response, write_request,
};
use crate::http::h2 as http2;
use crate::http::head::{HttpVersion, RequestHead, ResponseHead, Upgrade};
use crate::http::header_filter::HeaderFilter;
use crate::pipeline::Responder;
use crate::plan::PlannedCluster;
use crate::timeouts::RequestProgress;
use crate::tls::Alpn;
use crate::upstream_failure::ResponseFault;
use crate::worker::SidecarWorker;

/// A request on its way, with where its response goes.
pub(crate) struct Call<'s, 'r, 'w> {
    pub(crate) head: &'r RequestHead,
    /// What of its trailers is not passed on.
    pub(crate) header_filter: HeaderFilter,
    pub(crate) source: BodySource<'s>,
    pub(crate) reply: &'r mut Responder<'w>,
    pub(crate) progress: &'r RequestProgress,
    /// What was taken of the body, for an endpoint that might not look at it.
    pub(crate) taken: RefCell<ReplayBuffer>,
    /// Whether it asks for a tunnel that ends here.
    pub(crate) ends_tunnel: bool,
    /// What changes in the headers of its response.
    pub(crate) changes: Option<&'r HeaderChanges<'r>>,
    /// How long the endpoint may take nothing of the request while there is some.
    pub(crate) stall: Duration,
    /// The connection to an endpoint that serves this client connection only; none where the client
    /// connection may carry requests of several clients.
    pub(crate) pin: Option<&'r RefCell<Option<PinnedConnection>>>,
}

/// Why an exchange did not begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ExchangeFailure {
    /// The endpoint could not be reached: nothing was sent.
    NotConnected(Denial),
    /// A connection that had been used before was closed under our hands, in this way.
    Stale(ResponseFault),
    /// The endpoint did not look at it, and said so: it may be sent again, whatever it is.
    Unseen,
    /// The request must be refused.
    Denied(Denial),
}

/// How often a request is sent again on another connection.
const AGAIN: usize = 2;
/// How often one that an endpoint did not look at is sent again: many connections may end at once, and it
/// does no harm.
const UNSEEN_AGAIN: usize = 8;
/// How many interim responses an endpoint may send before the one.
const INTERIM_LIMIT: usize = 16;

/// Sends the request to an endpoint of `target` and the response back. An endpoint that cannot be
/// reached is followed by another; a request that may have been seen is not sent twice unless that
/// is harmless.
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
    let (mut tried, mut last) = (Vec::new(), Denial::NoEndpoint);
    let (mut again, mut unseen, mut fresh) = (0, 0, false);
    loop {
        let pinned = PinnedConnection::take(call.pin, target).filter(|_| alpn != Alpn::Http2);
        let held = pinned.as_ref().and_then(|pinned| target.balancer.at(pinned.address));
        let pinned = pinned.filter(|_| held.is_some());
        let Some(chosen) = held.or_else(|| target.balancer.choose(&tried)) else {
            return Err(last);
        };
        *endpoint = Some(chosen.address);
        if let Some(changes) = call.changes {
            changes.note_endpoint(chosen.address);
        }
        let result = match alpn {
            _ if call.ends_tunnel => {
                Box::pin(connect::end_tunnel(call, target, chosen.address, worker)).await
            }
            Alpn::Http2 => over_http2(call, target, chosen.address, worker).await,
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
            Err(ExchangeFailure::NotConnected(denial)) if again < AGAIN => {
                tried.push(chosen.address);
                last = denial;
            }
            // Others that wait may be as stale; over a new one it cannot happen again.
            Err(ExchangeFailure::Stale(_)) if again < AGAIN && call.may_be_repeated() => {
                fresh = true
            }
            Err(ExchangeFailure::Unseen) if unseen < UNSEEN_AGAIN && call.rewind() => {
                unseen += 1;
                worker.metrics.upstream_retries.increment();
                continue;
            }
            Err(ExchangeFailure::NotConnected(denial)) => return Err(denial),
            Err(ExchangeFailure::Stale(fault)) => return Err(Denial::UpstreamBroken(fault)),
            Err(ExchangeFailure::Unseen) => {
                let refused = ResponseFault::Http2Reset(h2::Reason::REFUSED_STREAM);
                return Err(Denial::UpstreamBroken(refused));
            }
        }
        again += 1;
        worker.metrics.upstream_retries.increment();
    }
}

impl<'s, 'r, 'w> Call<'s, 'r, 'w> {
    /// A request that was decided upon.
    pub(crate) fn new(
        head: &'r RequestHead,
        source: BodySource<'s>,
        reply: &'r mut Responder<'w>,
        progress: &'r RequestProgress,
    ) -> Self {
        let (header_filter, taken) = (HeaderFilter::default(), RefCell::default());
        let stall = HttpTimeouts::default().stall_limit();
        let (ends_tunnel, changes, pin) = (false, None, None);
        Self {
            head,
            header_filter,
            source,
            reply,
            progress,
            taken,
            ends_tunnel,
            changes,
            stall,
            pin,
        }
    }

    /// The version to speak to the endpoint.
    fn protocol(&self, target: &PlannedCluster) -> Result<Alpn, Denial> {
        use weft_model::UpstreamProtocol;
        let http2 = match target.cluster.protocol {
            UpstreamProtocol::Http1 => false,
            UpstreamProtocol::Http2 => true,
            UpstreamProtocol::AsDownstream => self.head.version == HttpVersion::Http2,
        };
        if !http2 && self.head.is_grpc() && self.head.version == HttpVersion::Http2 {
            return Err(Denial::ProtocolMismatch("gRPC needs a service that speaks HTTP/2"));
        }
        Ok(if http2 { Alpn::Http2 } else { Alpn::Http1 })
    }

    /// Whether sending the request once more does no harm (RFC 9110, section 9.2.2) and is possible.
    fn may_be_repeated(&self) -> bool {
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

    /// Goes back to the beginning of the body; whether that is possible.
    fn rewind(&mut self) -> bool {
        let source = std::mem::replace(&mut self.source, BodySource::Empty);
        let rewound = source.rewound(self.taken.take());
        let possible = rewound.is_ok();
        self.source = rewound.unwrap_or_else(|rest| rest);
        possible
    }

    fn framing(&self) -> BodyFraming {
        match (self.source.is_empty(), self.head.content_length) {
            _ if self.head.upgrade.is_some() => BodyFraming::None,
            // HTTP/1.1 has trailers behind chunks only.
            (false, Some(_)) if self.head.headers.has("trailer") => BodyFraming::Chunked,
            (_, Some(length)) => BodyFraming::Length(length),
            // These give a body a meaning, so its absence is told (RFC 9110, section 8.6).
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
    let mut connection = connection.map_err(|error| unreached(address, &error))?;
    let used = connection.used;
    let limits = ResponseLimits::of(&target.cluster);
    connection.writer.stall = call.stall;
    connection.is_personal |= pinned::logs_in(call.head);
    let done = match call.head.upgrade {
        // Rare, and apart, so that no other request carries room for it.
        Some(upgrade) => {
            Box::pin(connect::over_http1(call, &mut connection, upgrade, limits)).await
        }
        None => {
            let framing = call.framing();
            write_request(call.head, framing, connection.writer.room());
            converse(call, &mut connection, framing, limits).await
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
            worker.metrics.fail_upstream_handshake(failure);
        }
        ExchangeFailure::Denied(Denial::UpstreamBroken(fault))
    })?;
    match call.pin {
        _ if !done.reusable || call.head.is_isolated => {}
        _ if !connection.is_personal => worker.pools.give_back(target, address, connection),
        Some(pin) => drop(pin.replace(Some(PinnedConnection::new(target, address, connection)))),
        None => {
            tracing::debug!(%address, "connection with a login closed, its client connection may be shared")
        }
    }
    Ok(done.outcome)
}

pub(super) struct Http1Exchange {
    pub(super) outcome: ExchangeOutcome,
    pub(super) reusable: bool,
}

/// Sends the body while the response is awaited and carried back: either may come first.
async fn converse(
    call: &mut Call<'_, '_, '_>,
    connection: &mut Http1Connection,
    framing: BodyFraming,
    limits: ResponseLimits,
) -> Result<Http1Exchange, HeadError> {
    let Http1Connection { reader, writer, kept_for, is_personal, .. } = connection;
    let Call { head, header_filter, source, reply, progress, changes, .. } = call;
    let mut outcome = ExchangeOutcome::default();
    let coding = BodyCoding::of(framing);
    let mut sink = BodySink::Http1(BodyWriter { writer: &mut *writer, coding });
    let carrying =
        pin!(forward_body(source, &mut sink, header_filter, BodyProgress::of_request(progress)));
    let mut upload = Upload::new(carrying, progress);
    let mut interim = 0;
    let response = loop {
        let response = pin!(read_response(reader, &head.method, limits));
        let response = upload.until_answered(response, reply).await;
        let response = response.map_err(HeadError::Refused)??;
        if !response.is_interim() {
            break response;
        }
        interim += 1;
        let forwarding = Box::pin(forward_interim(response.head, interim, reply));
        forwarding.await.map_err(HeadError::Refused)?;
    };
    if response.head.status == 101 {
        // Nobody asked for it.
        return Err(HeadError::Refused(Denial::UpstreamBroken(ResponseFault::BadUpgrade)));
    }
    outcome.status = response.head.status;
    let keep_alive = response.keep_alive;
    *is_personal |= pinned::asks_for_login(&response.head);
    *kept_for = response.kept_for.or(*kept_for);
    let mut body = BodySource::Http1(BodyReader::new(reader, response.framing));
    if !upload.is_whole() {
        reply.comes_early();
    }
    let (header_filter, mut down) = reply.start(response.head, &body, head, *changes);
    {
        let carrying = pin!(forward_body(
            &mut body,
            &mut down,
            &header_filter,
            BodyProgress::of_response(progress)
        ));
        outcome.downloaded(upload.until_carried(carrying).await, progress);
    }
    outcome.bytes_sent = upload.bytes();
    let whole = outcome.broken.is_none();
    if !whole {
        down.break_off().await;
    }
    // An answer may come before the whole request was read. What is left of it must never be taken
    // for the next request, so neither connection is used again.
    reply.finished(whole && upload.is_whole());
    let reusable = whole && upload.is_whole() && keep_alive;
    Ok(Http1Exchange { outcome, reusable })
}

/// Carries back an answer that is one like any other, to a request for an upgrade.
pub(super) async fn decline(
    call: &mut Call<'_, '_, '_>,
    connection: &mut Http1Connection,
    response: ReadResponse,
) -> Http1Exchange {
    let mut outcome =
        ExchangeOutcome { status: response.head.status, ..ExchangeOutcome::default() };
    connection.is_personal |= pinned::asks_for_login(&response.head);
    let mut body = BodySource::Http1(BodyReader::new(&mut connection.reader, response.framing));
    let (header_filter, mut down) = call.reply.start(response.head, &body, call.head, call.changes);
    outcome.downloaded(
        forward_body(
            &mut body,
            &mut down,
            &header_filter,
            BodyProgress::of_response(call.progress),
        )
        .await,
        call.progress,
    );
    let whole = outcome.broken.is_none();
    if !whole {
        down.break_off().await;
    }
    call.reply.finished(whole);
    Http1Exchange { outcome, reusable: whole && response.keep_alive }
}

/// Passes on an interim response.
pub(super) async fn forward_interim(
    mut head: ResponseHead,
    number: usize,
    reply: &mut Responder<'_>,
) -> Result<(), Denial> {
    if number > INTERIM_LIMIT {
        return Err(Denial::UpstreamBroken(ResponseFault::TooManyInterim));
    }
    HeaderFilter::of_response(&head.headers).strip(&mut head.headers);
    reply.interim(head).await.map_err(|_| Denial::ClientGone)
}

async fn over_http2(
    call: &mut Call<'_, '_, '_>,
    target: &PlannedCluster,
    address: SocketAddr,
    worker: &SidecarWorker,
) -> Result<ExchangeOutcome, ExchangeFailure> {
    let StreamLease { sender, greeting, alert, open: _open } = worker
        .pools
        .http2(target, address, worker)
        .await
        .map_err(|error| unreached(address, &error))?;
    let scheme = if target.cluster.tls.is_some() { "https" } else { "http" };
    let result = match call.head.upgrade {
        Some(upgrade) => {
            if upgrade == Upgrade::WebSocket {
                // Only its settings say whether the endpoint takes it (RFC 8441, section 3).
                let patience = target.cluster.connect_timeout;
                drop(tokio::time::timeout(patience, greeting.heard()).await);
            }
            Box::pin(connect::over_http2(call, sender, upgrade, scheme)).await
        }
        None => match http2::to_request(call.head, scheme) {
            Ok(request) => {
                let count = target.cluster.response_field_count;
                converse_http2(call, sender, request, count).await
            }
            Err(denial) => Err(ExchangeFailure::Denied(denial)),
        },
    };
    if matches!(result, Err(ExchangeFailure::Stale(_) | ExchangeFailure::Unseen)) {
        worker.pools.forget_http2(target, address);
    }
    match (result, alert.get()) {
        (Err(ExchangeFailure::Stale(_)), Some(failure)) => {
            Err(ExchangeFailure::Stale(ResponseFault::Tls(failure)))
        }
        (result, _) => result,
    }
}

async fn converse_http2(
    call: &mut Call<'_, '_, '_>,
    mut sender: SendRequest<Bytes>,
    request: http::Request<()>,
    field_limit: usize,
) -> Result<ExchangeOutcome, ExchangeFailure> {
    let Call { head, header_filter, source, reply, progress, taken, changes, .. } = call;
    let ended = source.is_empty();
    let (mut response, stream) =
        sender.send_request(request, ended).map_err(|_| ExchangeFailure::Unseen)?;
    let mut sink = if ended { BodySink::Closed } else { BodySink::Http2(stream) };
    let mut outcome = ExchangeOutcome::default();
    let carrying = pin!(async {
        if ended {
            return Ok(0);
        }
        forward_body(source, &mut sink, header_filter, BodyProgress::of_repeatable(progress, taken))
            .await
    });
    let mut upload = Upload::new(carrying, progress);
    let mut interim = 0;
    let response = loop {
        let answer = pin!(next_response(&mut response));
        let answer = upload.until_answered(answer, reply).await;
        match answer.map_err(ExchangeFailure::Denied)?? {
            UpstreamResponse::Final(response) => break response,
            UpstreamResponse::Interim(head) => {
                interim += 1;
                let forwarding = Box::pin(forward_interim(head, interim, reply));
                forwarding.await.map_err(ExchangeFailure::Denied)?;
            }
        }
    };
    let (parts, body) = response.into_parts();
    let mut body = http2::ReceivedBody::new(body);
    if parts.headers.len() > field_limit {
        let fault = ResponseFault::TooManyHeaders;
        return Err(ExchangeFailure::Denied(Denial::UpstreamBroken(fault)));
    }
    let bodiless = head.method == Method::HEAD || parts.status == 304 || parts.status == 204;
    let response = http2::received_response(parts, bodiless);
    let response =
        response.map_err(|fault| ExchangeFailure::Denied(Denial::UpstreamBroken(fault)))?;
    outcome.status = response.status;
    let mut body = BodySource::Http2(&mut body);
    if !upload.is_whole() {
        reply.comes_early();
    }
    let (header_filter, mut down) = reply.start(response, &body, head, *changes);
    {
        let carrying = pin!(forward_body(
            &mut body,
            &mut down,
            &header_filter,
            BodyProgress::of_response(progress)
        ));
        outcome.downloaded(upload.until_carried(carrying).await, progress);
    }
    outcome.bytes_sent = upload.bytes();
    if outcome.broken.is_some() {
        down.break_off().await;
    }
    reply.finished(outcome.broken.is_none() && upload.is_whole());
    Ok(outcome)
}

pub(super) fn unreached(address: SocketAddr, error: &std::io::Error) -> ExchangeFailure {
    tracing::debug!(%address, %error, "an endpoint could not be reached");
    match Denial::unreached(error) {
        // Others have the same limit.
        Denial::Overloaded => ExchangeFailure::Denied(Denial::Overloaded),
        denial => ExchangeFailure::NotConnected(denial),
    }
}

impl Responder<'_> {
    /// Begins the response: the head goes out with the first of the body. Gives what of its trailers
    /// is not passed on, and where the body goes.
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
