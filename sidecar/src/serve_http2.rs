//! Serves the requests of an HTTP/2 connection, with one task per stream.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use weft_model::HttpService;
use weft_runtime::clock::now;
use weft_runtime::connections::ConnectionStatus;

use crate::connection::ClientConnection;
use crate::denial::Denial;
use crate::http::body::BodySource;
use crate::http::h2 as http2;
use crate::http::h2_budget::LIBRARY_VIOLATION_LIMIT;
use crate::http::h2_client_guard::{Http2ClientGuard, Http2Monitor};
use crate::http::h2_keepalive;
use crate::http::head::{HttpVersion, RequestHead};
use crate::http2_windows::ConnectionWindow;
use crate::responder::Responder;
use crate::serve_request;
use crate::stream::TransportStream;
use crate::worker::SidecarWorker;

/// How long to wait for the client to take a GOAWAY before the connection is closed.
const GOAWAY_TIMEOUT: Duration = Duration::from_millis(200);
/// The most streams that the client opened and reset and that are still to be accepted.
const RESET_LIMIT: usize = 100;
/// The same for a peer with a verified identity: a sidecar forwards the resets of many clients.
const RESET_LIMIT_OF_PEER: usize = 1_000;
/// How long to ignore frames for a stream that was reset here, which the client sent before it knew.
const RESET_REMEMBERED: Duration = Duration::from_secs(10);

/// How many bytes of a request body are read and discarded after its response, and for how long.
const DISCARD_BYTES: usize = 64 * 1024 * 1024;
const DISCARD: Duration = Duration::from_secs(30);
/// How long a client may keep the connection open after a GOAWAY, once all its requests are done.
const GOAWAY_GRACE: Duration = Duration::from_secs(5);

/// Serves a connection until it is closed.
pub(crate) async fn serve(
    stream: TransportStream,
    connection: Rc<ClientConnection>,
    settings: &HttpService,
    worker: &Rc<SidecarWorker>,
) {
    let (stream, monitor) = Http2ClientGuard::new(stream, settings.limits.streams);
    let ended = monitor.abort_reason();
    tokio::pin!(ended);
    let window = worker.windows.open();
    let is_peer = connection.peer.is_some();
    let handshake = builder(settings, window.bytes, is_peer).handshake(stream);
    // On the heap, so that an idle connection does not reserve its space.
    let handshake = Box::pin(tokio::time::timeout(settings.timeouts.head, handshake));
    let accepted = tokio::select! {
        accepted = handshake => accepted.ok().and_then(Result::ok).map(Box::new),
        reason = &mut ended => return note_end(reason, &connection, worker),
    };
    let Some(mut streams) = accepted else { return };
    let open = Rc::<Cell<usize>>::default();
    let ending = ending(settings, &connection.status, &monitor, &open);
    let stuck = monitor.stalled(settings.timeouts.head);
    let silent = h2_keepalive::ping_timeout(settings.keepalive, streams.ping_pong(), &monitor);
    connection.status.keep_writable();
    let closed = connection.status.closed();
    let grace_over = idle_after_goaway(&open);
    tokio::pin!(ending, stuck, silent, closed, grace_over);
    let mut is_draining = false;
    let mut left = settings.limits.requests_per_connection;
    let reason = loop {
        let next = tokio::select! {
            biased;
            // First, because closing the connection also ends reading from it.
            _ = &mut closed => break h2::Reason::INADEQUATE_SECURITY,
            reason = &mut ended => break reason,
            () = monitor.refused_by_h2() => {
                note_refused(&connection, worker);
                continue;
            }
            next = streams.accept() => next,
            () = &mut stuck => break h2::Reason::NO_ERROR,
            () = &mut silent => break h2::Reason::NO_ERROR,
            () = &mut grace_over, if is_draining => return,
            () = &mut ending, if !is_draining => {
                is_draining = true;
                streams.graceful_shutdown();
                continue;
            }
        };
        match next {
            Some(Ok((request, mut respond))) => {
                let is_new = monitor.note_accepted(respond.stream_id().as_u32());
                if !is_new || !accept_request(&mut respond, &connection, worker) {
                    continue;
                }
                let (head, body) = http2::received_request(request, &settings.limits);
                note_breach(head.as_ref().err(), &monitor);
                let stream = Http2RequestStream::begin(&open, &connection, &window);
                tokio::task::spawn_local(stream.serve(head, body, respond, worker.clone()));
                left = left.map(|left| left.saturating_sub(1));
                if left == Some(0) && !is_draining {
                    is_draining = true;
                    streams.graceful_shutdown();
                }
            }
            ended => {
                if let Some(Err(error)) = ended {
                    tracing::debug!(%error, "HTTP/2 connection failed");
                }
                return note_all_refused(&monitor, &connection, worker);
            }
        }
    };
    note_end(reason, &connection, worker);
    close_with_goaway(streams, reason).await;
}

