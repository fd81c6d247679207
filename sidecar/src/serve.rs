//! Serves the requests of a connection, in either version of HTTP.

use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;
use http::Method;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use weft_model::{HttpService, TransportKind};
use weft_runtime::drain::Phase;

use crate::denial::Denial;
use crate::http::body::Source;
use crate::http::h1::{BodyReader, Framing, HeadError, Reader, Writer, read_request};
use crate::http::h2 as http2_heads;
use crate::http::h2_budget::Counted;
use crate::http::head::{HttpVersion, RequestHead};
use crate::pipeline::{self, Connection};
use crate::reply::{Http1Reply, Reply, Reuse};
use crate::stream::{Half, Stream};
use crate::worker::Worker;

/// How long the first bytes of a connection may take, where they decide how it is served.
const FIRST_BYTES: Duration = Duration::from_secs(10);
/// How much of an unread body is taken in after a refusal, so that the client sees our answer and
/// not a reset.
const LINGER_BYTES: usize = 256 * 1024;
const LINGER: Duration = Duration::from_secs(2);

/// Whether a connection begins with a TLS handshake. None when it begins with nothing.
pub(crate) async fn transport_kind(stream: &TcpStream) -> Option<TransportKind> {
    const HANDSHAKE: u8 = 22;
    let mut first = [0];
    let seen = tokio::time::timeout(FIRST_BYTES, stream.peek(&mut first)).await.ok()?.ok()?;
    match (seen, first) {
        (0, _) => None,
        (_, [HANDSHAKE]) => Some(TransportKind::Tls),
        _ => Some(TransportKind::Plain),
    }
}

