//! `HttpConnectionManager`: how requests are served.

#![expect(
    clippy::indexing_slicing,
    reason = "assigning a field of a JSON object made here cannot fail"
)]

use serde_json::{Value, json};
use weft_model::{
    AmbiguousPath, CertificateKey, ClientCertificateDetails, Codec, EscapedSlashes, ForwardedFor,
    ForwardedHeaders, HeadersWithUnderscores, HostPort, HttpFilter, HttpLimits, HttpService,
    HttpTimeouts, PathRules, RouteSource, StreamIdle, Upgrades,
};

use super::super::reader::MISSING;
use super::super::{FieldError, MessageReader, route, values};
use super::http_ours::OurHttp;
use super::{http_versions, jwt, rbac};

const HTTP: &str =
    "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const ROUTER: &str = "envoy.extensions.filters.http.router.v3.Router";

const JWT: &str = "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication";
const RBAC: &str = "envoy.extensions.filters.http.rbac.v3.RBAC";
const SUPPORTED: [&str; 3] = [ROUTER, JWT, RBAC];

/// The effect of leaving out a filter that only observes or compresses; none for other filters.
fn without_consequence(kind: &str) -> Option<&'static str> {
    match kind.rsplit('.').next().unwrap_or_default() {
        "Compressor" => Some("responses are not compressed"),
        "Tap" => Some("requests are not tapped"),
        // `envoy.extensions.filters.http.grpc_stats.v3.FilterConfig`.
        "FilterConfig" if kind.contains(".grpc_stats.") => Some("gRPC calls are not counted"),
        _ => None,
    }
}

/// The error for an unsupported filter, with the supported alternative.
fn unsupported(kind: &str) -> String {
    let instead = match kind.rsplit('.').next().unwrap_or_default() {
        "Lua" | "Wasm" | "GolangConfig" => "; use routes, header changes and RBAC instead of code",
        "ExtAuthz" | "OAuth2" | "BasicAuth" => {
            "; use JwtAuthentication and RBAC to authorize requests"
        }
        _ => "",
    };
    format!("unsupported HTTP filter {kind:?}: must be Router, JwtAuthentication or RBAC{instead}")
}

/// Reads `HttpConnectionManager`.
pub(crate) fn http_service(
    mut manager: MessageReader<'_>,
    ours: &OurHttp,
) -> Result<HttpService, FieldError> {
    manager.harmless(&[
        "stat_prefix",
        // `Expect: 100-continue` is always forwarded, as RFC 9110, section 10.1.1, requires of a proxy.
        "proxy_100_continue",
    ]);
    let codec = codec(&mut manager)?;
    let mut limits = HttpLimits { head_bytes: head_bytes(&mut manager)?, ..HttpLimits::default() };
    limits.target_bytes = ours.target_bytes.unwrap_or(limits.head_bytes).min(limits.head_bytes);
    limits.header_bytes = ours.header_bytes.unwrap_or(limits.head_bytes).min(limits.head_bytes);
    let mut timeouts = timeouts(&mut manager)?;
    timeouts.stall = ours.stall;
    let mut underscores = HeadersWithUnderscores::default();
    if let Some(common) = manager.child("common_http_protocol_options") {
        underscores = common_options(common, &mut limits, &mut timeouts)?;
    }
    if ours.allows_underscores {
        underscores = HeadersWithUnderscores::Allow;
    }
    let http1 = http_versions::http1_options(&mut manager)?;
    let keepalive = http_versions::http2_options(&mut manager, &mut limits)?;
    let upgrades = upgrades(&mut manager)?;
    let client_certificate = client_certificate(&mut manager, ours)?;
    let certificate_keys = certificate_keys(&mut manager);
    let path = path_rules(&mut manager, ours)?;
    let forwarded = forwarded(&mut manager, ours);
    let host_port = host_port(&mut manager, ours)?;
    let access_log = values::access_log(&mut manager)?;
    let routes = routes(&mut manager)?;
    let filters = http_filters(&mut manager, ours)?;
    Ok(HttpService {
        codec,
        routes,
        filters,
        limits,
        timeouts,
        path,
        desync: ours.desync.unwrap_or_default(),
        forwarded,
        host_port,
        underscores,
        upgrades,
        client_certificate,
        certificate_keys,
        http1,
        keepalive,
        access_log,
    })
}

