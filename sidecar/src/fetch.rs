//! Fetches what configuration names, over HTTP, from a cluster. Control work: it runs beside the workers.

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

/// The longest wait after failures.
pub(crate) const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// How long to wait before the next attempt, after so many before this one failed as well.
pub(crate) fn wait_after(failures: u32) -> Duration {
    Duration::from_secs(1).saturating_mul(2u32.saturating_pow(failures)).min(LONGEST_WAIT)
}

/// What to ask for.
#[derive(Debug, Clone)]
pub(crate) struct FetchRequest {
    pub(crate) uri: String,
    /// The cluster that serves it.
    pub(crate) target: Arc<PlannedCluster>,
    /// How long one endpoint may take for all of it.
    pub(crate) timeout: Duration,
    /// The media type.
    pub(crate) accept: &'static str,
    /// The most bytes.
    pub(crate) limit: usize,
    /// What we have: it is sent only where it is another.
    pub(crate) held: Validators,
    /// How many redirects are followed.
    pub(crate) redirects: u8,
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
pub(crate) struct FetchResponse {
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
pub(crate) enum FetchFailure {
    /// In the time there is.
    Timeout(String),
    /// It has more bytes than may be.
    TooLarge(String),
    /// Anything else.
    Failed(String),
}

impl fmt::Display for FetchFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Timeout(reason) | Self::TooLarge(reason) | Self::Failed(reason)) = self;
        f.write_str(reason)
    }
}

/// Fetches from the first endpoint of the cluster that answers.
///
/// # Errors
/// Why nothing could be had, of the last endpoint.
pub(crate) async fn fetch(
    wanted: &FetchRequest,
    mark: Option<Mark>,
) -> Result<FetchResponse, FetchFailure> {
    let failed = |reason: &str| FetchFailure::Failed(reason.to_owned());
    let uri: Result<Uri, _> = wanted.uri.parse();
    let uri = uri.map_err(|_| FetchFailure::Failed(format!("{:?} is no URI", wanted.uri)))?;
    let mut last = failed("its cluster has no endpoint");
    for address in wanted.target.balancer.addresses() {
        match tokio::time::timeout(wanted.timeout, follow(&uri, address, wanted, mark)).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(failure)) => last = failure.at(address),
            Err(_) => {
                let reason = format!("no answer within {:?}", wanted.timeout);
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

trait FetchIo: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> FetchIo for T {}

/// What one server says.
enum ServerResponse {
    Final(FetchResponse),
    /// The `location` of a redirect.
    Redirect(StatusCode, Option<String>),
}

/// Fetches from an endpoint, and from where it redirects to.
async fn follow(
    uri: &Uri,
    address: SocketAddr,
    wanted: &FetchRequest,
    mark: Option<Mark>,
) -> Result<FetchResponse, FetchFailure> {
    let first = FetchTarget { uri: uri.clone(), address };
    let mut server = first.clone();
    let mut left = wanted.redirects;
    loop {
        match get(&server.uri, server.address, wanted, mark).await? {
            ServerResponse::Final(answer) => return Ok(FetchResponse { from: address, ..answer }),
            ServerResponse::Redirect(status, _) if left == 0 => {
                let limit = wanted.redirects;
                let reason = format!("it answered {status}; redirects followed: {limit}");
                return Err(FetchFailure::Failed(reason));
            }
            ServerResponse::Redirect(status, location) => {
                left -= 1;
                let location = location.unwrap_or_default();
                let next = redirected(&server.uri, &location).map_err(|reason| {
                    FetchFailure::Failed(format!("it answered {status} to {location:?}: {reason}"))
                })?;
                let known = [&first, &server].into_iter().find(|known| is_same(&known.uri, &next));
                let address = match known {
                    Some(known) => known.address,
                    None => look_up(&next).await?,
                };
                server = FetchTarget { uri: next, address };
            }
        }
    }
}

/// A server that is asked, and what for.
#[derive(Debug, Clone)]
struct FetchTarget {
    uri: Uri,
    address: SocketAddr,
}

const HTTP: u16 = 80;
const HTTPS: u16 = 443;

/// Whether two URIs name the same server: host and port, also where one says the port that the other implies.
fn is_same(one: &Uri, other: &Uri) -> bool {
    let implied = |uri: &Uri| if uri.scheme_str() == Some("https") { HTTPS } else { HTTP };
    let port = |uri: &Uri| uri.port_u16().unwrap_or_else(|| implied(uri));
    let host = |uri: &Uri| uri.host().map(str::to_ascii_lowercase);
    host(one) == host(other) && port(one) == port(other)
}

/// Where a redirect leads (RFC 9110, section 10.2.2). To another server only by https, whose name the
/// certificate must have: who can answer in plain text could otherwise send us anywhere.
///
/// # Errors
/// Why it is not followed.
fn redirected(from: &Uri, location: &str) -> Result<Uri, &'static str> {
    let authority = from.authority().map_or("", |authority| authority.as_str());
    let scheme = from.scheme_str().unwrap_or("http");
    let location = location.split('#').next().unwrap_or_default();
    let (first_segment, _) = location.split_once(['/', '?']).unwrap_or((location, ""));
    let absolute = if location.is_empty() {
        return Err("there is no location");
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{}{location}", from.path())
    } else if first_segment.contains(':') {
        // A scheme: no other reference has a colon there (RFC 3986, section 4.2).
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
        Some("http") if scheme == "http" && is_same(&next, from) => Ok(next),
        Some("http") if scheme == "http" => Err("in plain text only the same server is followed"),
        _ => Err("the scheme changes"),
    }
}

async fn look_up(uri: &Uri) -> Result<SocketAddr, FetchFailure> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let found = tokio::net::lookup_host((host, uri.port_u16().unwrap_or(HTTPS))).await;
    let found = found.map_err(|error| FetchFailure::Failed(format!("{host}: {error}")))?.next();
    found.ok_or_else(|| FetchFailure::Failed(format!("{host} has no address")))
}

