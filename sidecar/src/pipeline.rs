//! The stages of a connection; [`serve_request`](crate::serve_request) has those of a request.
//!
//! ```text
//! connection   accept -> original destination -> filter chain -> TLS: VerifiedPeer -> policies
//!              -> HTTP version
//! request      normalize -> authenticate: Authenticated -> authorize: Authorized
//!              -> route: Routed -> choose endpoint -> exchange -> access log
//! ```

use std::cell::{OnceCell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use tokio::net::TcpStream;
use weft_certs::VerifiedPeer;
use weft_model::{Codec, HttpService, Name, RbacDecision, TransportKind};
use weft_runtime::connections::ConnectionStatus;
use weft_runtime::metrics::GaugeGuard;
use weft_runtime::socket::{PROBE_PORT, original_destination, reset_on_close};

use crate::connection::ClientConnection;
use crate::connection_info::ConnectionInfo;
use crate::denial::Denial;
use crate::detect::{self, DetectedProtocol, ServerFirstUpstream};
use crate::identity_headers::{ClientCertificateHeaders, HandshakeCertificates};
use crate::plan::{ChainTls, PlannedChain, PlannedListener, PlannedService};
use crate::plan_changes::PlanSubscription;
use crate::request_metrics::ConnectionSeries;
use crate::stream::TransportStream;
use crate::tcp_log::TcpLog;
use crate::tls::Alpn;
use crate::tls::handshake::{HandshakeContext, SecuredConnection, secure};
use crate::worker::SidecarWorker;
use crate::{serve_http1, serve_http2, tcp_proxy};

/// An accepted connection and the listener that accepted it.
pub(crate) struct AcceptedSocket {
    pub(crate) client: SocketAddr,
    pub(crate) stream: TcpStream,
    pub(crate) listener: Arc<PlannedListener>,
}

/// Serves an accepted connection until it is closed.
pub(crate) async fn connection(accepted: AcceptedSocket, worker: Rc<SidecarWorker>) {
    let Some(handle) = worker.connections.try_register(worker.shared.limits.connections) else {
        return worker.refuse_connection(accepted.client);
    };
    worker.metrics.connections.increment();
    let _open = GaugeGuard::new(&worker.metrics.connections_open);
    if serve_connection(accepted, handle.status(), &worker).await.is_none() {
        worker.metrics.connections_refused.increment();
    }
}

/// Whether a connection to a capture port was redirected there, and has a destination of its own.
fn is_redirected(client: SocketAddr, destination: SocketAddr, own: SocketAddr) -> bool {
    if destination == own {
        tracing::debug!(%client, "connection refused: dialled the capture port directly, or redirection loop");
    }
    destination != own && destination.port() != PROBE_PORT
}

/// A connection with the filter chain that serves it.
struct AdmittedConnection {
    client: SocketAddr,
    destination: SocketAddr,
    stream: TcpStream,
    listener: Arc<PlannedListener>,
    kind: TransportKind,
    chain: Arc<PlannedChain>,
}

/// Finds the filter chain of a connection. None when it is refused.
async fn admit(accepted: AcceptedSocket, worker: &SidecarWorker) -> Option<AdmittedConnection> {
    let AcceptedSocket { client, stream, listener } = accepted;
    let own = stream.local_addr().ok()?;
    let destination = original_destination(&stream, own);
    if listener.listener.use_original_destination && !is_redirected(client, destination, own) {
        return None;
    }
    let listener = worker.plan_ref().listener_for(&listener, destination).clone();
    if !listener.listener.admits(client.ip()) {
        tracing::debug!(%client, "connection refused: not in the listener's security group");
        return None;
    }
    let kind = if listener.listener.inspects_transport() {
        detect::transport_kind(&stream).await?
    } else {
        TransportKind::Plain
    };
    let chain = listener.chain(destination, kind)?.clone();
    Some(AdmittedConnection { client, destination, stream, listener, kind, chain })
}

/// Serves a connection. None when it was refused before any request.
async fn serve_connection(
    accepted: AcceptedSocket,
    status: &Rc<ConnectionStatus>,
    worker: &Rc<SidecarWorker>,
) -> Option<()> {
    // Before the plan is read, so that no change is missed.
    let plan_changes = worker.changes.subscribe();
    let AdmittedConnection { client, destination, stream, listener, kind, chain } =
        admit(accepted, worker).await?;
    let handshake =
        HandshakeContext { client, status, destination, sinks: chain.service.access_log() };
    let SecuredConnection { stream, alpn, peer, is_unchecked, trace } =
        secure(&chain.tls, stream, handshake, worker).await?;
    let tls_version = stream.tls_version();
    let info = ConnectionInfo { peer: peer.as_ref(), client, destination, tls_version, trace };
    let decision = check_policies(&stream, info, &chain, worker)?;
    match &chain.service {
        PlannedService::Tcp(tcp) => {
            let mut log = TcpLog::new(info, &tcp.access_log, worker);
            log.policy = decision.policy.cloned();
            let place = ChainLocation { listener: &listener.listener.name, chain: &chain, kind };
            let denied = tokio::select! {
                () = Box::pin(tcp_proxy::proxy(stream, tcp, &mut log, worker)) => None,
                policy = until_connection_denied(info, place, plan_changes, worker) => Some(policy),
            };
            if let Some(policy) = denied {
                log.policy = policy;
            }
        }
        PlannedService::Http(http) => {
            let certificate_headers =
                certificate_headers(peer.as_ref(), is_unchecked, &stream, &chain.tls, &http.http);
            let connection = Rc::new(ClientConnection {
                client,
                destination,
                peer,
                certificate_headers,
                status: status.clone(),
                kind,
                tls_version,
                trace,
                listener: listener.listener.name.clone(),
                series: ConnectionSeries::default(),
                pinned: RefCell::default(),
                metrics: worker.metrics.clone(),
                dropped: OnceCell::new(),
            });
            let settings = http.http.clone();
            drop((chain, listener));
            serve_http(stream, alpn, connection, &settings, worker).await;
        }
    }
    Some(())
}

/// Evaluates the policies of a filter chain for a connection. None when the connection was refused.
fn check_policies<'c>(
    stream: &TransportStream,
    info: ConnectionInfo<'_>,
    chain: &'c PlannedChain,
    worker: &SidecarWorker,
) -> Option<RbacDecision<'c>> {
    let decision = info.judge(&chain.rules);
    if !decision.refused {
        return Some(decision);
    }
    tracing::debug!(client = %info.client, "connection refused: no policy allows it");
    let mut log = TcpLog::new(info, chain.service.access_log(), worker);
    log.policy = decision.policy.cloned();
    log.deny(Denial::NotAllowed);
    reset_on_close(stream.tcp());
    None
}

