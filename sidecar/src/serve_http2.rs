//! Serves the requests of a connection of HTTP/2: a task for every stream.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use weft_model::HttpService;
use weft_runtime::drain::Phase;

use crate::denial::Denial;
use crate::http::body::Source;
use crate::http::h2 as http2;
use crate::http::h2_budget::{Counted, Watch};
use crate::http::head::{HttpVersion, RequestHead};
use crate::pipeline::{self, Connection};
use crate::reply::Reply;
use crate::stream::Stream;
use crate::worker::Worker;

/// How long a client that is told to calm down has to take the message.
const CALM: Duration = Duration::from_millis(200);
/// How much of the responses to one connection waits in our memory for it to take them.
const SEND_BUFFER_BYTES: usize = 256 * 1024;
/// How many streams that the client opened and reset, and how many that we reset because it broke the
/// rules, one connection may have behind it at once: each costs work that nobody wants.
const RESET_LIMIT: usize = 100;

/// Serves a connection until it ends.
pub(crate) async fn serve(
    stream: Stream,
    connection: Rc<Connection>,
    settings: &HttpService,
    worker: &Rc<Worker>,
) {
    let (stream, watch) = Counted::new(stream);
    let exhausted = watch.exhausted();
    tokio::pin!(exhausted);
    let handshake = builder(settings).handshake(stream);
    let handshake = tokio::select! {
        handshake = tokio::time::timeout(settings.timeouts.head, handshake) => handshake,
        () = &mut exhausted => return worker.metrics.floods.increment(),
    };
    let Ok(Ok(mut streams)) = handshake else {
        return;
    };
    let open = Rc::<Cell<usize>>::default();
    let drain = worker.shared.drain.clone();
    let ending = ending(settings, &drain, &watch, &open);
    tokio::pin!(ending);
    let (mut is_told, mut left) = (false, settings.limits.requests_per_connection);
    loop {
        let next = tokio::select! {
            next = streams.accept() => next,
            () = &mut exhausted => {
                worker.metrics.floods.increment();
                tracing::debug!(client = %connection.client, "a flood of HTTP/2 frames");
                streams.abrupt_shutdown(h2::Reason::ENHANCE_YOUR_CALM);
                // It may not take our answer either.
                drop(tokio::time::timeout(CALM, streams.accept()).await);
                return;
            }
            () = &mut ending, if !is_told => {
                is_told = true;
                streams.graceful_shutdown();
                continue;
            }
        };
        match next {
            Some(Ok((request, respond))) => {
                let (head, body) = http2::request(request, &settings.limits);
                let stream = OneStream { open: open.clone(), connection: connection.clone() };
                open.set(open.get() + 1);
                tokio::task::spawn_local(stream.serve(head, body, respond, worker.clone()));
                left = left.map(|left| left.saturating_sub(1));
                if left == Some(0) && !is_told {
                    is_told = true;
                    streams.graceful_shutdown();
                }
            }
            Some(Err(error)) => {
                tracing::debug!(%error, "an HTTP/2 connection ended");
                return;
            }
            None => return,
        }
    }
}

fn builder(settings: &HttpService) -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(http2::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(http2::CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(settings.limits.streams)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .max_pending_accept_reset_streams(RESET_LIMIT)
        .max_local_error_reset_streams(Some(RESET_LIMIT))
        .data_frame_budget(http2::DATA_FRAME_BUDGET_BYTES)
        // The library ends the whole connection not far above its limit. Ours is looked at when a
        // head is there, and costs only its own request.
        .max_header_list_size(
            u32::try_from(settings.limits.head_bytes).unwrap_or(u32::MAX).saturating_mul(4),
        );
    if settings.upgrades.websocket {
        builder.enable_connect_protocol();
    }
    builder
}

/// Resolves when the connection should take no more requests: the process ends, it is too old, or it
/// has had neither a stream nor a frame for too long.
async fn ending(
    settings: &HttpService,
    drain: &weft_runtime::drain::Drain,
    watch: &Watch,
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
            let seen = watch.received();
            tokio::time::sleep(settings.timeouts.idle).await;
            if open.get() == 0 && watch.received() == seen {
                return;
            }
        }
    };
    tokio::select! {
        () = aged => {}
        () = idle => {}
        () = drain.reached(Phase::Draining) => {}
    }
}

/// One stream of a connection.
struct OneStream {
    /// How many are open.
    open: Rc<Cell<usize>>,
    connection: Rc<Connection>,
}

impl Drop for OneStream {
    fn drop(&mut self) {
        self.open.set(self.open.get().saturating_sub(1));
    }
}

impl OneStream {
    async fn serve(
        self,
        head: Result<RequestHead, Denial>,
        body: h2::RecvStream,
        mut respond: h2::server::SendResponse<bytes::Bytes>,
        worker: Rc<Worker>,
    ) {
        let mut reply = Reply::Http2 { respond: &mut respond, started: false };
        match head {
            Ok(head) => {
                let source = if body.is_end_stream() { Source::Empty } else { Source::Http2(body) };
                pipeline::request(head, source, &mut reply, &self.connection, &worker).await;
            }
            Err(denial) => {
                pipeline::refused(denial, HttpVersion::Http2, &self.connection, &worker);
                reply.deny(denial, false).await;
            }
        }
    }
}
