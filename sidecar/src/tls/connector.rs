//! Connects to endpoints: TCP and the client side of the TLS handshake.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls_pki_types::{ServerName, UnixTime};
use weft_certs::tls::ClientTls;
use weft_model::UpstreamTls;
use weft_runtime::socket::{Mark, connect_tcp};

use super::Alpn;
use super::failure::{FailedHandshake, TlsFailure};
use super::stream::TlsStream;
use crate::certificate_index::PeerRegistrar;
use crate::metrics::SidecarMetrics;
use crate::plan::{PlannedCluster, PlannedClusterTls};
use crate::stream::{RegisteredTlsStream, TransportStream};

/// Connects to endpoints on behalf of a worker.
#[derive(Debug)]
pub(crate) struct Connector {
    pub(crate) metrics: Arc<SidecarMetrics>,
    /// The mark of outgoing connections, where the process may set it.
    pub(crate) mark: Option<Mark>,
    /// Closes the connections to endpoints whose certificates are revoked.
    pub(crate) registrar: Rc<PeerRegistrar>,
}

impl Connector {
    /// Connects to an endpoint and performs the TLS handshake if its cluster uses TLS, each within the cluster's connect
    /// timeout. `alpn` is the protocol that will be used. The connection is closed when the endpoint's certificate is
    /// revoked.
    ///
    /// # Errors
    /// When the endpoint cannot be reached or the handshake fails. A TLS failure is counted, and is the cause of the
    /// error as a [`FailedHandshake`].
    pub(crate) async fn connect(
        &self,
        cluster: &PlannedCluster,
        address: SocketAddr,
        alpn: Alpn,
    ) -> io::Result<TransportStream> {
        let connected = attempt(cluster, address, alpn, self).await;
        if let Some(failure) = connected.as_ref().err().and_then(TlsFailure::of_attempt) {
            self.metrics.count_upstream_handshake_failure(failure);
        }
        connected
    }
}

/// The TLS server name: the configured SNI, or else the address.
pub(crate) fn server_name(tls: &UpstreamTls, address: SocketAddr) -> ServerName<'static> {
    let named = tls.sni.as_ref().and_then(|sni| ServerName::try_from(sni.clone()).ok());
    named.unwrap_or_else(|| ServerName::IpAddress(address.ip().into()))
}

async fn attempt(
    cluster: &PlannedCluster,
    address: SocketAddr,
    alpn: Alpn,
    connector: &Connector,
) -> io::Result<TransportStream> {
    let mark = connector.mark;
    let timeout: Duration = cluster.settings.connect_timeout;
    let (client, tls) = match &cluster.tls {
        PlannedClusterTls::None => {
            return Ok(TransportStream::Plain(connect_tcp(address, mark.into(), timeout).await?));
        }
        PlannedClusterTls::Broken => {
            let error = io::Error::other("TLS secrets of the cluster are missing");
            return Err(FailedHandshake::wrap(error, TlsFailure::SecretsMissing));
        }
        PlannedClusterTls::Originate { http1, http2, plain, tls } => match alpn {
            Alpn::Http1 => (http1, tls),
            Alpn::Http2 => (http2, tls),
            Alpn::None => (plain, tls),
        },
    };
    let stream = secure(client, server_name(tls, address), address, mark, timeout).await?;
    let registration = match client.trust() {
        None => None,
        Some(trust) => {
            let chain = stream.session().peer_certificates();
            let proof = chain.and_then(|chain| client.proof(chain, UnixTime::now()));
            let proof = proof.ok_or_else(|| {
                let error = io::ErrorKind::InvalidData.into();
                FailedHandshake::wrap(error, TlsFailure::BadCertificate)
            })?;
            Some(connector.registrar.register(Rc::default(), proof, trust))
        }
    };
    let agreed = Alpn::of(stream.session().alpn_protocol());
    if alpn == Alpn::Http2 && agreed != Alpn::Http2 {
        let error = io::Error::other(format!("{address} did not agree to HTTP/2 (ALPN h2)"));
        return Err(FailedHandshake::wrap(error, TlsFailure::NoApplicationProtocol));
    }
    Ok(TransportStream::Tls(RegisteredTlsStream::new(stream, registration)))
}

/// Connects and performs the TLS handshake. When a session was resumed whose server certificate has expired or was
/// revoked, connects again and performs a full handshake.
///
/// # Errors
/// When the endpoint cannot be reached, or the handshake fails.
pub(crate) async fn secure(
    client: &ClientTls,
    name: ServerName<'static>,
    address: SocketAddr,
    mark: Option<Mark>,
    timeout: Duration,
) -> io::Result<Box<TlsStream>> {
    let handshake = async |config: &Arc<ClientConfig>| {
        let tcp = connect_tcp(address, mark.into(), timeout).await?;
        let stream = TlsStream::connect(config.clone(), name.clone(), tcp);
        tokio::time::timeout(timeout, stream).await.map_err(|_| {
            let reason = format!("TLS handshake with {address} not completed within {timeout:?}");
            let error = io::Error::new(io::ErrorKind::TimedOut, reason);
            FailedHandshake::wrap(error, TlsFailure::Timeout)
        })?
    };
    let stream = handshake(client.config()).await?;
    match client.check_server(stream.session(), &name, UnixTime::now()) {
        Ok(()) => Ok(stream),
        Err(error) => {
            tracing::debug!(%address, %error, "TLS session not resumed");
            handshake(client.full_handshake_config()).await
        }
    }
}
