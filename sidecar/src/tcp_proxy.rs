//! Proxies TCP connections: copies bytes between the client and an endpoint, with TLS on either side where configured.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use futures_util::FutureExt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf, copy_bidirectional};
use weft_certs::VerifiedPeer;
use weft_model::{Discovery, Name, SpiffeId, TcpProxy, WeightedCluster};
use weft_runtime::socket::reset_on_close;

use crate::clock::{now, unix_ms};
use crate::connection_registry::ConnectionStatus;
use crate::denial::Denial;
use crate::detect::ServerFirstUpstream;
use crate::load_balancer::ChosenEndpoint;
use crate::plan::PlannedCluster;
use crate::record::{TcpRecord, Trace};
use crate::stream::TransportStream;
use crate::tls::Alpn;
use crate::tls::failure::TlsFailure;
use crate::upstream::Slot;
use crate::upstream_failure::ConnectFailure;
use crate::worker::SidecarWorker;

/// How many more endpoints are tried when one cannot be connected to, as for requests.
const MORE_ATTEMPTS: usize = 2;

/// A client connection to proxy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TcpConnectionInfo<'a> {
    pub(crate) client: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) peer: Option<&'a VerifiedPeer>,
    pub(crate) trace: Option<Trace>,
}

/// Proxies a connection to an endpoint of its cluster until both sides are closed.
pub(crate) async fn proxy(
    mut client: TransportStream,
    connection: TcpConnectionInfo<'_>,
    tcp: &TcpProxy,
    worker: &SidecarWorker,
) {
    let from = connection.client;
    let destination = connection.destination;
    let mut line = TcpAccessLine::new(connection, tcp.access_log, worker);
    let plan = worker.plan();
    let cluster = WeightedCluster::pick(&tcp.clusters, fastrand::u32(..));
    let Some(target) = cluster.and_then(|cluster| plan.target(&cluster.name)).cloned() else {
        return line.deny(Denial::NoEndpoint);
    };
    drop(plan);
    line.service = Some(target.cluster.name.clone());
    let upstream = match connect(&target, destination, &mut line.endpoint, worker).await {
        Ok(upstream) => upstream,
        Err(denial) => {
            tracing::debug!(%from, ?denial, "connection refused: no endpoint reachable");
            line.deny(denial);
            return reset_on_close(client.tcp());
        }
    };
    let UpstreamConnection { mut endpoint, address, _slot, _chosen } = upstream;
    worker.metrics.upstream_connections.increment();
    let client_status = client.status().cloned();
    let endpoint_status = endpoint.status().cloned();
    let mut endpoint = ObservedUpstream::new(&mut endpoint, &line.moved);
    let statuses = [client_status.clone(), endpoint_status.clone()];
    let is_revoked = || statuses.iter().flatten().any(|status| status.is_closed());
    let moved = tokio::select! {
        moved = copy_bidirectional(&mut client, &mut endpoint) => moved.map_err(|error| {
            tracing::debug!(%from, %address, %error, "TCP proxy connection failed");
            if is_revoked() { ProxyFault::PeerRevoked } else { ProxyFault::Failed }
        }),
        // Reading from a revoked side stops, so that its socket causes no wake-ups.
        () = closed(client_status) => Err(ProxyFault::PeerRevoked),
        () = closed(endpoint_status) => Err(ProxyFault::PeerRevoked),
    };
    if moved.is_err() {
        endpoint.read_refusal().await;
        reset_on_close(client.tcp());
    }
    let alert = endpoint.alert;
    let has_failed = endpoint.has_failed;
    tracing::debug!(%from, %address, ?moved, "TCP proxy connection closed");
    match (moved, alert) {
        (Ok(_), _) => line.outcome = "served",
        (Err(ProxyFault::Failed | ProxyFault::PeerRevoked), Some(failure)) => {
            worker.metrics.count_upstream_handshake_failure(failure);
            line.deny(Denial::Unreachable(ConnectFailure::Tls(failure)));
        }
        (Err(ProxyFault::PeerRevoked), None) => line.detail = Some("certificate_withdrawn"),
        (Err(ProxyFault::Failed), None) if has_failed => line.outcome = "endpoint_broke_off",
        (Err(ProxyFault::Failed), None) => line.outcome = "client_broke_off",
    }
}

/// Why a connection was closed before both sides were done.
#[derive(Debug, Clone, Copy)]
enum ProxyFault {
    /// Reading from or writing to a side failed.
    Failed,
    /// The certificate of a side was revoked or its trust was removed.
    PeerRevoked,
}

/// The access log entry of a connection, written when it is dropped.
struct TcpAccessLine<'a> {
    connection: TcpConnectionInfo<'a>,
    is_logged: bool,
    started: Instant,
    worker: &'a SidecarWorker,
    service: Option<Name>,
    endpoint: Option<SocketAddr>,
    moved: ByteCounts,
    denial: Option<Denial>,
    detail: Option<&'static str>,
    outcome: &'static str,
}

/// The bytes sent to the endpoint and received from it.
#[derive(Debug, Default)]
struct ByteCounts {
    sent: Cell<u64>,
    received: Cell<u64>,
}

impl<'a> TcpAccessLine<'a> {
    fn new(connection: TcpConnectionInfo<'a>, is_logged: bool, worker: &'a SidecarWorker) -> Self {
        Self {
            connection,
            is_logged,
            started: now(),
            worker,
            service: None,
            endpoint: None,
            moved: ByteCounts::default(),
            denial: None,
            detail: None,
            // The outcome if a policy change closes the connection.
            outcome: "aborted",
        }
    }

