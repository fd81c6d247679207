//! One request and its response, over one connection to one endpoint.

use std::net::SocketAddr;
use std::pin::pin;

use h2::client::SendRequest;
use http::Method;

use super::pool::Http1;
use super::tunnel::{Side, tunnel};
use crate::denial::Denial;
use crate::http::body::{Broken, Sink, Source, carry};
use crate::http::h1::{
    BodyReader, BodyWriter, Framing, HeadError, Writer, read_response, write_request,
};
use crate::http::h2 as http2;
use crate::http::head::{RequestHead, ResponseHead, strip_hop_by_hop};
use crate::pipeline::Reply;
use crate::plan::Target;
use crate::tls::Alpn;
use crate::worker::Worker;

/// A request on its way, with where its response goes.
pub(crate) struct Call<'s, 'r, 'w> {
    pub(crate) head: RequestHead,
    pub(crate) source: Source<'s>,
    pub(crate) reply: &'r mut Reply<'w>,
}

/// How an exchange ended that began.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Outcome {
    pub(crate) status: u16,
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_received: u64,
    /// Which side broke it off, if one did.
    pub(crate) broken: Option<&'static str>,
}

/// Why an exchange did not begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    /// The endpoint could not be reached: nothing was sent.
    NotConnected,
    /// A connection that had been used before was closed under our hands.
    Stale,
    /// The request must be refused.
    Denied(Denial),
}

/// How often a request is sent again on another connection.
const AGAIN: usize = 2;

/// Sends the request to an endpoint of `target` and the response back. An endpoint that cannot be
/// reached is followed by another; a request that may have been seen is not sent twice unless that
/// is harmless.
pub(crate) async fn exchange(
    mut call: Call<'_, '_, '_>,
    target: &Target,
    worker: &Worker,
    endpoint: &mut Option<SocketAddr>,
) -> Result<Outcome, Denial> {
    if target.balancer.open() >= target.cluster.request_limit {
        return Err(Denial::Overloaded);
    }
    let alpn = call.protocol(target);
    let mut tried = Vec::new();
    let mut again = 0;
    loop {
        let Some(chosen) = target.balancer.choose(worker.turn_of(target.id), &tried) else {
            return Err(if tried.is_empty() { Denial::NoEndpoint } else { Denial::Unreachable });
        };
        *endpoint = Some(chosen.address);
        let result = match alpn {
            Alpn::Http2 => over_http2(&mut call, target, chosen.address, worker).await,
            Alpn::Http1 | Alpn::None => over_http1(&mut call, target, chosen.address, worker).await,
        };
        match result {
            Ok(outcome) => return Ok(outcome),
            Err(Failure::Denied(denial)) => return Err(denial),
            Err(Failure::NotConnected) if again < AGAIN => tried.push(chosen.address),
            Err(Failure::Stale) if again < AGAIN && call.may_be_repeated() => {}
            Err(Failure::NotConnected) => return Err(Denial::Unreachable),
            Err(Failure::Stale) => return Err(Denial::UpstreamBroken),
        }
        again += 1;
        worker.metrics.upstream_retries.increment();
    }
}

impl Call<'_, '_, '_> {
    fn protocol(&self, target: &Target) -> Alpn {
        use crate::http::head::HttpVersion;
        use weft_model::UpstreamProtocol;
        let http2 = match target.cluster.protocol {
            UpstreamProtocol::Http1 => false,
            UpstreamProtocol::Http2 => true,
            UpstreamProtocol::AsDownstream => self.head.version == HttpVersion::Http2,
        };
        // An upgrade changes the connection, which an HTTP/2 stream is not.
        if http2 && self.head.upgrade.is_none() { Alpn::Http2 } else { Alpn::Http1 }
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
        matches!(self.source, Source::Empty) && idempotent.contains(&self.head.method)
    }

    fn framing(&self) -> Framing {
        match (self.source.is_empty(), self.head.content_length) {
            (_, Some(length)) => Framing::Length(length),
            (true, None) if self.head.method == Method::POST || self.head.method == Method::PUT => {
                Framing::Length(0)
            }
            (true, None) => Framing::None,
            (false, None) => Framing::Chunked,
        }
    }
}

