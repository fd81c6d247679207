//! Fetches a key set over HTTP. Control work: it runs beside the workers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use weft_model::{Discovery, UpstreamTls};

use super::keys::{KeySet, SET_LIMIT_BYTES};
use crate::plan::{Target, TargetTls};
use crate::tls::connector;

/// A key set to fetch.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) uri: String,
    /// The cluster that serves it.
    pub(crate) target: Arc<Target>,
    pub(crate) timeout: Duration,
    pub(crate) cache: Duration,
}

/// Fetches a set from the first endpoint of its cluster that answers.
///
/// # Errors
/// Why no set could be had.
pub(crate) async fn fetch(
    wanted: &Wanted,
    mark: Option<weft_runtime::socket::Mark>,
) -> Result<KeySet, String> {
    let uri: Uri = wanted.uri.parse().map_err(|_| format!("{:?} is no URI", wanted.uri))?;
    let Discovery::Static(set) = &wanted.target.cluster.discovery else {
        return Err("its cluster has no fixed endpoints".into());
    };
    let mut reason = "its cluster has no endpoint".to_owned();
    for endpoint in &set.endpoints {
        let attempt = get(&uri, endpoint.address, &wanted.target, mark);
        match tokio::time::timeout(wanted.timeout, attempt).await {
            Ok(Ok(bytes)) => return KeySet::parse(&bytes),
            Ok(Err(error)) => reason = format!("{}: {error}", endpoint.address),
            Err(_) => {
                reason = format!("{}: no answer within {:?}", endpoint.address, wanted.timeout)
            }
        }
    }
    Err(reason)
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

async fn get(
    uri: &Uri,
    address: SocketAddr,
    target: &Target,
    mark: Option<weft_runtime::socket::Mark>,
) -> Result<Bytes, String> {
    let text = |error: &dyn std::error::Error| error.to_string();
    let timeout = target.cluster.connect_timeout;
    let io: Box<dyn Io> = match &target.tls {
        TargetTls::None => {
            let tcp = weft_runtime::socket::connect_tcp(address, mark.into(), timeout).await;
            Box::new(tcp.map_err(|error| text(&error))?)
        }
        TargetTls::Broken => return Err("the secrets for TLS are missing".into()),
        TargetTls::Originate { http1, tls, .. } => {
            let name = server_name(tls, address);
            let tls = connector::secure(http1, name, address, mark, timeout).await;
            tls.map_err(|error| text(&error))?
        }
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io))
        .await
        .map_err(|error| text(&error))?;
    let driver = tokio::spawn(connection);
    let authority = uri.authority().map_or_else(|| address.to_string(), ToString::to_string);
    let request = Request::get(uri.path_and_query().map_or("/", |target| target.as_str()))
        .header("host", authority)
        .header("accept", "application/json")
        .body(Empty::<Bytes>::new())
        .map_err(|error| text(&error))?;
    let response = sender.send_request(request).await.map_err(|error| text(&error))?;
    if response.status() != http::StatusCode::OK {
        return Err(format!("it answered {}", response.status()));
    }
    let body = Limited::new(response.into_body(), SET_LIMIT_BYTES).collect().await;
    driver.abort();
    Ok(body.map_err(|error| format!("the answer was not taken: {error}"))?.to_bytes())
}

/// The name TLS is asked for: the one configured, else the address.
pub(crate) fn server_name(tls: &UpstreamTls, address: SocketAddr) -> ServerName<'static> {
    let named = tls.sni.as_ref().and_then(|sni| ServerName::try_from(sni.clone()).ok());
    named.unwrap_or_else(|| ServerName::IpAddress(address.ip().into()))
}
