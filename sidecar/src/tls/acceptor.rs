//! The server's side of a handshake, and the only place where a peer is asserted.

use std::io;

use rustls::HandshakeKind;
use rustls_pki_types::UnixTime;
use tokio::net::TcpStream;
use weft_certs::VerifiedPeer;
use weft_certs::tls::Server;

use super::Alpn;
use super::stream::TlsStream;
use crate::stream::Stream;

/// A connection whose handshake is done.
pub(crate) struct Accepted {
    pub(crate) stream: Stream,
    pub(crate) alpn: Alpn,
    /// Who the client proved to be; none when it was not asked or declined.
    pub(crate) peer: Option<VerifiedPeer>,
    /// Whether it went on with a session of an earlier connection.
    pub(crate) resumed: bool,
}

/// Does the handshake. When it succeeds, whatever certificate was shown has been checked: by the verifier,
/// or, where a session was resumed, once more after it.
///
/// # Errors
/// Why there is no connection; the client has been sent the alert.
pub(crate) async fn accept(server: Server, tcp: TcpStream) -> io::Result<Accepted> {
    let stream = TlsStream::accept(server.config().clone(), tcp).await?;
    let session = stream.session();
    let alpn = Alpn::of(session.alpn_protocol());
    let client = server.client(session, UnixTime::now());
    let client = client.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let peer = client.and_then(VerifiedPeer::assertion);
    let resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
    Ok(Accepted { stream: Stream::Tls(stream), alpn, peer, resumed })
}