async fn over_http1(
    call: &mut Call<'_, '_, '_>,
    target: &Target,
    address: SocketAddr,
    worker: &Worker,
) -> Result<Outcome, Failure> {
    let mut connection = worker
        .pools
        .http1(target, address, worker)
        .await
        .map_err(|error| unreached(address, &error))?;
    let framing = call.framing();
    write_request(&call.head, framing, &mut connection.writer.out);
    let used = connection.used;
    let done = match call.head.upgrade {
        Some(_) => converse_upgrade(call, &mut connection).await,
        None => converse(call, &mut connection, framing).await,
    };
    let done = done.map_err(|error| match error {
        HeadError::Closed | HeadError::Broken if used => Failure::Stale,
        HeadError::Closed | HeadError::Broken => Failure::Denied(Denial::UpstreamBroken),
        HeadError::Refused(denial) => Failure::Denied(denial),
    })?;
    if done.reusable {
        worker.pools.give_back(target, address, connection);
    }
    Ok(done.outcome)
}

struct Conversation {
    outcome: Outcome,
    reusable: bool,
}

/// Sends the body while the response is awaited and carried back: either may come first.
async fn converse(
    call: &mut Call<'_, '_, '_>,
    connection: &mut Http1,
    framing: Framing,
) -> Result<Conversation, HeadError> {
    let Http1 { reader, writer, .. } = connection;
    let Call { head, source, reply } = call;
    let mut outcome = Outcome::default();
    let mut sink =
        Sink::Http1(BodyWriter { writer: &mut *writer, chunked: framing == Framing::Chunked });
    let carrying = pin!(carry(source, &mut sink));
    let mut upload = Upload::new(carrying);
    let response = upload.until_answered(read_response(reader, &head.method), reply).await;
    let response = response.map_err(HeadError::Refused)??;
    if response.head.status == 101 {
        // Nobody asked for it.
        return Err(HeadError::Refused(Denial::UpstreamBroken));
    }
    outcome.status = response.head.status;
    let mut body = Source::Http1(BodyReader::new(reader, response.framing));
    let mut down = reply.start(response.head, &body, head);
    outcome.downloaded(upload.until_carried(carry(&mut body, &mut down)).await);
    outcome.bytes_sent = upload.bytes();
    let whole = outcome.broken.is_none();
    if !whole {
        down.abort();
    }
    // An answer may come before the whole request was read. What is left of it must never be taken
    // for the next request, so neither connection is used again.
    reply.finished(whole && upload.is_whole());
    let reusable = whole && upload.is_whole() && response.keep_alive;
    Ok(Conversation { outcome, reusable })
}

/// Asks for an upgrade. When the endpoint agrees, the connection becomes a tunnel; when it does not,
/// its answer is one like any other.
async fn converse_upgrade(
    call: &mut Call<'_, '_, '_>,
    connection: &mut Http1,
) -> Result<Conversation, HeadError> {
    connection.writer.flush().await.map_err(|_| HeadError::Broken)?;
    let response = tokio::select! {
        response = read_response(&mut connection.reader, &call.head.method) => response?,
        () = call.reply.refused() => return Err(HeadError::Refused(Denial::ClientGone)),
    };
    let mut outcome = Outcome { status: response.head.status, ..Outcome::default() };
    if response.head.status != 101 {
        let mut body = Source::Http1(BodyReader::new(&mut connection.reader, response.framing));
        let mut down = call.reply.start(response.head, &body, &call.head);
        outcome.downloaded(carry(&mut body, &mut down).await);
        let whole = outcome.broken.is_none();
        call.reply.finished(whole);
        return Ok(Conversation { outcome, reusable: whole && response.keep_alive });
    }
    let upstream = Side { reader: &mut connection.reader, writer: &mut connection.writer };
    let source = std::mem::replace(&mut call.source, Source::Empty);
    if let (Source::Http1(body), Some(writer)) = (source, call.reply.upgrade(response.head)) {
        let client = Side { reader: body.into_reader(), writer };
        (outcome.bytes_sent, outcome.bytes_received) = tunnel(client, upstream).await;
    }
    Ok(Conversation { outcome, reusable: false })
}

async fn over_http2(
    call: &mut Call<'_, '_, '_>,
    target: &Target,
    address: SocketAddr,
    worker: &Worker,
) -> Result<Outcome, Failure> {
    let sender = worker
        .pools
        .http2(target, address, worker)
        .await
        .map_err(|error| unreached(address, &error))?;
    let scheme = if target.cluster.tls.is_some() { "https" } else { "http" };
    let request = http2::to_request(&call.head, scheme).map_err(Failure::Denied)?;
    match converse_http2(call, sender, request).await {
        Err(Failure::Stale) => {
            worker.pools.forget_http2(target, address);
            Err(Failure::Stale)
        }
        other => other,
    }
}

