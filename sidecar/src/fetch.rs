//! Fetches key sets and CRLs over HTTP from clusters. Runs on the control thread, not on the workers.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ACCEPT, CACHE_CONTROL, ETAG, HOST, IF_MODIFIED_SINCE, IF_NONE_MATCH, LAST_MODIFIED, LOCATION,
};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use weft_model::UpstreamTls;
use weft_runtime::socket::Mark;

use crate::plan::{PlannedCluster, PlannedClusterTls};
use crate::tls::connector;

/// What to fetch, and how.
#[derive(Debug, Clone)]
pub(crate) struct FetchRequest {
    pub(crate) uri: String,
    /// The cluster that serves the URI.
    pub(crate) cluster: Arc<PlannedCluster>,
    /// The limit for one endpoint's complete response.
    pub(crate) timeout: Duration,
    /// The media type to accept.
    pub(crate) accept: &'static str,
    /// The largest body, in bytes.
    pub(crate) limit: usize,
    /// The validators of the stored version: the body is sent only if it changed.
    pub(crate) validators: Validators,
    /// The number of redirects to follow.
    pub(crate) redirects: u8,
}

/// The validators of a version of a resource (RFC 9110, section 8.8).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Validators {
    tag: Option<HeaderValue>,
    modified: Option<HeaderValue>,
}

#[cfg(test)]
impl Validators {
    /// Validators with a `last-modified` date.
    pub(crate) fn dated(date: &'static str) -> Self {
        Self { tag: None, modified: Some(HeaderValue::from_static(date)) }
    }
}

/// A successful response.
#[derive(Debug)]
pub(crate) struct FetchResponse {
    /// None when the stored version is current.
    pub(crate) body: Option<Bytes>,
    pub(crate) validators: Validators,
    /// How long the response may be cached, by its own `cache-control`.
    pub(crate) max_age: Option<Duration>,
    /// The endpoint that responded.
    pub(crate) from: SocketAddr,
}

/// Why a fetch failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FetchFailure {
    /// The response did not arrive in time.
    Timeout(String),
    /// The body exceeds the size limit.
    TooLarge(String),
    /// Any other failure.
    Failed(String),
}

impl fmt::Display for FetchFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Timeout(reason) | Self::TooLarge(reason) | Self::Failed(reason)) = self;
        f.write_str(reason)
    }
}

/// Fetches from the first endpoint of the cluster that responds.
///
/// # Errors
/// When the URI is invalid, the cluster has no endpoint, or all endpoints fail: then with the failure of the last one.
pub(crate) async fn fetch(
    fetch_request: &FetchRequest,
    mark: Option<Mark>,
) -> Result<FetchResponse, FetchFailure> {
    let failed = |reason: &str| FetchFailure::Failed(reason.to_owned());
    let uri: Result<Uri, _> = fetch_request.uri.parse();
    let uri =
        uri.map_err(|_| FetchFailure::Failed(format!("invalid URI {:?}", fetch_request.uri)))?;
    let mut last = failed("the cluster has no endpoint");
    for address in fetch_request.cluster.balancer.addresses() {
        match tokio::time::timeout(
            fetch_request.timeout,
            follow(&uri, address, fetch_request, mark),
        )
        .await
        {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(failure)) => last = failure.at(address),
            Err(_) => {
                let reason = format!("no response within {:?}", fetch_request.timeout);
                last = FetchFailure::Timeout(reason).at(address);
            }
        }
    }
    Err(last)
}

impl FetchFailure {
    fn at(self, address: SocketAddr) -> Self {
        let at = |reason| format!("{address}: {reason}");
        match self {
            Self::Timeout(reason) => Self::Timeout(at(reason)),
            Self::TooLarge(reason) => Self::TooLarge(at(reason)),
            Self::Failed(reason) => Self::Failed(at(reason)),
        }
    }
}

