//! A client of mutual TLS that stays, to see when it is sent away.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use rustls::{AlertDescription, ClientConfig, ClientConnection, HandshakeKind, StreamOwned};
use rustls_pki_types::{ServerName, UnixTime};
use weft_certs::TrustStore;
use weft_certs::tls::{self, Identity};
use weft_model::StringMatch;

use crate::authority::{PemIdentity, TestAuthority};
use crate::mesh_pki::spiffe_id;
use crate::wait::DEADLINE;

/// A connection.
#[derive(Debug)]
pub struct TlsClient(StreamOwned<ClientConnection, TcpStream>);

/// What is needed to call `service` as `holder`.
#[must_use]
pub fn client_config(
    signer: &TestAuthority,
    holder: &PemIdentity,
    service: &str,
    alpn: &str,
) -> Arc<ClientConfig> {
    client_config_trusting(signer.roots(), holder, service, alpn)
}

/// The same, of a service that another signer may have signed.
///
/// # Panics
/// When the certificate is none.
#[must_use]
pub fn client_config_trusting(
    roots: &str,
    holder: &PemIdentity,
    service: &str,
    alpn: &str,
) -> Arc<ClientConfig> {
    let identity = Identity::load(holder.chain.as_bytes(), holder.key.as_bytes());
    let trust =
        TrustStore::load(roots.as_bytes(), None, Vec::new(), None, UnixTime::now()).expect("roots");
    let names = vec![StringMatch::Exact(spiffe_id(service))];
    let identity = identity.expect("it is an identity");
    tls::client(Some(&identity), Arc::new(trust), names, &[alpn.to_owned()]).expect("a client")
}

impl TlsClient {
    /// Connects, and does the handshake.
    ///
    /// # Panics
    /// When nobody listens.
    #[must_use]
    pub fn connect(port: u16, config: &Arc<ClientConfig>) -> Self {
        let tcp = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("somebody listens");
        tcp.set_read_timeout(Some(DEADLINE)).expect("a deadline above zero");
        tcp.set_nodelay(true).expect("it is a TCP socket");
        let name = ServerName::from(Ipv4Addr::LOCALHOST);
        let session = ClientConnection::new(config.clone(), name).expect("a client");
        Self(StreamOwned::new(session, tcp))
    }

    /// Sends bytes; whether they went.
    pub fn send(&mut self, bytes: &[u8]) -> bool {
        self.0.write_all(bytes).and_then(|()| self.0.flush()).is_ok()
    }

    /// What comes next, at most so much; empty when the connection has ended, in whatever way.
    pub fn receive(&mut self, most: usize) -> Vec<u8> {
        let mut bytes = vec![0; most];
        let count = self.0.read(&mut bytes).unwrap_or(0);
        bytes.truncate(count);
        bytes
    }

    /// Whether the server lets us in: with TLS 1.3 it tells by what it sends first, a ticket or an alert.
    ///
    /// # Errors
    /// The alert; none where the connection just ends.
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

    /// Whether the handshake took up an earlier session.
    #[must_use]
    pub fn is_resumed(&self) -> bool {
        self.0.conn.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    /// Asks by HTTP/1.1 for a path whose answer has a length; its status, or none when the connection has
    /// ended.
    pub fn ask(&mut self, path: &str) -> Option<u16> {
        self.exchange(&format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n")).map(|(status, _)| status)
    }

    /// Sends a request whose answer has a length; the answer's status and body, or none when the connection
    /// has ended.
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
            let length: usize = length.map_or(0, |length| length.parse().expect("a number"));
            if body.len() >= length {
                return Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()));
            }
        }
    }

    /// Whether the connection ends within this time, while nothing is asked.
    pub fn ends_within(&mut self, time: Duration) -> bool {
        self.0.sock.set_read_timeout(Some(time)).expect("a time above zero");
        let mut byte = [0];
        let ended = match self.0.read(&mut byte) {
            Ok(0) => true,
            Ok(_) => false,
            Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
        };
        self.0.sock.set_read_timeout(Some(DEADLINE)).expect("a deadline above zero");
        ended
    }
}

impl TlsClient {
    /// Reads what comes until something does: the alert, by its name, or none when it was something else.
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
