//! Connections to endpoints, kept for the next request. Each worker has its own.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::SendRequest;

use crate::http::h1::{Reader, Writer};
use crate::http::h2::{CONNECTION_WINDOW_BYTES, DATA_FRAME_BUDGET_BYTES, STREAM_WINDOW_BYTES};
use crate::plan::Target;
use crate::stream::Half;
use crate::tls::{Alpn, connector};
use crate::worker::{Worker, now};

/// How many idle HTTP/1.1 connections are kept to an endpoint.
const IDLE_LIMIT: usize = 256;
/// How much earlier than it said an endpoint is expected to close: what it sends takes its time to us,
/// and a request takes its time to it.
const EARLIER: Duration = Duration::from_secs(1);

/// A target's endpoint. The target's number changes when its TLS does, so that no connection made
/// under other secrets is used again.
type Key = (u64, SocketAddr);

/// The connections of a worker.
#[derive(Debug, Default)]
pub(crate) struct Pools {
    http1: RefCell<HashMap<Key, Vec<Waiting>>>,
    http2: RefCell<HashMap<Key, SendRequest<Bytes>>>,
}

/// A connection that waits for a request.
#[derive(Debug)]
struct Waiting {
    /// When it is closed.
    until: Instant,
    connection: Http1,
}

/// An HTTP/1.1 connection.
#[derive(Debug)]
pub(crate) struct Http1 {
    pub(crate) reader: Reader,
    pub(crate) writer: Writer,
    /// Whether a request went over it before: then the endpoint may have closed it meanwhile.
    pub(crate) used: bool,
    /// How long the endpoint said that it keeps the connection (`keep-alive: timeout=`).
    pub(crate) kept_for: Option<Duration>,
}

impl Pools {
    /// A connection to an endpoint: one that waits, or a new one.
    pub(crate) async fn http1(
        &self,
        target: &Target,
        address: SocketAddr,
        worker: &Worker,
    ) -> io::Result<Http1> {
        while let Some(connection) = self.take((target.id, address)) {
            if is_alive(&connection) {
                return Ok(connection);
            }
        }
        let stream = connector::connect(target, address, Alpn::Http1, worker.shared.mark).await?;
        worker.metrics.upstream_connections.increment();
        let (read, write) = Half::pair(stream);
        Ok(Http1 {
            reader: Reader::new(read),
            writer: Writer::new(write, target.cluster.idle_timeout),
            used: false,
            kept_for: None,
        })
    }

    fn take(&self, key: Key) -> Option<Http1> {
        let mut pools = self.http1.borrow_mut();
        let waiting = pools.get_mut(&key)?.pop()?;
        // The newest is on top, and the others wait no longer than it.
        if now() < waiting.until { Some(waiting.connection) } else { None }
    }

    /// Keeps a connection whose response was read whole.
    pub(crate) fn give_back(&self, target: &Target, address: SocketAddr, mut connection: Http1) {
        if !connection.reader.buffer.is_empty() || !connection.writer.out.is_empty() {
            // Bytes that nobody asked for, or that nobody took: whose they are cannot be told.
            return;
        }
        let said = connection.kept_for.map(|kept| kept.saturating_sub(EARLIER));
        let wait = said.unwrap_or(Duration::MAX).min(target.cluster.idle_timeout);
        if wait.is_zero() {
            return;
        }
        connection.used = true;
        connection.reader.rest();
        connection.writer.rest();
        let mut pools = self.http1.borrow_mut();
        let idle = pools.entry((target.id, address)).or_default();
        if idle.len() < IDLE_LIMIT {
            idle.push(Waiting { until: now() + wait, connection });
        }
    }

    /// A sender on an HTTP/2 connection to an endpoint: the one there is, or a new one.
    pub(crate) async fn http2(
        &self,
        target: &Target,
        address: SocketAddr,
        worker: &Worker,
    ) -> io::Result<SendRequest<Bytes>> {
        let key = (target.id, address);
        let held = self.http2.borrow().get(&key).cloned();
        if let Some(sender) = held {
            match sender.ready().await {
                Ok(sender) => return Ok(sender),
                Err(_) => drop(self.http2.borrow_mut().remove(&key)),
            }
        }
        let stream = connector::connect(target, address, Alpn::Http2, worker.shared.mark).await?;
        worker.metrics.upstream_connections.increment();
        let (sender, connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .enable_push(false)
            .max_header_list_size(
                u32::try_from(target.cluster.response_head_bytes).unwrap_or(u32::MAX),
            )
            .data_frame_budget(DATA_FRAME_BUDGET_BYTES)
            .handshake(stream)
            .await
            .map_err(io::Error::other)?;
        tokio::task::spawn_local(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "an HTTP/2 connection to an endpoint ended");
            }
        });
        let sender = sender.ready().await.map_err(io::Error::other)?;
        self.http2.borrow_mut().insert(key, sender.clone());
        Ok(sender)
    }

    /// Forgets an HTTP/2 connection that has failed.
    pub(crate) fn forget_http2(&self, target: &Target, address: SocketAddr) {
        self.http2.borrow_mut().remove(&(target.id, address));
    }

    /// Closes what has waited too long, and what `is_current` no longer knows.
    pub(crate) fn sweep(&self, is_current: impl Fn(u64) -> bool) {
        let now = now();
        self.http1.borrow_mut().retain(|(target, _), idle| {
            idle.retain(|waiting| now < waiting.until);
            is_current(*target) && !idle.is_empty()
        });
        self.http2.borrow_mut().retain(|(target, _), _| is_current(*target));
    }
}

/// Whether an idle connection is still open and silent, as far as the worker's event loop knows: what
/// it does not know yet is the rare case that a request is sent again for. Whatever the endpoint has to
/// say, it cannot be an answer to a request that was not sent.
fn is_alive(connection: &Http1) -> bool {
    !connection.reader.half.has_news()
}
