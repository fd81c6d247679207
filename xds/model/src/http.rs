//! How HTTP is served: what a listener understands, admits and adds, and where it draws its limits.

use std::sync::Arc;
use std::time::Duration;

use crate::{JwtPolicy, Name, RbacFilter, RouteTable};

/// How requests are served
/// (`envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager`). What Envoy
/// has no field for stands in the filter chain's metadata, under `weft`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpService {
    /// The HTTP versions that are understood.
    pub codec: Codec,
    /// Where the routes come from.
    pub routes: RouteSource,
    /// What a request passes, in order, before it is routed.
    pub filters: Vec<HttpFilter>,
    /// How large a request's head may be, and how much one connection may ask for.
    pub limits: HttpLimits,
    /// How long a client may take.
    pub timeouts: HttpTimeouts,
    /// What becomes of a path before anything looks at it.
    pub path: PathRules,
    /// What is done with requests that others might read in another way.
    pub desync: DesyncMode,
    /// What the service is told of the client's address.
    pub forwarded: ForwardedHeaders,
    /// What becomes of the port in `host`.
    pub host_port: HostPort,
    /// What becomes of fields with `_` in their names.
    pub underscores: HeadersWithUnderscores,
    /// What a connection or a stream may become.
    pub upgrades: Upgrades,
    /// What of the client's certificate is told to the service (`forward_client_cert_details`).
    pub client_certificate: ClientCertificateDetails,
    /// The keys of `x-forwarded-client-cert` beside `By` and `Hash`, in the order in which they are
    /// written (`set_current_client_cert_details`).
    pub certificate_keys: Vec<CertificateKey>,
    /// How HTTP/1.1 is written and read (`http_protocol_options`).
    pub http1: Http1Options,
    /// Whether and how clients of HTTP/2 are asked for a sign of life
    /// (`http2_protocol_options.connection_keepalive`).
    pub keepalive: Option<Keepalive>,
    /// Whether a line is written per request (`access_log`).
    pub access_log: bool,
}

impl HttpService {
    /// A service with these routes, and with the defaults for everything else.
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
            access_log: false,
        }
    }
}

/// How much a client may send at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HttpLimits {
    /// The most bytes of a request head (`max_request_headers_kb`).
    pub head_bytes: usize,
    /// The most bytes of a request's target (ours: `target_limit_bytes`; as many as `head_bytes` unless set).
    pub target_bytes: usize,
    /// The most bytes of one header, its name and value (ours: `field_limit_bytes`; as many as `head_bytes`
    /// unless set).
    pub header_bytes: usize,
    /// The most fields of a head (`common_http_protocol_options.max_headers_count`).
    pub header_count: usize,
    /// How many requests a connection may bring; none: any number
    /// (`common_http_protocol_options.max_requests_per_connection`).
    pub requests_per_connection: Option<u32>,
    /// How many streams of HTTP/2 may be open at once
    /// (`http2_protocol_options.max_concurrent_streams`).
    pub streams: u32,
}

impl Default for HttpLimits {
    /// Envoy's, but fewer streams than its 2^31, since each costs a task.
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

/// How long a client may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HttpTimeouts {
    /// For the head of a request, from its first byte (`request_headers_timeout`).
    pub head: Duration,
    /// For a whole request with its body; none: for ever (`request_timeout`).
    pub request: Option<Duration>,
    /// How long a connection may be without a request, and without a PING
    /// (`common_http_protocol_options.idle_timeout`).
    pub idle: Duration,
    /// How long a request under way may be without a byte in either direction; none: for ever. A gRPC
    /// call has none unless it was set (`stream_idle_timeout`).
    pub stream_idle: StreamIdle,
    /// How long a client may take no byte of a response, or an endpoint no byte of a request, while there
    /// are some (ours: `stall_timeout_ms`); none: as long as a request may be silent.
    pub stall: Option<Duration>,
    /// How long a connection may live before it is asked to end; none: for ever
    /// (`common_http_protocol_options.max_connection_duration`).
    pub age: Option<Duration>,
}

