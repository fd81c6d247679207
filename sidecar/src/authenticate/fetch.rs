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

use super::fault::TokenFault;
use super::key_store::{FetchError, FetchedSet};
use super::keys::{KeySet, SET_LIMIT_BYTES, SetError};
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
) -> Result<FetchedSet, FetchError> {
    let failed = |reason: String| FetchError { fault: TokenFault::KeysFailed, reason };
    let uri: Result<Uri, _> = wanted.uri.parse();
    let uri = uri.map_err(|_| failed(format!("{:?} is no URI", wanted.uri)))?;
    let Discovery::Static(set) = &wanted.target.cluster.discovery else {
        return Err(failed("its cluster has no fixed endpoints".into()));
    };
    let mut last = failed("its cluster has no endpoint".into());
    for endpoint in &set.endpoints {
        let attempt = get(&uri, endpoint.address, &wanted.target, mark);
        match tokio::time::timeout(wanted.timeout, attempt).await {
            Ok(Ok((bytes, age))) => {
                let set = KeySet::parse(&bytes).map_err(|error| match error {
                    SetError::TooLarge(reason) => {
                        FetchError { fault: TokenFault::KeysTooLarge, reason }
                    }
                    SetError::Invalid(reason) => {
                        FetchError { fault: TokenFault::KeysInvalid, reason }
                    }
                })?;
                return Ok(FetchedSet { set, age });
            }
            Ok(Err(FetchError { fault, reason })) => {
                last = FetchError { fault, reason: format!("{}: {reason}", endpoint.address) };
            }
            Err(_) => {
                let reason = format!("{}: no answer within {:?}", endpoint.address, wanted.timeout);
                last = FetchError { fault: TokenFault::KeysTimeout, reason };
            }
        }
    }
    Err(last)
}

/// How long an answer says that it is good (RFC 9111, section 5.2.2.1). What must not be kept is kept as
/// short as may be.
fn age(headers: &http::HeaderMap) -> Option<Duration> {
    let all = headers.get_all(http::header::CACHE_CONTROL).iter();
    let said: Vec<String> =
        all.filter_map(|value| value.to_str().ok()).map(str::to_ascii_lowercase).collect();
    let mut words = said.iter().flat_map(|value| value.split(',')).map(str::trim);
    if words.clone().any(|word| word == "no-store" || word == "no-cache") {
        return Some(Duration::ZERO);
    }
    let seconds = words.find_map(|word| word.strip_prefix("max-age="))?;
    seconds.trim_matches('"').parse().ok().map(Duration::from_secs)
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

async fn get(
    uri: &Uri,
    address: SocketAddr,
    target: &Target,
    mark: Option<weft_runtime::socket::Mark>,
) -> Result<(Bytes, Option<Duration>), FetchError> {
    let failed = |reason: String| FetchError { fault: TokenFault::KeysFailed, reason };
    let text = |error: &dyn std::error::Error| failed(error.to_string());
    let timeout = target.cluster.connect_timeout;
    let io: Box<dyn Io> = match &target.tls {
        TargetTls::None => {
            let tcp = weft_runtime::socket::connect_tcp(address, mark.into(), timeout).await;
            Box::new(tcp.map_err(|error| text(&error))?)
        }
        TargetTls::Broken => return Err(failed("the secrets for TLS are missing".into())),
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
        // Not followed where it leads elsewhere: where keys come from is configuration.
        return Err(failed(format!("it answered {}", response.status())));
    }
    let age = age(response.headers());
    let body = Limited::new(response.into_body(), SET_LIMIT_BYTES).collect().await;
    driver.abort();
    let body = body.map_err(|error| {
        let is_long = error.is::<http_body_util::LengthLimitError>();
        let fault = if is_long { TokenFault::KeysTooLarge } else { TokenFault::KeysFailed };
        FetchError { fault, reason: format!("the answer was not taken: {error}") }
    })?;
    Ok((body.to_bytes(), age))
}

/// The name TLS is asked for: the one configured, else the address.
pub(crate) fn server_name(tls: &UpstreamTls, address: SocketAddr) -> ServerName<'static> {
    let named = tls.sni.as_ref().and_then(|sni| ServerName::try_from(sni.clone()).ok());
    named.unwrap_or_else(|| ServerName::IpAddress(address.ip().into()))
}