fn head_bytes(manager: &mut MessageReader<'_>) -> Result<usize, FieldError> {
    match manager.number("max_request_headers_kb") {
        None => Ok(HttpLimits::default().head_bytes),
        Some(kib @ 1..=8192) => Ok(usize::try_from(kib).unwrap_or(60) * 1024),
        Some(kib) => Err(manager
            .refuse("max_request_headers_kb", format!("invalid size {kib}: must be 1 to 8192"))),
    }
}

fn timeouts(manager: &mut MessageReader<'_>) -> Result<HttpTimeouts, FieldError> {
    let mut timeouts = HttpTimeouts::default();
    if let Some(head) = manager.duration("request_headers_timeout")? {
        timeouts.head = head;
    }
    timeouts.request = manager.duration("request_timeout")?.filter(|t| !t.is_zero());
    if let Some(idle) = manager.duration("stream_idle_timeout")? {
        timeouts.stream_idle = StreamIdle::Set(Some(idle).filter(|t| !t.is_zero()));
    }
    Ok(timeouts)
}

/// Reads `HttpProtocolOptions`; returns how headers with `_` are handled.
fn common_options(
    mut common: MessageReader<'_>,
    limits: &mut HttpLimits,
    timeouts: &mut HttpTimeouts,
) -> Result<HeadersWithUnderscores, FieldError> {
    if let Some(idle) = common.duration("idle_timeout")? {
        timeouts.idle = idle;
    }
    timeouts.age = common.duration("max_connection_duration")?.filter(|t| !t.is_zero());
    if let Some(count) = common.number("max_headers_count") {
        limits.header_count = values::header_count(&common, count)?;
    }
    limits.requests_per_connection =
        common.number("max_requests_per_connection").filter(|n| *n > 0);
    match common.choice("headers_with_underscores_action").as_str() {
        "ALLOW" => Ok(HeadersWithUnderscores::Allow),
        "DROP_HEADER" => Ok(HeadersWithUnderscores::Drop),
        "REJECT_REQUEST" => Ok(HeadersWithUnderscores::Reject),
        other => Err(common.refuse(
            "headers_with_underscores_action",
            format!("unsupported action {other}: must be ALLOW, DROP_HEADER or REJECT_REQUEST"),
        )),
    }
}

/// The allowed protocol upgrades.
fn upgrades(manager: &mut MessageReader<'_>) -> Result<Upgrades, FieldError> {
    let mut upgrades = Upgrades::default();
    for mut upgrade in manager.children("upgrade_configs") {
        let kind = upgrade.required_text("upgrade_type")?;
        let enabled = upgrade.flag("enabled").unwrap_or(true);
        if kind.eq_ignore_ascii_case("websocket") {
            upgrades.websocket = enabled;
        } else if kind == "CONNECT" {
            upgrades.connect = enabled;
        } else {
            return Err(upgrade.refuse(
                "upgrade_type",
                format!("unsupported upgrade {kind:?}: must be websocket or CONNECT"),
            ));
        }
    }
    Ok(upgrades)
}

fn client_certificate(
    manager: &mut MessageReader<'_>,
    ours: &OurHttp,
) -> Result<ClientCertificateDetails, FieldError> {
    match manager.choice("forward_client_cert_details").as_str() {
        "SANITIZE" if ours.certificate.is_some() => {
            let reason = "must be SANITIZE_SET, because the chain's metadata sets client_certificate";
            Err(manager.refuse("forward_client_cert_details", reason))
        }
        "SANITIZE" => Ok(ClientCertificateDetails::Sanitize),
        "SANITIZE_SET" => Ok(ours.certificate.unwrap_or(ClientCertificateDetails::SanitizeSet)),
        other => Err(manager.refuse(
            "forward_client_cert_details",
            format!("unsupported value {other}: must be SANITIZE or SANITIZE_SET, otherwise a client could claim any identity"),
        )),
    }
}

