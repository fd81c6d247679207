//! Pools of connections to endpoints. Each worker has its own.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::SendRequest;
use tokio::sync::Notify;
use weft_runtime::clock::now;
use weft_runtime::connections::ConnectionStatus;

use crate::config_map::ConfigMap;
use crate::http::h1::{Http1Reader, Http1Writer};
use crate::http::h2::{SEND_BUFFER_BYTES, STREAM_WINDOW_BYTES};
use crate::http::h2_endpoint_guard::{EndpointAlert, Http2EndpointGuard};
use crate::plan::PlannedCluster;
use crate::stream::StreamHalf;
use crate::tls::Alpn;
use crate::tls::connector::Connector;

use super::{Slot, Slots};
use crate::http2_windows::{BodyPermit, ConnectionWindow, WindowBudget};

/// How many idle HTTP/1.1 connections are kept to an endpoint.
const IDLE_LIMIT: usize = 256;
/// How many HTTP/2 connections may be open to an endpoint that limits the streams on each.
const HTTP2_LIMIT: usize = 8;
/// How long an HTTP/2 connection without streams is kept.
const HTTP2_IDLE: Duration = Duration::from_secs(60);
/// How many reset streams the h2 crate remembers, so that late frames of the endpoint for them are ignored.
const RESETS_REMEMBERED: usize = 4_096;
/// How much earlier than announced by `keep-alive: timeout=` an endpoint is expected to close, because of the latency
/// in both directions.
const CLOSE_MARGIN: Duration = Duration::from_secs(1);

/// Target ID and endpoint. The ID of a cluster changes with its TLS settings, so that no connection with old secrets is
/// reused.
type PoolKey = (u64, SocketAddr);

/// The connections of a worker.
#[derive(Debug)]
pub(crate) struct Pools {
    connector: Rc<Connector>,
    /// The budget for the receive windows of HTTP/2 connections.
    windows: WindowBudget,
    http1: RefCell<ConfigMap<PoolKey, Vec<IdleConnection>>>,
    http2: RefCell<ConfigMap<PoolKey, Vec<Http2Connection>>>,
    /// Locked while an HTTP/2 connection is being established.
    connecting: RefCell<ConfigMap<PoolKey, Rc<tokio::sync::Mutex<()>>>>,
    pub(crate) slots: Slots,
}

/// An idle HTTP/1.1 connection.
#[derive(Debug)]
struct IdleConnection {
    /// When it is closed if it is not used.
    until: Instant,
    connection: Http1Connection,
}

/// An HTTP/1.1 connection.
#[derive(Debug)]
pub(crate) struct Http1Connection {
    pub(crate) reader: Http1Reader,
    pub(crate) writer: Http1Writer,
    /// Whether a request was sent over it before: then the endpoint may have closed it since.
    pub(crate) used: bool,
    /// How long the endpoint keeps an idle connection (`keep-alive: timeout=`).
    pub(crate) keep_alive_timeout: Option<Duration>,
    /// Whether a client has authenticated the connection by NTLM or Negotiate, or may: no other client may use it.
    pub(crate) is_personal: bool,
    slot: Slot,
}

/// An HTTP/2 connection.
#[derive(Debug)]
struct Http2Connection {
    /// Whether the endpoint's certificate is still accepted; none when it was not verified.
    status: Option<Rc<ConnectionStatus>>,
    sender: SendRequest<Bytes>,
    settings: Rc<SettingsReceived>,
    alert: EndpointAlert,
    /// The number of open streams.
    open: Rc<Cell<usize>>,
    window: Rc<ConnectionWindow>,
    /// When it was first seen without open streams.
    idle_since: Option<Instant>,
}

impl Http2Connection {
    /// Permission for a new stream. None when the limit of receive windows is reached.
    fn lease(&mut self) -> Option<StreamLease> {
        let receiving = self.window.receive()?;
        Some(self.lease_with(receiving))
    }

