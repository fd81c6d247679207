//! HTTP settings of a listener: versions, filters, limits, timeouts, and the headers it adds or normalizes.

use std::sync::Arc;
use std::time::Duration;

use crate::{AccessLogSinks, JwtPolicy, Name, RbacFilter, RouteTable};

/// How requests are served
/// (`envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager`). Settings without an Envoy
/// field are in the filter chain's metadata, under `weft`; they are marked "weft metadata" here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpService {
    /// The supported HTTP versions.
    pub codec: Codec,
    /// Where the routes come from.
    pub routes: RouteSource,
    /// The filters that a request passes before it is routed, in order.
    pub filters: Vec<HttpFilter>,
    /// Limits of requests and connections.
    pub limits: HttpLimits,
    /// Timeouts towards clients.
    pub timeouts: HttpTimeouts,
    /// How a path is normalized before it is authorized and routed.
    pub path: PathRules,
    /// How requests are handled that other HTTP parsers could interpret differently (request smuggling).
    pub desync: DesyncMode,
    /// How `x-forwarded-*` headers are set.
    pub forwarded: ForwardedHeaders,
    /// How the port in `host` is normalized.
    pub host_port: HostPort,
    /// How headers with `_` in their names are handled.
    pub underscores: HeadersWithUnderscores,
    /// The allowed protocol upgrades.
    pub upgrades: Upgrades,
    /// Which headers describe the client's certificate to the service (`forward_client_cert_details`).
    pub client_certificate: ClientCertificateDetails,
    /// The keys of `x-forwarded-client-cert` besides `By` and `Hash`, in the order in which they are written
    /// (`set_current_client_cert_details`).
    pub certificate_keys: Vec<CertificateKey>,
    /// Options of HTTP/1.1 (`http_protocol_options`).
    pub http1: Http1Options,
    /// HTTP/2 keepalive PINGs to clients; none: no PINGs (`http2_protocol_options.connection_keepalive`).
    pub keepalive: Option<Keepalive>,
    /// Where an access log line per request is written (`access_log`).
    pub access_log: AccessLogSinks,
}

impl HttpService {
    /// A service with these routes and default settings.
    #[must_use]
    pub fn new(routes: RouteSource) -> Self {
        Self {
            codec: Codec::Auto,
            routes,
            filters: Vec::new(),
            limits: HttpLimits::default(),
            timeouts: HttpTimeouts::default(),
            path: PathRules::default(),
            desync: DesyncMode::default(),
            forwarded: ForwardedHeaders::default(),
            host_port: HostPort::default(),
            underscores: HeadersWithUnderscores::default(),
            upgrades: Upgrades::default(),
            client_certificate: ClientCertificateDetails::Sanitize,
            certificate_keys: Vec::new(),
            http1: Http1Options::default(),
            keepalive: None,
            access_log: AccessLogSinks::Off,
        }
    }
}

/// Limits of requests and connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HttpLimits {
    /// The most bytes of a request head: request line and headers (`max_request_headers_kb`).
    pub head_bytes: usize,
    /// The most bytes of a request target (weft metadata: `target_limit_bytes`; default: `head_bytes`).
    pub target_bytes: usize,
    /// The most bytes of one header, name and value together (weft metadata: `field_limit_bytes`; default:
    /// `head_bytes`).
    pub header_bytes: usize,
    /// The most headers of a request (`common_http_protocol_options.max_headers_count`).
    pub header_count: usize,
    /// The most requests of a connection; none: no limit
    /// (`common_http_protocol_options.max_requests_per_connection`).
    pub requests_per_connection: Option<u32>,
    /// The most concurrent HTTP/2 streams of a connection
    /// (`http2_protocol_options.max_concurrent_streams`).
    pub streams: u32,
}

impl Default for HttpLimits {
    /// Envoy's defaults, with fewer streams than its 2^31 - 1, because each stream is a task.
    fn default() -> Self {
        Self {
            head_bytes: 60 * 1024,
            target_bytes: 60 * 1024,
            header_bytes: 60 * 1024,
            header_count: 100,
            requests_per_connection: None,
            streams: 256,
        }
    }
}

/// Timeouts towards clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HttpTimeouts {
    /// For a request head, from its first byte to its last (`request_headers_timeout`).
    pub head: Duration,
    /// For a whole request with its body; none: no limit (`request_timeout`).
    pub request: Option<Duration>,
    /// How long a connection may have neither a request nor a PING
    /// (`common_http_protocol_options.idle_timeout`).
    pub idle: Duration,
    /// How long a request in flight may have no byte in either direction. gRPC calls have no limit unless it is set
    /// (`stream_idle_timeout`).
    pub stream_idle: StreamIdle,
    /// How long a client may read no byte of a pending response, or an endpoint no byte of a pending request (weft
    /// metadata: `stall_timeout_ms`); none: as long as `stream_idle`.
    pub stall: Option<Duration>,
    /// The longest lifetime of a connection before it is drained; none: no limit
    /// (`common_http_protocol_options.max_connection_duration`).
    pub age: Option<Duration>,
}

