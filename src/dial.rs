//! Opens the connections to the control plane and to other xDS servers.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use weft_runtime::socket::{Mark, connect_tcp};
use weft_xds::dial::{DialedConnection, Dialer};

const CONNECT: Duration = Duration::from_secs(5);

/// Dials `HOST:PORT`, with TLS when there is a configuration for it.
pub(crate) fn dial_tls(
    address: String,
    config: Option<Arc<ClientConfig>>,
    mark: Option<Mark>,
) -> Dialer {
    Dialer::new(move || Box::pin(connect(address.clone(), config.clone(), mark)))
}

async fn connect(
    address: String,
    config: Option<Arc<ClientConfig>>,
    mark: Option<Mark>,
) -> io::Result<Box<dyn DialedConnection>> {
    let mut last =
        io::Error::new(io::ErrorKind::NotFound, format!("{address} resolves to no address"));
    for target in tokio::net::lookup_host(&address).await? {
        match connect_tcp(target, mark.into(), CONNECT).await {
            Ok(tcp) => {
                let Some(config) = config else {
                    return Ok(Box::new(tcp));
                };
                let name = ServerName::IpAddress(target.ip().into());
                let handshake = tokio_rustls::TlsConnector::from(config).connect(name, tcp);
                let tls = tokio::time::timeout(CONNECT, handshake).await.map_err(|_| {
                    io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!("TLS handshake with {target} timed out"),
                    )
                })??;
                return Ok(Box::new(tls));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}
