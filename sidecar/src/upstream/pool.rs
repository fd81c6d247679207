//! Connections to endpoints, kept for the next request. Each worker has its own.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::SendRequest;
use tokio::sync::Notify;

use crate::config_map::ConfigMap;
use crate::connection_registry::ConnectionStatus;
use crate::http::h1::{Http1Reader, Http1Writer};
use crate::http::h2::{SEND_BUFFER_BYTES, STREAM_WINDOW_BYTES};
use crate::http::h2_endpoint_guard::{EndpointAlert, Http2EndpointGuard};
use crate::plan::PlannedCluster;
use crate::stream::StreamHalf;
use crate::tls::{Alpn, connector};
use crate::worker::{SidecarWorker, now};

use super::{Slot, Slots};
use crate::http2_windows::{BodyPermit, ConnectionWindow};

/// How many idle HTTP/1.1 connections are kept to an endpoint.
const IDLE_LIMIT: usize = 256;
/// How many HTTP/2 connections are open to an endpoint, when it takes too few streams on each.
const HTTP2_LIMIT: usize = 8;
/// How long an HTTP/2 connection is kept without a stream.
const HTTP2_IDLE: Duration = Duration::from_secs(60);
/// How many streams that we reset are remembered, so that frames that the endpoint sent before it knew need
/// no answer.
const RESETS_REMEMBERED: usize = 4_096;
/// How much earlier than it said an endpoint is expected to close: what it sends takes its time to us,
/// and a request takes its time to it.
const EARLIER: Duration = Duration::from_secs(1);

/// A target's endpoint. The target's number changes when its TLS does, so that no connection made
/// under other secrets is used again.
type PoolKey = (u64, SocketAddr);

/// The connections of a worker.
#[derive(Debug, Default)]
pub(crate) struct Pools {
    http1: RefCell<ConfigMap<PoolKey, Vec<IdleConnection>>>,
    http2: RefCell<ConfigMap<PoolKey, Vec<Http2Connection>>>,
    /// Held while a connection of HTTP/2 is being made.
    making: RefCell<ConfigMap<PoolKey, Rc<tokio::sync::Mutex<()>>>>,
    pub(crate) slots: Slots,
}

/// A connection that waits for a request.
#[derive(Debug)]
struct IdleConnection {
    /// When it is closed.
    until: Instant,
    connection: Http1Connection,
}

/// An HTTP/1.1 connection.
#[derive(Debug)]
pub(crate) struct Http1Connection {
    pub(crate) reader: Http1Reader,
    pub(crate) writer: Http1Writer,
    /// Whether a request went over it before: then the endpoint may have closed it meanwhile.
    pub(crate) used: bool,
    /// How long the endpoint said that it keeps the connection (`keep-alive: timeout=`).
    pub(crate) kept_for: Option<Duration>,
    /// Whether one client has authenticated on it, or may: then no other client may use it.
    pub(crate) is_personal: bool,
    slot: Slot,
}

/// An HTTP/2 connection.
#[derive(Debug)]
struct Http2Connection {
    /// Whether what the endpoint proved still stands; none where it proved nothing.
    standing: Option<Rc<ConnectionStatus>>,
    sender: SendRequest<Bytes>,
    greeting: Rc<SettingsReceived>,
    alert: EndpointAlert,
    /// How many streams of ours are open on it.
    open: Rc<Cell<usize>>,
    window: Rc<ConnectionWindow>,
    /// Since when it was seen without any.
    idle_since: Option<Instant>,
}

impl Http2Connection {
    /// None when the window limit is in use.
    fn lease(&mut self) -> Option<StreamLease> {
        let receiving = self.window.receive()?;
        Some(self.lease_with(receiving))
    }

    fn lease_with(&mut self, receiving: BodyPermit) -> StreamLease {
        self.idle_since = None;
        self.open.set(self.open.get() + 1);
        let (sender, greeting) = (self.sender.clone(), self.greeting.clone());
        let open = OpenStream { count: self.open.clone(), _receiving: receiving };
        StreamLease { sender, greeting, alert: self.alert.clone(), open }
    }
}

/// Whether the endpoint has said what it offers.
#[derive(Debug, Default)]
pub(crate) struct SettingsReceived {
    came: Cell<bool>,
    news: Notify,
}

impl SettingsReceived {
    /// Waits until it has.
    pub(crate) async fn heard(&self) {
        while !self.came.get() {
            self.news.notified().await;
        }
        // Whoever else waits is told too.
        self.news.notify_one();
    }

    fn hear(&self) {
        self.came.set(true);
        self.news.notify_one();
    }
}

/// The right to open one stream on an HTTP/2 connection.
#[derive(Debug)]
pub(crate) struct StreamLease {
    pub(crate) sender: SendRequest<Bytes>,
    pub(crate) greeting: Rc<SettingsReceived>,
    pub(crate) alert: EndpointAlert,
    /// Held for as long as the stream is open.
    pub(crate) open: OpenStream,
}