impl Default for HttpTimeouts {
    /// Envoy's defaults, except for `head`: Envoy has no limit, which allows slow-client attacks.
    fn default() -> Self {
        Self {
            head: Duration::from_secs(15),
            request: None,
            idle: Duration::from_secs(3600),
            stream_idle: StreamIdle::default(),
            stall: None,
            age: None,
        }
    }
}

impl HttpTimeouts {
    /// How long a receiver may read no byte of pending data.
    #[must_use]
    pub fn stall_limit(&self) -> Duration {
        let stream_idle = self.stream_idle.limit(false);
        self.stall.or(stream_idle).unwrap_or(Duration::MAX)
    }
}

/// The idle timeout of a request in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StreamIdle {
    /// Not configured: five minutes; no limit for gRPC, whose streams may wait for events.
    #[default]
    Unset,
    /// Configured; none: no limit.
    Set(Option<Duration>),
}

impl StreamIdle {
    /// The timeout for a request; none: no limit.
    #[must_use]
    pub fn limit(self, is_grpc: bool) -> Option<Duration> {
        match self {
            Self::Unset if is_grpc => None,
            Self::Unset => Some(Duration::from_secs(300)),
            Self::Set(limit) => limit,
        }
    }
}

/// How a path is normalized before it is authorized, routed and forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PathRules {
    /// Whether dot segments are resolved and unreserved characters decoded (RFC 3986, section 6.2.2;
    /// `normalize_path`).
    pub normalize: bool,
    /// Whether empty segments are removed (`merge_slashes`).
    pub merge_slashes: bool,
    /// How encoded slashes are handled.
    pub escaped_slashes: EscapedSlashes,
    /// How a path is handled that still has several readings.
    pub ambiguous: AmbiguousPath,
}

/// How a path is handled that has several readings after the other [`PathRules`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AmbiguousPath {
    /// The request is routed and forwarded with the path as sent. Policies must allow every reading (Envoy forwards
    /// it too, but evaluates policies only for the path as sent).
    #[default]
    RouteAsSent,
    /// The same, but routed by the normalized form (weft metadata: `path: as_sent`; used for mesh ports).
    RouteNormalized,
    /// The request is refused (weft metadata: `path: strict`).
    Refuse,
}

/// How `%2F` and `%5C` are handled (`path_with_escaped_slashes_action`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EscapedSlashes {
    /// They are kept.
    #[default]
    Keep,
    /// The request is refused.
    Reject,
    /// They are decoded.
    Unescape,
    /// The client is redirected to the path with plain slashes (307).
    Redirect,
}

/// How a request is handled that is not strict HTTP/1.1. A request without a single valid reading is refused in
/// every mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DesyncMode {
    /// It is counted, and forwarded in strict form where the standard gives it one reading.
    Monitor,
    /// Harmless deviations are forwarded; after an ambiguous request both connections are closed; severe deviations
    /// are refused.
    #[default]
    Defensive,
    /// Every deviation is refused.
    Strictest,
}

impl DesyncMode {
    /// The mode with this name in configurations.
    #[must_use]
    pub fn named(word: &str) -> Option<Self> {
        [Self::Monitor, Self::Defensive, Self::Strictest]
            .into_iter()
            .find(|mode| mode.word() == word)
    }

    /// The name in configurations.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Monitor => "monitor",
            Self::Defensive => "defensive",
            Self::Strictest => "strictest",
        }
    }
}

/// How `x-forwarded-*` headers are set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ForwardedHeaders {
    /// How `x-forwarded-for` is changed.
    pub addresses: ForwardedFor,
    /// Whether the client's port is added to its address (weft metadata: `forwarded_client_port`).
    pub client_port: bool,
    /// Whether this is the first trusted hop, which sets `x-forwarded-proto` and `x-forwarded-port`
    /// (`use_remote_address`).
    pub is_edge: bool,
    /// How many proxies before this hop are trusted to report their client's address (`xff_num_trusted_hops`).
    pub trusted_hops: u32,
}