/// How long a response may be cached (RFC 9111, section 5.2.2.1): zero, which callers raise to their minimum, where it must
/// not be stored.
fn max_age(headers: &HeaderMap) -> Option<Duration> {
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

trait FetchIo: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> FetchIo for T {}

/// The response of one server.
enum ServerResponse {
    Final(FetchResponse),
    /// The `location` of a redirect.
    Redirect(StatusCode, Option<String>),
}

/// Fetches from an endpoint, following its redirects.
async fn follow(
    uri: &Uri,
    address: SocketAddr,
    fetch_request: &FetchRequest,
    mark: Option<Mark>,
) -> Result<FetchResponse, FetchFailure> {
    let first = FetchTarget { uri: uri.clone(), address };
    let mut server = first.clone();
    let mut left = fetch_request.redirects;
    loop {
        match get(&server.uri, server.address, fetch_request, mark).await? {
            ServerResponse::Final(answer) => return Ok(FetchResponse { from: address, ..answer }),
            ServerResponse::Redirect(status, _) if left == 0 => {
                let limit = fetch_request.redirects;
                let reason = format!("HTTP status {status}; redirects followed: {limit}");
                return Err(FetchFailure::Failed(reason));
            }
            ServerResponse::Redirect(status, location) => {
                left -= 1;
                let location = location.unwrap_or_default();
                let next = resolve_redirect(&server.uri, &location).map_err(|reason| {
                    FetchFailure::Failed(format!(
                        "HTTP status {status} with location {location:?}: {reason}"
                    ))
                })?;
                let known =
                    [&first, &server].into_iter().find(|known| is_same_server(&known.uri, &next));
                let address = match known {
                    Some(known) => known.address,
                    None => look_up(&next).await?,
                };
                server = FetchTarget { uri: next, address };
            }
        }
    }
}

/// A server and the URI to request from it.
#[derive(Debug, Clone)]
struct FetchTarget {
    uri: Uri,
    address: SocketAddr,
}

const HTTP: u16 = 80;
const HTTPS: u16 = 443;

/// Whether two URIs name the same server: the same host and port, whether the port is explicit or implied by the scheme.
fn is_same_server(one: &Uri, other: &Uri) -> bool {
    let implied = |uri: &Uri| if uri.scheme_str() == Some("https") { HTTPS } else { HTTP };
    let port = |uri: &Uri| uri.port_u16().unwrap_or_else(|| implied(uri));
    let host = |uri: &Uri| uri.host().map(str::to_ascii_lowercase);
    host(one) == host(other) && port(one) == port(other)
}

/// The URI that a redirect leads to (RFC 9110, section 10.2.2). A redirect to another server is followed over HTTPS only,
/// where the certificate proves the server's name: a plaintext attacker could otherwise redirect to any
/// server.
///
/// # Errors
/// When the location is missing or invalid, the location leads to another server in plaintext, or the scheme changes.
fn resolve_redirect(from: &Uri, location: &str) -> Result<Uri, &'static str> {
    let authority = from.authority().map_or("", |authority| authority.as_str());
    let scheme = from.scheme_str().unwrap_or("http");
    let location = location.split('#').next().unwrap_or_default();
    let (first_segment, _) = location.split_once(['/', '?']).unwrap_or((location, ""));
    let absolute = if location.is_empty() {
        return Err("the response has no location");
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{}{location}", from.path())
    } else if first_segment.contains(':') {
        // A colon in the first segment ends a scheme (RFC 3986, section 4.2).
        location.to_owned()
    } else {
        let (folder, _) = from.path().rsplit_once('/').unwrap_or_default();
        format!("{scheme}://{authority}{folder}/{location}")
    };
    let next: Uri = absolute.parse().map_err(|_| "the location is not a URI")?;
    let names_user = next.authority().is_some_and(|authority| authority.as_str().contains('@'));
    match next.scheme_str() {
        _ if next.host().is_none_or(str::is_empty) || names_user => Err("the location has no host"),
        Some("https") if scheme == "https" => Ok(next),
        Some("http") if scheme == "http" && is_same_server(&next, from) => Ok(next),
        Some("http") if scheme == "http" => Err("redirect to another server without HTTPS"),
        _ => Err("redirect to another scheme"),
    }
}

async fn look_up(uri: &Uri) -> Result<SocketAddr, FetchFailure> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let found = tokio::net::lookup_host((host, uri.port_u16().unwrap_or(HTTPS))).await;
    let found = found.map_err(|error| FetchFailure::Failed(format!("{host}: {error}")))?.next();
    found.ok_or_else(|| FetchFailure::Failed(format!("host {host} has no addresses")))
}