    fn lease_with(&mut self, receiving: BodyPermit) -> StreamLease {
        self.idle_since = None;
        self.open.set(self.open.get() + 1);
        StreamLease {
            sender: self.sender.clone(),
            settings: self.settings.clone(),
            alert: self.alert.clone(),
            open: OpenStream { count: self.open.clone(), _receiving: receiving },
        }
    }
}

/// Whether the SETTINGS frame of an endpoint was received.
#[derive(Debug, Default)]
pub(crate) struct SettingsReceived {
    is_received: Cell<bool>,
    changed: Notify,
}

impl SettingsReceived {
    /// Waits until it was received.
    pub(crate) async fn wait(&self) {
        while !self.is_received.get() {
            self.changed.notified().await;
        }
        // `notify_one` wakes one waiter, which wakes the next.
        self.changed.notify_one();
    }

    fn set(&self) {
        self.is_received.set(true);
        self.changed.notify_one();
    }
}

/// The permission to open one stream on an HTTP/2 connection.
#[derive(Debug)]
pub(crate) struct StreamLease {
    pub(crate) sender: SendRequest<Bytes>,
    pub(crate) settings: Rc<SettingsReceived>,
    pub(crate) alert: EndpointAlert,
    /// Dropped when the stream ends.
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
    /// Pools without connections.
    pub(crate) fn new(connector: Rc<Connector>, windows: WindowBudget) -> Self {
        Self {
            connector,
            windows,
            http1: RefCell::default(),
            http2: RefCell::default(),
            connecting: RefCell::default(),
            slots: Slots::default(),
        }
    }

    /// An HTTP/1.1 connection to an endpoint: an idle one, or a new one. Always a new one with `fresh`.
    ///
    /// # Errors
    /// When connecting fails, or no connection becomes free below the limit within the connect timeout.
    pub(crate) async fn http1(
        &self,
        cluster: &PlannedCluster,
        address: SocketAddr,
        fresh: bool,
    ) -> io::Result<Http1Connection> {
        let mut deadline = None;
        let slot = loop {
            while let Some(connection) = self.take((cluster.id, address)).filter(|_| !fresh) {
                if is_alive(&connection) {
                    return Ok(connection);
                }
            }
            match self.slots.take(cluster, address) {
                Some(slot) => break slot,
                None => {
                    let timeout = || now() + cluster.settings.connect_timeout;
                    self.wait_for_slot(cluster, *deadline.get_or_insert_with(timeout)).await?;
                }
            }
        };
        // Boxed, because most requests reuse a connection.
        let connecting = self.connector.connect(cluster, address, Alpn::Http1);
        let stream = Box::pin(connecting).await?;
        self.connector.metrics.upstream_connections.increment();
        let (read, write) = StreamHalf::pair(stream);
        Ok(Http1Connection {
            reader: Http1Reader::new(read),
            // Each request sets its own stall timeout.
            writer: Http1Writer::new(write, cluster.settings.connect_timeout),
            used: false,
            keep_alive_timeout: None,
            is_personal: false,
            slot,
        })
    }

    /// Waits until a connection becomes idle or is closed, when the limit of connections is reached.
    async fn wait_for_slot(&self, cluster: &PlannedCluster, deadline: Instant) -> io::Result<()> {
        let freed = self.slots.freed(cluster);
        let waiting = tokio::time::timeout_at(deadline.into(), freed);
        waiting.await.map_err(|_| limit_reached("max_connections"))
    }

    fn take(&self, key: PoolKey) -> Option<Http1Connection> {
        let mut pools = self.http1.borrow_mut();
        let waiting = pools.get_mut(&key)?.pop()?;
        // The newest is the last; when it has expired, so have the others.
        if now() < waiting.until { Some(waiting.connection) } else { None }
    }

