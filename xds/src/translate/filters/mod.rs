//! Network filters: what is done with a connection's bytes or with datagrams.

#![allow(
    clippy::indexing_slicing,
    reason = "assigning a field of a JSON object made here cannot fail"
)]

mod jwt;
mod rbac;

use std::time::Duration;

use serde_json::{Value, json};
use weft_model::{
    ClientCertificateDetails, Codec, FlowKey, HttpFilter, HttpService, RouteSource, SourceAddress,
    TcpProxy, UdpProxy, WeightedCluster,
};

use super::{Reader, Refused, route, values};

const HTTP: &str =
    "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const TCP: &str = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
const UDP: &str = "envoy.extensions.filters.udp.udp_proxy.v3.UdpProxyConfig";
const UDP_ROUTE: &str = "envoy.extensions.filters.udp.udp_proxy.v3.Route";
const ROUTER: &str = "envoy.extensions.filters.http.router.v3.Router";

/// What Envoy takes when the fields are not set.
const DEFAULT_HEADER_LIMIT_BYTES: usize = 60 * 1024;
const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
const DEFAULT_UDP_IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Ours: Envoy waits for ever, which a slow client turns against it.
const DEFAULT_HEADER_TIMEOUT: Duration = Duration::from_secs(15);

/// Reads `TcpProxy`.
pub(super) fn tcp_proxy(mut filter: Reader<'_>) -> Result<TcpProxy, Refused> {
    filter.harmless(&["stat_prefix"]);
    let flow_key = flow_key(filter.children("hash_policy"), |policy| {
        if policy.child("source_ip").is_some() {
            return Ok(FlowKey::SourceAddress);
        }
        let key = policy.child("filter_state").map(|mut state| state.text("key"));
        let is_sequence = key.is_some_and(|key| key == TCP_SEQUENCE);
        let supported = format!("source_ip and the filter_state {TCP_SEQUENCE}");
        if is_sequence { Ok(FlowKey::WithSequence) } else { Err(supported) }
    })?;
    let clusters = if filter.has("cluster") {
        vec![WeightedCluster { name: filter.required_text("cluster")?.into(), weight: 1 }]
    } else if let Some(weighted) = filter.child("weighted_clusters") {
        route::weighted_clusters(weighted)?
    } else {
        return Err(filter.refuse("", "one of cluster and weighted_clusters must be set"));
    };
    let idle_timeout = match filter.duration("idle_timeout")? {
        None => Some(DEFAULT_IDLE_TIMEOUT),
        Some(timeout) => Some(timeout).filter(|t| !t.is_zero()),
    };
    Ok(TcpProxy { clusters, idle_timeout, flow_key, access_log: values::access_log(&mut filter) })
}

/// Stands for the sequence number of a connection's SYN in a hash policy.
const TCP_SEQUENCE: &str = "weft.tcp_sequence";