/// One open stream.
#[derive(Debug)]
pub(crate) struct OpenStream {
    count: Rc<Cell<usize>>,
    _receiving: BodyPermit,
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.count.set(self.count.get().saturating_sub(1));
    }
}

impl Pools {
    /// A connection to an endpoint: one that waits, or a new one, and surely that when it must be `fresh`.
    pub(crate) async fn http1(
        &self,
        target: &PlannedCluster,
        address: SocketAddr,
        fresh: bool,
        worker: &SidecarWorker,
    ) -> io::Result<Http1Connection> {
        let mut deadline = None;
        let slot = loop {
            while let Some(connection) = self.take((target.id, address)).filter(|_| !fresh) {
                if is_alive(&connection) {
                    return Ok(connection);
                }
            }
            match self.slots.take(target, address) {
                Some(slot) => break slot,
                None => {
                    let latest = || now() + target.cluster.connect_timeout;
                    self.await_free(target, *deadline.get_or_insert_with(latest)).await?;
                }
            }
        };
        // Apart, since most requests find one that waits.
        let connecting = connector::connect(target, address, Alpn::Http1, worker);
        let stream = Box::pin(connecting).await?;
        worker.metrics.upstream_connections.increment();
        let (read, write) = StreamHalf::pair(stream);
        Ok(Http1Connection {
            reader: Http1Reader::new(read),
            // Each request sets its own.
            writer: Http1Writer::new(write, target.cluster.connect_timeout),
            used: false,
            kept_for: None,
            is_personal: false,
            slot,
        })
    }

    /// Waits, at the limit of connections, until one of them may be used.
    async fn await_free(&self, target: &PlannedCluster, deadline: Instant) -> io::Result<()> {
        let freed = self.slots.freed(target);
        let waiting = tokio::time::timeout_at(deadline.into(), freed);
        waiting.await.map_err(|_| full("max_connections"))
    }

    fn take(&self, key: PoolKey) -> Option<Http1Connection> {
        let mut pools = self.http1.borrow_mut();
        let waiting = pools.get_mut(&key)?.pop()?;
        // The newest is on top, and the others wait no longer than it.
        if now() < waiting.until { Some(waiting.connection) } else { None }
    }

    /// Keeps a connection whose response was read whole.
    pub(crate) fn give_back(
        &self,
        target: &PlannedCluster,
        address: SocketAddr,
        mut connection: Http1Connection,
    ) {
        if !connection.reader.buffer.is_empty() || !connection.writer.out.is_empty() {
            // Bytes that nobody asked for, or that nobody took: whose they are cannot be told.
            return;
        }
        let said = connection.kept_for.map(|kept| kept.saturating_sub(EARLIER));
        let wait = said.unwrap_or(Duration::MAX).min(target.cluster.idle_timeout);
        if wait.is_zero() || connection.reader.half.is_draining() {
            return;
        }
        connection.used = true;
        connection.reader.rest();
        connection.writer.rest();
        let mut pools = self.http1.borrow_mut();
        let idle = pools.entry((target.id, address)).or_default();
        if idle.len() < IDLE_LIMIT {
            connection.slot.free();
            idle.push(IdleConnection { until: now() + wait, connection });
        }
    }

    /// The right to a stream on an HTTP/2 connection to an endpoint: one that has room for another, or
    /// a new one. While one is being made, others wait for it.
    pub(crate) async fn http2(
        &self,
        target: &PlannedCluster,
        address: SocketAddr,
        worker: &SidecarWorker,
    ) -> io::Result<StreamLease> {
        let key = (target.id, address);
        if let Some(lease) = self.http2_with_room(key) {
            return Ok(lease);
        }
        let making = self.making.borrow_mut().entry(key).or_default().clone();
        let _first = making.lock().await;
        if let Some(lease) = self.http2_with_room(key) {
            return Ok(lease);
        }
        let slot = self.slots.take(target, address);
        if let Some(mut lease) = self.least_open_of_all(key, slot.is_some()) {
            // It is ready when one of its streams has ended.
            lease.sender = lease.sender.ready().await.map_err(io::Error::other)?;
            return Ok(lease);
        }
        let slot = slot.ok_or_else(|| full("max_connections"))?;
        let window = worker.upstream_windows.open();
        // Before a handshake, which would be for nothing.
        let receiving = window.receive().ok_or_else(|| full("the window limit"))?;
        let connecting = connect_http2(target, address, (slot, window), worker);
        let mut connection = Box::pin(connecting).await?;
        let lease = connection.lease_with(receiving);
        self.http2.borrow_mut().entry(key).or_default().push(connection);
        Ok(lease)
    }

