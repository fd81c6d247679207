//! What a connection is, told by its first bytes: by the client's, or by the service's where the service
//! speaks first.
//!
//! An explicit protocol needs none of this. Where there is none, a client that says nothing for a moment
//! may be waiting for the service: the service is asked, while the client is listened to. Whoever speaks
//! first decides, so neither waits for the other. That is done only where every request would go to the
//! same cluster and nothing is asked of a request, or bytes would get past a policy.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::io::Interest;
use tokio::net::TcpStream;
use weft_model::{TransportKind, UpstreamProtocol};

use crate::plan::{PlannedCluster, PlannedClusterTls};
use crate::stream::TransportStream;
use crate::tls::{Alpn, connector};
use crate::upstream::Slot;
use crate::worker::SidecarWorker;

/// How long the first bytes of a connection may take, where they decide how it is served.
const FIRST_BYTES: Duration = Duration::from_secs(10);
/// How long a client may be silent before its service is asked. Nearly all that speak first do so at once.
const HEAD_START: Duration = Duration::from_millis(20);
/// The same where the last service spoke first: whoever speaks HTTP there all the same is still heard.
const SHORT_START: Duration = Duration::from_millis(1);
/// How long a service is listened to that may speak first.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many services a worker asks at once: clients that say nothing must not use up a cluster's connections.
const ASKED_LIMIT: usize = 64;
/// How many destinations are remembered as such whose services speak first.
const LEARNED_LIMIT: usize = 1024;

/// The first word of HTTP/2's preface (RFC 9113, section 3.4).
const PREFACE_WORD: &[u8] = b"PRI ";

/// What a plain connection turned out to be.
pub(crate) enum DetectedProtocol {
    Http1,
    Http2,
    /// The client began HTTP/2's preface and did not go on in time.
    Incomplete,
    /// Neither: the service spoke first.
    ServerFirst(ServerFirstUpstream),
}

/// A connection to a service that spoke first. What it said waits to be read.
pub(crate) struct ServerFirstUpstream {
    pub(crate) stream: TransportStream,
    pub(crate) address: SocketAddr,
    _slot: Slot,
}

/// Destinations whose services speak first, so that the next client need not wait.
#[derive(Debug, Default)]
pub(crate) struct ServerFirstCache {
    known: RefCell<HashSet<SocketAddr>>,
    /// How many services are being asked.
    asked: Rc<()>,
}

impl ServerFirstCache {
    fn knows(&self, destination: SocketAddr) -> bool {
        self.known.borrow().contains(&destination)
    }

    fn note(&self, destination: SocketAddr, speaks_first: bool) {
        let mut known = self.known.borrow_mut();
        if !speaks_first {
            known.remove(&destination);
        } else if known.len() < LEARNED_LIMIT {
            known.insert(destination);
        }
    }
}

/// Whether a connection begins with a TLS handshake. None when it begins with nothing.
pub(crate) async fn transport_kind(stream: &TcpStream) -> Option<TransportKind> {
    const HANDSHAKE: u8 = 22;
    let mut first = [0];
    let seen = tokio::time::timeout(FIRST_BYTES, stream.peek(&mut first)).await.ok()?.ok()?;
    match (seen, first) {
        (0, _) => None,
        (_, [HANDSHAKE]) => Some(TransportKind::Tls),
        _ => Some(TransportKind::Plain),
    }
}