/// Whether a plain connection begins with HTTP/2's preface, whose first word is no method.
pub(crate) async fn has_preface(stream: &TcpStream, timeout: Duration) -> bool {
    const WORD: &[u8] = b"PRI ";
    let looked = tokio::time::timeout(timeout, async {
        let mut first = [0; WORD.len()];
        loop {
            let seen = stream.peek(&mut first).await.unwrap_or(0);
            let here = first.get(..seen).unwrap_or_default();
            if seen == WORD.len() || !WORD.starts_with(here) || seen == 0 {
                return here == WORD;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    looked.await.unwrap_or(false)
}

/// Serves HTTP/1.1: one request after the other.
pub(crate) async fn http1(
    stream: Stream,
    connection: Rc<Connection>,
    settings: &HttpService,
    worker: &Rc<Worker>,
) {
    let (read, write) = Half::pair(stream);
    let mut reader = Reader { half: read, buffer: BytesMut::new() };
    let mut writer = Writer { half: write, out: BytesMut::new() };
    let _enrolled = worker.enrol(&connection);
    loop {
        let request = match next_request(&mut reader, &connection, settings).await {
            Ok(request) => request,
            Err(HeadError::Closed | HeadError::Broken) => return,
            Err(HeadError::Refused(denial)) => return refuse(denial, reader, writer, worker).await,
        };
        if request.expects_continue {
            writer.out.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
            if writer.flush().await.is_err() {
                return;
            }
        }
        let mut reply = Reply::Http1(Http1Reply {
            writer: &mut writer,
            version: request.head.version,
            is_head: request.head.method == Method::HEAD,
            reuse: match request.framing {
                _ if !request.keep_alive || worker.is_draining() => Reuse::No,
                Framing::None => Reuse::Yes,
                _ => Reuse::BehindBody,
            },
            started: false,
        });
        let source = match request.framing {
            Framing::None => Source::Empty,
            framing => Source::Http1(BodyReader::new(&mut reader, framing)),
        };
        let upgrades = request.head.upgrade.is_some();
        let source = if upgrades && matches!(source, Source::Empty) {
            Source::Http1(BodyReader::new(&mut reader, Framing::None))
        } else {
            source
        };
        pipeline::request(request.head, source, &mut reply, &connection, worker).await;
        let Reply::Http1(Http1Reply { reuse, .. }) = reply else {
            return;
        };
        // Draining may have begun meanwhile, and only ended the connections that were idle then.
        if reuse == Reuse::No || worker.is_draining() {
            return close(reader, writer).await;
        }
    }
}

/// Waits for the next request: long for its first byte, short for the rest of its head.
async fn next_request(
    reader: &mut Reader,
    connection: &Connection,
    settings: &HttpService,
) -> Result<crate::http::h1::ReadRequest, HeadError> {
    if reader.buffer.is_empty() {
        connection.idle.set(true);
        reader.buffer.reserve(4096);
        let first =
            tokio::time::timeout(settings.idle_timeout, reader.half.read_buf(&mut reader.buffer))
                .await;
        connection.idle.set(false);
        match first {
            Err(_) | Ok(Ok(0)) => return Err(HeadError::Closed),
            Ok(Err(_)) => return Err(HeadError::Broken),
            Ok(Ok(_)) => {}
        }
    }
    let reading = read_request(reader, settings.header_limit_bytes);
    tokio::time::timeout(settings.header_timeout, reading)
        .await
        .unwrap_or(Err(HeadError::Refused(Denial::HeadTimeout)))
}

/// Refuses what is no request.
async fn refuse(denial: Denial, reader: Reader, mut writer: Writer, worker: &Worker) {
    worker.metrics.requests.increment();
    worker.metrics.deny(denial);
    worker.metrics.respond(denial.status());
    let mut reply = Reply::Http1(Http1Reply {
        writer: &mut writer,
        version: HttpVersion::Http11,
        is_head: false,
        reuse: Reuse::No,
        started: false,
    });
    reply.deny(denial, false).await;
    close(reader, writer).await;
}

/// Closes our side, and takes in a little of what still comes: closing with unread bytes would
/// reset the connection and could take our answer with it.
async fn close(mut reader: Reader, mut writer: Writer) {
    use tokio::io::AsyncWriteExt;
    if writer.half.shutdown().await.is_err() {
        return;
    }
    let mut taken = 0;
    let lingering = async {
        while taken < LINGER_BYTES {
            reader.buffer.clear();
            reader.buffer.reserve(16 * 1024);
            match reader.half.read_buf(&mut reader.buffer).await {
                Ok(0) | Err(_) => return,
                Ok(more) => taken += more,
            }
        }
    };
    // Whether it ended or ran out of time, the connection is closed now.
    drop(tokio::time::timeout(LINGER, lingering).await);
}

/// How long a client that is told to calm down has to take the message.
const CALM: Duration = Duration::from_millis(200);

/// Serves HTTP/2: a task for every stream.
pub(crate) async fn http2(
    stream: Stream,
    connection: Rc<Connection>,
    settings: &HttpService,
    worker: &Rc<Worker>,
) {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(http2_heads::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(http2_heads::CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(http2_heads::STREAM_LIMIT)
        // The library ends the whole connection not far above its limit. Ours is looked at when a
        // head is there, and costs only its own request.
        .max_header_list_size(
            u32::try_from(settings.header_limit_bytes).unwrap_or(u32::MAX).saturating_mul(4),
        );
    let header_limit_bytes = settings.header_limit_bytes;
    let (stream, exhausted) = Counted::new(stream);
    let exhausted = exhausted.reached();
    tokio::pin!(exhausted);
    let handshake = builder.handshake(stream);
    let handshake = tokio::select! {
        handshake = tokio::time::timeout(settings.header_timeout, handshake) => handshake,
        () = &mut exhausted => return worker.metrics.floods.increment(),
    };
    let Ok(Ok(mut streams)) = handshake else {
        return;
    };
    let draining = worker.shared.drain.clone();
    let draining = draining.reached(Phase::Draining);
    tokio::pin!(draining);
    let mut told = false;
    loop {
        let next = tokio::select! {
            next = tokio::time::timeout(settings.idle_timeout, streams.accept()) => next,
            () = &mut exhausted => {
                worker.metrics.floods.increment();
                tracing::debug!(client = %connection.client, "a flood of HTTP/2 frames");
                streams.abrupt_shutdown(h2::Reason::ENHANCE_YOUR_CALM);
                // It may not take our answer either.
                drop(tokio::time::timeout(CALM, streams.accept()).await);
                return;
            }
            () = &mut draining, if !told => {
                told = true;
                streams.graceful_shutdown();
                continue;
            }
        };
        match next {
            Ok(Some(Ok((request, respond)))) => {
                let (connection, worker) = (connection.clone(), worker.clone());
                let (head, body) = http2_heads::request(request, header_limit_bytes);
                tokio::task::spawn_local(serve_stream(head, body, respond, connection, worker));
            }
            Ok(Some(Err(error))) => {
                tracing::debug!(%error, "an HTTP/2 connection ended");
                return;
            }
            Ok(None) => return,
            Err(_) if !told => {
                told = true;
                streams.graceful_shutdown();
            }
            Err(_) => {}
        }
    }
}

async fn serve_stream(
    head: Result<RequestHead, Denial>,
    body: h2::RecvStream,
    mut respond: h2::server::SendResponse<bytes::Bytes>,
    connection: Rc<Connection>,
    worker: Rc<Worker>,
) {
    let mut reply = Reply::Http2 { respond: &mut respond, started: false };
    match head {
        Ok(head) => {
            let source = if body.is_end_stream() { Source::Empty } else { Source::Http2(body) };
            pipeline::request(head, source, &mut reply, &connection, &worker).await;
        }
        Err(denial) => {
            worker.metrics.requests.increment();
            worker.metrics.deny(denial);
            worker.metrics.respond(denial.status());
            reply.deny(denial, false).await;
        }
    }
}