async fn converse_http2(
    call: &mut Call<'_, '_, '_>,
    mut sender: SendRequest<bytes::Bytes>,
    request: http::Request<()>,
) -> Result<Outcome, Failure> {
    let Call { head, source, reply } = call;
    let ended = source.is_empty();
    let (response, stream) = sender.send_request(request, ended).map_err(|_| Failure::Stale)?;
    let mut sink = if ended { Sink::Closed } else { Sink::Http2(stream) };
    let mut outcome = Outcome::default();
    let carrying = pin!(async { if ended { Ok(0) } else { carry(source, &mut sink).await } });
    let mut upload = Upload::new(carrying);
    let response = upload.until_answered(response, reply).await.map_err(Failure::Denied)?;
    let response = response.map_err(|error| {
        let unseen = error.is_go_away()
            || error.reason() == Some(h2::Reason::REFUSED_STREAM)
            || error.is_io();
        if unseen { Failure::Stale } else { Failure::Denied(Denial::UpstreamBroken) }
    })?;
    let (parts, body) = response.into_parts();
    let bodiless = head.method == Method::HEAD || parts.status == 304 || parts.status == 204;
    let response = http2::response(parts, bodiless).map_err(Failure::Denied)?;
    outcome.status = response.status;
    let mut body = Source::Http2(body);
    let mut down = reply.start(response, &body, head);
    outcome.downloaded(upload.until_carried(carry(&mut body, &mut down)).await);
    outcome.bytes_sent = upload.bytes();
    if outcome.broken.is_some() {
        down.abort();
    }
    reply.finished(outcome.broken.is_none() && upload.is_whole());
    Ok(outcome)
}

fn unreached(address: SocketAddr, error: &std::io::Error) -> Failure {
    tracing::debug!(%address, %error, "an endpoint could not be reached");
    Failure::NotConnected
}

/// The request's body on its way. The response may come before its end, so both are carried at
/// once.
struct Upload<F> {
    carrying: F,
    /// How it ended, once it has.
    ended: Option<Result<u64, Broken>>,
}

impl<F: Future<Output = Result<u64, Broken>> + Unpin> Upload<F> {
    fn new(carrying: F) -> Self {
        Self { carrying, ended: None }
    }

    /// Sends on until the response is there, or the client no longer wants it.
    async fn until_answered<R>(
        &mut self,
        response: impl Future<Output = R>,
        reply: &mut Reply<'_>,
    ) -> Result<R, Denial> {
        let mut response = pin!(response);
        loop {
            tokio::select! {
                biased;
                result = &mut self.carrying, if self.ended.is_none() => {
                    match result {
                        Err(Broken::Source) => return Err(Denial::ClientGone),
                        Err(Broken::Malformed(why)) => return Err(Denial::Malformed(why)),
                        // An endpoint that takes no more may have answered before; that counts.
                        Err(Broken::Sink) | Ok(_) => self.ended = Some(result),
                    }
                }
                response = &mut response => return Ok(response),
                () = reply.refused() => return Err(Denial::ClientGone),
            }
        }
    }

    /// Sends on until the response was carried to its end.
    async fn until_carried(
        &mut self,
        download: impl Future<Output = Result<u64, Broken>>,
    ) -> Result<u64, Broken> {
        let mut download = pin!(download);
        loop {
            tokio::select! {
                biased;
                result = &mut self.carrying, if self.ended.is_none() => self.ended = Some(result),
                downloaded = &mut download => return downloaded,
            }
        }
    }

    /// Whether all of it was sent.
    fn is_whole(&self) -> bool {
        matches!(self.ended, Some(Ok(_)))
    }

    /// How much was sent, if all was.
    fn bytes(&self) -> u64 {
        self.ended.and_then(Result::ok).unwrap_or(0)
    }
}

impl Outcome {
    /// Takes down how the response's body ended.
    fn downloaded(&mut self, result: Result<u64, Broken>) {
        match result {
            Ok(bytes) => self.bytes_received = bytes,
            Err(Broken::Source | Broken::Malformed(_)) => self.broken = Some("endpoint_broke_off"),
            Err(Broken::Sink) => self.broken = Some("client_broke_off"),
        }
    }
}

impl Reply<'_> {
    /// Begins the response: the head goes out with the first of the body.
    pub(crate) fn start(
        &mut self,
        mut head: ResponseHead,
        body: &Source<'_>,
        request: &RequestHead,
    ) -> Sink<'_> {
        strip_hop_by_hop(&mut head.fields);
        let bodiless = request.method == Method::HEAD || head.status == 204 || head.status == 304;
        self.begin(head, bodiless, body.is_empty())
    }

    /// Answers 101 and gives the writing half, over which anything may follow.
    fn upgrade(&mut self, mut head: ResponseHead) -> Option<&mut Writer> {
        strip_hop_by_hop(&mut head.fields);
        self.switch(&head)
    }
}