/// What the hash policies of a flow come to: without any, its 5-tuple decides.
fn flow_key(
    policies: Vec<Reader<'_>>,
    read: impl Fn(&mut Reader<'_>) -> Result<FlowKey, String>,
) -> Result<FlowKey, Refused> {
    let mut key = FlowKey::FiveTuple;
    for mut policy in policies {
        key = read(&mut policy).map_err(|supported| {
            let reason = format!("only {supported} is supported; without it the 5-tuple decides");
            policy.refuse("", reason)
        })?;
    }
    Ok(key)
}

/// The JSON form of `TcpProxy`.
pub(super) fn tcp_proxy_json(tcp: &TcpProxy) -> Value {
    let mut fields = json!({
        "stat_prefix": "tcp",
        "idle_timeout": values::duration(tcp.idle_timeout.unwrap_or_default()),
        "access_log": values::access_log_json(tcp.access_log),
    });
    match tcp.flow_key {
        FlowKey::FiveTuple => {}
        FlowKey::SourceAddress => fields["hash_policy"] = json!([{"source_ip": {}}]),
        FlowKey::WithSequence => {
            fields["hash_policy"] = json!([{"filter_state": {"key": TCP_SEQUENCE}}]);
        }
    }
    match tcp.clusters.as_slice() {
        [only] => fields["cluster"] = json!(&*only.name),
        several => fields["weighted_clusters"] = route::weighted_clusters_json(several),
    }
    json!({"name": "envoy.filters.network.tcp_proxy", "typed_config": values::any(TCP, fields)})
}

/// Reads `UdpProxyConfig`.
pub(super) fn udp_proxy(mut filter: Reader<'_>) -> Result<UdpProxy, Refused> {
    filter.harmless(&["stat_prefix", "upstream_socket_config"]);
    let flow_key = flow_key(filter.children("hash_policies"), |policy| {
        let is_by_source = policy.flag("source_ip").unwrap_or(false);
        if is_by_source { Ok(FlowKey::SourceAddress) } else { Err("source_ip".into()) }
    })?;
    let idle_timeout = filter.duration("idle_timeout")?.unwrap_or(DEFAULT_UDP_IDLE_TIMEOUT);
    let access_log = values::access_log(&mut filter);
    if filter.has("cluster") {
        return Ok(UdpProxy {
            cluster: filter.required_text("cluster")?.into(),
            idle_timeout,
            flow_key,
            access_log,
        });
    }
    let mut matcher = filter.required_child("matcher")?;
    let mut otherwise = matcher.required_child("on_no_match")?;
    let mut action = otherwise.required_child("action")?;
    action.harmless(&["name"]);
    match action.any("typed_config")? {
        Some(mut route) if route.kind() == UDP_ROUTE => Ok(UdpProxy {
            cluster: route.required_text("cluster")?.into(),
            idle_timeout,
            flow_key,
            access_log,
        }),
        _ => Err(action.refuse("typed_config", format!("it is no {UDP_ROUTE}"))),
    }
}

/// The JSON form of a UDP listener filter.
pub(super) fn udp_proxy_json(udp: &UdpProxy, source: SourceAddress) -> Value {
    let route = values::any(UDP_ROUTE, json!({"cluster": &*udp.cluster}));
    let mut fields = json!({
        "stat_prefix": "udp",
        "idle_timeout": values::duration(udp.idle_timeout),
        "access_log": values::access_log_json(udp.access_log),
        "matcher": {"on_no_match": {"action": {"name": "route", "typed_config": route}}},
    });
    if udp.flow_key == FlowKey::SourceAddress {
        fields["hash_policies"] = json!([{"source_ip": true}]);
    }
    if source == SourceAddress::Client {
        fields["use_original_src_ip"] = json!(true);
    }
    json!({"name": "envoy.filters.udp_listener.udp_proxy", "typed_config": values::any(UDP, fields)})
}

/// Reads `HttpConnectionManager`.
pub(super) fn http_service(mut manager: Reader<'_>) -> Result<HttpService, Refused> {
    manager.harmless(&[
        "stat_prefix",
        "server_name",
        "tracing",
        "generate_request_id",
        "request_id_extension",
        "use_remote_address",
        "drain_timeout",
        "delayed_close_timeout",
        "http_protocol_options",
        "http2_protocol_options",
        "set_current_client_cert_details",
        "server_header_transformation",
        "stream_idle_timeout",
        "request_timeout",
        "normalize_path",
        "merge_slashes",
    ]);
    let codec = codec(&mut manager)?;
    let header_limit_bytes = match manager.number("max_request_headers_kb") {
        None => DEFAULT_HEADER_LIMIT_BYTES,
        Some(kib @ 1..=8192) => usize::try_from(kib).unwrap_or(60) * 1024,
        Some(kib) => {
            return Err(manager
                .refuse("max_request_headers_kb", format!("{kib} is not between 1 and 8192")));
        }
    };
    let idle_timeout = match manager.child("common_http_protocol_options") {
        Some(mut common) => {
            common.harmless(&["headers_with_underscores_action"]);
            common.duration("idle_timeout")?.unwrap_or(DEFAULT_IDLE_TIMEOUT)
        }
        None => DEFAULT_IDLE_TIMEOUT,
    };
    let header_timeout =
        manager.duration("request_headers_timeout")?.unwrap_or(DEFAULT_HEADER_TIMEOUT);
    let websocket = websocket(&mut manager)?;
    let client_certificate = match manager.choice("forward_client_cert_details").as_str() {
        "SANITIZE" => ClientCertificateDetails::Nothing,
        "SANITIZE_SET" => ClientCertificateDetails::FromProof,
        other => {
            return Err(manager.refuse(
                "forward_client_cert_details",
                format!("{other} would let a client claim an identity; SANITIZE and SANITIZE_SET are supported"),
            ));
        }
    };
    let access_log = values::access_log(&mut manager);
    let routes = routes(&mut manager)?;
    let filters = http_filters(&mut manager)?;
    Ok(HttpService {
        codec,
        routes,
        filters,
        header_limit_bytes,
        header_timeout,
        idle_timeout,
        websocket,
        client_certificate,
        access_log,
    })
}

fn codec(manager: &mut Reader<'_>) -> Result<Codec, Refused> {
    match manager.choice("codec_type").as_str() {
        "AUTO" => Ok(Codec::Auto),
        "HTTP1" => Ok(Codec::Http1),
        "HTTP2" => Ok(Codec::Http2),
        other => Err(manager
            .refuse("codec_type", format!("{other} is not spoken; AUTO, HTTP1 and HTTP2 are"))),
    }
}

/// Whether upgrades to WebSocket are let through.
fn websocket(manager: &mut Reader<'_>) -> Result<bool, Refused> {
    let mut websocket = false;
    for mut upgrade in manager.children("upgrade_configs") {
        let kind = upgrade.required_text("upgrade_type")?;
        if !kind.eq_ignore_ascii_case("websocket") {
            return Err(
                upgrade.refuse("upgrade_type", format!("{kind:?} is not supported; websocket is"))
            );
        }
        websocket = upgrade.flag("enabled").unwrap_or(true);
    }
    Ok(websocket)
}

fn routes(manager: &mut Reader<'_>) -> Result<RouteSource, Refused> {
    if let Some(table) = manager.child("route_config") {
        return Ok(RouteSource::Inline(route::decode(table)?.into()));
    }
    let mut rds = manager
        .required_child("rds")
        .map_err(|_| manager.refuse("", "one of route_config and rds must be set"))?;
    rds.harmless(&["config_source"]);
    Ok(RouteSource::Named(rds.required_text("route_config_name")?.into()))
}

fn http_filters(manager: &mut Reader<'_>) -> Result<Vec<HttpFilter>, Refused> {
    let mut filters = Vec::new();
    let mut routed = false;
    for mut filter in manager.children("http_filters") {
        filter.harmless(&["name"]);
        if routed {
            return Err(filter.refuse("", "the router must be the last filter"));
        }
        let optional = filter.flag("is_optional").unwrap_or(false);
        if filter.flag("disabled").unwrap_or(false) {
            return Err(filter.refuse("disabled", "it is not supported; leave the filter out"));
        }
        let mut config = match filter.any("typed_config") {
            Ok(Some(config)) => config,
            Ok(None) => return Err(filter.refuse("typed_config", "it is missing")),
            Err(_) if optional => continue,
            Err(refused) => return Err(refused),
        };
        match config.kind().rsplit('.').next().unwrap_or_default() {
            "Router" => {
                config.harmless(&["dynamic_stats", "suppress_envoy_headers", "start_child_span"]);
                routed = true;
            }
            "JwtAuthentication" => filters.push(HttpFilter::Jwt(jwt::decode(config)?.into())),
            "RBAC" => {
                filters.extend(rbac::decode(config)?.map(|rules| HttpFilter::Rbac(rules.into())))
            }
            _ if optional => {}
            _ => {
                return Err(
                    config.refuse("", format!("{} is no HTTP filter known here", config.kind()))
                );
            }
        }
    }
    if routed {
        Ok(filters)
    } else {
        Err(manager.refuse("http_filters", "the router is missing; it must be the last"))
    }
}

/// The JSON form of `HttpConnectionManager`.
pub(super) fn http_service_json(http: &HttpService) -> Value {
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
        ClientCertificateDetails::Nothing => "SANITIZE",
        ClientCertificateDetails::FromProof => "SANITIZE_SET",
    };
    let mut fields = json!({
        "stat_prefix": "http",
        "codec_type": codec,
        "http_filters": filters,
        "max_request_headers_kb": http.header_limit_bytes / 1024,
        "request_headers_timeout": values::duration(http.header_timeout),
        "common_http_protocol_options": {"idle_timeout": values::duration(http.idle_timeout)},
        "forward_client_cert_details": details,
        "access_log": values::access_log_json(http.access_log),
    });
    if details == "SANITIZE_SET" {
        fields["set_current_client_cert_details"] = json!({"uri": true, "subject": true});
    }
    if http.websocket {
        fields["upgrade_configs"] = json!([{"upgrade_type": "websocket"}]);
    }
    match &http.routes {
        RouteSource::Inline(table) => fields["route_config"] = route::encode(table),
        RouteSource::Named(name) => {
            fields["rds"] = json!({
            "route_config_name": &**name, "config_source": {"ads": {}, "resource_api_version": "V3"}})
        }
    }
    json!({"name": "envoy.filters.network.http_connection_manager", "typed_config": values::any(HTTP, fields)})
}
