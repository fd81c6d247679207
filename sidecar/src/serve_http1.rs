//! Serves the requests of an HTTP/1.1 connection.

use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use http::Method;
use tokio::io::AsyncReadExt;
use weft_model::HttpService;
use weft_runtime::clock::now;

use crate::connection::ClientConnection;
use crate::denial::Denial;
use crate::http::body::BodySource;
use crate::http::h1::{
    BodyFraming, BodyReader, HeadError, Http1Reader, Http1Writer, ReadRequest, read_request,
};
use crate::http::head::{HttpVersion, Upgrade};
use crate::responder::{ConnectionReuse, Http1Responder, Responder, ResponseEnd};
use crate::serve_request;
use crate::stream::{StreamHalf, TransportStream};
use crate::worker::SidecarWorker;

/// The most bytes of a request that are read and discarded after its response. Many clients read no response before they have
/// sent the whole body: closing earlier resets the connection and destroys the response on its way.
const LINGER_BYTES: u64 = 1024 * 1024 * 1024;
/// The most bytes of them that are read at once.
const LINGER_READ_BYTES: usize = 64 * 1024;
/// The limit for discarding in total.
const LINGER: Duration = Duration::from_secs(60);
/// The limit for a pause in what the client sends meanwhile.
const LINGER_IDLE_READING: Duration = Duration::from_secs(5);
/// How long a client that has sent its request completely may take to close the connection.
const LINGER_IDLE: Duration = Duration::from_secs(2);

/// Serves the requests of a connection, one after the other.
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
    loop {
        let request = match next_request(&mut reader, &mut writer, &connection, settings).await {
            Ok(request) => with_host(request, settings),
            Err(HeadError::Closed | HeadError::ConnectionLost(_)) => return,
            Err(HeadError::Refused(denial)) => {
                serve_request::log_refused(denial, HttpVersion::Http11, &connection, worker);
                return Box::pin(refuse(denial, reader, writer, settings)).await;
            }
        };
        let status = &*connection.status;
        let is_last = allowance.count_request() || status.is_draining();
        let mut reply = Responder::Http1(Http1Responder {
            writer: &mut writer,
            version: request.head.version,
            is_head: request.head.method == Method::HEAD,
            reuse: match request.framing {
                _ if !request.keep_alive || is_last => ConnectionReuse::No,
                // A client that sends tunnel bytes before the tunnel is accepted: if it is refused, they must not be
                // parsed as a request.
                _ if request.head.upgrade == Some(Upgrade::Tunnel) => ConnectionReuse::No,
                BodyFraming::None | BodyFraming::Length(0) => ConnectionReuse::Yes,
                _ => ConnectionReuse::AfterBody,
            },
            started: false,
            end: ResponseEnd::Framed,
            header_case: settings.http1.header_case,
            status: Some(status),
        });
        let source = match request.framing {
            BodyFraming::None if request.head.upgrade.is_none() => BodySource::Empty,
            framing => BodySource::Http1(BodyReader::new(&mut reader, framing)),
        };
        serve_request::request(request.head, source, &mut reply, &connection, worker).await;
        let Responder::Http1(Http1Responder { reuse, end, .. }) = reply else {
            return;
        };
        if end == ResponseEnd::Aborted {
            return writer.half.reset();
        }
        // Draining may have begun while the response was sent.
        if reuse == ConnectionReuse::No || status.is_draining() {
            let unread = reader.has_unread_body;
            return close(reader, writer, unread).await;
        }
    }
}

/// Sets the host of a request without one, which only HTTP/1.0 allows.
fn with_host(mut request: ReadRequest, settings: &HttpService) -> ReadRequest {
    if request.head.authority.is_empty() && request.head.version == HttpVersion::Http10 {
        let host = settings.http1.default_host.as_deref().unwrap_or("localhost");
        host.clone_into(&mut request.head.authority);
    }
    request
}

/// The remaining requests and lifetime of a connection.
struct ConnectionAllowance {
    requests: Option<u32>,
    until: Option<Instant>,
}

impl ConnectionAllowance {
    fn new(settings: &HttpService) -> Self {
        let until = settings.timeouts.age.map(|age| now() + age);
        Self { requests: settings.limits.requests_per_connection, until }
    }

    /// Counts one more request. Returns whether it is the last.
    fn count_request(&mut self) -> bool {
        self.requests = self.requests.map(|left| left.saturating_sub(1));
        self.requests == Some(0) || self.until.is_some_and(|until| now() >= until)
    }
}

/// Waits for the next request: up to the idle timeout for its first byte, then up to the head timeout.
async fn next_request(
    reader: &mut Http1Reader,
    writer: &mut Http1Writer,
    connection: &ClientConnection,
    settings: &HttpService,
) -> Result<ReadRequest, HeadError> {
    if reader.buffer.is_empty() {
        reader.release_buffer();
        writer.release_buffer();
        let first = tokio::time::timeout(settings.timeouts.idle, async {
            tokio::select! {
                biased;
                readable = reader.half.readable() => Some(readable),
                () = connection.status.draining() => None,
            }
        });
        match first.await {
            Ok(Some(Ok(()))) => {}
            Ok(Some(Err(_))) => return Err(HeadError::ConnectionLost(None)),
            Ok(None) | Err(_) => {
                reader.half.reset_if_closed();
                return Err(HeadError::Closed);
            }
        }
    }
    if connection.status.refuses_requests() {
        reader.half.reset_if_closed();
        return Err(HeadError::Closed);
    }
    let reading = read_request(reader, &settings.limits, settings.desync);
    tokio::time::timeout(settings.timeouts.head, reading)
        .await
        .unwrap_or(Err(HeadError::Refused(Denial::HeadTimeout)))
}

/// Refuses a client that began the HTTP/2 preface and did not complete it in time.
pub(crate) async fn refuse_incomplete(
    stream: TransportStream,
    connection: &ClientConnection,
    settings: &HttpService,
    worker: &SidecarWorker,
) {
    let (read, write) = StreamHalf::pair(stream);
    let writer = Http1Writer::new(write, settings.timeouts.stall_limit());
    serve_request::log_refused(Denial::HeadTimeout, HttpVersion::Http11, connection, worker);
    Box::pin(refuse(Denial::HeadTimeout, Http1Reader::new(read), writer, settings)).await;
}

/// Sends a denial for a head that could not be read, and closes the connection.
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
        status: None,
    });
    reply.deny(denial, false, None).await;
    close(reader, writer, true).await;
}

/// Closes the sending side, then reads and discards what the client still sends (RFC 9112, section 9.6): closing with unread
/// bytes would reset the connection and could destroy the response. `unread`: part of a request is missing.
async fn close(mut reader: Http1Reader, mut writer: Http1Writer, unread: bool) {
    use tokio::io::AsyncWriteExt;
    let idle_limit = if unread { LINGER_IDLE_READING } else { LINGER_IDLE };
    let lingering = async {
        tokio::time::timeout(idle_limit, writer.half.shutdown())
            .await
            .map_err(io::Error::from)??;
        let mut left = LINGER_BYTES;
        while left > 0 {
            reader.buffer.clear();
            reader.reserve(LINGER_READ_BYTES);
            let reading = reader.half.read_buf(&mut reader.buffer);
            match tokio::time::timeout(idle_limit, reading).await.map_err(io::Error::from)?? {
                0 => break,
                read => left = left.saturating_sub(read as u64),
            }
        }
        Ok::<_, io::Error>(())
    };
    // The connection is closed, whether the client closed it or a limit was reached.
    drop(tokio::time::timeout(LINGER, lingering).await);
}
