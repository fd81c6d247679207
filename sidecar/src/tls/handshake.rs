//! Performs the TLS handshake with a client, with a timeout, metrics and an access-log line.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use rustls_pki_types::CertificateDer;
use tokio::net::TcpStream;
use weft_certs::fault::{self, PeerFault};
use weft_certs::{CertificateText, VerifiedPeer};
use weft_model::{AccessLogSinks, SpiffeId};
use weft_runtime::access::{AccessRecord, ConnectionTraceId, RecordKind};
use weft_runtime::clock::{now, unix_ms};
use weft_runtime::connections::ConnectionStatus;

use super::{Alpn, acceptor};
use crate::plan::ChainTls;
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
    pub(crate) trace: Option<ConnectionTraceId>,
}

/// The facts of a connection that are logged with its handshake.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HandshakeContext<'a> {
    pub(crate) client: SocketAddr,
    /// The status of the connection.
    pub(crate) status: &'a Rc<ConnectionStatus>,
    /// The original destination.
    pub(crate) destination: SocketAddr,
    /// Where the handshake is logged.
    pub(crate) sinks: &'a AccessLogSinks,
}

/// Performs the handshake if the filter chain has TLS. None when the handshake failed.
pub(crate) async fn secure(
    tls: &ChainTls,
    stream: TcpStream,
    context: HandshakeContext<'_>,
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
    let handshake = Box::pin(acceptor::accept(server, stream, context.status, worker));
    let done = tokio::time::timeout(worker.shared.limits.handshake, handshake).await;
    let took = now() - start;
    match done {
        Ok(Ok(accepted)) => {
            worker.metrics.handshakes.increment();
            if accepted.resumed {
                worker.metrics.handshakes_resumed.increment();
            }
            let trace =
                (!context.sinks.is_off()).then(|| log_success(&accepted, context, took, worker));
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
    context: HandshakeContext<'_>,
    took: Duration,
    worker: &SidecarWorker,
) -> ConnectionTraceId {
    let session = accepted.stream.session();
    let group = session.and_then(|s| s.negotiated_key_exchange_group());
    let group = group.map(|group| format!("{:?}", group.name()));
    let suite = session.and_then(|s| s.negotiated_cipher_suite());
    let peer = accepted.peer.as_ref().and_then(VerifiedPeer::identity);
    let trace = ConnectionTraceId::new(fastrand::u128(..));
    let record = AccessRecord {
        downstream_tls_version: accepted.stream.tls_version(),
        downstream_tls_cipher: suite.and_then(|suite| suite.suite().as_str()),
        downstream_tls_group: group.as_deref(),
        downstream_tls_resumed: Some(accepted.resumed),
        downstream_tls_result: Some(if accepted.is_unchecked { "unverified" } else { "success" }),
        downstream_peer_uri_san: peer.map(SpiffeId::as_str),
        conn_trace_id: Some(trace),
        ..record(context, took)
    };
    write(&record, accepted.stream.certificates().first(), context, worker);
    trace
}

fn log_failure(
    error: &io::Error,
    context: HandshakeContext<'_>,
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
    if context.sinks.is_off() {
        return;
    }
    let detail = refusal.as_ref().map(|refusal| refusal.detail).filter(|text| !text.is_empty());
    let detail = detail.map_or_else(|| error.to_string(), str::to_owned);
    let record = AccessRecord {
        downstream_tls_result: Some("failed"),
        downstream_transport_failure_reason: Some(fault.word()),
        error_detail: Some(&detail),
        conn_trace_id: Some(ConnectionTraceId::new(fastrand::u128(..))),
        ..record(context, took)
    };
    let certificate = refusal.as_ref().and_then(|refusal| refusal.certificate.as_ref());
    write(&record, certificate, context, worker);
}

fn record<'a>(context: HandshakeContext<'_>, took: Duration) -> AccessRecord<'a> {
    AccessRecord {
        downstream_local_address: Some(context.destination),
        ..AccessRecord::new(RecordKind::Tls, unix_ms(), took, context.client)
    }
}

/// Writes the line of a handshake with the fields of the client certificate, valid or not.
fn write(
    record: &AccessRecord<'_>,
    certificate: Option<&CertificateDer<'_>>,
    context: HandshakeContext<'_>,
    worker: &SidecarWorker,
) {
    let text = certificate.and_then(CertificateText::of);
    let text = text.as_ref();
    let record = AccessRecord {
        downstream_peer_subject: text.map(|text| text.subject.as_str()),
        downstream_peer_serial: text.map(|text| text.serial.as_str()),
        downstream_peer_cert_v_start: text.map(|text| text.not_before.as_str()),
        downstream_peer_cert_v_end: text.map(|text| text.not_after.as_str()),
        ..*record
    };
    worker.access.line(context.sinks, &record);
}