impl Default for HttpTimeouts {
    /// Envoy's, but for the head: Envoy waits without a limit, which a slow client turns against it.
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
    /// How long a receiver may take nothing while there is something to take.
    #[must_use]
    pub fn stall_limit(&self) -> Duration {
        let silence = self.stream_idle.limit(false);
        self.stall.or(silence).unwrap_or(Duration::MAX)
    }
}

/// How long a request under way may be silent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StreamIdle {
    /// Nothing was said: five minutes, and for ever for gRPC, whose streams wait for events.
    #[default]
    Unset,
    /// So long; none: for ever.
    Set(Option<Duration>),
}

impl StreamIdle {
    /// The limit for a request.
    #[must_use]
    pub fn limit(self, is_grpc: bool) -> Option<Duration> {
        match self {
            Self::Unset if is_grpc => None,
            Self::Unset => Some(Duration::from_secs(300)),
            Self::Set(limit) => limit,
        }
    }
}

/// What becomes of a path before it is matched, authorized and forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PathRules {
    /// Whether dot segments are resolved and unreserved characters decoded (RFC 3986, section 6.2.2;
    /// `normalize_path`).
    pub normalize: bool,
    /// Whether empty segments are removed (`merge_slashes`).
    pub merge_slashes: bool,
    /// What is done with encoded slashes.
    pub escaped_slashes: EscapedSlashes,
    /// What is done with a path that still can be read in several ways.
    pub ambiguous: AmbiguousPath,
}

/// What is done with a path that services read in several ways, after the other [`PathRules`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AmbiguousPath {
    /// It is routed and reaches the service as it came. Policies must allow every way in which a service
    /// may read it (Envoy forwards it too, and judges it as it came only).
    #[default]
    RouteAsSent,
    /// The same, but it is routed by its normalized form (ours: `path: as_sent`; ports of a mesh).
    RouteNormalized,
    /// The request is refused (ours: `path: strict`).
    Refuse,
}

/// What is done with `%2F`, `%5C` and their like (`path_with_escaped_slashes_action`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EscapedSlashes {
    /// They are kept as they are.
    #[default]
    Keep,
    /// The request is refused.
    Reject,
    /// They are decoded.
    Unescape,
    /// The client is sent to the path with slashes instead (307).
    Redirect,
}

/// What is done with a request that is not strict HTTP/1.1. What has no single reading is refused
/// whatever the mode says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DesyncMode {
    /// It is counted and let through where the standard gives it one reading, in strict form.
    Monitor,
    /// What is unusual is let through; after what is ambiguous both connections are closed; what is
    /// severe is refused.
    #[default]
    Defensive,
    /// Everything that is not strict is refused.
    Strictest,
}

impl DesyncMode {
    /// The mode of this name.
    #[must_use]
    pub fn named(word: &str) -> Option<Self> {
        [Self::Monitor, Self::Defensive, Self::Strictest]
            .into_iter()
            .find(|mode| mode.word() == word)
    }

    /// Its name.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Monitor => "monitor",
            Self::Defensive => "defensive",
            Self::Strictest => "strictest",
        }
    }
}

/// What the service is told of the client's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ForwardedHeaders {
    /// What becomes of `x-forwarded-for`.
    pub addresses: ForwardedFor,
    /// Whether the client's port is told with its address (ours: `forwarded_client_port`).
    pub client_port: bool,
    /// Whether `x-forwarded-proto` and `x-forwarded-port` are set here: this hop is the first of ours
    /// (`use_remote_address`).
    pub is_edge: bool,
    /// How many proxies before this hop are trusted to say who their client is (`xff_num_trusted_hops`).
    pub trusted_hops: u32,
}

/// What becomes of `x-forwarded-for`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ForwardedFor {
    /// It stays as it came: the hop before is ours (`use_remote_address` false, or
    /// `skip_xff_append`).
    #[default]
    Preserve,
    /// The client's address is added (`use_remote_address`).
    Append,
    /// It is removed (ours: `forwarded_for: remove`).
    Remove,
}

