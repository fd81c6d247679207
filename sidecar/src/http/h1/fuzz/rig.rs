//! The decoder, and what it lets through on its way to a service, over sockets as in use.

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

/// Small, so that streams reach them.
pub(super) const LIMITS: HttpLimits = HttpLimits {
    head_bytes: 1024,
    target_bytes: 250,
    field_bytes: 500,
    field_count: 16,
    requests_per_connection: None,
    streams: 1,
};
/// Far longer than any stream takes.
const ENDS_WITHIN: Duration = Duration::from_secs(20);
/// What follows each request on the connection to the service: whoever reads the request too short or
/// too long does not read this as it is.
pub(super) const NEXT: &[u8] = b"GET /what-follows HTTP/1.1\r\nhost: next.example\r\n\r\n";

/// A request that the decoder let through, and what became of it.
#[derive(Debug)]
pub(super) struct Passed {
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) authority: String,
    /// As they were read.
    pub(super) headers: HeaderMap,
    /// As they should arrive.
    pub(super) sent: HeaderMap,
    pub(super) body: Vec<u8>,
    pub(super) trailers: HeaderMap,
    /// Those that should arrive.
    pub(super) sent_trailers: HeaderMap,
    /// Whether the body came to its end.
    pub(super) is_whole: bool,
    pub(super) is_isolated: bool,
    /// All that went to the service.
    pub(super) forwarded: Vec<u8>,
}

impl Passed {
    pub(super) fn is_the_same_as(&self, other: &Self) -> bool {
        let facts = |p: &Self| (p.method.clone(), p.path.clone(), p.authority.clone(), p.is_whole);
        facts(self) == facts(other)
            && self.headers == other.headers
            // A body that broke off may have been taken in to different lengths.
            && (!self.is_whole || (self.body == other.body && self.trailers == other.trailers))
    }
}

/// How the decoder's reading of a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// All of the stream was read.
    Exhausted,
    /// A head or a body was refused.
    Refused,
    /// The last request said that none follows.
    Closed,
}

/// A connection to a service, and the service's end of it.
struct Onward {
    writer: Http1Writer,
    service: TcpStream,
}

/// The sockets that all streams share.
pub(super) struct Rig {
    listener: TcpListener,
    onward: Onward,
}

impl Rig {
    pub(super) async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("the loopback has ports");
        let (ours, service) = pair(&listener).await;
        let (_, half) = StreamHalf::pair(TransportStream::Plain(ours));
        let writer = Http1Writer::new(half, ENDS_WITHIN);
        Self { listener, onward: Onward { writer, service } }
    }

    /// What the decoder makes of a stream whose writes are `parts`.
    pub(super) async fn read(
        &mut self,
        parts: &[&[u8]],
        mode: DesyncMode,
    ) -> (Vec<Passed>, Ending) {
        let (server, mut client) = pair(&self.listener).await;
        let (half, _) = StreamHalf::pair(TransportStream::Plain(server));
        let onward = &mut self.onward;
        let reading = async move {
            let mut reader = Http1Reader::new(half);
            let read = read_all(&mut reader, onward, mode).await;
            // Leaves no port in wait behind.
            reader.half.reset();
            read
        };
        let writing = async move {
            for part in parts {
                // Nobody takes the rest of what was refused.
                if client.write_all(part).await.is_err() {
                    return client;
                }
                tokio::task::yield_now().await;
            }
            drop(client.shutdown().await);
            client
        };
        // The reader goes first, so that it sees each write by itself.
        let both = futures_util::future::join(reading, writing);
        timeout(ENDS_WITHIN, both).await.expect("a stream that ends comes to an end").0
    }
}

async fn read_all(
    reader: &mut Http1Reader,
    onward: &mut Onward,
    mode: DesyncMode,
) -> (Vec<Passed>, Ending) {
    let mut passed = Vec::new();
    loop {
        let request = match read_request(reader, &LIMITS, mode).await {
            Ok(request) => request,
            Err(HeadError::Closed) => return (passed, Ending::Exhausted),
            Err(HeadError::ConnectionLost(_)) => panic!("the connection is whole"),
            Err(HeadError::Refused(_)) => return (passed, Ending::Refused),
        };
        let is_tunnel = request.head.upgrade == Some(Upgrade::Tunnel);
        let is_last = is_tunnel || !request.keep_alive;
        let one = forward(reader, request, onward).await;
        let is_whole = one.is_whole;
        passed.push(one);
        if !is_whole {
            return (passed, Ending::Refused);
        }
        if is_last {
            return (passed, Ending::Closed);
        }
    }
}