    /// Returns a connection whose response was read completely to the pool.
    pub(crate) fn return_idle(
        &self,
        cluster: &PlannedCluster,
        address: SocketAddr,
        mut connection: Http1Connection,
    ) {
        if !connection.reader.buffer.is_empty() || !connection.writer.out.is_empty() {
            // Unexpected or unsent bytes would be attributed to the next request.
            return;
        }
        let announced =
            connection.keep_alive_timeout.map(|timeout| timeout.saturating_sub(CLOSE_MARGIN));
        let wait = announced.unwrap_or(Duration::MAX).min(cluster.settings.idle_timeout);
        if wait.is_zero() || connection.reader.half.is_draining() {
            return;
        }
        connection.used = true;
        connection.reader.release_buffer();
        connection.writer.release_buffer();
        let mut pools = self.http1.borrow_mut();
        let idle = pools.entry((cluster.id, address)).or_default();
        if idle.len() < IDLE_LIMIT {
            connection.slot.notify_idle();
            idle.push(IdleConnection { until: now() + wait, connection });
        }
    }

    /// Permission for a stream on an HTTP/2 connection to an endpoint: an existing one below its limit of streams, or a
    /// new one. Only one connection is established at a time; other requests wait for it.
    ///
    /// # Errors
    /// When connecting fails, or the limit of connections or receive windows is reached.
    pub(crate) async fn http2(
        &self,
        cluster: &PlannedCluster,
        address: SocketAddr,
    ) -> io::Result<StreamLease> {
        let key = (cluster.id, address);
        if let Some(lease) = self.http2_below_limit(key) {
            return Ok(lease);
        }
        let connecting = self.connecting.borrow_mut().entry(key).or_default().clone();
        let _first = connecting.lock().await;
        if let Some(lease) = self.http2_below_limit(key) {
            return Ok(lease);
        }
        let slot = self.slots.take(cluster, address);
        if let Some(mut lease) = self.least_loaded(key, slot.is_some()) {
            // Ready when one of its streams has ended.
            lease.sender = lease.sender.ready().await.map_err(io::Error::other)?;
            return Ok(lease);
        }
        let slot = slot.ok_or_else(|| limit_reached("max_connections"))?;
        let window = self.windows.open();
        // Checked before the handshake, which would be wasted.
        let receiving =
            window.receive().ok_or_else(|| limit_reached("limit of receive windows"))?;
        let connecting =
            connect_http2(cluster, address, ConnectionPermits { slot, window }, &self.connector);
        let mut connection = Box::pin(connecting).await?;
        let lease = connection.lease_with(receiving);
        self.http2.borrow_mut().entry(key).or_default().push(connection);
        Ok(lease)
    }

    /// A stream on the first connection below its limit of streams. Removes closed connections.
    fn http2_below_limit(&self, key: PoolKey) -> Option<StreamLease> {
        let mut pools = self.http2.borrow_mut();
        let mut lease = None;
        pools.get_mut(&key)?.retain_mut(|connection| {
            if lease.is_some() {
                return true;
            }
            if connection.status.as_ref().is_some_and(|status| status.is_draining()) {
                return false;
            }
            let sender = &mut connection.sender;
            let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
            match sender.poll_ready(&mut cx) {
                Poll::Ready(Ok(())) => {
                    if connection.open.get() < sender.current_max_send_streams() {
                        lease = connection.lease();
                    }
                    true
                }
                Poll::Pending => true,
                Poll::Ready(Err(_)) => false,
            }
        });
        lease
    }

    /// A stream on the connection with the fewest streams, when no more connections may be opened.
    fn least_loaded(&self, key: PoolKey, may_connect: bool) -> Option<StreamLease> {
        let mut pools = self.http2.borrow_mut();
        let connections =
            pools.get_mut(&key).filter(|all| all.len() >= HTTP2_LIMIT || !may_connect)?;
        connections
            .iter_mut()
            .min_by_key(|connection| connection.open.get())
            .and_then(Http2Connection::lease)
    }

    /// Removes the HTTP/2 connections to an endpoint after one has failed.
    pub(crate) fn remove_http2(&self, cluster: &PlannedCluster, address: SocketAddr) {
        self.http2.borrow_mut().remove(&(cluster.id, address));
    }

