//! Serves the requests of a connection of HTTP/2: a task for every stream.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use weft_model::HttpService;
use weft_runtime::drain::Phase;

use crate::denial::Denial;
use crate::http::body::BodySource;
use crate::http::h2 as http2;
use crate::http::h2_budget::LIBRARY_VIOLATION_LIMIT;
use crate::http::h2_client_guard::{Http2ClientGuard, Http2Monitor};
use crate::http::h2_keepalive;
use crate::http::head::{HttpVersion, RequestHead};
use crate::http2_windows::ConnectionWindow;
use crate::pipeline::{self, ClientConnection};
use crate::responder::Responder;
use crate::stream::TransportStream;
use crate::worker::{SidecarWorker, now};

/// How long a client that is told to calm down has to take the message.
const CALM: Duration = Duration::from_millis(200);
/// How many streams that the client opened and reset may wait to be accepted.
const RESET_LIMIT: usize = 100;
/// The same for a peer that proved its identity: a sidecar passes on the resets of many clients.
const RESET_LIMIT_OF_PEER: usize = 1_000;
/// For how long frames on a stream that we reset are ignored, which the client sent before it knew.
const RESET_REMEMBERED: Duration = Duration::from_secs(10);

/// How much of a request's body is read and dropped after its answer, and for how long.
const DISCARD_BYTES: usize = 64 * 1024 * 1024;
const DISCARD: Duration = Duration::from_secs(30);
/// How long a client that was told that no more requests are served has to go, once all are.
const FAREWELL: Duration = Duration::from_secs(5);

/// Serves a connection until it ends.
pub(crate) async fn serve(
    stream: TransportStream,
    connection: Rc<ClientConnection>,
    settings: &HttpService,
    worker: &Rc<SidecarWorker>,
) {
    let (stream, monitor) = Http2ClientGuard::new(stream, settings.limits.streams);
    let over = monitor.abort_reason();
    tokio::pin!(over);
    let window = worker.windows.open();
    let is_peer = connection.peer.is_some();
    let greeting = builder(settings, window.bytes, is_peer).handshake(stream);
    // On the heap, so that a connection that waits keeps no place for it.
    let greeting = Box::pin(tokio::time::timeout(settings.timeouts.head, greeting));
    let greeted = tokio::select! {
        greeted = greeting => greeted.ok().and_then(Result::ok).map(Box::new),
        reason = &mut over => return note_end(reason, &connection, worker),
    };
    let Some(mut streams) = greeted else { return };
    let open = Rc::<Cell<usize>>::default();
    let drain = worker.shared.drain.clone();
    let ending = ending(settings, &connection, &drain, &monitor, &open);
    let stuck = monitor.stalled(settings.timeouts.head);
    let silent = h2_keepalive::ping_timeout(settings.keepalive, streams.ping_pong(), &monitor);
    let fallen = connection.closed();
    let gone = farewell(&open);
    tokio::pin!(ending, stuck, silent, fallen, gone);
    let mut is_told = false;
    let mut left = settings.limits.requests_per_connection;
    let reason = loop {
        let next = tokio::select! {
            biased;
            // First, since what wakes it ends the reading too.
            () = &mut fallen => break h2::Reason::INADEQUATE_SECURITY,
            reason = &mut over => break reason,
            () = monitor.refused_by_h2() => {
                note_refused(&connection, worker);
                continue;
            }
            next = streams.accept() => next,
            () = &mut stuck => break h2::Reason::NO_ERROR,
            () = &mut silent => break h2::Reason::NO_ERROR,
            () = &mut gone, if is_told => return,
            () = &mut ending, if !is_told => {
                is_told = true;
                streams.graceful_shutdown();
                continue;
            }
        };
        match next {
            Some(Ok((request, mut respond))) => {
                let is_new = monitor.note_accepted(respond.stream_id().as_u32());
                if !is_new || !is_wanted(&mut respond, &connection, worker) {
                    continue;
                }
                let (head, body) = http2::received_request(request, &settings.limits);
                note_breach(head.as_ref().err(), &monitor);
                let stream = Http2RequestStream::begin(&open, &connection, &window);
                tokio::task::spawn_local(stream.serve(head, body, respond, worker.clone()));
                left = left.map(|left| left.saturating_sub(1));
                if left == Some(0) && !is_told {
                    is_told = true;
                    streams.graceful_shutdown();
                }
            }
            ended => {
                if let Some(Err(error)) = ended {
                    tracing::debug!(%error, "HTTP/2 connection ended");
                }
                return note_all_refused(&monitor, &connection, worker);
            }
        }
    };
    note_end(reason, &connection, worker);
    dismiss(streams, reason).await;
}

type Streams = h2::server::Connection<Http2ClientGuard<TransportStream>, bytes::Bytes>;

/// Ends a connection at once, and tells why.
async fn dismiss(mut streams: Box<Streams>, reason: h2::Reason) {
    streams.abrupt_shutdown(reason);
    // It may not take our answer either.
    drop(tokio::time::timeout(CALM, streams.accept()).await);
}

