//! The access log lines of requests, TCP connections and TLS handshakes.

use std::net::SocketAddr;

use rustls_pki_types::CertificateDer;
use serde::Serialize;
use weft_certs::CertificateText;

/// A name for a connection, as AWS' log has them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Trace(u128);

impl Trace {
    pub(crate) fn new() -> Self {
        Self(fastrand::u128(..))
    }
}

impl Serialize for Trace {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("TID_{:032x}", self.0))
    }
}

/// One access line. The field names equal the type names of the path.
#[derive(Debug, Serialize)]
pub(crate) struct HttpAccessRecord<'a> {
    pub(crate) kind: &'static str,
    pub(crate) time_ms: u128,
    pub(crate) client: SocketAddr,
    pub(crate) original_destination: SocketAddr,
    /// The connection, as its own line has it; none without TLS.
    pub(crate) conn_trace_id: Option<Trace>,
    pub(crate) peer: Option<&'a str>,
    pub(crate) subject: Option<&'a str>,
    pub(crate) version: &'static str,
    pub(crate) method: &'a str,
    pub(crate) authority: &'a str,
    pub(crate) path: &'a str,
    pub(crate) status: u16,
    pub(crate) denial: Option<&'static str>,
    pub(crate) detail: Option<&'static str>,
    /// The policy that let it pass, or refused it; none where none spoke of it.
    pub(crate) rule: Option<&'a str>,
    /// The policy that only watches and would refuse it.
    pub(crate) dry_run: Option<&'a str>,
    pub(crate) desync: Option<&'static str>,
    pub(crate) service: Option<&'a str>,
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_received: u64,
    pub(crate) duration_us: u128,
    pub(crate) outcome: &'static str,
}

/// The line of a connection whose bytes are carried as they are.
#[derive(Debug, Serialize)]
pub(crate) struct TcpRecord<'a> {
    pub(crate) kind: &'static str,
    pub(crate) time_ms: u128,
    pub(crate) client: SocketAddr,
    pub(crate) original_destination: SocketAddr,
    /// The connection, as its handshake's line has it; none without TLS.
    pub(crate) conn_trace_id: Option<Trace>,
    pub(crate) peer: Option<&'a str>,
    pub(crate) denial: Option<&'static str>,
    pub(crate) detail: Option<&'static str>,
    pub(crate) service: Option<&'a str>,
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_received: u64,
    pub(crate) duration_us: u128,
    pub(crate) outcome: &'static str,
}

/// The line of a connection's handshake. The names are those of AWS' connection log.
#[derive(Debug, Serialize)]
pub(crate) struct HandshakeRecord {
    pub(crate) kind: &'static str,
    pub(crate) time_ms: u128,
    pub(crate) client: SocketAddr,
    pub(crate) listener_port: u16,
    pub(crate) tls_protocol: Option<&'static str>,
    pub(crate) tls_cipher: Option<String>,
    pub(crate) tls_keyexchange: Option<String>,
    pub(crate) tls_handshake_latency_us: u128,
    pub(crate) resumed: bool,
    pub(crate) peer: Option<String>,
    pub(crate) leaf_client_cert_subject: Option<String>,
    pub(crate) leaf_client_cert_validity: Option<String>,
    pub(crate) leaf_client_cert_serial_number: Option<String>,
    /// `Success`, or `Failed:` and the word of the fault.
    pub(crate) tls_verify_status: String,
    pub(crate) detail: Option<String>,
    pub(crate) conn_trace_id: Trace,
}

impl HandshakeRecord {
    /// Adds the fields of the client certificate, valid or not.
    pub(crate) fn with_certificate(mut self, certificate: Option<&CertificateDer<'_>>) -> Self {
        if let Some(text) = certificate.and_then(CertificateText::of) {
            let (from, to) = (text.not_before, text.not_after);
            self.leaf_client_cert_subject = Some(text.subject);
            self.leaf_client_cert_validity = Some(format!("NotBefore={from};NotAfter={to}"));
            self.leaf_client_cert_serial_number = Some(text.serial);
        }
        self
    }
}