    /// Closes connections that were idle for too long or are draining, and those of clusters for which `is_current` is
    /// false.
    pub(crate) fn sweep(&self, is_current: impl Fn(u64) -> bool) {
        let now = now();
        self.http2.borrow_mut().retain(|(cluster, _), connections| {
            connections.retain_mut(|connection| {
                if connection.open.get() > 0 {
                    connection.idle_since = None;
                    return true;
                }
                let since = *connection.idle_since.get_or_insert(now);
                now.saturating_duration_since(since) < HTTP2_IDLE
            });
            is_current(*cluster) && !connections.is_empty()
        });
        self.http1.borrow_mut().retain(|(cluster, _), idle| {
            idle.retain(|waiting| {
                now < waiting.until && !waiting.connection.reader.half.is_draining()
            });
            is_current(*cluster) && !idle.is_empty()
        });
        self.connecting.borrow_mut().retain(|(cluster, _), _| is_current(*cluster));
        self.slots.sweep();
    }
}

/// What an HTTP/2 connection occupies while it is open.
struct ConnectionPermits {
    slot: Slot,
    window: Rc<ConnectionWindow>,
}

/// Establishes an HTTP/2 connection and spawns the task that drives it.
async fn connect_http2(
    cluster: &PlannedCluster,
    address: SocketAddr,
    permits: ConnectionPermits,
    connector: &Connector,
) -> io::Result<Http2Connection> {
    let ConnectionPermits { slot, window } = permits;
    let stream = connector.connect(cluster, address, Alpn::Http2).await?;
    let status = stream.status().cloned();
    connector.metrics.upstream_connections.increment();
    let alert = EndpointAlert::default();
    let (sender, mut connection) = h2::client::Builder::new()
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(window.bytes)
        .enable_push(false)
        .max_header_list_size(
            // The limit of the h2 crate is the first size that is too large.
            u32::try_from(cluster.settings.response_head_bytes + 1).unwrap_or(u32::MAX),
        )
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        // Many clients share the connection: what one of them cancels or reads slowly must not close it. What the
        // endpoint sends is limited by `Http2EndpointGuard`.
        .max_concurrent_reset_streams(RESETS_REMEMBERED)
        .max_local_error_reset_streams(None)
        .data_frame_budget(usize::MAX)
        .handshake(Http2EndpointGuard::new(stream, alert.clone()))
        .await
        .map_err(io::Error::other)?;
    let settings = Rc::<SettingsReceived>::default();
    if let Some(mut pings) = connection.ping_pong() {
        let settings = settings.clone();
        tokio::task::spawn_local(async move {
            // The endpoint acknowledges the PING after it has sent its SETTINGS.
            if pings.ping(h2::Ping::opaque()).await.is_ok() {
                settings.set();
            }
        });
    }
    // Held while the connection is open, which may be longer than it is in the pool.
    let permits = ConnectionPermits { slot, window: window.clone() };
    let metrics = connector.metrics.clone();
    let ended_by = alert.clone();
    tokio::task::spawn_local(async move {
        let _permits = permits;
        if let Err(error) = connection.await {
            tracing::debug!(%error, "HTTP/2 connection to an endpoint closed");
        }
        if let Some(failure) = ended_by.get() {
            metrics.count_upstream_handshake_failure(failure);
        }
    });
    let sender = sender.ready().await.map_err(io::Error::other)?;
    let open = Rc::default();
    let idle_since = None;
    Ok(Http2Connection { status, sender, settings, alert, open, window, idle_since })
}

/// The error for a limit that is reached.
fn limit_reached(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::QuotaExceeded, format!("{what} reached"))
}

/// Whether an idle connection is open and has received nothing, as far as the worker's event loop knows. A connection
/// that was closed without the event loop knowing yet is handled by a retry. A response that was received before the
/// request was sent must not be used.
pub(super) fn is_alive(connection: &Http1Connection) -> bool {
    let half = &connection.reader.half;
    !half.is_draining() && !half.has_events()
}