type Streams = h2::server::Connection<Http2ClientGuard<TransportStream>, bytes::Bytes>;

/// Closes a connection with a GOAWAY that has the reason.
async fn close_with_goaway(mut streams: Box<Streams>, reason: h2::Reason) {
    streams.abrupt_shutdown(reason);
    // The client may not read the GOAWAY either.
    drop(tokio::time::timeout(GOAWAY_TIMEOUT, streams.accept()).await);
}

/// Counts and logs a request that the h2 crate refused.
fn note_refused(connection: &ClientConnection, worker: &SidecarWorker) {
    let denial = Denial::Malformed("the head of a request of HTTP/2 breaks its rules");
    serve_request::log_refused(denial, HttpVersion::Http2, connection, worker);
}

/// Counts a head that is too large as a protocol violation.
fn note_breach(refused: Option<&http2::RefusedHead>, monitor: &Http2Monitor) {
    if refused.is_some_and(|refused| refused.denial == Denial::HeadTooLarge) {
        monitor.count_violation(now());
    }
}

/// Counts and logs all requests that the h2 crate refused before the connection was closed.
fn note_all_refused(monitor: &Http2Monitor, connection: &ClientConnection, worker: &SidecarWorker) {
    while monitor.take_refused() {
        note_refused(connection, worker);
    }
}

fn note_end(reason: h2::Reason, connection: &ClientConnection, worker: &SidecarWorker) {
    if reason == h2::Reason::ENHANCE_YOUR_CALM {
        worker.metrics.http2_floods.increment();
    }
    tracing::debug!(client = %connection.client, %reason, "HTTP/2 connection closed");
}

/// Resolves when there has been no stream for the grace period.
async fn idle_after_goaway(open: &Cell<usize>) {
    loop {
        tokio::time::sleep(GOAWAY_GRACE).await;
        if open.get() == 0 {
            return;
        }
    }
}

fn builder(settings: &HttpService, window_bytes: u32, is_peer: bool) -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(http2::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(window_bytes)
        .max_concurrent_streams(settings.limits.streams)
        .max_send_buffer_size(http2::SEND_BUFFER_BYTES)
        .max_pending_accept_reset_streams(if is_peer { RESET_LIMIT_OF_PEER } else { RESET_LIMIT })
        .max_concurrent_reset_streams(settings.limits.streams as usize)
        .reset_stream_duration(RESET_REMEMBERED)
        // `ViolationCounter` closes an abusive connection far earlier.
        .max_local_error_reset_streams(Some(LIBRARY_VIOLATION_LIMIT as usize))
        .data_frame_budget(if is_peer {
            http2::DATA_FRAME_BUDGET_OF_PEER_BYTES
        } else {
            http2::DATA_FRAME_BUDGET_BYTES
        })
        // The h2 crate closes the connection at a little more than its limit. The own limit is checked when a head is
        // complete, and refuses only that request.
        .max_header_list_size(
            u32::try_from(settings.limits.head_bytes).unwrap_or(u32::MAX).saturating_mul(2),
        );
    if settings.upgrades.websocket {
        builder.enable_connect_protocol();
    }
    builder
}

/// Resolves when the connection should take no more requests: the process drains, the client's certificate expired or was
/// revoked, the connection is too old, too many of its streams violated the protocol, or it had neither a stream nor a frame
/// for the idle timeout. The latter takes up to twice the timeout: frames are checked for at intervals, so that no frame reads
/// the clock.
async fn ending(
    settings: &HttpService,
    status: &ConnectionStatus,
    monitor: &Http2Monitor,
    open: &Cell<usize>,
) {
    let aged = async {
        match settings.timeouts.age {
            Some(age) => tokio::time::sleep(age).await,
            None => std::future::pending().await,
        }
    };
    let idle = async {
        loop {
            let seen = monitor.received_count();
            tokio::time::sleep(settings.timeouts.idle).await;
            if open.get() == 0 && monitor.received_count() == seen {
                return;
            }
        }
    };
    tokio::select! {
        () = aged => {}
        () = idle => {}
        () = status.draining() => {}
        () = monitor.renewal_due() => {}
    }
}