async fn get(
    uri: &Uri,
    address: SocketAddr,
    fetch_request: &FetchRequest,
    mark: Option<Mark>,
) -> Result<ServerResponse, FetchFailure> {
    let text = |error: &dyn std::error::Error| FetchFailure::Failed(error.to_string());
    let timeout = fetch_request.cluster.settings.connect_timeout;
    let io: Box<dyn FetchIo> = match &fetch_request.cluster.tls {
        PlannedClusterTls::None => {
            let tcp = weft_runtime::socket::connect_tcp(address, mark.into(), timeout).await;
            Box::new(tcp.map_err(|error| text(&error))?)
        }
        PlannedClusterTls::Broken => {
            return Err(FetchFailure::Failed("the TLS secrets of the cluster are missing".into()));
        }
        PlannedClusterTls::Originate { http1, tls, .. } => {
            let name = name_of(uri, fetch_request, tls, address);
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
        .header(ACCEPT, fetch_request.accept);
    let validators = [
        (IF_NONE_MATCH, &fetch_request.validators.tag),
        (IF_MODIFIED_SINCE, &fetch_request.validators.modified),
    ];
    for (name, value) in validators {
        if let Some(value) = value {
            request = request.header(name, value);
        }
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(|error| text(&error))?;
    let response = sender.send_request(request).await.map_err(|error| text(&error))?;
    let received = receive(response, address, fetch_request).await;
    driver.abort();
    received
}

/// Reads the response of `address`.
async fn receive(
    response: Response<Incoming>,
    address: SocketAddr,
    fetch_request: &FetchRequest,
) -> Result<ServerResponse, FetchFailure> {
    let status = response.status();
    let headers = response.headers();
    let max_age = max_age(headers);
    let validators = Validators {
        tag: headers.get(ETAG).cloned(),
        modified: headers.get(LAST_MODIFIED).cloned(),
    };
    if status == StatusCode::NOT_MODIFIED && fetch_request.validators != Validators::default() {
        // The response need not repeat validators that did not change.
        let validators = fetch_request.validators.clone();
        return Ok(ServerResponse::Final(FetchResponse {
            body: None,
            validators,
            max_age,
            from: address,
        }));
    }
    if [301, 302, 303, 307, 308].contains(&status.as_u16()) {
        let location = headers.get(LOCATION).and_then(|value| value.to_str().ok());
        return Ok(ServerResponse::Redirect(status, location.map(str::to_owned)));
    }
    if status != StatusCode::OK {
        return Err(FetchFailure::Failed(format!("HTTP status {status}")));
    }
    let body = Limited::new(response.into_body(), fetch_request.limit).collect().await;
    let body = body.map_err(|error| {
        let reason = format!("failed to read the response: {error}");
        match error.is::<http_body_util::LengthLimitError>() {
            true => FetchFailure::TooLarge(reason),
            false => FetchFailure::Failed(reason),
        }
    })?;
    Ok(ServerResponse::Final(FetchResponse {
        body: Some(body.to_bytes()),
        validators,
        max_age,
        from: address,
    }))
}

/// The name that the server's certificate must have: the SNI configured for the cluster or else the host of the URI; after a
/// redirect to another server, that server's host.
fn name_of(
    uri: &Uri,
    fetch_request: &FetchRequest,
    tls: &UpstreamTls,
    address: SocketAddr,
) -> ServerName<'static> {
    let first: Option<Uri> = fetch_request.uri.parse().ok();
    let has_moved = first.is_some_and(|first| !is_same_server(&first, uri));
    let host = uri.host().map(|host| host.trim_matches(['[', ']']).to_owned());
    match host.and_then(|host| ServerName::try_from(host).ok()) {
        Some(host) if has_moved || tls.sni.is_none() => host,
        _ => connector::server_name(tls, address),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_followed_to_the_same_server_or_over_https_to_another() {
        let check = |from: &str, location: &str, expected: Result<&str, &str>| {
            let next = resolve_redirect(&from.parse().expect("a URI"), location);
            let next = next.map(|uri| uri.to_string());
            assert_eq!(next.as_deref().map_err(|reason| *reason), expected, "{from} {location}");
        };
        let secure = "https://a.test/one/keys?x=1";
        check(secure, "/two", Ok("https://a.test/two"));
        check(secure, "two", Ok("https://a.test/one/two"));
        check(secure, "?x=2", Ok("https://a.test/one/keys?x=2"));
        check(secure, "/two?from=https://b.test", Ok("https://a.test/two?from=https://b.test"));
        check(secure, "two?from=https://b.test", Ok("https://a.test/one/two?from=https://b.test"));
        check(secure, "./two:3", Ok("https://a.test/one/./two:3"));
        check(secure, "https://b.test:8443/keys#part", Ok("https://b.test:8443/keys"));
        check(secure, "//b.test/keys", Ok("https://b.test/keys"));
        check(secure, "http://a.test/two", Err("redirect to another scheme"));
        check(secure, "file:///etc/passwd", Err("the location is not a URI"));
        check(secure, "https://user@b.test/", Err("the location has no host"));
        check(secure, "", Err("the response has no location"));
        let plain = "http://a.test:80/keys";
        check(plain, "/two", Ok("http://a.test:80/two"));
        check(plain, "http://a.test:80/two", Ok("http://a.test:80/two"));
        check(plain, "http://A.test/two", Ok("http://A.test/two"));
        check(plain, "http://a.test:8080/two", Err("redirect to another server without HTTPS"));
        check(plain, "http://b.test/two", Err("redirect to another server without HTTPS"));
        check(plain, "https://a.test/two", Err("redirect to another scheme"));
    }

    #[test]
    fn servers_with_the_same_host_and_explicit_or_implied_port_are_the_same() {
        let check = |one: &str, other: &str, expected: bool| {
            let uri = |text: &str| text.parse::<Uri>().expect("a URI");
            assert_eq!(is_same_server(&uri(one), &uri(other)), expected, "{one} {other}");
        };
        check("https://a.test/x", "https://a.test:443/y?z", true);
        check("http://a.test", "http://A.TEST:80/", true);
        check("https://[::1]:443/", "https://[::1]/", true);
        check("https://a.test/", "https://a.test:8443/", false);
        check("https://a.test/", "https://b.test/", false);
        check("http://a.test/", "https://a.test/", false);
    }
}
