//! Serves the requests of a connection of HTTP/1.1.

use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use http::Method;
use tokio::io::AsyncReadExt;
use weft_model::HttpService;

use crate::denial::Denial;
use crate::http::body::BodySource;
use crate::http::h1::{
    BodyFraming, BodyReader, HeadError, Http1Reader, Http1Writer, ReadRequest, read_request,
};
use crate::http::head::{HttpVersion, Upgrade};
use crate::pipeline::{self, ClientConnection};
use crate::responder::{CloseSignal, ConnectionReuse, Http1Responder, Responder, ResponseEnd};
use crate::stream::{StreamHalf, TransportStream};
use crate::worker::{SidecarWorker, now};

/// How much of a request is read and discarded after its answer. Many clients read no answer before they
/// have sent the whole body: closing earlier resets the connection and destroys the answer on its way.
const LINGER_BYTES: u64 = 1024 * 1024 * 1024;
/// How much of it is read at once.
const LINGER_READ_BYTES: usize = 64 * 1024;
/// How long that may take in all.
const LINGER: Duration = Duration::from_secs(60);
/// How long the client may send nothing meanwhile.
const LINGER_SILENCE: Duration = Duration::from_secs(5);
/// How long a client that has sent its request whole may take to close.
const LINGER_IDLE: Duration = Duration::from_secs(2);

/// Serves HTTP/1.1: one request after the other.
pub(crate) async fn serve(
    stream: TransportStream,
    connection: Rc<ClientConnection>,
    settings: &HttpService,
    worker: &Rc<SidecarWorker>,
) {
    let (read, write) = StreamHalf::pair(stream);
    let mut reader = Http1Reader::new(read);
    let mut writer = Http1Writer::new(write, settings.timeouts.stall_limit());
    let mut allowance = ConnectionAllowance::new(settings);
    let _enrolled = worker.register_drainable(&connection);
    loop {
        let request = match next_request(&mut reader, &mut writer, &connection, settings).await {
            Ok(request) => with_host(request, settings),
            Err(HeadError::Closed | HeadError::ConnectionLost(_)) => return,
            Err(HeadError::Refused(denial)) => {
                pipeline::refused(denial, HttpVersion::Http11, &connection, worker);
                return Box::pin(refuse(denial, reader, writer, settings)).await;
            }
        };
        let close_signal = CloseSignal { worker, connection: &connection };
        let is_last = allowance.is_spent_by_one_more() || close_signal.has_begun();
        let mut reply = Responder::Http1(Http1Responder {
            writer: &mut writer,
            version: request.head.version,
            is_head: request.head.method == Method::HEAD,
            reuse: match request.framing {
                _ if !request.keep_alive || is_last => ConnectionReuse::No,
                // Who does not wait for the agreement sends what is meant for the tunnel; when there is
                // none, it must not be read as a request.
                _ if request.head.upgrade == Some(Upgrade::Tunnel) => ConnectionReuse::No,
                BodyFraming::None | BodyFraming::Length(0) => ConnectionReuse::Yes,
                _ => ConnectionReuse::AfterBody,
            },
            started: false,
            end: ResponseEnd::Framed,
            header_case: settings.http1.header_case,
            close_signal: Some(close_signal),
        });
        let source = match request.framing {
            BodyFraming::None if request.head.upgrade.is_none() => BodySource::Empty,
            framing => BodySource::Http1(BodyReader::new(&mut reader, framing)),
        };
        pipeline::request(request.head, source, &mut reply, &connection, worker).await;
        let Responder::Http1(Http1Responder { reuse, end, .. }) = reply else {
            return;
        };
        if end == ResponseEnd::Aborted {
            return writer.half.reset();
        }
        // Draining may have begun while the body was sent, or the client's certificate ended, which only ends the
        // connections that were idle then. Another request would come in vain.
        if reuse == ConnectionReuse::No || close_signal.has_begun() {
            let unread = reader.has_unread_body;
            return close(reader, writer, unread).await;
        }
    }
}

