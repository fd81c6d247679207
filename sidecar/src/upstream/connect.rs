//! Requests for an upgrade or a tunnel: when the endpoint agrees, bytes follow; when it does not, its
//! answer is one like any other.
//!
//! Each side may speak either version. What HTTP/1.1 asks for by `upgrade: websocket` is an extended
//! `CONNECT` in HTTP/2 (RFC 8441), and the handshake of WebSocket is completed in between.

use std::net::SocketAddr;

use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderMap, HeaderValue};

use super::answer::{Answer, http2_answer};
use super::exchange::{Call, Conversation, Failure, decline, forward_interim, unreached};
use super::outcome::Outcome;
use super::pool::Http1;
use super::tunnel::{Side, tunnel};
use super::websocket;
use crate::denial::Denial;
use crate::http::body::{Progress, Sink, Source, carry};
use crate::http::fields::Fields;
use crate::http::h1::{
    BodyReader, BodyWriter, Coding, Framing, HeadError, Reader, ResponseLimits, Writer,
    read_response, write_request,
};
use crate::http::h2 as http2;
use crate::http::head::{HttpVersion, ResponseHead, Upgrade};
use crate::http::unwanted::Unwanted;
use crate::plan::Target;
use crate::stream::Half;
use crate::tls::{Alpn, connector};
use crate::upstream_failure::ResponseFault;
use crate::worker::Worker;

const EARLY: Denial = Denial::Malformed("bytes before the upgrade was agreed to");

/// Asks an endpoint that speaks HTTP/1.1.
pub(super) async fn over_http1(
    call: &mut Call<'_, '_, '_>,
    connection: &mut Http1,
    upgrade: Upgrade,
    limits: ResponseLimits,
) -> Result<Conversation, HeadError> {
    let by_http2 = call.head.version == HttpVersion::Http2;
    let proof = if upgrade == Upgrade::WebSocket && by_http2 {
        let mut keyed = call.head.clone();
        let proof = websocket::add_key(&mut keyed.fields);
        write_request(&keyed, Framing::None, connection.writer.room());
        Some(proof)
    } else {
        write_request(call.head, Framing::None, connection.writer.room());
        None
    };
    // An endpoint that takes no more may have said why; that is read below.
    let written = connection.writer.flush().await;
    if written.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::TimedOut) {
        return Err(HeadError::Broken(None));
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
    written.map_err(|_| HeadError::Broken(None))?;
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
        && !websocket::take_proof(&mut response.head.fields, &proof)
    {
        let fault = ResponseFault::BadWebSocketAccept;
        return Err(HeadError::Refused(Denial::UpstreamBroken(fault)));
    }
    let writer = &mut connection.writer;
    let upstream = Side {
        source: Source::Http1(BodyReader::new(&mut connection.reader, Framing::UntilClose)),
        sink: Sink::Http1(BodyWriter { writer, coding: Coding::Tunnel }),
    };
    let outcome = join(call, upstream, response.head).await.map_err(HeadError::Refused)?;
    Ok(Conversation { outcome, reusable: false })
}