/// What a plain connection to `destination` is. `target` is where all of it would go, whatever it is.
pub(crate) async fn protocol(
    client: &TcpStream,
    destination: SocketAddr,
    target: Option<Arc<PlannedCluster>>,
    timeout: Duration,
    worker: &SidecarWorker,
) -> DetectedProtocol {
    let by_client = by_first_bytes(client, timeout);
    let Some(target) = target else {
        return by_client.await;
    };
    let known = worker.learned.knows(destination);
    let by_service = async {
        tokio::time::sleep(if known { SHORT_START } else { HEAD_START }).await;
        let held = worker.learned.asked.clone();
        let may_ask = Rc::strong_count(&held) <= ASKED_LIMIT;
        if may_ask
            && let Ok(Some(spoken)) = tokio::time::timeout(PATIENCE, spoken(&target, worker)).await
        {
            return DetectedProtocol::ServerFirst(spoken);
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
        worker.learned.note(destination, speaks_first);
    }
    protocol
}

/// Which HTTP version a plain connection begins with: HTTP/2's preface begins with a word that is no method.
async fn by_first_bytes(stream: &TcpStream, timeout: Duration) -> DetectedProtocol {
    let begun = Cell::new(false);
    let looking = async {
        let mut first = [0; PREFACE_WORD.len()];
        loop {
            let seen = stream.peek(&mut first).await.unwrap_or(0);
            let here = first.get(..seen).unwrap_or_default();
            begun.set(seen > 0);
            if seen == PREFACE_WORD.len() || !PREFACE_WORD.starts_with(here) || seen == 0 {
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
    match tokio::time::timeout(timeout, looking).await {
        Ok(protocol) => protocol,
        Err(_) if begun.get() => DetectedProtocol::Incomplete,
        Err(_) => DetectedProtocol::Http1,
    }
}

/// Has the next peek wait for bytes behind those that were seen; false when the client has closed its side.
fn more_may_come(stream: &TcpStream) -> bool {
    let ready = stream.ready(Interest::READABLE).now_or_never();
    let is_closed = ready.is_some_and(|ready| ready.is_ok_and(|ready| ready.is_read_closed()));
    // Bytes that were only peeked at keep the socket readable. Forgetting that it is readable makes the event
    // loop wait for the kernel's next event: more bytes, or the end.
    let would_block = || Err::<(), _>(io::Error::from(io::ErrorKind::WouldBlock));
    !is_closed && stream.try_io(Interest::READABLE, would_block).is_err()
}

/// The same connection, whose unread bytes the event loop reports again after they were peeked at.
pub(crate) fn report_unread(stream: TransportStream) -> io::Result<TransportStream> {
    match stream {
        TransportStream::Plain(tcp) => {
            Ok(TransportStream::Plain(TcpStream::from_std(tcp.into_std()?)?))
        }
        tls @ TransportStream::Tls(_) => Ok(tls),
    }
}

/// Connects to an endpoint and waits for it to speak. None when it will not.
async fn spoken(target: &PlannedCluster, worker: &SidecarWorker) -> Option<ServerFirstUpstream> {
    // Servers of HTTP/2 may speak first too; and what TLS would be asked for is not known yet.
    let (PlannedClusterTls::None, UpstreamProtocol::Http1) = (&target.tls, target.cluster.protocol)
    else {
        return None;
    };
    let address = target.balancer.choose(&[])?.address;
    let slot = worker.pools.slots.take(target, address)?;
    let connecting = connector::connect(target, address, Alpn::None, worker);
    let stream = Box::pin(connecting).await.ok()?;
    worker.metrics.upstream_connections.increment();
    let mut first = [0; 5];
    let seen = stream.tcp().peek(&mut first).await.ok()?;
    let first = first.get(..seen).filter(|first| !first.is_empty() && !is_of_http(first))?;
    tracing::debug!(%address, ?first, "a service spoke first");
    Some(ServerFirstUpstream { stream, address, _slot: slot })
}

/// Whether a service says at first what one of HTTP may say: its settings (RFC 9113, section 3.4), or that it
/// waited too long for a request. Neither is for a client that has yet to speak, past what we hold it to.
fn is_of_http(first: &[u8]) -> bool {
    const SETTINGS: u8 = 4;
    let is_refusal = b"HTTP/".starts_with(first);
    is_refusal || matches!(first, [0, _, _, SETTINGS, ..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_learned_is_bounded_and_unlearned() {
        let learned = ServerFirstCache::default();
        let at =
            |port: usize| SocketAddr::from(([127, 0, 0, 1], u16::try_from(port).expect("small")));
        for port in 1..=LEARNED_LIMIT + 10 {
            learned.note(at(port), true);
        }
        assert_eq!(learned.known.borrow().len(), LEARNED_LIMIT);
        assert!(learned.knows(at(1)));
        learned.note(at(1), false);
        assert!(!learned.knows(at(1)));
    }

    #[test]
    fn what_http_says_first_is_known() {
        let check = |first: &[u8], expected| assert_eq!(is_of_http(first), expected, "{first:?}");
        check(b"HTTP/", true);
        check(b"HT", true);
        check(&[0, 0, 18, 4, 0], true);
        check(b"220 r", false);
        check(b"SSH-2", false);
        // A greeting of MySQL: its length, its number, its version.
        check(&[74, 0, 0, 0, 10], false);
    }
}
