//! `HttpConnectionManager`: how requests are served.

use envoy_types::util::pack_any;
use weft_model::{
    AmbiguousPath, CertificateKey, ClientCertificateDetails, Codec, EscapedSlashes, ForwardedFor,
    ForwardedHeaders, HeadersWithUnderscores, HostPort, HttpFilter, HttpLimits, HttpService,
    HttpTimeouts, PathRules, RouteSource, StreamIdle, Upgrades,
};

use super::super::pb::http::http_connection_manager as manager_pb;
use super::super::pb::{core, http as pb, listener, router};
use super::super::reader::MISSING;
use super::super::{FieldError, MessageReader, route, values};
use super::http_ours::OurHttp;
use super::typed_config::{http_filter, network_filter};
use super::{http_versions, jwt, rbac};

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

/// Encodes `HttpConnectionManager`.
pub(crate) fn encode_http_service(http: &HttpService) -> listener::Filter {
    let filters = http.filters.iter().map(|filter| match filter {
        HttpFilter::Jwt(policy) => jwt::encode(policy),
        HttpFilter::Rbac(rules) => rbac::encode(rules),
    });
    let router = http_filter("envoy.filters.http.router", pack_any(router::Router::default()));
    let codec = match http.codec {
        Codec::Auto => manager_pb::CodecType::Auto,
        Codec::Http1 => manager_pb::CodecType::Http1,
        Codec::Http2 => manager_pb::CodecType::Http2,
    };
    let routes = match &http.routes {
        RouteSource::Inline(table) => manager_pb::RouteSpecifier::RouteConfig(route::encode(table)),
        RouteSource::Named(name) => manager_pb::RouteSpecifier::Rds(pb::Rds {
            route_config_name: name.to_string(),
            config_source: Some(values::ads()),
        }),
    };
    let idle = match http.timeouts.stream_idle {
        StreamIdle::Set(idle) => Some(idle.unwrap_or_default()),
        _ => None,
    };
    let mut manager = pb::HttpConnectionManager {
        stat_prefix: "http".into(),
        codec_type: codec.into(),
        http_filters: filters.chain([router]).collect(),
        max_request_headers_kb: values::count(http.limits.head_bytes / 1024),
        request_headers_timeout: Some(values::duration(http.timeouts.head)),
        request_timeout: http.timeouts.request.map(values::duration),
        stream_idle_timeout: idle.map(values::duration),
        common_http_protocol_options: Some(encode_common_options(http)),
        http_protocol_options: http_versions::encode_http1(http),
        http2_protocol_options: http_versions::encode_http2(http),
        upgrade_configs: encode_upgrades(&http.upgrades),
        access_log: values::encode_access_log(&http.access_log),
        route_specifier: Some(routes),
        ..pb::HttpConnectionManager::default()
    };
    encode_certificate(http, &mut manager);
    encode_addresses(http, &mut manager);
    encode_path_rules(&http.path, &mut manager);
    network_filter("envoy.filters.network.http_connection_manager", pack_any(manager))
}

/// Encodes how the client's certificate is forwarded.
fn encode_certificate(http: &HttpService, manager: &mut pb::HttpConnectionManager) {
    let details = match http.client_certificate {
        ClientCertificateDetails::Sanitize => manager_pb::ForwardClientCertDetails::Sanitize,
        ClientCertificateDetails::SanitizeSet | ClientCertificateDetails::SanitizeSetWhole => {
            manager_pb::ForwardClientCertDetails::SanitizeSet
        }
    };
    manager.forward_client_cert_details = details.into();
    let mut keys = manager_pb::SetCurrentClientCertDetails::default();
    for key in &http.certificate_keys {
        match key {
            CertificateKey::Cert => keys.cert = true,
            CertificateKey::Chain => keys.chain = true,
            CertificateKey::Subject => keys.subject = values::flag(true),
            CertificateKey::Uri => keys.uri = true,
            CertificateKey::Dns => keys.dns = true,
        }
    }
    manager.set_current_client_cert_details = (!http.certificate_keys.is_empty()).then_some(keys);
}

/// Encodes how addresses in headers are handled.
fn encode_addresses(http: &HttpService, manager: &mut pb::HttpConnectionManager) {
    match (http.forwarded.addresses, http.forwarded.is_edge) {
        (ForwardedFor::Append, _) => manager.use_remote_address = values::flag(true),
        (ForwardedFor::Preserve, true) => {
            manager.use_remote_address = values::flag(true);
            manager.skip_xff_append = true;
        }
        (ForwardedFor::Preserve, false) | (ForwardedFor::Remove, _) => {}
    }
    manager.xff_num_trusted_hops = http.forwarded.trusted_hops;
    match http.host_port {
        HostPort::StripMatching => manager.strip_matching_host_port = true,
        HostPort::StripAny => {
            manager.strip_port_mode = Some(manager_pb::StripPortMode::StripAnyHostPort(true));
        }
        HostPort::Keep | HostPort::Canonical => {}
    }
}

fn encode_path_rules(path: &PathRules, manager: &mut pb::HttpConnectionManager) {
    if path.normalize {
        manager.normalize_path = values::flag(true);
    }
    manager.merge_slashes = path.merge_slashes;
    let action = match path.escaped_slashes {
        EscapedSlashes::Reject => manager_pb::PathWithEscapedSlashesAction::RejectRequest,
        EscapedSlashes::Keep => manager_pb::PathWithEscapedSlashesAction::KeepUnchanged,
        EscapedSlashes::Unescape => manager_pb::PathWithEscapedSlashesAction::UnescapeAndForward,
        EscapedSlashes::Redirect => manager_pb::PathWithEscapedSlashesAction::UnescapeAndRedirect,
    };
    manager.path_with_escaped_slashes_action = action.into();
}

fn encode_upgrades(upgrades: &Upgrades) -> Vec<manager_pb::UpgradeConfig> {
    let kinds = [(upgrades.websocket, "websocket"), (upgrades.connect, "CONNECT")];
    let enabled = kinds.into_iter().filter(|(enabled, _)| *enabled);
    let config = |kind: &str| manager_pb::UpgradeConfig {
        upgrade_type: kind.into(),
        ..manager_pb::UpgradeConfig::default()
    };
    enabled.map(|(_, kind)| config(kind)).collect()
}

fn encode_common_options(http: &HttpService) -> core::HttpProtocolOptions {
    use core::http_protocol_options::HeadersWithUnderscoresAction;
    let underscores = match http.underscores {
        HeadersWithUnderscores::Allow => HeadersWithUnderscoresAction::Allow,
        HeadersWithUnderscores::Drop => HeadersWithUnderscoresAction::DropHeader,
        HeadersWithUnderscores::Reject => HeadersWithUnderscoresAction::RejectRequest,
    };
    let mut common = core::HttpProtocolOptions {
        idle_timeout: Some(values::duration(http.timeouts.idle)),
        max_connection_duration: http.timeouts.age.map(values::duration),
        max_requests_per_connection: http.limits.requests_per_connection.and_then(values::number),
        headers_with_underscores_action: underscores.into(),
        ..core::HttpProtocolOptions::default()
    };
    if http.limits.header_count != HttpLimits::default().header_count {
        common.max_headers_count = values::count(http.limits.header_count);
    }
    common
}