/// The configured keys of `x-forwarded-client-cert`.
fn certificate_keys(manager: &mut MessageReader<'_>) -> Vec<CertificateKey> {
    let Some(mut details) = manager.child("set_current_client_cert_details") else {
        return Vec::new();
    };
    let is_wanted = |(field, _): &&(&str, CertificateKey)| details.flag(field).unwrap_or(false);
    CertificateKey::FIELDS.iter().filter(is_wanted).map(|(_, key)| *key).collect()
}

fn path_rules(manager: &mut MessageReader<'_>, ours: &OurHttp) -> Result<PathRules, FieldError> {
    let ambiguous = ours.ambiguous_paths.unwrap_or_default();
    let escaped_slashes = match manager.choice("path_with_escaped_slashes_action").as_str() {
        // `path: strict` refuses every ambiguous path, also where this action says to keep escaped slashes.
        "IMPLEMENTATION_SPECIFIC_DEFAULT" | "KEEP_UNCHANGED"
            if ambiguous == AmbiguousPath::Refuse =>
        {
            EscapedSlashes::Reject
        }
        "IMPLEMENTATION_SPECIFIC_DEFAULT" | "KEEP_UNCHANGED" => EscapedSlashes::Keep,
        "REJECT_REQUEST" => EscapedSlashes::Reject,
        "UNESCAPE_AND_FORWARD" => EscapedSlashes::Unescape,
        "UNESCAPE_AND_REDIRECT" => EscapedSlashes::Redirect,
        other => {
            return Err(manager.refuse(
                "path_with_escaped_slashes_action",
                format!("unsupported action {other}: must be REJECT_REQUEST, KEEP_UNCHANGED, UNESCAPE_AND_FORWARD or UNESCAPE_AND_REDIRECT"),
            ));
        }
    };
    Ok(PathRules {
        normalize: manager.flag("normalize_path").unwrap_or(false),
        merge_slashes: manager.flag("merge_slashes").unwrap_or(false),
        escaped_slashes,
        ambiguous,
    })
}

fn forwarded(manager: &mut MessageReader<'_>, ours: &OurHttp) -> ForwardedHeaders {
    let appends = manager.flag("use_remote_address").unwrap_or(false);
    let skips = manager.flag("skip_xff_append").unwrap_or(false);
    let addresses = match (ours.removes_forwarded, appends && !skips) {
        (true, _) => ForwardedFor::Remove,
        (false, true) => ForwardedFor::Append,
        (false, false) => ForwardedFor::Preserve,
    };
    let is_edge = appends || ours.removes_forwarded;
    let trusted_hops = manager.number("xff_num_trusted_hops").unwrap_or(0);
    ForwardedHeaders {
        addresses,
        client_port: ours.client_port.unwrap_or(false),
        is_edge,
        trusted_hops,
    }
}

fn host_port(manager: &mut MessageReader<'_>, ours: &OurHttp) -> Result<HostPort, FieldError> {
    let matching = manager.flag("strip_matching_host_port").unwrap_or(false);
    let any = manager.flag("strip_any_host_port").unwrap_or(false);
    match (matching, any, ours.canonical_host_port) {
        (false, false, false) => Ok(HostPort::Keep),
        (true, false, false) => Ok(HostPort::StripMatching),
        (false, true, false) => Ok(HostPort::StripAny),
        (false, false, true) => Ok(HostPort::Canonical),
        _ => Err(manager.refuse(
            "strip_any_host_port",
            "only one of strip_any_host_port, strip_matching_host_port and weft's host_port must be set",
        )),
    }
}

fn codec(manager: &mut MessageReader<'_>) -> Result<Codec, FieldError> {
    match manager.choice("codec_type").as_str() {
        "AUTO" => Ok(Codec::Auto),
        "HTTP1" => Ok(Codec::Http1),
        "HTTP2" => Ok(Codec::Http2),
        other => Err(manager.refuse(
            "codec_type",
            format!("unsupported codec {other}: must be AUTO, HTTP1 or HTTP2"),
        )),
    }
}

