//! Requests for an upgrade or a tunnel: when the endpoint agrees, bytes follow; when it does not, its
//! answer is one like any other.
//!
//! Each side may speak either version. What HTTP/1.1 asks for by `upgrade: websocket` is an extended
//! `CONNECT` in HTTP/2 (RFC 8441), and the handshake of WebSocket is completed in between.

use std::net::SocketAddr;

use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderMap, HeaderValue};

use super::exchange::{Call, ExchangeFailure, Http1Exchange, decline, forward_interim, unreached};
use super::outcome::ExchangeOutcome;
use super::pool::Http1Connection;
use super::tunnel::{TunnelSide, tunnel};
use super::upstream_response::{UpstreamResponse, next_response};
use super::websocket;
use crate::denial::Denial;
use crate::http::body::{BodyProgress, BodySink, BodySource, forward_body};
use crate::http::h1::{
    BodyCoding, BodyFraming, BodyReader, BodyWriter, HeadError, Http1Reader, Http1Writer,
    ResponseLimits, read_response, write_request,
};
use crate::http::h2 as http2;
use crate::http::head::{HttpVersion, ResponseHead, Upgrade};
use crate::http::header_filter::HeaderFilter;
use crate::http::headers::Headers;
use crate::plan::PlannedCluster;
use crate::stream::StreamHalf;
use crate::tls::{Alpn, connector};
use crate::upstream_failure::ResponseFault;
use crate::worker::SidecarWorker;

const EARLY: Denial = Denial::Malformed("bytes before the upgrade was agreed to");

/// Asks an endpoint that speaks HTTP/1.1.
pub(super) async fn over_http1(
    call: &mut Call<'_, '_, '_>,
    connection: &mut Http1Connection,
    upgrade: Upgrade,
    limits: ResponseLimits,
) -> Result<Http1Exchange, HeadError> {
    let by_http2 = call.head.version == HttpVersion::Http2;
    let proof = if upgrade == Upgrade::WebSocket && by_http2 {
        let mut keyed = call.head.clone();
        let proof = websocket::add_key(&mut keyed.headers);
        write_request(&keyed, BodyFraming::None, connection.writer.room());
        Some(proof)
    } else {
        write_request(call.head, BodyFraming::None, connection.writer.room());
        None
    };
    // An endpoint that takes no more may have said why; that is read below.
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
            () = call.reply.refused() => return Err(HeadError::Refused(Denial::ClientGone)),
        };
        if !response.is_interim() {
            break response;
        }
        interim += 1;
        forward_interim(response.head, interim, call.reply).await.map_err(HeadError::Refused)?;
    };
    written.map_err(|_| HeadError::ConnectionLost(None))?;
    let status = response.head.status;
    let agreed = match upgrade {
        Upgrade::WebSocket => status == 101,
        Upgrade::Tunnel => (200..300).contains(&status),
    };
    // A client of HTTP/2 would take any success for the service's agreement.
    let misleads = status == 101 || (by_http2 && (200..300).contains(&status));
    if !agreed && misleads {
        return Err(HeadError::Refused(Denial::UpstreamBroken(ResponseFault::BadUpgrade)));
    }
    if !agreed {
        return Ok(decline(call, connection, response).await);
    }
    if let Some(proof) = proof
        && !websocket::take_proof(&mut response.head.headers, &proof)
    {
        let fault = ResponseFault::BadWebSocketAccept;
        return Err(HeadError::Refused(Denial::UpstreamBroken(fault)));
    }
    let writer = &mut connection.writer;
    let upstream = TunnelSide {
        source: BodySource::Http1(BodyReader::new(&mut connection.reader, BodyFraming::UntilClose)),
        sink: BodySink::Http1(BodyWriter { writer, coding: BodyCoding::Tunnel }),
    };
    let outcome = join(call, upstream, response.head).await.map_err(HeadError::Refused)?;
    Ok(Http1Exchange { outcome, reusable: false })
}

