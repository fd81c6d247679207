//! The client's side of a handshake.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use rustls_pki_types::UnixTime;
use weft_runtime::socket::{Mark, connect_tcp};

use super::Alpn;
use super::stream::TlsStream;
use crate::authenticate::fetch::server_name;
use crate::plan::{Target, TargetTls};
use crate::stream::Stream;

/// Connects to an endpoint and does the handshake that its cluster asks for, within the cluster's
/// connect timeout. `alpn` is what will be spoken.
///
/// # Errors
/// When it cannot be reached, or does not prove who it should be.
pub(crate) async fn connect(
    target: &Target,
    address: SocketAddr,
    alpn: Alpn,
    mark: Option<Mark>,
) -> io::Result<Stream> {
    let timeout: Duration = target.cluster.connect_timeout;
    let tcp = connect_tcp(address, mark.into(), timeout).await?;
    let (client, tls) = match &target.tls {
        TargetTls::None => return Ok(Stream::Plain(tcp)),
        TargetTls::Broken => return Err(io::Error::other("the secrets for TLS are missing")),
        TargetTls::Originate { http1, http2, plain, tls } => match alpn {
            Alpn::Http1 => (http1, tls),
            Alpn::Http2 => (http2, tls),
            Alpn::None => (plain, tls),
        },
    };
    let name = server_name(tls, address);
    let handshake = TlsStream::connect(client.config().clone(), name.clone(), tcp);
    let stream = tokio::time::timeout(timeout, handshake).await.map_err(|_| {
        io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no handshake with {address} within {timeout:?}"),
        )
    })??;
    let checked = client.check_server(stream.session(), &name, UnixTime::now());
    checked.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let agreed = Alpn::of(stream.session().alpn_protocol());
    if alpn == Alpn::Http2 && agreed != Alpn::Http2 {
        return Err(io::Error::other(format!("{address} does not speak HTTP/2")));
    }
    Ok(Stream::Tls(stream))
}