fn routes(manager: &mut MessageReader<'_>) -> Result<RouteSource, FieldError> {
    if let Some(table) = manager.child("route_config") {
        return Ok(RouteSource::Inline(route::decode(table)?.into()));
    }
    let mut rds = manager
        .required_child("rds")
        .map_err(|_| manager.refuse("", "one of route_config and rds must be set"))?;
    values::config_source(&mut rds, "config_source");
    Ok(RouteSource::Named(rds.required_text("route_config_name")?.into()))
}

fn http_filters(
    manager: &mut MessageReader<'_>,
    ours: &OurHttp,
) -> Result<Vec<HttpFilter>, FieldError> {
    let mut filters = Vec::new();
    let mut routed = false;
    for mut filter in manager.children("http_filters") {
        filter.harmless(&["name"]);
        if routed {
            return Err(filter.refuse("", "the router must be the last filter"));
        }
        let optional = filter.flag("is_optional").unwrap_or(false);
        if filter.flag("disabled").unwrap_or(false) {
            return Err(filter.refuse("disabled", "not supported: leave the filter out"));
        }
        let Some(any) = filter.child("typed_config") else {
            return Err(filter.refuse("typed_config", MISSING));
        };
        let kind = any.any_kind();
        if optional && !SUPPORTED.contains(&kind.as_str()) {
            filter.not_honoured("", &format!("optional, {kind} is not supported"));
            any.set_aside();
            continue;
        }
        if let Some(effect) = without_consequence(&kind) {
            filter.not_honoured("", effect);
            any.set_aside();
            continue;
        }
        if !SUPPORTED.contains(&kind.as_str()) {
            return Err(any.refuse("", unsupported(&kind)));
        }
        let mut config = any.unpacked()?;
        match config.kind().rsplit('.').next().unwrap_or_default() {
            "Router" => {
                // Envoy's own headers are never added.
                config.harmless(&["dynamic_stats", "suppress_envoy_headers"]);
                routed = true;
            }
            "JwtAuthentication" => {
                filters.push(HttpFilter::Jwt(jwt::decode(config, &ours.tokens)?.into()));
            }
            "RBAC" => {
                filters.push(HttpFilter::Rbac(rbac::decode(config)?.into()));
            }
            _ => return Err(config.refuse("", unsupported(&kind))),
        }
    }
    if !routed {
        return Err(
            manager.refuse("http_filters", "the router is missing: it must be the last filter")
        );
    }
    let has_tokens = filters.iter().any(|filter| matches!(filter, HttpFilter::Jwt(_)));
    if !ours.tokens.is_empty() && !has_tokens {
        let reason =
            "the chain's metadata has jwt settings, but there is no JwtAuthentication filter";
        return Err(manager.refuse("http_filters", reason));
    }
    Ok(filters)
}

/// The JSON form of `HttpConnectionManager`.
pub(crate) fn http_service_json(http: &HttpService) -> Value {
    let mut filters: Vec<Value> = http
        .filters
        .iter()
        .map(|filter| match filter {
            HttpFilter::Jwt(policy) => jwt::encode(policy),
            HttpFilter::Rbac(rules) => rbac::encode(rules),
        })
        .collect();
    filters.push(json!({"name": "envoy.filters.http.router", "typed_config": values::any(ROUTER, json!({}))}));
    let codec = match http.codec {
        Codec::Auto => "AUTO",
        Codec::Http1 => "HTTP1",
        Codec::Http2 => "HTTP2",
    };
    let details = match http.client_certificate {
        ClientCertificateDetails::Sanitize => "SANITIZE",
        ClientCertificateDetails::SanitizeSet | ClientCertificateDetails::SanitizeSetWhole => {
            "SANITIZE_SET"
        }
    };
    let mut fields = json!({
        "stat_prefix": "http",
        "codec_type": codec,
        "http_filters": filters,
        "max_request_headers_kb": http.limits.head_bytes / 1024,
        "request_headers_timeout": values::duration(http.timeouts.head),
        "common_http_protocol_options": common_options_json(http),
        "forward_client_cert_details": details,
        "access_log": values::access_log_json(&http.access_log),
    });
    if !http.certificate_keys.is_empty() {
        let is_wanted = |(_, key): &&(&str, CertificateKey)| http.certificate_keys.contains(key);
        let keys = CertificateKey::FIELDS.iter().filter(is_wanted);
        fields["set_current_client_cert_details"] =
            keys.map(|(field, _)| ((*field).to_owned(), json!(true))).collect();
    }
    add_rules(http, &mut fields);
    match &http.routes {
        RouteSource::Inline(table) => fields["route_config"] = route::encode(table),
        RouteSource::Named(name) => {
            fields["rds"] = json!({
            "route_config_name": &**name, "config_source": {"ads": {}, "resource_api_version": "V3"}})
        }
    }
    json!({"name": "envoy.filters.network.http_connection_manager", "typed_config": values::any(HTTP, fields)})
}