    fn deny(&mut self, denial: Denial) {
        self.worker.metrics.count_denial(denial);
        (self.denial, self.outcome) = (Some(denial), "denied");
    }
}

impl Drop for TcpAccessLine<'_> {
    fn drop(&mut self) {
        if !self.is_logged {
            return;
        }
        let peer = self.connection.peer.and_then(VerifiedPeer::identity);
        let detail = self.denial.map(Denial::detail).filter(|detail| !detail.is_empty());
        self.worker.access.line(&TcpRecord {
            kind: "tcp",
            time_ms: unix_ms(),
            client: self.connection.client,
            original_destination: self.connection.destination,
            conn_trace_id: self.connection.trace,
            peer: peer.map(SpiffeId::as_str),
            denial: self.denial.map(Denial::reason),
            detail: detail.or(self.detail),
            service: self.service.as_deref(),
            endpoint: self.endpoint,
            bytes_sent: self.moved.sent.get(),
            bytes_received: self.moved.received.get(),
            duration_us: (now() - self.started).as_micros(),
            outcome: self.outcome,
        });
    }
}

/// A connection to an endpoint that counts bytes and records failures.
struct ObservedUpstream<'s> {
    stream: &'s mut TransportStream,
    moved: &'s ByteCounts,
    /// The TLS alert received before any data: with TLS 1.3 an endpoint refuses our certificate after the handshake.
    alert: Option<TlsFailure>,
    has_failed: bool,
}

impl<'s> ObservedUpstream<'s> {
    fn new(stream: &'s mut TransportStream, moved: &'s ByteCounts) -> Self {
        Self { stream, moved, alert: None, has_failed: false }
    }

    /// Reads the alert that a failed write left unread.
    async fn read_refusal(&mut self) {
        if self.has_failed && self.alert.is_none() {
            drop(self.read(&mut [0]).now_or_never());
        }
    }

    fn note(&mut self, error: &io::Error) {
        self.has_failed = true;
        if self.moved.received.get() == 0 && self.alert.is_none() {
            self.alert = TlsFailure::of_read(error);
        }
    }
}

impl AsyncRead for ObservedUpstream<'_> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let polled = Pin::new(&mut *this.stream).poll_read(cx, buf);
        let more = (buf.filled().len() - before) as u64;
        this.moved.received.set(this.moved.received.get() + more);
        if let Poll::Ready(Err(error)) = &polled {
            this.note(error);
        }
        polled
    }
}

impl AsyncWrite for ObservedUpstream<'_> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut *this.stream).poll_write(cx, buf);
        match &polled {
            Poll::Ready(Ok(written)) => {
                this.moved.sent.set(this.moved.sent.get() + *written as u64)
            }
            Poll::Ready(Err(_)) => this.has_failed = true,
            Poll::Pending => {}
        }
        polled
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut *this.stream).poll_flush(cx);
        this.has_failed |= matches!(polled, Poll::Ready(Err(_)));
        polled
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut *this.stream).poll_shutdown(cx);
        this.has_failed |= matches!(polled, Poll::Ready(Err(_)));
        polled
    }
}

/// A connection to an endpoint, with the permits that count it.
struct UpstreamConnection {
    endpoint: TransportStream,
    address: SocketAddr,
    _slot: Slot,
    _chosen: Option<ChosenEndpoint>,
}

/// Connects to an endpoint of `target`. When an endpoint cannot be connected to, the next one is tried: no byte of the client
/// was sent to the first.
///
/// # Errors
/// When the cluster has no endpoint, its connection limit is upstream, or the connection to the last tried endpoint failed.
async fn connect(
    target: &PlannedCluster,
    destination: SocketAddr,
    endpoint: &mut Option<SocketAddr>,
    worker: &SidecarWorker,
) -> Result<UpstreamConnection, Denial> {
    let passes_through = target.cluster.discovery == Discovery::OriginalDestination;
    let mut tried = Vec::new();
    let mut failed = Denial::NoEndpoint;
    for _ in 0..=MORE_ATTEMPTS {
        let chosen = target.balancer.choose(&tried);
        let address = match &chosen {
            _ if passes_through => destination,
            Some(chosen) => chosen.address,
            None => return Err(failed),
        };
        *endpoint = Some(address);
        if !tried.is_empty() {
            worker.metrics.upstream_retries.increment();
        }
        let Some(slot) = worker.pools.slots.take(target, address) else {
            tracing::debug!(%address, "connection limit of the cluster upstream (max_connections)");
            return Err(Denial::Overloaded);
        };
        match worker.connector.connect(target, address, Alpn::None).await {
            Ok(endpoint) => {
                return Ok(UpstreamConnection { endpoint, address, _slot: slot, _chosen: chosen });
            }
            Err(error) => {
                tracing::debug!(%address, %error, "connection to endpoint failed");
                failed = Denial::unreached(&error);
            }
        }
        if passes_through {
            break;
        }
        tried.push(address);
    }
    Err(failed)
}

/// Resolves when the connection must be closed because of its peer's certificate; never where the peer proved nothing.
async fn closed(status: Option<Rc<ConnectionStatus>>) {
    match status {
        Some(status) => status.closed().await,
        None => std::future::pending().await,
    }
}

/// Proxies a connection whose service spoke first.
pub(crate) async fn relay_server_first(
    mut client: TransportStream,
    from: SocketAddr,
    mut service: ServerFirstUpstream,
) {
    let address = service.address;
    let moved = copy_bidirectional(&mut client, &mut service.stream).await;
    tracing::debug!(%from, %address, ?moved, "server-first connection closed");
}