/// The request with a host: HTTP/1.0 need not name one.
fn with_host(mut request: ReadRequest, settings: &HttpService) -> ReadRequest {
    if request.head.authority.is_empty() && request.head.version == HttpVersion::Http10 {
        let host = settings.http1.default_host.as_deref().unwrap_or("localhost");
        host.clone_into(&mut request.head.authority);
    }
    request
}

/// How much a connection may still do.
struct ConnectionAllowance {
    requests: Option<u32>,
    until: Option<Instant>,
}

impl ConnectionAllowance {
    fn new(settings: &HttpService) -> Self {
        let until = settings.timeouts.age.map(|age| now() + age);
        Self { requests: settings.limits.requests_per_connection, until }
    }

    /// Takes one more request; whether it is the last.
    fn is_spent_by_one_more(&mut self) -> bool {
        self.requests = self.requests.map(|left| left.saturating_sub(1));
        self.requests == Some(0) || self.until.is_some_and(|until| now() >= until)
    }
}

/// Waits for the next request: long for its first byte, short for the rest of its head.
async fn next_request(
    reader: &mut Http1Reader,
    writer: &mut Http1Writer,
    connection: &ClientConnection,
    settings: &HttpService,
) -> Result<ReadRequest, HeadError> {
    if reader.buffer.is_empty() {
        reader.release_buffer();
        writer.release_buffer();
        connection.set_idle(true);
        let first = tokio::time::timeout(settings.timeouts.idle, reader.half.readable()).await;
        connection.set_idle(false);
        match first {
            Err(_) => return Err(HeadError::Closed),
            Ok(Err(_)) => return Err(HeadError::ConnectionLost(None)),
            Ok(Ok(())) => {}
        }
    }
    if connection.is_draining() {
        reader.half.reset_if_closed();
        return Err(HeadError::Closed);
    }
    let reading = read_request(reader, &settings.limits, settings.desync);
    tokio::time::timeout(settings.timeouts.head, reading)
        .await
        .unwrap_or(Err(HeadError::Refused(Denial::HeadTimeout)))
}

/// Refuses a client that began a connection and did not go on in time.
pub(crate) async fn refuse_incomplete(
    stream: TransportStream,
    connection: &ClientConnection,
    settings: &HttpService,
    worker: &SidecarWorker,
) {
    let (read, write) = StreamHalf::pair(stream);
    let writer = Http1Writer::new(write, settings.timeouts.stall_limit());
    pipeline::refused(Denial::HeadTimeout, HttpVersion::Http11, connection, worker);
    Box::pin(refuse(Denial::HeadTimeout, Http1Reader::new(read), writer, settings)).await;
}

/// Refuses what is no request.
async fn refuse(
    denial: Denial,
    reader: Http1Reader,
    mut writer: Http1Writer,
    settings: &HttpService,
) {
    let mut reply = Responder::Http1(Http1Responder {
        writer: &mut writer,
        version: HttpVersion::Http11,
        is_head: false,
        reuse: ConnectionReuse::No,
        started: false,
        end: ResponseEnd::Framed,
        header_case: settings.http1.header_case,
        close_signal: None,
    });
    reply.deny(denial, false, None).await;
    close(reader, writer, true).await;
}

/// Closes our side, then reads and discards what still comes (RFC 9112, section 9.6): closing with unread
/// bytes would reset the connection and could destroy the answer. `unread`: part of a request is missing.
async fn close(mut reader: Http1Reader, mut writer: Http1Writer, unread: bool) {
    use tokio::io::AsyncWriteExt;
    let silence = if unread { LINGER_SILENCE } else { LINGER_IDLE };
    let lingering = async {
        tokio::time::timeout(silence, writer.half.shutdown()).await.map_err(io::Error::from)??;
        let mut left = LINGER_BYTES;
        while left > 0 {
            reader.buffer.clear();
            reader.reserve(LINGER_READ_BYTES);
            let reading = reader.half.read_buf(&mut reader.buffer);
            match tokio::time::timeout(silence, reading).await.map_err(io::Error::from)?? {
                0 => break,
                read => left = left.saturating_sub(read as u64),
            }
        }
        Ok::<_, io::Error>(())
    };
    // Whether the client closed or a limit was reached, the connection is closed now.
    drop(tokio::time::timeout(LINGER, lingering).await);
}
