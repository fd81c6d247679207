//! Detects the protocol of a connection by the first bytes of the client, or of the service where the service speaks
//! first.
//!
//! Listeners with an explicit protocol skip this. On the others, a client that stays silent for a moment may be waiting
//! for a server-first protocol such as MySQL or SMTP, so the sidecar connects to the service while it keeps listening to
//! the client. Whichever side speaks first decides. This is done only where every request would go to the same cluster
//! and no policy applies to requests; otherwise bytes could bypass a policy.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::io::Interest;
use tokio::net::TcpStream;
use weft_model::{Name, TransportKind, UpstreamProtocol};

use crate::plan::{PlannedCluster, PlannedClusterTls};
use crate::stream::TransportStream;
use crate::tls::Alpn;
use crate::upstream::Slot;
use crate::worker::SidecarWorker;

/// The limit for the first bytes of a connection, where they decide how it is served.
const FIRST_BYTES_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client may stay silent before the service is connected to. Nearly all client-first protocols send at once.
const CLIENT_HEAD_START: Duration = Duration::from_millis(20);
/// The same where the last connection was server-first. A client that speaks HTTP there is still served as HTTP.
const KNOWN_CLIENT_HEAD_START: Duration = Duration::from_millis(1);
/// How long to wait for the first bytes of a service.
const SERVICE_TIMEOUT: Duration = Duration::from_secs(10);
/// The most services that a worker probes at once, so that silent clients cannot use up a cluster's connections.
const PROBE_LIMIT: usize = 64;

/// The first bytes of the HTTP/2 preface (RFC 9113, section 3.4).
const PREFACE_WORD: &[u8] = b"PRI ";

/// The protocol of a plaintext connection.
pub(crate) enum DetectedProtocol {
    Http1,
    Http2,
    /// The client began the HTTP/2 preface and did not complete it in time.
    Incomplete,
    /// The service spoke first, with something other than HTTP.
    ServerFirst(ServerFirstUpstream),
}

/// A connection to a service that spoke first. Its first bytes are still unread.
pub(crate) struct ServerFirstUpstream {
    pub(crate) stream: TransportStream,
    pub(crate) address: SocketAddr,
    pub(crate) cluster: Name,
    _slot: Slot,
}

/// Whether a connection begins with a TLS handshake. None when the client sends nothing.
pub(crate) async fn transport_kind(stream: &TcpStream) -> Option<TransportKind> {
    const HANDSHAKE: u8 = 22;
    let mut first = [0];
    let peeked =
        tokio::time::timeout(FIRST_BYTES_TIMEOUT, stream.peek(&mut first)).await.ok()?.ok()?;
    match (peeked, first) {
        (0, _) => None,
        (_, [HANDSHAKE]) => Some(TransportKind::Tls),
        _ => Some(TransportKind::Plain),
    }
}

/// Detects the protocol of a plaintext connection to `destination`. `cluster` is the only cluster that it can go to, if there
/// is one.
pub(crate) async fn protocol(
    client: &TcpStream,
    destination: SocketAddr,
    cluster: Option<Arc<PlannedCluster>>,
    timeout: Duration,
    worker: &SidecarWorker,
) -> DetectedProtocol {
    let by_client = by_first_bytes(client, timeout);
    let Some(cluster) = cluster else {
        return by_client.await;
    };
    let known = worker.server_first.contains(destination);
    let by_service = async {
        tokio::time::sleep(if known { KNOWN_CLIENT_HEAD_START } else { CLIENT_HEAD_START }).await;
        let held = worker.server_first.probes.clone();
        let may_probe = Rc::strong_count(&held) <= PROBE_LIMIT;
        if may_probe
            && let Ok(Some(upstream)) =
                tokio::time::timeout(SERVICE_TIMEOUT, first_speaker(&cluster, worker)).await
        {
            return DetectedProtocol::ServerFirst(upstream);
        }
        drop(held);
        std::future::pending().await
    };
    let protocol = tokio::select! {
        biased;
        protocol = by_client => protocol,
        protocol = by_service => protocol,
    };
    let speaks_first = matches!(protocol, DetectedProtocol::ServerFirst(_));
    if speaks_first != known {
        worker.server_first.record(destination, speaks_first);
    }
    protocol
}

