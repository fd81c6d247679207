//! Sends one request to an endpoint and forwards the response, with retries on other endpoints and connections.

use std::net::SocketAddr;
use std::pin::pin;

use super::call::Call;
use super::failure::{ExchangeFailure, connect_failure};
use super::http2_exchange;
use super::interim::forward_interim;
use super::outcome::{ExchangeOutcome, Http1Exchange};
use super::pinned::{self, PinnedConnection};
use super::pool::Http1Connection;
use super::upgrade;
use super::upload::Upload;
use crate::denial::Denial;
use crate::http::body::{BodyProgress, BodySink, BodySource};
use crate::http::forward_body::forward_body;
use crate::http::h1::{
    BodyCoding, BodyFraming, BodyReader, BodyWriter, HeadError, ResponseLimits, read_response,
    write_request,
};
use crate::plan::PlannedCluster;
use crate::tls::Alpn;
use crate::upstream_failure::ResponseFault;
use crate::worker::SidecarWorker;

/// How many times a request is retried on another endpoint or connection.
const MAX_RETRIES: usize = 2;
/// How many times a request is retried that an endpoint did not process: many connections may be closed at the same
/// time, and these retries are safe.
const MAX_UNPROCESSED_RETRIES: usize = 8;

/// Sends the request to an endpoint of `cluster` and forwards the response. Sets `endpoint` to the chosen endpoint.
///
/// When an endpoint cannot be reached, another is tried. A request that an endpoint may have processed is retried only
/// when it is idempotent and has no body.
///
/// # Errors
/// The denial to respond with, when no endpoint gave a valid response or a limit was reached.
pub(crate) async fn exchange(
    call: &mut Call<'_, '_, '_>,
    cluster: &PlannedCluster,
    worker: &SidecarWorker,
    endpoint: &mut Option<SocketAddr>,
) -> Result<ExchangeOutcome, Denial> {
    if cluster.balancer.open() >= cluster.settings.request_limit {
        return Err(Denial::Overloaded);
    }
    let alpn = call.protocol(cluster)?;
    let mut tried = Vec::new();
    let mut last = Denial::NoEndpoint;
    let mut retries = 0;
    let mut unprocessed = 0;
    let mut fresh = false;
    loop {
        let pinned = PinnedConnection::take(call.pin, cluster).filter(|_| alpn != Alpn::Http2);
        let pinned_endpoint =
            pinned.as_ref().and_then(|pinned| cluster.balancer.at(pinned.address));
        let pinned = pinned.filter(|_| pinned_endpoint.is_some());
        let Some(chosen) = pinned_endpoint.or_else(|| cluster.balancer.choose(&tried)) else {
            return Err(last);
        };
        *endpoint = Some(chosen.address);
        if retries + unprocessed > 0 {
            worker.metrics.upstream_retries.increment();
        }
        if let Some(changes) = call.changes() {
            changes.note_endpoint(chosen.address);
        }
        let result = match alpn {
            _ if call.request.ends_tunnel => {
                Box::pin(upgrade::terminate_tunnel(call, cluster, chosen.address, worker)).await
            }
            Alpn::Http2 => http2_exchange::over_http2(call, cluster, chosen.address, worker).await,
            Alpn::Http1 | Alpn::None => {
                let connection = match pinned {
                    Some(pinned) => Ok(pinned.connection),
                    None => worker.pools.http1(cluster, chosen.address, fresh).await,
                };
                over_http1(call, cluster, chosen.address, connection, worker).await
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
    }
}

async fn over_http1(
    call: &mut Call<'_, '_, '_>,
    cluster: &PlannedCluster,
    address: SocketAddr,
    connection: std::io::Result<Http1Connection>,
    worker: &SidecarWorker,
) -> Result<ExchangeOutcome, ExchangeFailure> {
    let mut connection = connection.map_err(|error| connect_failure(address, &error))?;
    let used = connection.used;
    let limits = ResponseLimits::of(&cluster.settings);
    connection.writer.stall = call.request.timeouts.stall;
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
        _ if !connection.is_personal => worker.pools.return_idle(cluster, address, connection),
        Some(pin) => drop(pin.replace(Some(PinnedConnection::new(cluster, address, connection)))),
        None => {
            tracing::debug!(%address, "closed upstream connection with NTLM login: its client connection is shared")
        }
    }
    Ok(done.outcome)
}

/// Sends the request's body and forwards the response over HTTP/1.1 at the same time: either may end first.
async fn exchange_http1(
    call: &mut Call<'_, '_, '_>,
    connection: &mut Http1Connection,
    framing: BodyFraming,
    limits: ResponseLimits,
) -> Result<Http1Exchange, HeadError> {
    let Http1Connection { reader, writer, keep_alive_timeout, is_personal, .. } = connection;
    let changes = call.changes();
    let Call { head, request, source, responder, progress, .. } = call;
    let mut outcome = ExchangeOutcome::default();
    let coding = BodyCoding::of(framing);
    let mut sink = BodySink::Http1(BodyWriter { writer: &mut *writer, coding });
    let forwarding_body = pin!(forward_body(
        source,
        &mut sink,
        &request.header_filter,
        BodyProgress::of_request(progress)
    ));
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
    let (header_filter, mut downstream) = responder.start(response.head, &body, head, changes);
    {
        let forwarding_body = pin!(forward_body(
            &mut body,
            &mut downstream,
            &header_filter,
            BodyProgress::of_response(progress)
        ));
        outcome.record_download(upload.until_downloaded(forwarding_body).await, progress);
    }
    outcome.bytes_to_endpoint = upload.bytes();
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
