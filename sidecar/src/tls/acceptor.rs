//! The server side of a TLS handshake, and the only place that creates a [`VerifiedPeer`].

use std::io;
use std::rc::Rc;

use rustls::HandshakeKind;
use rustls_pki_types::UnixTime;
use tokio::net::TcpStream;
use weft_certs::VerifiedPeer;
use weft_certs::tls::ServerTls;
use weft_runtime::connections::ConnectionStatus;

use super::Alpn;
use super::server_handshake::{RefusedHandshake, server_handshake};
use crate::stream::{RegisteredTlsStream, TransportStream};
use crate::worker::SidecarWorker;

/// A connection after its handshake.
pub(crate) struct AcceptedTls {
    pub(crate) stream: TransportStream,
    pub(crate) alpn: Alpn,
    /// The verified client; none when no client certificate was requested or sent.
    pub(crate) peer: Option<VerifiedPeer>,
    /// Whether the client certificate was accepted without verification, for the service to check.
    pub(crate) is_unchecked: bool,
    /// Whether a session of an earlier connection was resumed.
    pub(crate) resumed: bool,
}

/// Performs the handshake. A `peer` in the result was verified: by rustls, which calls `verify_client_cert`
/// (`certs/src/verify.rs`), or again here after a resumed session. From then on the connection is in the certificate
/// index, and closed when the certificate is revoked.
///
/// # Errors
/// When the handshake fails, or the certificate of a resumed session has expired or was revoked. In the second case the
/// client receives no alert, because rustls sends none after the handshake.
pub(crate) async fn accept(
    server: ServerTls,
    tcp: TcpStream,
    status: &Rc<ConnectionStatus>,
    worker: &SidecarWorker,
) -> Result<AcceptedTls, RefusedHandshake> {
    let stream = server_handshake(server.config().clone(), tcp).await?;
    let session = stream.session();
    let alpn = Alpn::of(session.alpn_protocol());
    let resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
    let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    let now = UnixTime::now();
    let chain = server.client(session, now).map_err(invalid)?;
    let is_unchecked = server.unchecked(session).is_some();
    let (peer, registration) = match (chain, server.trust()) {
        (Some(chain), Some(trust)) => {
            let asserted = chain.first().and_then(VerifiedPeer::assertion);
            let proved = asserted.zip(server.proof(chain, now));
            let (peer, proof) =
                proved.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
            (Some(peer), Some(worker.registrar.register(status.clone(), proof, trust)))
        }
        _ => (None, None),
    };
    Ok(AcceptedTls {
        stream: TransportStream::Tls(RegisteredTlsStream::new(stream, registration)),
        alpn,
        peer,
        is_unchecked,
        resumed,
    })
}
