//! Proxies TCP connections: copies bytes between the client and an endpoint, with TLS on either side where configured.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use futures_util::FutureExt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf, copy_bidirectional};
use weft_model::{Discovery, TcpProxy, WeightedCluster};
use weft_runtime::access::TerminationDetails;
use weft_runtime::connections::ConnectionStatus;
use weft_runtime::socket::reset_on_close;

use crate::denial::Denial;
use crate::detect::ServerFirstUpstream;
use crate::load_balancer::ChosenEndpoint;
use crate::plan::PlannedCluster;
use crate::stream::TransportStream;
use crate::tcp_log::{ByteCounts, TcpLog};
use crate::tls::Alpn;
use crate::tls::failure::TlsFailure;
use crate::upstream::Slot;
use crate::upstream_failure::ConnectFailure;
use crate::worker::SidecarWorker;

/// How many more endpoints are tried when one cannot be connected to, as for requests.
const MORE_ATTEMPTS: usize = 2;

/// Proxies a connection to an endpoint of its cluster until both sides are closed.
pub(crate) async fn proxy(
    mut client: TransportStream,
    tcp: &TcpProxy,
    log: &mut TcpLog<'_>,
    worker: &SidecarWorker,
) {
    let from = log.connection.client;
    let destination = log.connection.destination;
    let plan = worker.plan();
    let picked = WeightedCluster::pick(&tcp.clusters, fastrand::u32(..));
    let Some(cluster) = picked.and_then(|picked| plan.cluster(&picked.name)).cloned() else {
        return log.deny(Denial::NoEndpoint);
    };
    drop(plan);
    log.service = Some(cluster.settings.name.clone());
    let upstream = match connect(&cluster, destination, &mut log.endpoint, worker).await {
        Ok(upstream) => upstream,
        Err(denial) => {
            tracing::debug!(%from, ?denial, "connection refused: no endpoint reachable");
            log.deny(denial);
            return reset_on_close(client.tcp());
        }
    };
    let UpstreamConnection { mut endpoint, _slot, _chosen } = upstream;
    worker.metrics.upstream_connections.increment();
    relay(&mut client, &mut endpoint, log, worker).await;
}

/// Relays a connection whose service spoke first, until both sides are closed.
pub(crate) async fn relay_server_first(
    mut client: TransportStream,
    mut service: ServerFirstUpstream,
    log: &mut TcpLog<'_>,
    worker: &SidecarWorker,
) {
    log.service = Some(service.cluster.clone());
    log.endpoint = Some(service.address);
    relay(&mut client, &mut service.stream, log, worker).await;
}

/// Copies bytes in both directions until both sides are closed or one fails, and records how the connection ended.
async fn relay(
    client: &mut TransportStream,
    upstream: &mut TransportStream,
    log: &mut TcpLog<'_>,
    worker: &SidecarWorker,
) {
    let from = log.connection.client;
    let address = log.endpoint;
    let client_status = client.status().cloned();
    let endpoint_status = upstream.status().cloned();
    let mut endpoint = ObservedUpstream::new(upstream, &log.moved);
    let statuses = [client_status.clone(), endpoint_status.clone()];
    let is_revoked = || statuses.iter().flatten().any(|status| status.is_closed());
    let moved = tokio::select! {
        moved = copy_bidirectional(client, &mut endpoint) => moved.map_err(|error| {
            tracing::debug!(%from, ?address, %error, "TCP proxy connection failed");
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
    tracing::debug!(%from, ?address, ?moved, "TCP proxy connection closed");
    match (moved, alert) {
        (Ok(_), _) => log.end = TerminationDetails::Closed,
        (Err(ProxyFault::Failed | ProxyFault::PeerRevoked), Some(failure)) => {
            worker.metrics.count_upstream_handshake_failure(failure);
            log.deny(Denial::Unreachable(ConnectFailure::Tls(failure)));
        }
        (Err(ProxyFault::PeerRevoked), None) => log.end = TerminationDetails::CertificateRevoked,
        (Err(ProxyFault::Failed), None) if has_failed => {
            log.end = TerminationDetails::UpstreamReset;
        }
        (Err(ProxyFault::Failed), None) => log.end = TerminationDetails::DownstreamReset,
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
        if self.moved.to_client.get() == 0 && self.alert.is_none() {
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
        this.moved.to_client.set(this.moved.to_client.get() + more);
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
                this.moved.to_endpoint.set(this.moved.to_endpoint.get() + *written as u64)
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
    _slot: Slot,
    _chosen: Option<ChosenEndpoint>,
}

/// Connects to an endpoint of `cluster`. When an endpoint cannot be connected to, the next one is tried: no byte of the client
/// was sent to the first.
///
/// # Errors
/// When the cluster has no endpoint, its connection limit is reached, or the connection to the last tried endpoint failed.
async fn connect(
    cluster: &PlannedCluster,
    destination: SocketAddr,
    endpoint: &mut Option<SocketAddr>,
    worker: &SidecarWorker,
) -> Result<UpstreamConnection, Denial> {
    let passes_through = cluster.settings.discovery == Discovery::OriginalDestination;
    let mut tried = Vec::new();
    let mut failed = Denial::NoEndpoint;
    for _ in 0..=MORE_ATTEMPTS {
        let chosen = cluster.balancer.choose(&tried);
        let address = match &chosen {
            _ if passes_through => destination,
            Some(chosen) => chosen.address,
            None => return Err(failed),
        };
        *endpoint = Some(address);
        if !tried.is_empty() {
            worker.metrics.upstream_retries.increment();
        }
        let Some(slot) = worker.pools.slots.take(cluster, address) else {
            tracing::debug!(%address, "connection limit of the cluster reached (max_connections)");
            return Err(Denial::Overloaded);
        };
        match worker.connector.connect(cluster, address, Alpn::None).await {
            Ok(endpoint) => {
                return Ok(UpstreamConnection { endpoint, _slot: slot, _chosen: chosen });
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
        Some(status) => drop(status.closed().await),
        None => std::future::pending().await,
    }
}