/// Asks an endpoint that speaks HTTP/2.
pub(super) async fn over_http2(
    call: &mut Call<'_, '_, '_>,
    mut sender: SendRequest<Bytes>,
    upgrade: Upgrade,
    scheme: &str,
) -> Result<Outcome, Failure> {
    if upgrade == Upgrade::WebSocket && !sender.is_extended_connect_protocol_enabled() {
        let why = "the service speaks HTTP/2 without WebSocket over it";
        return Err(Failure::Denied(Denial::ProtocolMismatch(why)));
    }
    let by_http2 = call.head.version == HttpVersion::Http2;
    let (proof, request) = if upgrade == Upgrade::WebSocket && !by_http2 {
        let mut bare = call.head.clone();
        let proof = take_key(&mut bare.fields)?;
        (Some(proof), http2::to_request(&bare, scheme))
    } else {
        (None, http2::to_request(call.head, scheme))
    };
    let request = request.map_err(Failure::Denied)?;
    let (mut response, stream) =
        sender.send_request(request, false).map_err(|_| Failure::Unseen)?;
    let mut interim = 0;
    let response = loop {
        let answer = tokio::select! {
            answer = http2_answer(&mut response) => answer?,
            () = call.reply.refused() => return Err(Failure::Denied(Denial::ClientGone)),
        };
        match answer {
            Answer::Final(response) => break response,
            Answer::Interim(head) => {
                interim += 1;
                forward_interim(head, interim, call.reply).await.map_err(Failure::Denied)?;
            }
        }
    };
    let (parts, body) = response.into_parts();
    let mut body = http2::ReceivedBody::new(body);
    let status = parts.status;
    let head = http2::response(parts, false);
    let mut head = head.map_err(|fault| Failure::Denied(Denial::UpstreamBroken(fault)))?;
    let mut source = Source::Http2(&mut body);
    let mut sink = Sink::Http2(stream);
    if !status.is_success() {
        let mut outcome = Outcome { status: status.as_u16(), ..Outcome::default() };
        let (unwanted, mut down) = call.reply.start(head, &source, call.head, call.changes);
        outcome.downloaded(
            carry(&mut source, &mut down, &unwanted, Progress::of_response(call.pulse)).await,
            call.pulse,
        );
        call.reply.finished(outcome.broken.is_none());
        sink.abort();
        return Ok(outcome);
    }
    head.content_length = None;
    if let Some(proof) = proof {
        websocket::add_proof(&mut head.fields, proof);
    }
    join(call, Side { source, sink }, head).await.map_err(Failure::Denied)
}

/// Ends a tunnel here: what comes through it goes to the endpoint as it is, and its answer back.
pub(super) async fn end_tunnel(
    call: &mut Call<'_, '_, '_>,
    target: &Target,
    address: SocketAddr,
    worker: &Worker,
) -> Result<Outcome, Failure> {
    let slot = worker.pools.slots.take(target, address);
    let _slot = slot.ok_or(Failure::Denied(Denial::Overloaded))?;
    let stream = connector::connect(target, address, Alpn::None, worker).await;
    let (read, write) = Half::pair(stream.map_err(|error| unreached(address, &error))?);
    worker.metrics.upstream_connections.increment();
    let (mut reader, mut writer) = (Reader::new(read), Writer::new(write, call.stall));
    let upstream = Side {
        source: Source::Http1(BodyReader::new(&mut reader, Framing::UntilClose)),
        sink: Sink::Http1(BodyWriter { writer: &mut writer, coding: Coding::Tunnel }),
    };
    let fields = Fields::from(HeaderMap::new());
    let head = ResponseHead { status: 200, fields, content_length: None };
    join(call, upstream, head).await.map_err(Failure::Denied)
}

fn take_key(fields: &mut Fields) -> Result<HeaderValue, Failure> {
    let proof = websocket::take_key(fields);
    proof.ok_or(Failure::Denied(Denial::Malformed("an upgrade to WebSocket without a key")))
}

/// Tells the client that the endpoint agreed, and joins the two.
async fn join(
    call: &mut Call<'_, '_, '_>,
    upstream: Side<'_>,
    mut head: ResponseHead,
) -> Result<Outcome, Denial> {
    let source = std::mem::replace(&mut call.source, Source::Empty);
    let source = source.upgraded().ok_or(EARLY)?;
    Unwanted::of_response(&head.fields).strip(&mut head.fields);
    if let Some(changes) = call.changes {
        changes.apply_to_response(call.head, &mut head);
    }
    let by_http2 = call.head.version == HttpVersion::Http2;
    head.status = match call.head.upgrade {
        Some(Upgrade::WebSocket) if !by_http2 => 101,
        _ => 200,
    };
    head.fields.remove(|name| name.eq_ignore_ascii_case(b"content-length"));
    let mut outcome = Outcome { status: head.status, ..Outcome::default() };
    let sink = call.reply.switch(head).ok_or(Denial::ClientGone)?;
    let client = Side { source, sink };
    (outcome.bytes_sent, outcome.bytes_received) = tunnel(client, upstream, call.pulse).await;
    Ok(outcome)
}
