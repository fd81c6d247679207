//! Builds Envoy bootstrap files from the few resources that tests need. Each function returns a
//! resource, or a part of one, in the JSON form of its protobuf message.

use std::net::{Ipv4Addr, SocketAddr};

use serde_json::{Value, json};

use crate::mesh_pki::spiffe_id;

const HTTP: &str =
    "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const TCP_PROXY: &str = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
const UDP_PROXY: &str = "envoy.extensions.filters.udp.udp_proxy.v3";

/// A message packed in an `Any`.
#[must_use]
pub fn any(message: &str, fields: Value) -> Value {
    with(fields, "@type", json!(format!("type.googleapis.com/{message}")))
}

/// Returns the JSON object with one more field.
///
/// # Panics
/// If `object` is not a JSON object.
#[must_use]
pub fn with(mut object: Value, field: &str, value: Value) -> Value {
    object.as_object_mut().expect("the message is a JSON object").insert(field.to_owned(), value);
    object
}

/// A socket address of protocol `TCP` or `UDP`.
#[must_use]
pub fn address(at: SocketAddr, protocol: &str) -> Value {
    json!({"socket_address":
        {"protocol": protocol, "address": at.ip(), "port_value": at.port()}})
}

/// A TCP address of loopback.
#[must_use]
pub fn loopback(port: u16) -> Value {
    address((Ipv4Addr::LOCALHOST, port).into(), "TCP")
}

/// A listener with a TCP proxy; `proxy` is the rest of its `TcpProxy`.
#[must_use]
pub fn tcp_listener(name: &str, at: SocketAddr, proxy: Value) -> Value {
    tcp_tls_listener(name, at, proxy, None)
}

/// The same with a transport socket, if one is given.
#[must_use]
pub fn tcp_tls_listener(name: &str, at: SocketAddr, proxy: Value, tls: Option<Value>) -> Value {
    let proxy = any(TCP_PROXY, with(proxy, "stat_prefix", json!("tcp")));
    let chain = with_socket(json!({"filters": [{"name": "tcp", "typed_config": proxy}]}), tls);
    json!({"name": name, "address": address(at, "TCP"), "filter_chains": [chain]})
}

/// A listener that proxies datagrams to a cluster; `proxy` is the rest of its `UdpProxyConfig`.
#[must_use]
pub fn udp_listener(name: &str, at: SocketAddr, cluster: &str, proxy: Value) -> Value {
    let route = any(&format!("{UDP_PROXY}.Route"), json!({"cluster": cluster}));
    let matcher = json!({"on_no_match": {"action": {"name": "route", "typed_config": route}}});
    let proxy = with(with(proxy, "stat_prefix", json!("udp")), "matcher", matcher);
    let proxy = any(&format!("{UDP_PROXY}.UdpProxyConfig"), proxy);
    json!({"name": name, "address": address(at, "UDP"),
        "listener_filters": [{"name": "udp", "typed_config": proxy}]})
}

/// A static cluster of these endpoints, with default settings.
#[must_use]
pub fn static_cluster(name: &str, endpoints: &[SocketAddr]) -> Value {
    let endpoint = |at: &SocketAddr| json!({"endpoint": {"address": address(*at, "TCP")}});
    let members: Vec<Value> = endpoints.iter().map(endpoint).collect();
    json!({"name": name, "type": "STATIC", "load_assignment":
        {"cluster_name": name, "endpoints": [{"lb_endpoints": members}]}})
}

/// A bootstrap file with static resources.
#[must_use]
pub fn bootstrap(admin: u16, listeners: &[Value], clusters: &[Value]) -> Value {
    json!({
        "admin": {"address": loopback(admin)},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    })
}

/// A route of all paths to a cluster.
#[must_use]
pub fn route_to(cluster: &str, timeout_seconds: u64) -> Value {
    json!({"match": {"prefix": "/"},
           "route": {"cluster": cluster, "timeout": format!("{timeout_seconds}s")}})
}

/// An `HttpConnectionManager` with one route.
#[must_use]
pub fn http(route: &Value, filters: &[Value]) -> Value {
    http_with_routes(std::slice::from_ref(route), filters)
}

/// An `HttpConnectionManager` with these routes for all hosts. The router follows the `filters`.
#[must_use]
pub fn http_with_routes(routes: &[Value], filters: &[Value]) -> Value {
    let hosts = json!([{"name": "all", "domains": ["*"], "routes": routes}]);
    with(http_filters(filters), "route_config", json!({"name": "all", "virtual_hosts": hosts}))
}

/// An `HttpConnectionManager` whose `RouteConfiguration` of this name comes from the xDS server.
#[must_use]
pub fn http_with_named_routes(name: &str, filters: &[Value]) -> Value {
    let source = json!({"ads": {}, "resource_api_version": "V3"});
    let routes = json!({"route_config_name": name, "config_source": source});
    with(http_filters(filters), "rds", routes)
}