/// Adds the settings that differ from the defaults.
fn add_rules(http: &HttpService, fields: &mut Value) {
    if let Some(request) = http.timeouts.request {
        fields["request_timeout"] = json!(values::duration(request));
    }
    if let StreamIdle::Set(idle) = http.timeouts.stream_idle {
        fields["stream_idle_timeout"] = json!(values::duration(idle.unwrap_or_default()));
    }
    http_versions::add_options(http, fields);
    let upgrades = [(http.upgrades.websocket, "websocket"), (http.upgrades.connect, "CONNECT")];
    let upgrades: Vec<Value> = upgrades
        .iter()
        .filter(|(enabled, _)| *enabled)
        .map(|(_, kind)| json!({"upgrade_type": kind}))
        .collect();
    if !upgrades.is_empty() {
        fields["upgrade_configs"] = json!(upgrades);
    }
    match (http.forwarded.addresses, http.forwarded.is_edge) {
        (ForwardedFor::Append, _) => fields["use_remote_address"] = json!(true),
        (ForwardedFor::Preserve, true) => {
            fields["use_remote_address"] = json!(true);
            fields["skip_xff_append"] = json!(true);
        }
        (ForwardedFor::Preserve, false) | (ForwardedFor::Remove, _) => {}
    }
    if http.forwarded.trusted_hops != 0 {
        fields["xff_num_trusted_hops"] = json!(http.forwarded.trusted_hops);
    }
    match http.host_port {
        HostPort::StripMatching => fields["strip_matching_host_port"] = json!(true),
        HostPort::StripAny => fields["strip_any_host_port"] = json!(true),
        HostPort::Keep | HostPort::Canonical => {}
    }
    if http.path.normalize {
        fields["normalize_path"] = json!(true);
    }
    if http.path.merge_slashes {
        fields["merge_slashes"] = json!(true);
    }
    match http.path.escaped_slashes {
        EscapedSlashes::Reject => {
            fields["path_with_escaped_slashes_action"] = json!("REJECT_REQUEST");
        }
        EscapedSlashes::Keep => {
            fields["path_with_escaped_slashes_action"] = json!("KEEP_UNCHANGED");
        }
        EscapedSlashes::Unescape => {
            fields["path_with_escaped_slashes_action"] = json!("UNESCAPE_AND_FORWARD");
        }
        EscapedSlashes::Redirect => {
            fields["path_with_escaped_slashes_action"] = json!("UNESCAPE_AND_REDIRECT");
        }
    }
}

fn common_options_json(http: &HttpService) -> Value {
    let mut common = json!({"idle_timeout": values::duration(http.timeouts.idle)});
    if http.limits.header_count != HttpLimits::default().header_count {
        common["max_headers_count"] = json!(http.limits.header_count);
    }
    if let Some(requests) = http.limits.requests_per_connection {
        common["max_requests_per_connection"] = json!(requests);
    }
    if let Some(age) = http.timeouts.age {
        common["max_connection_duration"] = json!(values::duration(age));
    }
    match http.underscores {
        HeadersWithUnderscores::Allow => {}
        HeadersWithUnderscores::Drop => {
            common["headers_with_underscores_action"] = json!("DROP_HEADER")
        }
        HeadersWithUnderscores::Reject => {
            common["headers_with_underscores_action"] = json!("REJECT_REQUEST")
        }
    }
    common
}