async fn get(
    uri: &Uri,
    address: SocketAddr,
    wanted: &FetchRequest,
    mark: Option<Mark>,
) -> Result<ServerResponse, FetchFailure> {
    let text = |error: &dyn std::error::Error| FetchFailure::Failed(error.to_string());
    let timeout = wanted.target.cluster.connect_timeout;
    let io: Box<dyn FetchIo> = match &wanted.target.tls {
        PlannedClusterTls::None => {
            let tcp = weft_runtime::socket::connect_tcp(address, mark.into(), timeout).await;
            Box::new(tcp.map_err(|error| text(&error))?)
        }
        PlannedClusterTls::Broken => {
            return Err(FetchFailure::Failed("the secrets for TLS are missing".into()));
        }
        PlannedClusterTls::Originate { http1, tls, .. } => {
            let name = name_of(uri, wanted, tls, address);
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
    let received = receive(response, address, wanted).await;
    driver.abort();
    received
}

/// Reads the response of `address`.
async fn receive(
    response: Response<Incoming>,
    address: SocketAddr,
    wanted: &FetchRequest,
) -> Result<ServerResponse, FetchFailure> {
    let (status, headers) = (response.status(), response.headers());
    let age = age(headers);
    let validators = Validators {
        tag: headers.get(ETAG).cloned(),
        modified: headers.get(LAST_MODIFIED).cloned(),
    };
    if status == StatusCode::NOT_MODIFIED && wanted.held != Validators::default() {
        // It need not say again what did not change.
        let validators = wanted.held.clone();
        return Ok(ServerResponse::Final(FetchResponse {
            body: None,
            validators,
            age,
            from: address,
        }));
    }
    if [301, 302, 303, 307, 308].contains(&status.as_u16()) {
        let location = headers.get(LOCATION).and_then(|value| value.to_str().ok());
        return Ok(ServerResponse::Redirect(status, location.map(str::to_owned)));
    }
    if status != StatusCode::OK {
        return Err(FetchFailure::Failed(format!("it answered {status}")));
    }
    let body = Limited::new(response.into_body(), wanted.limit).collect().await;
    let body = body.map_err(|error| {
        let reason = format!("the answer was not taken: {error}");
        match error.is::<http_body_util::LengthLimitError>() {
            true => FetchFailure::TooLarge(reason),
            false => FetchFailure::Failed(reason),
        }
    })?;
    Ok(ServerResponse::Final(FetchResponse {
        body: Some(body.to_bytes()),
        validators,
        age,
        from: address,
    }))
}

/// The name that the certificate of a key server must have: the one configured for its cluster, or the host
/// of the URI; after a redirect to another server, its host.
fn name_of(
    uri: &Uri,
    wanted: &FetchRequest,
    tls: &UpstreamTls,
    address: SocketAddr,
) -> ServerName<'static> {
    let first: Option<Uri> = wanted.uri.parse().ok();
    let has_moved = first.is_some_and(|first| !is_same(&first, uri));
    let host = uri.host().map(|host| host.trim_matches(['[', ']']).to_owned());
    match host.and_then(|host| ServerName::try_from(host).ok()) {
        Some(host) if has_moved || tls.sni.is_none() => host,
        _ => server_name(tls, address),
    }
}

/// The name TLS is asked for: the one configured, else the address.
pub(crate) fn server_name(tls: &UpstreamTls, address: SocketAddr) -> ServerName<'static> {
    let named = tls.sni.as_ref().and_then(|sni| ServerName::try_from(sni.clone()).ok());
    named.unwrap_or_else(|| ServerName::IpAddress(address.ip().into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirect_leads_to_the_same_server_or_by_https_to_another() {
        let check = |from: &str, location: &str, expected: Result<&str, &str>| {
            let next = redirected(&from.parse().expect("a URI"), location);
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
        check(secure, "http://a.test/two", Err("the scheme changes"));
        check(secure, "file:///etc/passwd", Err("the location is not a URI"));
        check(secure, "https://user@b.test/", Err("the location has no host"));
        check(secure, "", Err("there is no location"));
        let plain = "http://a.test:80/keys";
        check(plain, "/two", Ok("http://a.test:80/two"));
        check(plain, "http://a.test:80/two", Ok("http://a.test:80/two"));
        check(plain, "http://A.test/two", Ok("http://A.test/two"));
        check(
            plain,
            "http://a.test:8080/two",
            Err("in plain text only the same server is followed"),
        );
        check(plain, "http://b.test/two", Err("in plain text only the same server is followed"));
        check(plain, "https://a.test/two", Err("the scheme changes"));
    }

    #[test]
    fn servers_are_the_same_by_host_and_port_with_or_without_the_implied_port() {
        let check = |one: &str, other: &str, expected: bool| {
            let uri = |text: &str| text.parse::<Uri>().expect("a URI");
            assert_eq!(is_same(&uri(one), &uri(other)), expected, "{one} {other}");
        };
        check("https://a.test/x", "https://a.test:443/y?z", true);
        check("http://a.test", "http://A.TEST:80/", true);
        check("https://[::1]:443/", "https://[::1]/", true);
        check("https://a.test/", "https://a.test:8443/", false);
        check("https://a.test/", "https://b.test/", false);
        check("http://a.test/", "https://a.test/", false);
    }
}
