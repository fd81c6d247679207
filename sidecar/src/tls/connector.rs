//! The client's side of a handshake.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls_pki_types::{ServerName, UnixTime};
use weft_certs::tls::Client;
use weft_runtime::socket::{Mark, connect_tcp};

use super::Alpn;
use super::failure::{FailedHandshake, TlsFailure};
use super::stream::TlsStream;
use crate::fetch::server_name;
use crate::plan::{PlannedCluster, PlannedClusterTls};
use crate::stream::{RegisteredTlsStream, TransportStream};
use crate::worker::SidecarWorker;

/// Connects to an endpoint and does the handshake that its cluster asks for, within the cluster's
/// connect timeout. `alpn` is what will be spoken. The connection stands for as long as the endpoint's proof.
///
/// # Errors
/// When it cannot be reached, or does not prove who it should be: a failure of TLS is counted, and is the cause
/// of the error as a [`FailedHandshake`].
pub(crate) async fn connect(
    target: &PlannedCluster,
    address: SocketAddr,
    alpn: Alpn,
    worker: &SidecarWorker,
) -> io::Result<TransportStream> {
    let connected = attempt(target, address, alpn, worker).await;
    if let Some(failure) = connected.as_ref().err().and_then(TlsFailure::of_attempt) {
        worker.metrics.fail_upstream_handshake(failure);
    }
    connected
}

async fn attempt(
    target: &PlannedCluster,
    address: SocketAddr,
    alpn: Alpn,
    worker: &SidecarWorker,
) -> io::Result<TransportStream> {
    let mark = worker.shared.mark;
    let timeout: Duration = target.cluster.connect_timeout;
    let (client, tls) = match &target.tls {
        PlannedClusterTls::None => {
            return Ok(TransportStream::Plain(connect_tcp(address, mark.into(), timeout).await?));
        }
        PlannedClusterTls::Broken => {
            let error = io::Error::other("the secrets for TLS are missing");
            return Err(FailedHandshake::wrap(error, TlsFailure::SecretsMissing));
        }
        PlannedClusterTls::Originate { http1, http2, plain, tls } => match alpn {
            Alpn::Http1 => (http1, tls),
            Alpn::Http2 => (http2, tls),
            Alpn::None => (plain, tls),
        },
    };
    let stream = secure(client, server_name(tls, address), address, mark, timeout).await?;
    let enrolled = match client.trust() {
        None => None,
        Some(trust) => {
            let chain = stream.session().peer_certificates();
            let proof = chain.and_then(|chain| client.proof(chain, UnixTime::now()));
            let proof = proof.ok_or_else(|| {
                let error = io::ErrorKind::InvalidData.into();
                FailedHandshake::wrap(error, TlsFailure::BadCertificate)
            })?;
            Some(worker.register_connection(stream.tcp(), proof, trust))
        }
    };
    let agreed = Alpn::of(stream.session().alpn_protocol());
    if alpn == Alpn::Http2 && agreed != Alpn::Http2 {
        let error = io::Error::other(format!("{address} does not speak HTTP/2"));
        return Err(FailedHandshake::wrap(error, TlsFailure::NoApplicationProtocol));
    }
    Ok(TransportStream::Tls(RegisteredTlsStream::new(stream, enrolled)))
}

/// Connects, and does the handshake: a whole one where a session cannot be gone on with, since the server's
/// certificate of then is not good any more.
///
/// # Errors
/// When it cannot be reached, or does not prove who it should be.
pub(crate) async fn secure(
    client: &Client,
    name: ServerName<'static>,
    address: SocketAddr,
    mark: Option<Mark>,
    timeout: Duration,
) -> io::Result<Box<TlsStream>> {
    let handshake = async |config: &Arc<ClientConfig>| {
        let tcp = connect_tcp(address, mark.into(), timeout).await?;
        let stream = TlsStream::connect(config.clone(), name.clone(), tcp);
        tokio::time::timeout(timeout, stream).await.map_err(|_| {
            let late = format!("no handshake with {address} within {timeout:?}");
            let error = io::Error::new(io::ErrorKind::TimedOut, late);
            FailedHandshake::wrap(error, TlsFailure::Timeout)
        })?
    };
    let stream = handshake(client.config()).await?;
    match client.check_server(stream.session(), &name, UnixTime::now()) {
        Ok(()) => Ok(stream),
        Err(error) => {
            tracing::debug!(%address, %error, "a session was not gone on with");
            handshake(client.whole_config()).await
        }
    }
}