    /// One whose endpoint takes another stream. What has ended is forgotten.
    fn http2_with_room(&self, key: PoolKey) -> Option<StreamLease> {
        let mut pools = self.http2.borrow_mut();
        let mut found = None;
        pools.get_mut(&key)?.retain_mut(|connection| {
            if found.is_some() {
                return true;
            }
            if connection.standing.as_ref().is_some_and(|standing| standing.is_draining()) {
                return false;
            }
            let sender = &mut connection.sender;
            let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
            match sender.poll_ready(&mut cx) {
                Poll::Ready(Ok(())) => {
                    if connection.open.get() < sender.current_max_send_streams() {
                        found = connection.lease();
                    }
                    true
                }
                Poll::Pending => true,
                Poll::Ready(Err(_)) => false,
            }
        });
        found
    }

    /// When there may be no more connections: that with the fewest streams.
    fn least_open_of_all(&self, key: PoolKey, may_be_more: bool) -> Option<StreamLease> {
        let mut pools = self.http2.borrow_mut();
        let held = pools.get_mut(&key).filter(|held| held.len() >= HTTP2_LIMIT || !may_be_more)?;
        held.iter_mut()
            .min_by_key(|connection| connection.open.get())
            .and_then(Http2Connection::lease)
    }

    /// Forgets an HTTP/2 connection that has failed.
    pub(crate) fn forget_http2(&self, target: &PlannedCluster, address: SocketAddr) {
        self.http2.borrow_mut().remove(&(target.id, address));
    }

    /// Closes what has waited too long, and what `is_current` no longer knows.
    pub(crate) fn sweep(&self, is_current: impl Fn(u64) -> bool) {
        let now = now();
        self.http2.borrow_mut().retain(|(target, _), held| {
            held.retain_mut(|connection| {
                if connection.open.get() > 0 {
                    connection.idle_since = None;
                    return true;
                }
                let since = *connection.idle_since.get_or_insert(now);
                now.saturating_duration_since(since) < HTTP2_IDLE
            });
            is_current(*target) && !held.is_empty()
        });
        self.http1.borrow_mut().retain(|(target, _), idle| {
            idle.retain(|waiting| now < waiting.until);
            is_current(*target) && !idle.is_empty()
        });
        self.making.borrow_mut().retain(|(target, _), _| is_current(*target));
        self.slots.sweep();
    }
}

async fn connect_http2(
    target: &PlannedCluster,
    address: SocketAddr,
    (slot, window): (Slot, Rc<ConnectionWindow>),
    worker: &SidecarWorker,
) -> io::Result<Http2Connection> {
    let stream = connector::connect(target, address, Alpn::Http2, worker).await?;
    let standing = stream.standing().cloned();
    worker.metrics.upstream_connections.increment();
    let alert = EndpointAlert::default();
    let (sender, mut connection) = h2::client::Builder::new()
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(window.bytes)
        .enable_push(false)
        .max_header_list_size(
            // The library's limit is the first size that is too large.
            u32::try_from(target.cluster.response_head_bytes + 1).unwrap_or(u32::MAX),
        )
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        // Requests of many clients share it: what one of them cancels, or reads slowly, must not end
        // the others'. What the endpoint sends is limited by `Http2EndpointGuard`.
        .max_concurrent_reset_streams(RESETS_REMEMBERED)
        .max_local_error_reset_streams(None)
        .data_frame_budget(usize::MAX)
        .handshake(Http2EndpointGuard::new(stream, alert.clone()))
        .await
        .map_err(io::Error::other)?;
    let greeting = Rc::<SettingsReceived>::default();
    if let Some(mut pings) = connection.ping_pong() {
        let greeting = greeting.clone();
        tokio::task::spawn_local(async move {
            // The answer comes behind the endpoint's settings.
            if pings.ping(h2::Ping::opaque()).await.is_ok() {
                greeting.hear();
            }
        });
    }
    // For as long as the connection lives, which may outlive its place in the pool.
    let held = (slot, window.clone());
    let metrics = worker.metrics.clone();
    let ended_by = alert.clone();
    tokio::task::spawn_local(async move {
        let _held = held;
        if let Err(error) = connection.await {
            tracing::debug!(%error, "an HTTP/2 connection to an endpoint ended");
        }
        if let Some(failure) = ended_by.get() {
            metrics.fail_upstream_handshake(failure);
        }
    });
    let sender = sender.ready().await.map_err(io::Error::other)?;
    let open = Rc::default();
    let idle_since = None;
    Ok(Http2Connection { standing, sender, greeting, alert, open, window, idle_since })
}

/// That there is no room for another connection.
fn full(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::QuotaExceeded, format!("{what} is used up"))
}

/// Whether an idle connection is still open and silent, as far as the worker's event loop knows: what
/// it does not know yet is the rare case that a request is sent again for. Whatever the endpoint has to
/// say, it cannot be an answer to a request that was not sent.
pub(super) fn is_alive(connection: &Http1Connection) -> bool {
    let half = &connection.reader.half;
    !half.is_draining() && !half.has_events()
}