/// Whether a request is served. One that its client has reset is logged; one on a connection that takes no more
/// requests is reset.
fn accept_request(
    respond: &mut h2::server::SendResponse<bytes::Bytes>,
    connection: &ClientConnection,
    worker: &SidecarWorker,
) -> bool {
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    if respond.poll_reset(&mut cx).is_ready() {
        // An endpoint must not see the request: it would count the reset against a connection that many clients share.
        serve_request::log_refused(Denial::ClientGone, HttpVersion::Http2, connection, worker);
        return false;
    }
    if connection.status.refuses_requests() {
        // The request was not processed, so the client may retry it (RFC 9113, section 8.7).
        respond.send_reset(h2::Reason::REFUSED_STREAM);
        return false;
    }
    true
}

/// Reads and discards what a client still sends for a request that has its response: a reset would interrupt the upload, and each
/// frame after a reset costs the connection another reset. The flow-control window is returned to the other streams at once.
/// Beyond the limits the stream is reset with `NO_ERROR` (RFC 9113, section 8.1) when `body` is dropped.
async fn discard(body: &mut http2::ReceivedBody) {
    // What was read ahead and not forwarded.
    body.release_beyond(0);
    let reading = async {
        let mut left = DISCARD_BYTES;
        while let Ok(Some(piece)) = body.piece().await
            && left >= piece.len()
        {
            left -= piece.len();
        }
    };
    if tokio::time::timeout(DISCARD, reading).await.is_err() {
        tracing::debug!("limit reached: client still sends a request body after its response");
    }
}

/// Counts and logs a request whose body exceeds the window budget.
fn refuse_body(connection: &ClientConnection, worker: &SidecarWorker) {
    worker.metrics.http2_window_refusals.increment();
    if worker.windows.is_first_refusal() {
        tracing::warn!(
            client = %connection.client,
            "request bodies refused: the window limit (--window-limit) is in use"
        );
    }
    serve_request::log_refused(Denial::Overloaded, HttpVersion::Http2, connection, worker);
}

/// One request stream of a connection.
struct Http2RequestStream {
    /// The number of open streams.
    open: Rc<Cell<usize>>,
    connection: Rc<ClientConnection>,
    window: Rc<ConnectionWindow>,
}

impl Drop for Http2RequestStream {
    fn drop(&mut self) {
        self.open.set(self.open.get().saturating_sub(1));
    }
}

impl Http2RequestStream {
    fn begin(
        open: &Rc<Cell<usize>>,
        connection: &Rc<ClientConnection>,
        window: &Rc<ConnectionWindow>,
    ) -> Self {
        open.set(open.get() + 1);
        Self { open: open.clone(), connection: connection.clone(), window: window.clone() }
    }

    async fn serve(
        self,
        head: Result<RequestHead, http2::RefusedHead>,
        mut body: http2::ReceivedBody,
        mut respond: h2::server::SendResponse<bytes::Bytes>,
        worker: Rc<SidecarWorker>,
    ) {
        let mut reply = Responder::Http2 { respond: &mut respond, started: false };
        let has_body = !body.is_end();
        let receiving = if has_body { self.window.receive() } else { None };
        match head {
            Ok(head) if has_body && receiving.is_none() => {
                refuse_body(&self.connection, &worker);
                return reply.deny(Denial::Overloaded, head.is_grpc(), None).await;
            }
            Ok(head) => {
                let source =
                    if has_body { BodySource::Http2(&mut body) } else { BodySource::Empty };
                serve_request::request(head, source, &mut reply, &self.connection, &worker).await;
            }
            Err(http2::RefusedHead { denial, is_grpc }) => {
                serve_request::log_refused(denial, HttpVersion::Http2, &self.connection, &worker);
                reply.deny(denial, is_grpc, None).await;
            }
        }
        if receiving.is_some() && !body.is_end() {
            Box::pin(discard(&mut body)).await;
        }
    }
}