/// What becomes of the port in a request's authority.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HostPort {
    /// It stays.
    #[default]
    Keep,
    /// It is removed when it is the listener's (`strip_matching_host_port`).
    StripMatching,
    /// It is removed (`strip_any_host_port`).
    StripAny,
    /// It is removed at ports 80 and 443, and added at others where it is missing, as AWS does (ours:
    /// `host_port: canonical`).
    Canonical,
}

/// What becomes of a field with `_` in its name, which some services take for the one with `-`
/// (`common_http_protocol_options.headers_with_underscores_action`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeadersWithUnderscores {
    /// It stays, unless it is a spelling of an identity header.
    #[default]
    Allow,
    /// It is left out.
    Drop,
    /// The request is refused.
    Reject,
}

/// What a connection or a stream may become (`upgrade_configs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Upgrades {
    /// WebSocket (RFC 6455, RFC 8441).
    pub websocket: bool,
    /// A tunnel (`CONNECT`, RFC 9110, section 9.3.6).
    pub connect: bool,
}

/// Which HTTP versions a listener understands (`codec_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// ALPN decides; without it, whether the client sends HTTP/2's preface.
    Auto,
    /// HTTP/1.1 only.
    Http1,
    /// HTTP/2 only.
    Http2,
}

/// Where the routes of an HTTP service come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteSource {
    /// They stand in the listener.
    Inline(Arc<RouteTable>),
    /// They come as a `RouteConfiguration` of this name.
    Named(Name),
}

/// A check that a request passes before it is routed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HttpFilter {
    /// `envoy.filters.http.jwt_authn`.
    Jwt(Arc<JwtPolicy>),
    /// `envoy.filters.http.rbac`.
    Rbac(Arc<RbacFilter>),
}

/// What of the client's certificate is told to the service. What the client claims of itself is
/// always removed, whatever this says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientCertificateDetails {
    /// Nothing (`SANITIZE`).
    Sanitize,
    /// `x-forwarded-client-cert`, `x-weft-peer` and `x-amzn-mtls-clientcert-serial-number`, set from the
    /// proof (`SANITIZE_SET`). Where nothing is proved but the key, `x-amzn-mtls-clientcert`: all that the
    /// client showed, and none of those.
    SanitizeSet,
    /// The same, and all other `x-amzn-mtls-clientcert-*` fields: issuer, subject, validity and the
    /// certificate itself (ours: `client_certificate: whole`).
    SanitizeSetWhole,
}

/// A key of `x-forwarded-client-cert` (`HttpConnectionManager.SetCurrentClientCertDetails`), in the order in
/// which Envoy writes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CertificateKey {
    /// The client's certificate, as PEM.
    Cert,
    /// The whole chain that the client showed, as PEM.
    Chain,
    /// The subject of the certificate.
    Subject,
    /// The URIs of the certificate.
    Uri,
    /// The DNS names of the certificate.
    Dns,
}

impl CertificateKey {
    /// Each key with its field in Envoy's files, in order.
    pub const FIELDS: [(&'static str, Self); 5] = [
        ("cert", Self::Cert),
        ("chain", Self::Chain),
        ("subject", Self::Subject),
        ("uri", Self::Uri),
        ("dns", Self::Dns),
    ];
}

/// How HTTP/1.1 is written and read (`envoy.config.core.v3.Http1ProtocolOptions`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Http1Options {
    /// The host of a request of HTTP/1.0 that names none; without: `localhost`
    /// (`default_host_for_http_10`).
    pub default_host: Option<String>,
    /// How header names are written (`header_key_format`).
    pub header_case: HeaderCase,
}

/// How header names are written in messages of HTTP/1.1 (`header_key_format`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeaderCase {
    /// As they came: in lower case where they came by HTTP/2 or were added here.
    #[default]
    AsReceived,
    /// The first letter, and each behind a `-`, in upper case (`proper_case_words`).
    Words,
}

/// How a client of HTTP/2 is asked for a sign of life (`envoy.config.core.v3.KeepaliveSettings`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// How long after the answer the next PING is sent.
    pub interval: Duration,
    /// How long the answer may take before the connection is closed.
    pub timeout: Duration,
    /// By how many percent the interval is lengthened at most, at random (`interval_jitter`): 0 to 100.
    pub jitter_percent: u8,
}