/// The HTTP version that the client begins with. The first bytes of the HTTP/2 preface are not a valid method.
async fn by_first_bytes(stream: &TcpStream, timeout: Duration) -> DetectedProtocol {
    let has_bytes = Cell::new(false);
    let peeking = async {
        let mut first = [0; PREFACE_WORD.len()];
        loop {
            let peeked = stream.peek(&mut first).await.unwrap_or(0);
            let here = first.get(..peeked).unwrap_or_default();
            has_bytes.set(peeked > 0);
            if peeked == PREFACE_WORD.len() || !PREFACE_WORD.starts_with(here) || peeked == 0 {
                return if here == PREFACE_WORD {
                    DetectedProtocol::Http2
                } else {
                    DetectedProtocol::Http1
                };
            }
            if !more_may_come(stream) {
                return DetectedProtocol::Http1;
            }
        }
    };
    match tokio::time::timeout(timeout, peeking).await {
        Ok(protocol) => protocol,
        Err(_) if has_bytes.get() => DetectedProtocol::Incomplete,
        Err(_) => DetectedProtocol::Http1,
    }
}

/// Makes the next peek wait for more bytes than those peeked; false when the client has closed its side.
fn more_may_come(stream: &TcpStream) -> bool {
    let ready = stream.ready(Interest::READABLE).now_or_never();
    let is_closed = ready.is_some_and(|ready| ready.is_ok_and(|ready| ready.is_read_closed()));
    // Bytes that were only peeked at keep the socket readable. Clearing the readiness makes the event loop wait for
    // the next kernel event: more bytes or the end of the stream.
    let would_block = || Err::<(), _>(io::Error::from(io::ErrorKind::WouldBlock));
    !is_closed && stream.try_io(Interest::READABLE, would_block).is_err()
}

/// Registers the connection with the event loop again, so that bytes that were peeked at are reported again.
pub(crate) fn report_unread(stream: TransportStream) -> io::Result<TransportStream> {
    match stream {
        TransportStream::Plain(tcp) => {
            Ok(TransportStream::Plain(TcpStream::from_std(tcp.into_std()?)?))
        }
        tls @ TransportStream::Tls(_) => Ok(tls),
    }
}

/// Connects to an endpoint and waits for its first bytes. None when it sends nothing or speaks HTTP.
async fn first_speaker(
    cluster: &PlannedCluster,
    worker: &SidecarWorker,
) -> Option<ServerFirstUpstream> {
    // HTTP/2 servers may speak first as well, and the ALPN protocols to offer over TLS are not known yet.
    let (PlannedClusterTls::None, UpstreamProtocol::Http1) =
        (&cluster.tls, cluster.settings.protocol)
    else {
        return None;
    };
    let address = cluster.balancer.choose(&[])?.address;
    let slot = worker.pools.slots.take(cluster, address)?;
    let connecting = worker.connector.connect(cluster, address, Alpn::None);
    let stream = Box::pin(connecting).await.ok()?;
    worker.metrics.upstream_connections.increment();
    let mut first = [0; 5];
    let peeked = stream.tcp().peek(&mut first).await.ok()?;
    let first = first.get(..peeked).filter(|first| !first.is_empty() && !is_http(first))?;
    tracing::debug!(%address, ?first, "server-first protocol detected");
    let cluster = cluster.settings.name.clone();
    Some(ServerFirstUpstream { stream, address, cluster, _slot: slot })
}

/// Whether the first bytes are those of an HTTP server: HTTP/2 settings (RFC 9113, section 3.4), or a timeout response. Such
/// bytes must not reach a client that has sent no request, because the request would then bypass HTTP processing.
fn is_http(first: &[u8]) -> bool {
    const SETTINGS: u8 = 4;
    let is_response = b"HTTP/".starts_with(first);
    is_response || matches!(first, [0, _, _, SETTINGS, ..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_of_an_http_server_are_recognized() {
        let check = |first: &[u8], expected| assert_eq!(is_http(first), expected, "{first:?}");
        check(b"HTTP/", true);
        check(b"HT", true);
        check(&[0, 0, 18, 4, 0], true);
        check(b"220 r", false);
        check(b"SSH-2", false);
        // A MySQL greeting: length, sequence number, protocol version.
        check(&[74, 0, 0, 0, 10], false);
    }
}