/// The headers that describe a verified peer, or those of an unverified certificate chain.
fn certificate_headers(
    peer: Option<&VerifiedPeer>,
    is_unchecked: bool,
    stream: &TransportStream,
    tls: &ChainTls,
    http: &HttpService,
) -> Option<ClientCertificateHeaders> {
    let certificates = stream.certificates();
    let own = match tls {
        ChainTls::Terminate(server) => server.leaf(),
        ChainTls::None | ChainTls::Broken => None,
    };
    match peer {
        Some(peer) => Some(ClientCertificateHeaders::new(
            HandshakeCertificates { peer, chain: certificates, own },
            http,
        )),
        None => is_unchecked.then(|| ClientCertificateHeaders::unverified(certificates)),
    }
}

/// The filter chain that serves a connection, and what finds its successor in another plan.
struct ChainLocation<'a> {
    listener: &'a Name,
    chain: &'a PlannedChain,
    kind: TransportKind,
}

/// Resolves when a new plan's policies no longer allow a TCP connection, with the policy that denies it.
async fn until_connection_denied(
    info: ConnectionInfo<'_>,
    place: ChainLocation<'_>,
    mut plan_changes: PlanSubscription<'_>,
    worker: &SidecarWorker,
) -> Option<Name> {
    loop {
        plan_changes.next().await;
        let plan = worker.plan();
        let listener = plan.listener(place.listener);
        let current = listener.and_then(|listener| listener.chain(info.destination, place.kind));
        let Some(current) = current else {
            continue;
        };
        if current.rules == place.chain.rules {
            continue;
        }
        let decision = info.judge(&current.rules);
        if decision.refused {
            worker.metrics.connections_policy_changed.increment();
            return decision.policy.cloned();
        }
    }
}

async fn serve_http(
    stream: TransportStream,
    alpn: Alpn,
    connection: Rc<ClientConnection>,
    settings: &HttpService,
    worker: &Rc<SidecarWorker>,
) {
    let http2 = match (settings.codec, alpn, &stream) {
        (Codec::Http2, _, _) | (Codec::Auto, Alpn::Http2, _) => true,
        (Codec::Auto, Alpn::None, TransportStream::Plain(tcp)) => {
            let destination = connection.destination;
            let cluster = connection.only_cluster(worker);
            let timeouts = settings.timeouts.head;
            let detecting = detect::protocol(tcp, destination, cluster, timeouts, worker);
            match Box::pin(detecting).await {
                DetectedProtocol::Http1 => false,
                DetectedProtocol::Http2 => true,
                DetectedProtocol::Incomplete => {
                    let Ok(stream) = detect::report_unread(stream) else { return };
                    return serve_http1::refuse_incomplete(stream, &connection, settings, worker)
                        .await;
                }
                DetectedProtocol::ServerFirst(upstream) => {
                    worker.metrics.server_first_connections.increment();
                    let Ok(stream) = detect::report_unread(stream) else { return };
                    let relaying =
                        relay_server_first(stream, upstream, &connection, settings, worker);
                    return Box::pin(relaying).await;
                }
            }
        }
        (Codec::Http1 | Codec::Auto, _, _) => false,
    };
    if http2 {
        // Boxed, so that HTTP/1.1 connections do not reserve the space of this future.
        Box::pin(serve_http2::serve(stream, connection, settings, worker)).await;
    } else {
        serve_http1::serve(stream, connection, settings, worker).await;
    }
}

/// Relays a server-first connection to an HTTP port, and logs a TCP connection. Only a port
/// without policies and token requirements gets here: elsewhere `only_cluster` has no cluster to connect to.
async fn relay_server_first(
    stream: TransportStream,
    upstream: ServerFirstUpstream,
    connection: &ClientConnection,
    settings: &HttpService,
    worker: &SidecarWorker,
) {
    let mut log = TcpLog::new(connection.info(), &settings.access_log, worker);
    tcp_proxy::relay_server_first(stream, upstream, &mut log, worker).await;
}