/// Leaves the line of a request that the library refused.
fn note_refused(connection: &ClientConnection, worker: &SidecarWorker) {
    let denial = Denial::Malformed("the head of a request of HTTP/2 breaks its rules");
    pipeline::refused(denial, HttpVersion::Http2, connection, worker);
}

/// Counts a head that is too large as a breach of the rules.
fn note_breach(refused: Option<&http2::RefusedHead>, monitor: &Http2Monitor) {
    if refused.is_some_and(|refused| refused.denial == Denial::HeadTooLarge) {
        monitor.count_violation(now());
    }
}

/// Leaves the lines of all requests that the library refused before the connection ended.
fn note_all_refused(monitor: &Http2Monitor, connection: &ClientConnection, worker: &SidecarWorker) {
    while monitor.take_refused() {
        note_refused(connection, worker);
    }
}

fn note_end(reason: h2::Reason, connection: &ClientConnection, worker: &SidecarWorker) {
    if reason == h2::Reason::ENHANCE_YOUR_CALM {
        worker.metrics.http2_floods.increment();
    }
    tracing::debug!(client = %connection.client, %reason, "an HTTP/2 connection was ended");
}

/// Resolves when there has been no stream for a while.
async fn farewell(open: &Cell<usize>) {
    loop {
        tokio::time::sleep(FAREWELL).await;
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
        // Abuse is ended far earlier, by `ViolationCounter`.
        .max_local_error_reset_streams(Some(LIBRARY_VIOLATION_LIMIT as usize))
        .data_frame_budget(if is_peer {
            http2::DATA_FRAME_BUDGET_OF_PEER_BYTES
        } else {
            http2::DATA_FRAME_BUDGET_BYTES
        })
        // The library ends the whole connection not far above its limit. Ours is looked at when a
        // head is there, and costs only its own request.
        .max_header_list_size(
            u32::try_from(settings.limits.head_bytes).unwrap_or(u32::MAX).saturating_mul(2),
        );
    if settings.upgrades.websocket {
        builder.enable_connect_protocol();
    }
    builder
}

/// Resolves when the connection should take no more requests: the process drains, a certificate of the client
/// ended or was revoked, the connection is too old, too many of its streams broke a rule, or it has had neither a
/// stream nor a frame for the idle timeout. The last takes up to twice the timeout: frames are checked for at
/// intervals, so that no frame reads the clock.
async fn ending(
    settings: &HttpService,
    connection: &ClientConnection,
    drain: &weft_runtime::drain::Drain,
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
        () = drain.reached(Phase::Draining) => {}
        () = connection.draining() => {}
        () = monitor.renewal_due() => {}
    }
}

/// Whether a request is to be served: its client has not reset it yet, and may still send requests.
fn is_wanted(
    respond: &mut h2::server::SendResponse<bytes::Bytes>,
    connection: &ClientConnection,
    worker: &SidecarWorker,
) -> bool {
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    if respond.poll_reset(&mut cx).is_ready() {
        // An endpoint must not see it: there each such request counts against a connection of many clients.
        pipeline::refused(Denial::ClientGone, HttpVersion::Http2, connection, worker);
        return false;
    }
    if connection.is_draining() {
        // It was not looked at, and may be sent again elsewhere (RFC 9113, section 8.7).
        respond.send_reset(h2::Reason::REFUSED_STREAM);
        return false;
    }
    true
}

/// Reads and drops what a client still sends for a request that was answered: a reset would reach the
/// client in the middle of its upload, and each frame behind a reset costs the connection a reset more.
/// Its flow-control window goes back to the other streams at once. Behind the limits the stream is reset
/// with `NO_ERROR` (RFC 9113, section 8.1) when `body` is dropped.
async fn discard(body: &mut http2::ReceivedBody) {
    // What was read ahead and not sent on.
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
        tracing::debug!("a client still sends a body long after its answer");
    }
}

/// Counts and logs a request whose body has no place in the budget of windows.
fn refuse_body(connection: &ClientConnection, worker: &SidecarWorker) {
    worker.metrics.http2_window_refusals.increment();
    if worker.windows.is_first_refusal() {
        tracing::warn!(
            client = %connection.client,
            "request bodies refused: the window limit (--window-limit) is in use"
        );
    }
    pipeline::refused(Denial::Overloaded, HttpVersion::Http2, connection, worker);
}

/// One stream of a connection.
struct Http2RequestStream {
    /// How many are open.
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
                pipeline::request(head, source, &mut reply, &self.connection, &worker).await;
            }
            Err(http2::RefusedHead { denial, is_grpc }) => {
                pipeline::refused(denial, HttpVersion::Http2, &self.connection, &worker);
                reply.deny(denial, is_grpc, None).await;
            }
        }
        if receiving.is_some() && !body.is_end() {
            Box::pin(discard(&mut body)).await;
        }
    }
}