/// How `x-forwarded-for` is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ForwardedFor {
    /// It is forwarded unchanged: the previous hop is trusted (`use_remote_address` false, or `skip_xff_append`).
    #[default]
    Preserve,
    /// The client's address is appended (`use_remote_address`).
    Append,
    /// It is removed (weft metadata: `forwarded_for: remove`).
    Remove,
}

/// How the port in a request's authority is normalized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HostPort {
    /// The port is kept.
    #[default]
    Keep,
    /// The port is removed when it equals the listener's (`strip_matching_host_port`).
    StripMatching,
    /// The port is removed (`strip_any_host_port`).
    StripAny,
    /// The port is removed for listeners on ports 80 and 443, and added on other ports when it is missing, as AWS load
    /// balancers do (weft metadata: `host_port: canonical`).
    Canonical,
}

/// How a header with `_` in its name is handled; some services treat `_` as `-`
/// (`common_http_protocol_options.headers_with_underscores_action`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeadersWithUnderscores {
    /// The header is forwarded, unless it is a spelling of an identity header.
    #[default]
    Allow,
    /// The header is removed.
    Drop,
    /// The request is refused.
    Reject,
}

/// The allowed protocol upgrades (`upgrade_configs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Upgrades {
    /// WebSocket (RFC 6455, RFC 8441).
    pub websocket: bool,
    /// Tunnels (`CONNECT`, RFC 9110, section 9.3.6).
    pub connect: bool,
}

/// The HTTP versions of a listener (`codec_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// By ALPN; without ALPN, HTTP/2 when the client sends its connection preface.
    Auto,
    /// HTTP/1.1 only.
    Http1,
    /// HTTP/2 only.
    Http2,
}

/// Where the routes of an HTTP service come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteSource {
    /// A route table inside the listener.
    Inline(Arc<RouteTable>),
    /// The name of a `RouteConfiguration`.
    Named(Name),
}

/// A filter that a request passes before it is routed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HttpFilter {
    /// `envoy.filters.http.jwt_authn`.
    Jwt(Arc<JwtPolicy>),
    /// `envoy.filters.http.rbac`.
    Rbac(Arc<RbacFilter>),
}

/// Which headers describe the client's certificate to the service. Such headers from the client are always removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientCertificateDetails {
    /// None (`SANITIZE`).
    Sanitize,
    /// `x-forwarded-client-cert`, `x-weft-peer` and `x-amzn-mtls-clientcert-serial-number`, set from the verified
    /// certificate (`SANITIZE_SET`). With [`ClientCertificateMode::PassThrough`](crate::ClientCertificateMode), only
    /// `x-amzn-mtls-clientcert`: the unverified chain.
    SanitizeSet,
    /// The same, and all other `x-amzn-mtls-clientcert-*` headers: issuer, subject, validity and the certificate (weft
    /// metadata: `client_certificate: whole`).
    SanitizeSetWhole,
}

/// A key of `x-forwarded-client-cert` (`HttpConnectionManager.SetCurrentClientCertDetails`), in the order in
/// which Envoy writes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CertificateKey {
    /// The client's certificate, as PEM.
    Cert,
    /// The whole chain that the client sent, as PEM.
    Chain,
    /// The subject of the certificate.
    Subject,
    /// The URIs of the certificate.
    Uri,
    /// The DNS names of the certificate.
    Dns,
}

impl CertificateKey {
    /// Each key with its field of `SetCurrentClientCertDetails`, in order.
    pub const FIELDS: [(&'static str, Self); 5] = [
        ("cert", Self::Cert),
        ("chain", Self::Chain),
        ("subject", Self::Subject),
        ("uri", Self::Uri),
        ("dns", Self::Dns),
    ];
}

/// Options of HTTP/1.1 (`envoy.config.core.v3.Http1ProtocolOptions`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Http1Options {
    /// The authority of an HTTP/1.0 request without `host`; none: `localhost` (`default_host_for_http_10`).
    pub default_host: Option<String>,
    /// How header names are written (`header_key_format`).
    pub header_case: HeaderCase,
}

/// The case of header names in HTTP/1.1 messages (`header_key_format`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeaderCase {
    /// As received; lower case for headers from HTTP/2 and for added headers.
    #[default]
    AsReceived,
    /// The first letter, and each letter after a `-`, in upper case (`proper_case_words`).
    Words,
}

/// HTTP/2 keepalive PINGs (`envoy.config.core.v3.KeepaliveSettings`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// The time from a PING's acknowledgement to the next PING.
    pub interval: Duration,
    /// How long an acknowledgement may take before the connection is closed.
    pub timeout: Duration,
    /// The largest random extension of the interval, in percent (`interval_jitter`): 0 to 100.
    pub jitter_percent: u8,
}
