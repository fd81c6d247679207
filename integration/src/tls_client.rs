//! A mutual TLS client that keeps its connection open, to check when the server closes it.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use rustls::{AlertDescription, ClientConfig, ClientConnection, HandshakeKind, StreamOwned};
use rustls_pki_types::{ServerName, UnixTime};
use weft_certs::TrustStore;
use weft_certs::tls::{self, LoadedIdentity};
use weft_model::StringMatch;

use crate::authority::{PemIdentity, TestAuthority};
use crate::mesh_pki::spiffe_id;
use crate::wait::DEADLINE;

/// A connection.
#[derive(Debug)]
pub struct TlsClient(StreamOwned<ClientConnection, TcpStream>);

/// The TLS configuration to call `service` with the certificate `identity`.
#[must_use]
pub fn client_config(
    signer: &TestAuthority,
    identity: &PemIdentity,
    service: &str,
    alpn: &str,
) -> Arc<ClientConfig> {
    client_config_trusting(signer.roots(), identity, service, alpn)
}

/// The TLS configuration to call `service` with the certificate `identity`, trusting these roots.
///
/// # Panics
/// If the roots or the certificate are invalid.
#[must_use]
pub fn client_config_trusting(
    roots: &str,
    identity: &PemIdentity,
    service: &str,
    alpn: &str,
) -> Arc<ClientConfig> {
    let identity = LoadedIdentity::load(identity.chain.as_bytes(), identity.key.as_bytes());
    let trust = TrustStore::load(roots.as_bytes(), None, Vec::new(), None, UnixTime::now())
        .expect("the roots are valid");
    let names = vec![StringMatch::Exact(spiffe_id(service))];
    let identity = identity.expect("the certificate and key are valid");
    tls::client(Some(&identity), Arc::new(trust), names, &[alpn.to_owned()])
        .expect("the TLS configuration is valid")
}

impl TlsClient {
    /// Connects; the handshake takes place when bytes are first sent or read.
    ///
    /// # Panics
    /// If the port refuses connections.
    #[must_use]
    pub fn connect(port: u16, config: &Arc<ClientConfig>) -> Self {
        let tcp =
            TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the port accepts connections");
        tcp.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
        tcp.set_nodelay(true).expect("it is a TCP socket");
        let name = ServerName::from(Ipv4Addr::LOCALHOST);
        let session =
            ClientConnection::new(config.clone(), name).expect("the TLS configuration is valid");
        Self(StreamOwned::new(session, tcp))
    }

    /// Sends bytes; returns whether the connection accepted them.
    pub fn send(&mut self, bytes: &[u8]) -> bool {
        self.0.write_all(bytes).and_then(|()| self.0.flush()).is_ok()
    }

    /// Reads at most `most` bytes; empty when the connection has ended.
    pub fn receive(&mut self, most: usize) -> Vec<u8> {
        let mut bytes = vec![0; most];
        let count = self.0.read(&mut bytes).unwrap_or(0);
        bytes.truncate(count);
        bytes
    }

    /// Completes the handshake. With TLS 1.3, the client learns whether the server accepted its
    /// certificate from the server's next message, a session ticket or an alert.
    ///
    /// # Errors
    /// The alert, or `None` if the connection ended without an alert.
    pub fn handshake_result(&mut self) -> Result<(), Option<AlertDescription>> {
        let StreamOwned { conn, sock } = &mut self.0;
        let alert = |error: &rustls::Error| match error {
            rustls::Error::AlertReceived(alert) => Some(*alert),
            _ => None,
        };
        let inner = |error: std::io::Error| {
            error.get_ref().and_then(|inner| inner.downcast_ref()).and_then(alert)
        };
        while conn.is_handshaking() {
            conn.complete_io(sock).map_err(inner)?;
        }
        if conn.read_tls(sock).map_err(inner)? == 0 {
            return Err(None);
        }
        conn.process_new_packets().map(drop).map_err(|error| alert(&error))
    }

    /// Whether the handshake resumed an earlier session.
    #[must_use]
    pub fn is_resumed(&self) -> bool {
        self.0.conn.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    /// Sends a GET over HTTP/1.1 and returns the status; `None` when the connection has ended. The
    /// response must have a content-length.
    pub fn ask(&mut self, path: &str) -> Option<u16> {
        self.exchange(&format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n")).map(|(status, _)| status)
    }

    /// Sends a request and returns the status and body of the response; `None` when the connection
    /// has ended. The response must have a content-length.
    pub fn exchange(&mut self, request: &str) -> Option<(u16, String)> {
        if !self.send(request.as_bytes()) {
            return None;
        }
        let mut answer = Vec::new();
        loop {
            let more = self.receive(16 * 1024);
            if more.is_empty() {
                return None;
            }
            answer.extend_from_slice(&more);
            let text = String::from_utf8_lossy(&answer);
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let length: usize =
                length.map_or(0, |length| length.parse().expect("content-length is a number"));
            if body.len() >= length {
                return Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()));
            }
        }
    }

    /// Whether the connection ends within this time without a request.
    pub fn ends_within(&mut self, time: Duration) -> bool {
        self.0.sock.set_read_timeout(Some(time)).expect("the timeout is not zero");
        let mut byte = [0];
        let ended = match self.0.read(&mut byte) {
            Ok(0) => true,
            Ok(_) => false,
            Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
        };
        self.0.sock.set_read_timeout(Some(DEADLINE)).expect("the timeout is not zero");
        ended
    }
}

impl TlsClient {
    /// Waits for the next bytes: returns the name of the alert, or `None` if anything else was
    /// received.
    pub fn alert(&mut self) -> Option<String> {
        let mut byte = [0];
        let error = self.0.read(&mut byte).err()?;
        let cause = error.get_ref()?.downcast_ref::<rustls::Error>()?;
        match cause {
            rustls::Error::AlertReceived(alert) => Some(format!("{alert:?}")),
            _ => None,
        }
    }
}