/// Asks an endpoint that speaks HTTP/2.
pub(super) async fn over_http2(
    call: &mut Call<'_, '_, '_>,
    mut sender: SendRequest<Bytes>,
    upgrade: Upgrade,
    scheme: &str,
) -> Result<ExchangeOutcome, ExchangeFailure> {
    if upgrade == Upgrade::WebSocket && !sender.is_extended_connect_protocol_enabled() {
        let why = "the service speaks HTTP/2 without WebSocket over it";
        return Err(ExchangeFailure::Denied(Denial::ProtocolMismatch(why)));
    }
    let by_http2 = call.head.version == HttpVersion::Http2;
    let (proof, request) = if upgrade == Upgrade::WebSocket && !by_http2 {
        let mut bare = call.head.clone();
        let proof = take_key(&mut bare.headers)?;
        (Some(proof), http2::to_request(&bare, scheme))
    } else {
        (None, http2::to_request(call.head, scheme))
    };
    let request = request.map_err(ExchangeFailure::Denied)?;
    let (mut response, stream) =
        sender.send_request(request, false).map_err(|_| ExchangeFailure::Unseen)?;
    let mut interim = 0;
    let response = loop {
        let answer = tokio::select! {
            answer = next_response(&mut response) => answer?,
            () = call.reply.refused() => return Err(ExchangeFailure::Denied(Denial::ClientGone)),
        };
        match answer {
            UpstreamResponse::Final(response) => break response,
            UpstreamResponse::Interim(head) => {
                interim += 1;
                forward_interim(head, interim, call.reply)
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
        let (header_filter, mut down) = call.reply.start(head, &source, call.head, call.changes);
        outcome.downloaded(
            forward_body(
                &mut source,
                &mut down,
                &header_filter,
                BodyProgress::of_response(call.progress),
            )
            .await,
            call.progress,
        );
        call.reply.finished(outcome.broken.is_none());
        sink.abort();
        return Ok(outcome);
    }
    head.content_length = None;
    if let Some(proof) = proof {
        websocket::add_proof(&mut head.headers, proof);
    }
    join(call, TunnelSide { source, sink }, head).await.map_err(ExchangeFailure::Denied)
}

/// Ends a tunnel here: what comes through it goes to the endpoint as it is, and its answer back.
pub(super) async fn end_tunnel(
    call: &mut Call<'_, '_, '_>,
    target: &PlannedCluster,
    address: SocketAddr,
    worker: &SidecarWorker,
) -> Result<ExchangeOutcome, ExchangeFailure> {
    let slot = worker.pools.slots.take(target, address);
    let _slot = slot.ok_or(ExchangeFailure::Denied(Denial::Overloaded))?;
    let stream = connector::connect(target, address, Alpn::None, worker).await;
    let (read, write) = StreamHalf::pair(stream.map_err(|error| unreached(address, &error))?);
    worker.metrics.upstream_connections.increment();
    let (mut reader, mut writer) = (Http1Reader::new(read), Http1Writer::new(write, call.stall));
    let upstream = TunnelSide {
        source: BodySource::Http1(BodyReader::new(&mut reader, BodyFraming::UntilClose)),
        sink: BodySink::Http1(BodyWriter { writer: &mut writer, coding: BodyCoding::Tunnel }),
    };
    let headers = Headers::from(HeaderMap::new());
    let head = ResponseHead { status: 200, headers, content_length: None };
    join(call, upstream, head).await.map_err(ExchangeFailure::Denied)
}

fn take_key(headers: &mut Headers) -> Result<HeaderValue, ExchangeFailure> {
    let proof = websocket::take_key(headers);
    proof.ok_or(ExchangeFailure::Denied(Denial::Malformed("an upgrade to WebSocket without a key")))
}

/// Tells the client that the endpoint agreed, and joins the two.
async fn join(
    call: &mut Call<'_, '_, '_>,
    upstream: TunnelSide<'_>,
    mut head: ResponseHead,
) -> Result<ExchangeOutcome, Denial> {
    let source = std::mem::replace(&mut call.source, BodySource::Empty);
    let source = source.upgraded().ok_or(EARLY)?;
    HeaderFilter::of_response(&head.headers).strip(&mut head.headers);
    if let Some(changes) = call.changes {
        changes.apply_to_response(call.head, &mut head);
    }
    let by_http2 = call.head.version == HttpVersion::Http2;
    head.status = match call.head.upgrade {
        Some(Upgrade::WebSocket) if !by_http2 => 101,
        _ => 200,
    };
    head.headers.remove(|name| name.eq_ignore_ascii_case(b"content-length"));
    let mut outcome = ExchangeOutcome { status: head.status, ..ExchangeOutcome::default() };
    let sink = call.reply.switch(head).ok_or(Denial::ClientGone)?;
    let client = TunnelSide { source, sink };
    (outcome.bytes_sent, outcome.bytes_received) = tunnel(client, upstream, call.progress).await;
    Ok(outcome)
}
