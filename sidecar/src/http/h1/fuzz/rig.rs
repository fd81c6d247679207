//! Runs the HTTP/1.1 decoder over real sockets and forwards the requests that it accepts.

use std::time::Duration;

use bytes::BytesMut;
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderValue, Method};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use weft_model::{DesyncMode, HttpLimits};

use crate::http::h1::{
    BodyCoding, BodyFraming, BodyReader, BodyWriter, HeadError, Http1Reader, Http1Writer,
    ReadRequest, read_request, write_request,
};
use crate::http::head::{RequestHead, Upgrade};
use crate::http::header_filter::{HeaderFilter, UnderscoreAction};
use crate::stream::{StreamHalf, TransportStream};

/// Small, so that generated streams exceed them.
pub(super) const LIMITS: HttpLimits = HttpLimits {
    head_bytes: 1024,
    target_bytes: 250,
    header_bytes: 500,
    header_count: 16,
    requests_per_connection: None,
    streams: 1,
};
/// Far longer than any stream takes.
const TIMEOUT: Duration = Duration::from_secs(20);
/// The request that follows each forwarded request: a service that reads a request too short or too long does not
/// read this one unchanged.
pub(super) const NEXT_REQUEST: &[u8] = b"GET /what-follows HTTP/1.1\r\nhost: next.example\r\n\r\n";

/// A request that the decoder accepted, and how it was forwarded.
#[derive(Debug)]
pub(super) struct AcceptedRequest {
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) authority: String,
    /// As received.
    pub(super) headers: HeaderMap,
    /// As the service should receive them.
    pub(super) expected_headers: HeaderMap,
    pub(super) body: Vec<u8>,
    pub(super) trailers: HeaderMap,
    /// As the service should receive them.
    pub(super) expected_trailers: HeaderMap,
    /// Whether the body was complete.
    pub(super) is_whole: bool,
    pub(super) is_isolated: bool,
    /// All bytes that were sent to the service.
    pub(super) forwarded: Vec<u8>,
}

impl AcceptedRequest {
    pub(super) fn is_the_same_as(&self, other: &Self) -> bool {
        let facts = |p: &Self| (p.method.clone(), p.path.clone(), p.authority.clone(), p.is_whole);
        facts(self) == facts(other)
            && self.headers == other.headers
            // An incomplete body may have been read up to different lengths.
            && (!self.is_whole || (self.body == other.body && self.trailers == other.trailers))
    }
}

/// How decoding a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StreamEnd {
    /// The whole stream was read.
    Exhausted,
    /// A head or a body was refused.
    Refused,
    /// The last request closed the connection.
    Closed,
}

/// A connection to a service, with the service's end of it.
struct Upstream {
    writer: Http1Writer,
    service: TcpStream,
}

/// The sockets that all streams share.
pub(super) struct DecoderRig {
    listener: TcpListener,
    upstream: Upstream,
}

impl DecoderRig {
    pub(super) async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let (ours, service) = pair(&listener).await;
        let (_, half) = StreamHalf::pair(TransportStream::Plain(ours));
        let writer = Http1Writer::new(half, TIMEOUT);
        Self { listener, upstream: Upstream { writer, service } }
    }

    /// Decodes a stream that is written in `parts`.
    pub(super) async fn read(
        &mut self,
        parts: &[&[u8]],
        mode: DesyncMode,
    ) -> (Vec<AcceptedRequest>, StreamEnd) {
        let (server, mut client) = pair(&self.listener).await;
        let (half, _) = StreamHalf::pair(TransportStream::Plain(server));
        let upstream = &mut self.upstream;
        let reading = async move {
            let mut reader = Http1Reader::new(half);
            let read = read_all(&mut reader, upstream, mode).await;
            // Leaves no port in TIME_WAIT.
            reader.half.reset();
            read
        };
        let writing = async move {
            for part in parts {
                // A refused stream is not read to its end.
                if client.write_all(part).await.is_err() {
                    return client;
                }
                tokio::task::yield_now().await;
            }
            drop(client.shutdown().await);
            client
        };
        // The reader is polled first, so that it receives each write separately.
        let both = futures_util::future::join(reading, writing);
        timeout(TIMEOUT, both).await.expect("decoding ends").0
    }
}

