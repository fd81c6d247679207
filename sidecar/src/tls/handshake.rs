//! Performs the TLS handshake with a client, with a timeout, metrics and an access-log line.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use weft_certs::VerifiedPeer;
use weft_certs::fault::{self, PeerFault};

use super::{Alpn, acceptor};
use crate::clock::{now, unix_ms};
use crate::plan::ChainTls;
use crate::record::{HandshakeRecord, Trace};
use crate::stream::TransportStream;
use crate::worker::SidecarWorker;

/// A client connection, after the handshake if its filter chain has TLS.
pub(crate) struct SecuredConnection {
    pub(crate) stream: TransportStream,
    pub(crate) alpn: Alpn,
    pub(crate) peer: Option<VerifiedPeer>,
    /// Whether the client certificate was accepted without verification, for the service to check.
    pub(crate) is_unchecked: bool,
    /// The connection's ID in log lines.
    pub(crate) trace: Option<Trace>,
}

/// The facts of a connection that are logged with its handshake.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HandshakeContext {
    pub(crate) client: SocketAddr,
    /// The original destination port.
    pub(crate) port: u16,
    /// Whether the handshake is logged.
    pub(crate) is_logged: bool,
}

/// Performs the handshake if the filter chain has TLS. None when the handshake failed.
pub(crate) async fn secure(
    tls: &ChainTls,
    stream: TcpStream,
    context: HandshakeContext,
    worker: &SidecarWorker,
) -> Option<SecuredConnection> {
    let server = match tls {
        ChainTls::None => {
            let stream = TransportStream::Plain(stream);
            return Some(SecuredConnection {
                stream,
                alpn: Alpn::None,
                peer: None,
                is_unchecked: false,
                trace: None,
            });
        }
        ChainTls::Terminate(server) => server.clone(),
        ChainTls::Broken => return None,
    };
    let start = now();
    // Boxed, so that the state of the handshake is not part of the connection's future afterwards.
    let handshake = Box::pin(acceptor::accept(server, stream, worker));
    let done = tokio::time::timeout(worker.shared.limits.handshake, handshake).await;
    let took = now() - start;
    match done {
        Ok(Ok(accepted)) => {
            worker.metrics.handshakes.increment();
            if accepted.resumed {
                worker.metrics.handshakes_resumed.increment();
            }
            let trace = context.is_logged.then(|| log_success(&accepted, context, took, worker));
            let acceptor::AcceptedTls { stream, alpn, peer, is_unchecked, .. } = accepted;
            Some(SecuredConnection { stream, alpn, peer, is_unchecked, trace })
        }
        Ok(Err(refused)) => {
            let error = &refused.error;
            tracing::debug!(client = %context.client, %error, "TLS handshake failed");
            // The verifier left its reason in a thread-local, so this must be logged before another handshake runs
            // here.
            log_failure(error, context, took, worker);
            Box::pin(refused.close()).await;
            None
        }
        Err(_) => {
            let late = io::Error::new(io::ErrorKind::TimedOut, "handshake timeout");
            log_failure(&late, context, took, worker);
            None
        }
    }
}

/// Logs a successful handshake. Returns the connection's ID in the log.
fn log_success(
    accepted: &acceptor::AcceptedTls,
    context: HandshakeContext,
    took: Duration,
    worker: &SidecarWorker,
) -> Trace {
    let session = accepted.stream.session();
    let group = session.and_then(|s| s.negotiated_key_exchange_group());
    let peer = accepted.peer.as_ref().and_then(VerifiedPeer::identity);
    let record = HandshakeRecord {
        tls_protocol: session.and_then(|s| s.protocol_version()).and_then(|v| v.as_str()),
        tls_cipher: session
            .and_then(|s| s.negotiated_cipher_suite())
            .and_then(|suite| suite.suite().as_str().map(str::to_owned)),
        tls_keyexchange: group.map(|group| format!("{:?}", group.name())),
        resumed: accepted.resumed,
        peer: peer.map(ToString::to_string),
        tls_verify_status: if accepted.is_unchecked { "Unchecked" } else { "Success" }.into(),
        ..record(context, took)
    };
    let trace = record.conn_trace_id;
    worker.access.line(&record.with_certificate(accepted.stream.certificates().first()));
    trace
}

fn log_failure(
    error: &io::Error,
    context: HandshakeContext,
    took: Duration,
    worker: &SidecarWorker,
) {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
    let refusal = cause.map(fault::take);
    let fault = match &refusal {
        Some(refusal) => refusal.fault,
        None if error.kind() == io::ErrorKind::FileTooLarge => PeerFault::MaxSizeExceeded,
        None => PeerFault::Unmapped,
    };
    worker.metrics.count_handshake_failure(fault);
    if !context.is_logged {
        return;
    }
    let detail = refusal.as_ref().map(|refusal| refusal.detail).filter(|text| !text.is_empty());
    let detail = detail.map_or_else(|| error.to_string(), str::to_owned);
    let record = HandshakeRecord {
        tls_verify_status: format!("Failed:{fault}"),
        detail: Some(detail),
        ..record(context, took)
    };
    let certificate = refusal.as_ref().and_then(|refusal| refusal.certificate.as_ref());
    worker.access.line(&record.with_certificate(certificate));
}

fn record(context: HandshakeContext, took: Duration) -> HandshakeRecord {
    HandshakeRecord {
        kind: "tls",
        time_ms: unix_ms(),
        client: context.client,
        listener_port: context.port,
        tls_protocol: None,
        tls_cipher: None,
        tls_keyexchange: None,
        tls_handshake_latency_us: took.as_micros(),
        resumed: false,
        peer: None,
        leaf_client_cert_subject: None,
        leaf_client_cert_validity: None,
        leaf_client_cert_serial_number: None,
        tls_verify_status: String::new(),
        detail: None,
        conn_trace_id: Trace::new(),
    }
}
