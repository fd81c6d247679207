//! Fetches what configuration names, over HTTP, from a cluster. Control work: it runs beside the workers.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ACCEPT, CACHE_CONTROL, ETAG, HOST, IF_MODIFIED_SINCE, IF_NONE_MATCH, LAST_MODIFIED,
};
use http::{HeaderMap, HeaderValue, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use weft_model::{Discovery, UpstreamTls};
use weft_runtime::socket::Mark;

use crate::plan::{Target, TargetTls};
use crate::tls::connector;

/// The longest wait after failures.
pub(crate) const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// How long to wait before the next attempt, after so many before this one failed as well.
pub(crate) fn wait_after(failures: u32) -> Duration {
    Duration::from_secs(1).saturating_mul(2u32.saturating_pow(failures)).min(LONGEST_WAIT)
}

/// What to ask for.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) uri: String,
    /// The cluster that serves it.
    pub(crate) target: Arc<Target>,
    /// How long one endpoint may take for all of it.
    pub(crate) timeout: Duration,
    /// The media type.
    pub(crate) accept: &'static str,
    /// The most bytes.
    pub(crate) limit: usize,
    /// What we have: it is sent only where it is another.
    pub(crate) held: Validators,
}

/// What tells one state of something from another (RFC 9110, section 8.8).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Validators {
    tag: Option<HeaderValue>,
    modified: Option<HeaderValue>,
}

#[cfg(test)]
impl Validators {
    /// Of something that was changed then.
    pub(crate) fn dated(date: &'static str) -> Self {
        Self { tag: None, modified: Some(HeaderValue::from_static(date)) }
    }
}

/// What came.
#[derive(Debug)]
pub(crate) struct Answer {
    /// None when it is as we have it.
    pub(crate) body: Option<Bytes>,
    pub(crate) validators: Validators,
    /// How long it is good by its own word.
    pub(crate) age: Option<Duration>,
    /// The endpoint that answered.
    pub(crate) from: SocketAddr,
}

/// Why nothing came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure {
    /// In the time there is.
    Late(String),
    /// It has more bytes than may be.
    TooLarge(String),
    /// Anything else.
    Failed(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Late(reason) | Self::TooLarge(reason) | Self::Failed(reason)) = self;
        f.write_str(reason)
    }
}

/// Fetches from the first endpoint of the cluster that answers.
///
/// # Errors
/// Why nothing could be had, of the last endpoint.
pub(crate) async fn fetch(wanted: &Wanted, mark: Option<Mark>) -> Result<Answer, Failure> {
    let failed = |reason: &str| Failure::Failed(reason.to_owned());
    let uri: Result<Uri, _> = wanted.uri.parse();
    let uri = uri.map_err(|_| Failure::Failed(format!("{:?} is no URI", wanted.uri)))?;
    let Discovery::Static(set) = &wanted.target.cluster.discovery else {
        return Err(failed("its cluster has no fixed endpoints"));
    };
    let mut last = failed("its cluster has no endpoint");
    for endpoint in &set.endpoints {
        let address = endpoint.address;
        match tokio::time::timeout(wanted.timeout, get(&uri, address, wanted, mark)).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(failure)) => last = failure.at(address),
            Err(_) => {
                let reason = format!("no answer within {:?}", wanted.timeout);
                last = Failure::Late(reason).at(address);
            }
        }
    }
    Err(last)
}

impl Failure {
    fn at(self, address: SocketAddr) -> Self {
        let at = |reason| format!("{address}: {reason}");
        match self {
            Self::Late(reason) => Self::Late(at(reason)),
            Self::TooLarge(reason) => Self::TooLarge(at(reason)),
            Self::Failed(reason) => Self::Failed(at(reason)),
        }
    }
}

/// How long an answer says that it is good (RFC 9111, section 5.2.2.1). What must not be kept is kept as
/// short as may be.
fn age(headers: &HeaderMap) -> Option<Duration> {
    let all = headers.get_all(CACHE_CONTROL).iter();
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
    wanted: &Wanted,
    mark: Option<Mark>,
) -> Result<Answer, Failure> {
    let text = |error: &dyn std::error::Error| Failure::Failed(error.to_string());
    let timeout = wanted.target.cluster.connect_timeout;
    let io: Box<dyn Io> = match &wanted.target.tls {
        TargetTls::None => {
            let tcp = weft_runtime::socket::connect_tcp(address, mark.into(), timeout).await;
            Box::new(tcp.map_err(|error| text(&error))?)
        }
        TargetTls::Broken => {
            return Err(Failure::Failed("the secrets for TLS are missing".into()));
        }
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
    let mut request = Request::get(uri.path_and_query().map_or("/", |target| target.as_str()))
        .header(HOST, authority)
        .header(ACCEPT, wanted.accept);
    let held = [(IF_NONE_MATCH, &wanted.held.tag), (IF_MODIFIED_SINCE, &wanted.held.modified)];
    for (name, value) in held {
        if let Some(value) = value {
            request = request.header(name, value);
        }
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(|error| text(&error))?;
    let response = sender.send_request(request).await.map_err(|error| text(&error))?;
    let (status, headers) = (response.status(), response.headers());
    let age = age(headers);
    let validators = Validators {
        tag: headers.get(ETAG).cloned(),
        modified: headers.get(LAST_MODIFIED).cloned(),
    };
    if status == StatusCode::NOT_MODIFIED && wanted.held != Validators::default() {
        // It need not say again what did not change.
        return Ok(Answer { body: None, validators: wanted.held.clone(), age, from: address });
    }
    if status != StatusCode::OK {
        // Not followed where it leads elsewhere: where it comes from is configuration.
        return Err(Failure::Failed(format!("it answered {status}")));
    }
    let body = Limited::new(response.into_body(), wanted.limit).collect().await;
    driver.abort();
    let body = body.map_err(|error| {
        let reason = format!("the answer was not taken: {error}");
        match error.is::<http_body_util::LengthLimitError>() {
            true => Failure::TooLarge(reason),
            false => Failure::Failed(reason),
        }
    })?;
    Ok(Answer { body: Some(body.to_bytes()), validators, age, from: address })
}

/// The name TLS is asked for: the one configured, else the address.
pub(crate) fn server_name(tls: &UpstreamTls, address: SocketAddr) -> ServerName<'static> {
    let named = tls.sni.as_ref().and_then(|sni| ServerName::try_from(sni.clone()).ok());
    named.unwrap_or_else(|| ServerName::IpAddress(address.ip().into()))
}
