//! Connections to endpoints, kept for the next request. Each worker has its own.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::future::poll_immediate;
use h2::client::SendRequest;
use tokio::io::AsyncReadExt;

use crate::http::h1::{Reader, Writer};
use crate::http::h2::{CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES};
use crate::plan::Target;
use crate::stream::Half;
use crate::tls::{Alpn, connector};
use crate::worker::{Worker, now};

/// How many idle HTTP/1.1 connections are kept to an endpoint.
const IDLE_LIMIT: usize = 256;
/// How long an idle connection is kept: shorter than servers commonly do, so that we close first.
const IDLE_TIMEOUT: Duration = Duration::from_secs(50);

/// A target's endpoint. The target's number changes when its TLS does, so that no connection made
/// under other secrets is used again.
type Key = (u64, SocketAddr);

/// The connections of a worker.
#[derive(Debug, Default)]
pub(crate) struct Pools {
    http1: RefCell<HashMap<Key, Vec<(Instant, Http1)>>>,
    http2: RefCell<HashMap<Key, SendRequest<Bytes>>>,
}

/// An HTTP/1.1 connection.
#[derive(Debug)]
pub(crate) struct Http1 {
    pub(crate) reader: Reader,
    pub(crate) writer: Writer,
    /// Whether a request went over it before: then the endpoint may have closed it meanwhile.
    pub(crate) used: bool,
}

impl Pools {
    /// A connection to an endpoint: one that waits, or a new one.
    pub(crate) async fn http1(
        &self,
        target: &Target,
        address: SocketAddr,
        worker: &Worker,
    ) -> io::Result<Http1> {
        while let Some(mut connection) = self.take((target.id, address)) {
            if is_alive(&mut connection) {
                return Ok(connection);
            }
        }
        let stream = connector::connect(target, address, Alpn::Http1, worker.shared.mark).await?;
        worker.metrics.upstream_connections.increment();
        let (read, write) = Half::pair(stream);
        Ok(Http1 {
            reader: Reader { half: read, buffer: BytesMut::new() },
            writer: Writer { half: write, out: BytesMut::new() },
            used: false,
        })
    }

    fn take(&self, key: Key) -> Option<Http1> {
        let mut pools = self.http1.borrow_mut();
        let (since, connection) = pools.get_mut(&key)?.pop()?;
        // The newest is on top: when that is too old, all are.
        if now().saturating_duration_since(since) < IDLE_TIMEOUT { Some(connection) } else { None }
    }

    /// Keeps a connection whose response was read whole.
    pub(crate) fn give_back(&self, target: &Target, address: SocketAddr, mut connection: Http1) {
        if !connection.reader.buffer.is_empty() {
            // Bytes that nobody asked for: whose they are cannot be told.
            return;
        }
        connection.used = true;
        let mut pools = self.http1.borrow_mut();
        let idle = pools.entry((target.id, address)).or_default();
        if idle.len() < IDLE_LIMIT {
            idle.push((now(), connection));
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
            idle.retain(|(since, _)| now.saturating_duration_since(*since) < IDLE_TIMEOUT);
            is_current(*target) && !idle.is_empty()
        });
        self.http2.borrow_mut().retain(|(target, _), _| is_current(*target));
    }
}

/// Whether an idle connection is still open and silent. Whatever it has to say, it cannot be an
/// answer to a request that was not sent.
fn is_alive(connection: &mut Http1) -> bool {
    let mut probe = [0; 1];
    let read = connection.reader.half.read(&mut probe);
    let mut polled = Box::pin(poll_immediate(read));
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    matches!(Future::poll(polled.as_mut(), &mut cx), Poll::Ready(None))
}
