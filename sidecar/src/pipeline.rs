//! The stages of a connection; [`serve_request`](crate::serve_request) has those of a request.
//!
//! ```text
//! connection   accept -> original destination -> filter chain -> TLS: VerifiedPeer -> HTTP version
//! request      normalize -> authenticate: Authenticated -> authorize: Authorized
//!              -> route: Routed -> choose endpoint -> exchange -> access log
//! ```

use std::cell::{Cell, OnceCell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use tokio::net::TcpStream;
use weft_certs::VerifiedPeer;
use weft_model::{Codec, HttpService, Name, TransportKind};
use weft_runtime::metrics::GaugeGuard;
use weft_runtime::socket::{PROBE_PORT, original_destination, reset_on_close};

use crate::authorize::ConnectionFacts;
use crate::connection::ClientConnection;
use crate::denial::Denial;
use crate::detect::{self, DetectedProtocol};
use crate::identity_headers::{ClientCertificateHeaders, HandshakeCertificates};
use crate::plan::{ChainTls, PlannedChain, PlannedListener, PlannedService};
use crate::plan_changes::PlanFollower;
use crate::request_metrics::ConnectionSeries;
use crate::stream::TransportStream;
use crate::tcp_proxy::TcpConnectionInfo;
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
    let Some(_in_hand) = worker.live.try_acquire(worker.shared.limits.connections) else {
        return worker.refuse_connection(accepted.client);
    };
    worker.metrics.connections.increment();
    let _open = GaugeGuard::new(&worker.metrics.connections_open);
    if serve_connection(accepted, &worker).await.is_none() {
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

/// Serves a connection. None when it was refused before any request.
async fn serve_connection(accepted: AcceptedSocket, worker: &Rc<SidecarWorker>) -> Option<()> {
    let AcceptedSocket { client, stream, listener } = accepted;
    let own = stream.local_addr().ok()?;
    let destination = original_destination(&stream, own);
    if listener.listener.use_original_destination && !is_redirected(client, destination, own) {
        return None;
    }
    let plan = worker.plan();
    let follower = worker.changes.follow();
    let serving = plan.listener_for(&listener, destination).clone();
    drop(plan);
    if !serving.listener.admits(client.ip()) {
        tracing::debug!(%client, "connection refused: not in the listener's security group");
        return None;
    }
    let kind = if serving.listener.inspects_transport() {
        detect::transport_kind(&stream).await?
    } else {
        TransportKind::Plain
    };
    let chain = serving.chain(destination, kind)?.clone();
    let is_logged = chain.service.is_logged();
    let handshake = HandshakeContext { client, port: destination.port(), is_logged };
    let SecuredConnection { stream, alpn, peer, is_unchecked, trace } =
        secure(&chain.tls, stream, handshake, worker).await?;
    let facts = ConnectionFacts { peer: peer.as_ref(), client, destination };
    if !facts.is_allowed(&chain.rules) {
        tracing::debug!(%client, "connection refused: no policy allows it");
        worker.metrics.count_denial(Denial::NotAllowed);
        reset_on_close(stream.tcp());
        return None;
    }
    match &chain.service {
        PlannedService::Tcp(tcp) => {
            let about = TcpConnectionInfo { client, destination, peer: peer.as_ref(), trace };
            let proxying = tcp_proxy::proxy(stream, about, tcp, worker);
            let place = ChainLocation { listener: &serving.listener.name, chain: &chain, kind };
            tokio::select! {
                () = Box::pin(proxying) => {}
                () = until_connection_denied(facts, place, follower, worker) => {}
            }
        }
        PlannedService::Http(http) => {
            let certificate_headers =
                certificate_headers(peer.as_ref(), is_unchecked, &stream, &chain.tls, &http.http);
            let is_tls = !matches!(stream, TransportStream::Plain(_));
            let status = stream.status().cloned();
            let connection = Rc::new(ClientConnection {
                client,
                destination,
                peer,
                certificate_headers,
                status,
                kind,
                is_tls,
                trace,
                listener: serving.listener.name.clone(),
                idle: Rc::new(Cell::new(false)),
                series: ConnectionSeries::default(),
                pinned: RefCell::default(),
                dropped: OnceCell::new(),
            });
            let settings = http.http.clone();
            drop((chain, serving));
            serve_http(stream, alpn, connection, &settings, worker).await;
        }
    }
    Some(())
}

/// The headers that describe a verified peer, or those of a `is_unchecked` chain, which was not verified.
fn certificate_headers(
    peer: Option<&VerifiedPeer>,
    is_unchecked: bool,
    stream: &TransportStream,
    tls: &ChainTls,
    http: &HttpService,
) -> Option<ClientCertificateHeaders> {
    let chain = stream.certificates();
    let own = match tls {
        ChainTls::Terminate(server) => server.leaf(),
        ChainTls::None | ChainTls::Broken => None,
    };
    match peer {
        Some(peer) => {
            Some(ClientCertificateHeaders::new(HandshakeCertificates { peer, chain, own }, http))
        }
        None => is_unchecked.then(|| ClientCertificateHeaders::unverified(chain)),
    }
}

/// The filter chain that serves a connection, and what finds its successor in another plan.
struct ChainLocation<'a> {
    listener: &'a Name,
    chain: &'a PlannedChain,
    kind: TransportKind,
}

/// Resolves when a new plan's policies no longer allow a TCP connection.
async fn until_connection_denied(
    facts: ConnectionFacts<'_>,
    place: ChainLocation<'_>,
    mut follower: PlanFollower<'_>,
    worker: &SidecarWorker,
) {
    loop {
        follower.next().await;
        let plan = worker.plan();
        let listener = plan.listener(place.listener);
        let current = listener.and_then(|listener| listener.chain(facts.destination, place.kind));
        let Some(current) = current else {
            continue;
        };
        if current.rules != place.chain.rules && !facts.is_allowed(&current.rules) {
            worker.metrics.connections_policy_changed.increment();
            return;
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
            let target = connection.only_target(worker);
            let timeouts = settings.timeouts.head;
            let detecting = detect::protocol(tcp, destination, target, timeouts, worker);
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
                        tcp_proxy::relay_server_first(stream, connection.client, upstream);
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
