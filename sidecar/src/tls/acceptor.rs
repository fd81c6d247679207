//! The server's side of a handshake, and the only place where a peer is asserted.

use std::sync::Arc;

use rustls::ServerConfig;
use tokio::net::TcpStream;
use weft_certs::VerifiedPeer;

use super::Alpn;
use super::stream::TlsStream;
use crate::stream::Stream;

/// A connection whose handshake is done.
pub(crate) struct Accepted {
    pub(crate) stream: Stream,
    pub(crate) alpn: Alpn,
    /// Who the client proved to be; none when it was not asked or declined.
    pub(crate) peer: Option<VerifiedPeer>,
}

/// Does the handshake. When it succeeds, the verifier has checked whatever certificate was shown.
///
/// # Errors
/// Why there is no connection; the client has been sent the alert.
pub(crate) async fn accept(config: Arc<ServerConfig>, tcp: TcpStream) -> std::io::Result<Accepted> {
    let stream = TlsStream::accept(config, tcp).await?;
    let session = stream.session();
    let alpn = Alpn::of(session.alpn_protocol());
    let peer =
        session.peer_certificates().and_then(|chain| VerifiedPeer::assertion(chain.first()?));
    Ok(Accepted { stream: Stream::Tls(stream), alpn, peer })
}
