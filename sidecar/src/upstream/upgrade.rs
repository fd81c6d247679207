//! Forwards requests for a WebSocket upgrade or a CONNECT tunnel. When the endpoint accepts, bytes are forwarded in
//! both directions; otherwise its response is forwarded like any other.
//!
//! Client and endpoint may speak different HTTP versions. `upgrade: websocket` of HTTP/1.1 is an extended `CONNECT` in
//! HTTP/2 (RFC 8441); the WebSocket handshake is completed in between.

use std::net::SocketAddr;

use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderMap, HeaderValue};

use super::call::Call;
use super::failure::{ExchangeFailure, connect_failure};
use super::interim::forward_interim;
use super::outcome::{ExchangeOutcome, Http1Exchange};
use super::pinned;
use super::pool::Http1Connection;
use super::tunnel::{TunnelSide, tunnel};
use super::upstream_response::{UpstreamResponse, next_response};
use super::websocket;
use crate::denial::Denial;
use crate::http::body::{BodyProgress, BodySink, BodySource};
use crate::http::forward_body::forward_body;
use crate::http::h1::{
    BodyCoding, BodyFraming, BodyReader, BodyWriter, HeadError, Http1Reader, Http1Writer,
    ReadResponse, ResponseLimits, read_response, write_request,
};
use crate::http::h2 as http2;
use crate::http::head::{HttpVersion, ResponseHead, Upgrade};
use crate::http::header_filter::HeaderFilter;
use crate::http::headers::Headers;
use crate::plan::PlannedCluster;
use crate::stream::StreamHalf;
use crate::tls::Alpn;
use crate::upstream_failure::ResponseFault;
use crate::worker::SidecarWorker;

const EARLY_BYTES: Denial = Denial::Malformed("bytes received before the upgrade was accepted");

/// Sends the request to an endpoint that speaks HTTP/1.1.
///
/// # Errors
/// When no valid response arrives, or the client is gone.
pub(super) async fn over_http1(
    call: &mut Call<'_, '_, '_>,
    connection: &mut Http1Connection,
    upgrade: Upgrade,
    limits: ResponseLimits,
) -> Result<Http1Exchange, HeadError> {
    let by_http2 = call.head.version == HttpVersion::Http2;
    let accept = if upgrade == Upgrade::WebSocket && by_http2 {
        let mut with_key = call.head.clone();
        let accept = websocket::add_key(&mut with_key.headers);
        write_request(&with_key, BodyFraming::None, connection.writer.output());
        Some(accept)
    } else {
        write_request(call.head, BodyFraming::None, connection.writer.output());
        None
    };
    // An endpoint that stopped reading may have sent a response, which is read below.
    let written = connection.writer.flush().await;
    if written.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::TimedOut) {
        return Err(HeadError::ConnectionLost(None));
    }
    let mut interim = 0;
    let mut response = loop {
        let response = tokio::select! {
            response = read_response(&mut connection.reader, &call.head.method, limits) => {
                response?
            }
            () = call.responder.cancelled() => return Err(HeadError::Refused(Denial::ClientGone)),
        };
        if !response.is_interim() {
            break response;
        }
        interim += 1;
        forward_interim(response.head, interim, call.responder)
            .await
            .map_err(HeadError::Refused)?;
    };
    written.map_err(|_| HeadError::ConnectionLost(None))?;
    let status = response.head.status;
    let is_accepted = match upgrade {
        Upgrade::WebSocket => status == 101,
        Upgrade::Tunnel => (200..300).contains(&status),
    };
    // An HTTP/2 client would interpret any success status as an accepted upgrade.
    let is_misleading = status == 101 || (by_http2 && (200..300).contains(&status));
    if !is_accepted && is_misleading {
        return Err(HeadError::Refused(Denial::UpstreamBroken(ResponseFault::BadUpgrade)));
    }
    if !is_accepted {
        return Ok(forward_declined_upgrade(call, connection, response).await);
    }
    if let Some(accept) = accept
        && !websocket::take_accept(&mut response.head.headers, &accept)
    {
        let fault = ResponseFault::BadWebSocketAccept;
        return Err(HeadError::Refused(Denial::UpstreamBroken(fault)));
    }
    let writer = &mut connection.writer;
    let upstream = TunnelSide {
        source: BodySource::Http1(BodyReader::new(&mut connection.reader, BodyFraming::UntilClose)),
        sink: BodySink::Http1(BodyWriter { writer, coding: BodyCoding::Tunnel }),
    };
    let outcome = join_tunnel(call, upstream, response.head).await.map_err(HeadError::Refused)?;
    Ok(Http1Exchange { outcome, is_reusable: false })
}

