//! The server's side of a handshake, and the only place where a peer is asserted.

use std::io;

use rustls::HandshakeKind;
use rustls_pki_types::UnixTime;
use tokio::net::TcpStream;
use weft_certs::VerifiedPeer;
use weft_certs::tls::Server;

use super::Alpn;
use super::refused_handshake::RefusedHandshake;
use super::stream::TlsStream;
use crate::stream::{RegisteredTlsStream, TransportStream};
use crate::worker::SidecarWorker;

/// A connection whose handshake is done.
pub(crate) struct AcceptedTls {
    pub(crate) stream: TransportStream,
    pub(crate) alpn: Alpn,
    /// Who the client proved to be; none when it was not asked or declined.
    pub(crate) peer: Option<VerifiedPeer>,
    /// Whether what it showed is for the service to judge.
    pub(crate) passed: bool,
    /// Whether it went on with a session of an earlier connection.
    pub(crate) resumed: bool,
}

/// Does the handshake. When it succeeds, whatever certificate was shown has been checked: by the verifier,
/// or, where a session was resumed, once more after it; and the connection stands on it from then on.
///
/// # Errors
/// Why there is no connection. A client whose session was resumed and then refused receives no alert: the library
/// sends none after the handshake.
pub(crate) async fn accept(
    server: Server,
    tcp: TcpStream,
    worker: &SidecarWorker,
) -> Result<AcceptedTls, RefusedHandshake> {
    let stream = TlsStream::accept(server.config().clone(), tcp).await?;
    let session = stream.session();
    let alpn = Alpn::of(session.alpn_protocol());
    let resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
    let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    let now = UnixTime::now();
    let chain = server.client(session, now).map_err(invalid)?;
    let passed = server.unchecked(session).is_some();
    let (peer, enrolled) = match (chain, server.trust()) {
        (Some(chain), Some(trust)) => {
            let asserted = chain.first().and_then(VerifiedPeer::assertion);
            let proved = asserted.zip(server.proof(chain, now));
            let (peer, proof) =
                proved.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
            (Some(peer), Some(worker.register_connection(stream.tcp(), proof, trust)))
        }
        _ => (None, None),
    };
    Ok(AcceptedTls {
        stream: TransportStream::Tls(RegisteredTlsStream::new(stream, enrolled)),
        alpn,
        peer,
        passed,
        resumed,
    })
}