async fn pair(listener: &TcpListener) -> (TcpStream, TcpStream) {
    let address = listener.local_addr().expect("it is bound");
    let client = TcpStream::connect(address).await.expect("the listener is there");
    client.set_nodelay(true).expect("it is TCP");
    let (server, _) = listener.accept().await.expect("a client is there");
    (server, client)
}

/// Passes a request on as the upstream side does.
async fn forward(reader: &mut Http1Reader, request: ReadRequest, onward: &mut Onward) -> Passed {
    let ReadRequest { mut head, framing, .. } = request;
    let headers = head.headers.to_map();
    let header_filter = HeaderFilter::of_request(&head.headers, UnderscoreAction::Allowed);
    header_filter.strip(&mut head.headers);
    let onward_framing = onward_framing(&head, framing);
    let Onward { writer, service } = onward;
    write_request(&head, onward_framing, writer.room());
    let mut sink = BodyWriter { writer, coding: BodyCoding::of(onward_framing) };
    let mut source = BodyReader::new(reader, framing);
    let mut body = Vec::new();
    let is_whole = loop {
        match source.piece().await {
            Ok(Some(piece)) => {
                body.extend_from_slice(&piece);
                sink.send(&piece).await.expect("the service takes it");
            }
            Ok(None) => break true,
            Err(_) => break false,
        }
    };
    let trailers = source.take_trailers();
    let sent_trailers = trailers.clone().map(|trailers| {
        header_filter.strip_trailers(trailers).expect("names with an underscore pass")
    });
    if is_whole {
        sink.finish(sent_trailers.clone()).await.expect("the service takes it");
    }
    sink.writer.room().extend_from_slice(NEXT);
    sink.flush().await.expect("the service takes it");
    let mut forwarded = BytesMut::new();
    while !forwarded.ends_with(NEXT) {
        let read = service.read_buf(&mut forwarded).await.expect("the connection is whole");
        assert_ne!(read, 0, "the connection is open");
    }
    Passed {
        sent: sent(&head, onward_framing),
        method: head.method,
        path: head.target,
        authority: head.authority,
        headers,
        body,
        trailers: trailers.unwrap_or_default(),
        sent_trailers: sent_trailers.unwrap_or_default(),
        is_whole,
        // A WebSocket has a connection of its own in any case, and its head says so.
        is_isolated: head.is_isolated && head.upgrade != Some(Upgrade::WebSocket),
        forwarded: forwarded.to_vec(),
    }
}

/// As the upstream side frames it.
fn onward_framing(head: &RequestHead, framing: BodyFraming) -> BodyFraming {
    let gives_a_meaning = [Method::POST, Method::PUT, Method::PATCH].contains(&head.method);
    match (framing, head.content_length) {
        _ if head.upgrade.is_some() => BodyFraming::None,
        (_, Some(length)) => BodyFraming::Length(length),
        (BodyFraming::None, None) if gives_a_meaning => BodyFraming::Length(0),
        (framing, None) => framing,
    }
}

/// The headers that the service should see.
fn sent(head: &RequestHead, framing: BodyFraming) -> HeaderMap {
    let mut sent = head.headers.to_map();
    let value = |text: &str| HeaderValue::from_str(text).expect("it was read as one");
    sent.append(HOST, value(&head.authority));
    match framing {
        BodyFraming::None | BodyFraming::UntilClose => {}
        BodyFraming::Length(length) => drop(sent.append(CONTENT_LENGTH, length.into())),
        BodyFraming::Chunked => drop(sent.append(TRANSFER_ENCODING, value("chunked"))),
    }
    if head.upgrade == Some(Upgrade::WebSocket) {
        sent.append(CONNECTION, value("upgrade"));
        sent.append(UPGRADE, value("websocket"));
    } else if head.is_isolated {
        sent.append(CONNECTION, value("close"));
    }
    sent
}