/// Forwards the response of an endpoint that did not accept an upgrade.
async fn forward_declined_upgrade(
    call: &mut Call<'_, '_, '_>,
    connection: &mut Http1Connection,
    response: ReadResponse,
) -> Http1Exchange {
    let mut outcome =
        ExchangeOutcome { status: response.head.status, ..ExchangeOutcome::default() };
    connection.is_personal |= pinned::requests_connection_login(&response.head);
    let mut body = BodySource::Http1(BodyReader::new(&mut connection.reader, response.framing));
    let (header_filter, mut downstream) =
        call.responder.start(response.head, &body, call.head, call.changes());
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

/// Sends the request to an endpoint that speaks HTTP/2.
///
/// # Errors
/// When no valid response arrives, the endpoint does not support the upgrade, or the client is gone.
pub(super) async fn over_http2(
    call: &mut Call<'_, '_, '_>,
    mut sender: SendRequest<Bytes>,
    upgrade: Upgrade,
    scheme: &str,
) -> Result<ExchangeOutcome, ExchangeFailure> {
    if upgrade == Upgrade::WebSocket && !sender.is_extended_connect_protocol_enabled() {
        let reason = "the service does not support WebSocket over HTTP/2 (RFC 8441)";
        return Err(ExchangeFailure::Denied(Denial::ProtocolMismatch(reason)));
    }
    let by_http2 = call.head.version == HttpVersion::Http2;
    let (accept, request) = if upgrade == Upgrade::WebSocket && !by_http2 {
        let mut without_key = call.head.clone();
        let accept = take_key(&mut without_key.headers)?;
        (Some(accept), http2::to_request(&without_key, scheme))
    } else {
        (None, http2::to_request(call.head, scheme))
    };
    let request = request.map_err(ExchangeFailure::Denied)?;
    let (mut response, stream) =
        sender.send_request(request, false).map_err(|_| ExchangeFailure::NotProcessed)?;
    let mut interim = 0;
    let response = loop {
        let answer = tokio::select! {
            answer = next_response(&mut response) => answer?,
            () = call.responder.cancelled() => return Err(ExchangeFailure::Denied(Denial::ClientGone)),
        };
        match answer {
            UpstreamResponse::Final(response) => break response,
            UpstreamResponse::Interim(head) => {
                interim += 1;
                forward_interim(head, interim, call.responder)
                    .await
                    .map_err(ExchangeFailure::Denied)?;
            }
        }
    };
    let (parts, body) = response.into_parts();
    let mut body = http2::ReceivedBody::new(body);
    let status = parts.status;
    let head = http2::received_response(parts, false);
    let mut head = head.map_err(|fault| ExchangeFailure::Denied(Denial::UpstreamBroken(fault)))?;
    let mut source = BodySource::Http2(&mut body);
    let mut sink = BodySink::Http2(stream);
    if !status.is_success() {
        let mut outcome = ExchangeOutcome { status: status.as_u16(), ..ExchangeOutcome::default() };
        let (header_filter, mut downstream) =
            call.responder.start(head, &source, call.head, call.changes());
        outcome.record_download(
            forward_body(
                &mut source,
                &mut downstream,
                &header_filter,
                BodyProgress::of_response(call.progress),
            )
            .await,
            call.progress,
        );
        call.responder.record_end(outcome.aborted.is_none());
        sink.abort();
        return Ok(outcome);
    }
    head.content_length = None;
    if let Some(accept) = accept {
        websocket::add_accept(&mut head.headers, accept);
    }
    join_tunnel(call, TunnelSide { source, sink }, head).await.map_err(ExchangeFailure::Denied)
}

/// Terminates a CONNECT tunnel: connects to the endpoint and forwards the bytes of the tunnel in both directions.
///
/// # Errors
/// When the endpoint cannot be reached, or the connection limit is reached.
pub(super) async fn terminate_tunnel(
    call: &mut Call<'_, '_, '_>,
    cluster: &PlannedCluster,
    address: SocketAddr,
    worker: &SidecarWorker,
) -> Result<ExchangeOutcome, ExchangeFailure> {
    let slot = worker.pools.slots.take(cluster, address);
    let _slot = slot.ok_or(ExchangeFailure::Denied(Denial::Overloaded))?;
    let stream = worker.connector.connect(cluster, address, Alpn::None).await;
    let (read, write) = StreamHalf::pair(stream.map_err(|error| connect_failure(address, &error))?);
    worker.metrics.upstream_connections.increment();
    let mut reader = Http1Reader::new(read);
    let mut writer = Http1Writer::new(write, call.request.timeouts.stall);
    let upstream = TunnelSide {
        source: BodySource::Http1(BodyReader::new(&mut reader, BodyFraming::UntilClose)),
        sink: BodySink::Http1(BodyWriter { writer: &mut writer, coding: BodyCoding::Tunnel }),
    };
    let headers = Headers::from(HeaderMap::new());
    let head = ResponseHead { status: 200, headers, content_length: None };
    join_tunnel(call, upstream, head).await.map_err(ExchangeFailure::Denied)
}

fn take_key(headers: &mut Headers) -> Result<HeaderValue, ExchangeFailure> {
    let accept = websocket::take_key(headers);
    accept.ok_or(ExchangeFailure::Denied(Denial::Malformed(
        "WebSocket upgrade without sec-websocket-key",
    )))
}

/// Accepts the client's upgrade and forwards bytes until both sides have closed.
async fn join_tunnel(
    call: &mut Call<'_, '_, '_>,
    upstream: TunnelSide<'_>,
    mut head: ResponseHead,
) -> Result<ExchangeOutcome, Denial> {
    let source = std::mem::replace(&mut call.source, BodySource::Empty);
    let source = source.upgraded().ok_or(EARLY_BYTES)?;
    HeaderFilter::of_response(&head.headers).strip(&mut head.headers);
    if let Some(changes) = call.changes() {
        changes.apply_to_response(call.head, &mut head);
    }
    let by_http2 = call.head.version == HttpVersion::Http2;
    head.status = match call.head.upgrade {
        Some(Upgrade::WebSocket) if !by_http2 => 101,
        _ => 200,
    };
    head.headers.remove(|name| name.eq_ignore_ascii_case(b"content-length"));
    let mut outcome = ExchangeOutcome { status: head.status, ..ExchangeOutcome::default() };
    let sink = call.responder.switch(head).ok_or(Denial::ClientGone)?;
    let client = TunnelSide { source, sink };
    let (to_endpoint, to_client) = tunnel(client, upstream, call.progress).await;
    outcome.bytes_to_endpoint = to_endpoint;
    outcome.bytes_to_client = to_client;
    Ok(outcome)
}