/// An `HttpConnectionManager` without routes.
fn http_filters(filters: &[Value]) -> Value {
    let router = json!({"name": "router", "typed_config":
        any("envoy.extensions.filters.http.router.v3.Router", json!({}))});
    let filters: Vec<&Value> = filters.iter().chain([&router]).collect();
    json!({
        "stat_prefix": "http",
        "codec_type": "AUTO",
        "forward_client_cert_details": "SANITIZE_SET",
        "set_current_client_cert_details": {"uri": true},
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "access_log": [{"name": "stdout", "typed_config":
            any("envoy.extensions.access_loggers.stream.v3.StdoutAccessLog", json!({}))}],
        "http_filters": filters,
    })
}

/// A listener with one filter chain, which serves HTTP.
#[must_use]
pub fn listener(name: &str, port: u16, http: Value, tls: Option<Value>) -> Value {
    let chain = filter_chain(http, tls);
    json!({"name": name, "address": loopback(port), "filter_chains": [chain]})
}

/// A filter chain that serves HTTP; `tls` is its transport socket.
#[must_use]
pub fn filter_chain(http: Value, tls: Option<Value>) -> Value {
    let manager = json!({"name": "http", "typed_config": any(HTTP, http)});
    with_socket(json!({"filters": [manager]}), tls)
}

/// Adds a transport socket to a filter chain or a cluster.
fn with_socket(message: Value, tls: Option<Value>) -> Value {
    match tls {
        Some(tls) => with(message, "transport_socket", tls),
        None => message,
    }
}

/// The HTTP version that a cluster's endpoints speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpstreamHttp {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
    /// The version that the client speaks.
    AsClient,
}

/// A cluster of ports on loopback.
#[must_use]
pub fn cluster(name: &str, ports: &[u16], http: UpstreamHttp, tls: Option<Value>) -> Value {
    let cluster =
        with(empty_cluster(name, "STATIC", http), "load_assignment", endpoints(name, ports));
    with_socket(cluster, tls)
}

/// A cluster whose endpoints come from the xDS server.
#[must_use]
pub fn cluster_over_eds(name: &str, http: UpstreamHttp) -> Value {
    let by_name = json!({"eds_config": {"ads": {}, "resource_api_version": "V3"}});
    with(empty_cluster(name, "EDS", http), "eds_cluster_config", by_name)
}

/// A cluster of this `DiscoveryType`, without the source of its endpoints.
fn empty_cluster(name: &str, kind: &str, http: UpstreamHttp) -> Value {
    let options = match http {
        UpstreamHttp::Http1 => json!({"explicit_http_config": {"http_protocol_options": {}}}),
        UpstreamHttp::Http2 => json!({"explicit_http_config": {"http2_protocol_options": {}}}),
        UpstreamHttp::AsClient => json!({"use_downstream_protocol_config":
            {"http_protocol_options": {}, "http2_protocol_options": {}}}),
    };
    let message = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    json!({
        "name": name,
        "type": kind,
        "connect_timeout": "2s",
        "typed_extension_protocol_options": {message: any(message, options)},
    })
}

/// The endpoints of a cluster, on ports of loopback.
#[must_use]
pub fn endpoints(cluster: &str, ports: &[u16]) -> Value {
    let endpoint = |port: &u16| json!({"endpoint": {"address": loopback(*port)}});
    let members: Vec<Value> = ports.iter().map(endpoint).collect();
    json!({"cluster_name": cluster, "endpoints": [{"lb_endpoints": members}]})
}

/// An RBAC filter that allows only `service` to call paths with this prefix.
#[must_use]
pub fn allow_only(service: &str, path_prefix: &str) -> Value {
    json!({"name": "rbac", "typed_config": any("envoy.extensions.filters.http.rbac.v3.RBAC", json!({
        "rules": {"action": "ALLOW", "policies": {"callers": {
            "permissions": [{"url_path": {"path": {"prefix": path_prefix}}}],
            "principals": [{"authenticated": {"principal_name": {"exact": spiffe_id(service)}}}],
        }}},
    }))})
}

/// A JWT filter that requires a token of one issuer, whose JWKS is `keys`.
#[must_use]
pub fn require_token(issuer: &str, audience: &str, keys: &str) -> Value {
    let keys = json!({"inline_string": keys});
    token_filter(&json!({"issuer": issuer, "audiences": [audience], "local_jwks": keys}), "/")
}

/// A JWT filter that requires a token of one issuer for paths below `below`. The JWKS is fetched
/// from a cluster every second, with a timeout of one second.
#[must_use]
pub fn require_token_with_fetched_keys(
    issuer: &str,
    audience: &str,
    cluster: &str,
    below: &str,
) -> Value {
    let uri = format!("http://{cluster}/keys");
    let remote = json!({"http_uri": {"uri": uri, "cluster": cluster, "timeout": "1s"},
                        "cache_duration": "1s"});
    token_filter(&json!({"issuer": issuer, "audiences": [audience], "remote_jwks": remote}), below)
}

fn token_filter(provider: &Value, below: &str) -> Value {
    let message = "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication";
    json!({"name": "jwt", "typed_config": any(message, json!({
        "providers": {"issuer": provider},
        "rules": [{"match": {"prefix": below}, "requires": {"provider_name": "issuer"}}],
    }))})
}
