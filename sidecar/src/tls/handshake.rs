//! The handshake with a client, as far as it is told: in time, counted, and with a line of its own.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use weft_certs::VerifiedPeer;
use weft_certs::fault::{self, PeerFault};

use super::{Alpn, acceptor};
use crate::plan::ChainTls;
use crate::record::{HandshakeRecord, Trace};
use crate::stream::TransportStream;
use crate::worker::{SidecarWorker, now, unix_ms};

/// A connection, secured where that is asked for.
pub(crate) struct SecuredConnection {
    pub(crate) stream: TransportStream,
    pub(crate) alpn: Alpn,
    pub(crate) peer: Option<VerifiedPeer>,
    /// Whether the client showed a certificate that is for the service to judge.
    pub(crate) passed: bool,
    /// How lines name the connection.
    pub(crate) trace: Option<Trace>,
}

/// What is told of a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HandshakeContext {
    pub(crate) client: SocketAddr,
    /// The port that the client aimed at.
    pub(crate) port: u16,
    /// Whether its handshake leaves a line.
    pub(crate) is_logged: bool,
}

/// Does the handshake where the chain asks for one. None when the client was refused.
pub(crate) async fn secure(
    tls: &ChainTls,
    stream: TcpStream,
    about: HandshakeContext,
    worker: &SidecarWorker,
) -> Option<SecuredConnection> {
    let server = match tls {
        ChainTls::None => {
            let stream = TransportStream::Plain(stream);
            return Some(SecuredConnection {
                stream,
                alpn: Alpn::None,
                peer: None,
                passed: false,
                trace: None,
            });
        }
        ChainTls::Terminate(server) => server.clone(),
        ChainTls::Broken => return None,
    };
    let begun = now();
    // What each stage needs for itself is apart, so that a connection that waits does not carry it.
    let handshake = Box::pin(acceptor::accept(server, stream, worker));
    let done = tokio::time::timeout(worker.shared.limits.handshake, handshake).await;
    let took = now() - begun;
    match done {
        Ok(Ok(accepted)) => {
            worker.metrics.handshakes.increment();
            if accepted.resumed {
                worker.metrics.handshakes_resumed.increment();
            }
            let trace = about.is_logged.then(|| tell_success(&accepted, about, took, worker));
            let acceptor::AcceptedTls { stream, alpn, peer, passed, .. } = accepted;
            Some(SecuredConnection { stream, alpn, peer, passed, trace })
        }
        Ok(Err(refused)) => {
            let error = &refused.error;
            tracing::debug!(client = %about.client, %error, "TLS handshake failed");
            // Before anything else runs on this thread, which is where the verifier left its reason.
            tell_failure(error, about, took, worker);
            Box::pin(refused.close()).await;
            None
        }
        Err(_) => {
            let late = io::Error::new(io::ErrorKind::TimedOut, "the handshake took too long");
            tell_failure(&late, about, took, worker);
            None
        }
    }
}

/// Leaves a line, and gives the name of the connection in it.
fn tell_success(
    accepted: &acceptor::AcceptedTls,
    about: HandshakeContext,
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
        // Nobody has looked whether what was shown is good.
        tls_verify_status: if accepted.passed { "Unchecked" } else { "Success" }.into(),
        ..record(about, took)
    };
    let trace = record.conn_trace_id;
    worker.access.line(&record.with_certificate(accepted.stream.certificates().first()));
    trace
}

fn tell_failure(
    error: &io::Error,
    about: HandshakeContext,
    took: Duration,
    worker: &SidecarWorker,
) {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
    let (fault, detail) = match cause {
        Some(cause) => fault::last(cause),
        None if error.kind() == io::ErrorKind::FileTooLarge => (PeerFault::MaxSizeExceeded, ""),
        None => (PeerFault::Unmapped, ""),
    };
    worker.metrics.refuse_client(fault);
    // Of somebody else, where no certificate was the cause.
    let certificate = fault::shown().filter(|_| fault != PeerFault::Unmapped);
    if !about.is_logged {
        return;
    }
    let detail = if detail.is_empty() { error.to_string() } else { detail.to_owned() };
    let record = HandshakeRecord {
        tls_verify_status: format!("Failed:{fault}"),
        detail: Some(detail),
        ..record(about, took)
    };
    worker.access.line(&record.with_certificate(certificate.as_ref()));
}

fn record(about: HandshakeContext, took: Duration) -> HandshakeRecord {
    HandshakeRecord {
        kind: "tls",
        time_ms: unix_ms(),
        client: about.client,
        listener_port: about.port,
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