async fn read_all(
    reader: &mut Http1Reader,
    upstream: &mut Upstream,
    mode: DesyncMode,
) -> (Vec<AcceptedRequest>, StreamEnd) {
    let mut accepted = Vec::new();
    loop {
        let request = match read_request(reader, &LIMITS, mode).await {
            Ok(request) => request,
            Err(HeadError::Closed) => return (accepted, StreamEnd::Exhausted),
            Err(HeadError::ConnectionLost(_)) => panic!("the connection is open"),
            Err(HeadError::Refused(_)) => return (accepted, StreamEnd::Refused),
        };
        let is_tunnel = request.head.upgrade == Some(Upgrade::Tunnel);
        let is_last = is_tunnel || !request.keep_alive;
        let one = forward(reader, request, upstream).await;
        let is_whole = one.is_whole;
        accepted.push(one);
        if !is_whole {
            return (accepted, StreamEnd::Refused);
        }
        if is_last {
            return (accepted, StreamEnd::Closed);
        }
    }
}

async fn pair(listener: &TcpListener) -> (TcpStream, TcpStream) {
    let address = listener.local_addr().expect("the listener is bound");
    let client = TcpStream::connect(address).await.expect("the listener accepts");
    client.set_nodelay(true).expect("a TCP option");
    let (server, _) = listener.accept().await.expect("a connection");
    (server, client)
}

/// Forwards a request as `upstream` does.
async fn forward(
    reader: &mut Http1Reader,
    request: ReadRequest,
    upstream: &mut Upstream,
) -> AcceptedRequest {
    let ReadRequest { mut head, framing, .. } = request;
    let headers = head.headers.to_map();
    let header_filter = HeaderFilter::of_request(&head.headers, UnderscoreAction::Allowed);
    header_filter.strip(&mut head.headers);
    let upstream_framing = upstream_framing(&head, framing);
    let Upstream { writer, service } = upstream;
    write_request(&head, upstream_framing, writer.output());
    let mut sink = BodyWriter { writer, coding: BodyCoding::of(upstream_framing) };
    let mut source = BodyReader::new(reader, framing);
    let mut body = Vec::new();
    let is_whole = loop {
        match source.piece().await {
            Ok(Some(piece)) => {
                body.extend_from_slice(&piece);
                sink.send(&piece).await.expect("the service reads");
            }
            Ok(None) => break true,
            Err(_) => break false,
        }
    };
    let trailers = source.take_trailers();
    let expected_trailers = trailers.clone().map(|trailers| {
        header_filter.strip_trailers(trailers).expect("names with a `_` are allowed")
    });
    if is_whole {
        sink.finish(expected_trailers.clone()).await.expect("the service reads");
    }
    sink.writer.output().extend_from_slice(NEXT_REQUEST);
    sink.flush().await.expect("the service reads");
    let mut forwarded = BytesMut::new();
    while !forwarded.ends_with(NEXT_REQUEST) {
        let read = service.read_buf(&mut forwarded).await.expect("the connection is open");
        assert_ne!(read, 0, "the connection is open");
    }
    AcceptedRequest {
        expected_headers: expected_headers(&head, upstream_framing),
        method: head.method,
        path: head.target,
        authority: head.authority,
        headers,
        body,
        trailers: trailers.unwrap_or_default(),
        expected_trailers: expected_trailers.unwrap_or_default(),
        is_whole,
        // A WebSocket has a connection of its own in any case.
        is_isolated: head.is_isolated && head.upgrade != Some(Upgrade::WebSocket),
        forwarded: forwarded.to_vec(),
    }
}

/// The framing of the forwarded request, as `upstream` chooses it.
fn upstream_framing(head: &RequestHead, framing: BodyFraming) -> BodyFraming {
    let has_defined_body = [Method::POST, Method::PUT, Method::PATCH].contains(&head.method);
    match (framing, head.content_length) {
        _ if head.upgrade.is_some() => BodyFraming::None,
        (_, Some(length)) => BodyFraming::Length(length),
        (BodyFraming::None, None) if has_defined_body => BodyFraming::Length(0),
        (framing, None) => framing,
    }
}

/// The headers that the service should receive.
fn expected_headers(head: &RequestHead, framing: BodyFraming) -> HeaderMap {
    let mut expected = head.headers.to_map();
    let value = |text: &str| HeaderValue::from_str(text).expect("a valid header value");
    expected.append(HOST, value(&head.authority));
    match framing {
        BodyFraming::None | BodyFraming::UntilClose => {}
        BodyFraming::Length(length) => drop(expected.append(CONTENT_LENGTH, length.into())),
        BodyFraming::Chunked => drop(expected.append(TRANSFER_ENCODING, value("chunked"))),
    }
    if head.upgrade == Some(Upgrade::WebSocket) {
        expected.append(CONNECTION, value("upgrade"));
        expected.append(UPGRADE, value("websocket"));
    } else if head.is_isolated {
        expected.append(CONNECTION, value("close"));
    }
    expected
}
