//! Resources survive a round trip through encoder and decoder, and errors have the path of their field.

use std::time::Duration;

use weft_model::{
    AmbiguousPath, ClientCertificateMode, DataSource, DesyncMode, EscapedSlashes, ExpiredCrlAction,
    Filter, ForwardedFor, ForwardedHeaders, HeadersWithUnderscores, HostPort, HttpLimits,
    HttpService, HttpTimeouts, JwtRequirement, PathRules, RevocationDepth, RevocationMode,
    RevocationPolicy, RouteSource, StreamIdle, Upgrades,
};

use super::*;

fn message(kind: ResourceKind, yaml: &str) -> DynamicMessage {
    let file = crate::located::Located::parse(yaml).expect("YAML");
    let (message, mistakes) = crate::json_form::read(kind.message(), &file);
    assert_eq!(mistakes, []);
    message.expect("a message")
}

pub(super) fn read_yaml(kind: ResourceKind, yaml: &str) -> Result<DecodedResource, Rejection> {
    read(kind, message(kind, yaml), String::new())
}

/// Reads the YAML, writes it, reads that, writes it again, and compares.
pub(super) fn round_trip(kind: ResourceKind, yaml: &str) -> Resource {
    let first = read_yaml(kind, yaml).expect("accepted").resource;
    let bytes = first.encode();
    let second = decode(kind, &bytes).expect("accepted again");
    assert_eq!(first, second.resource);
    assert_eq!(second.resource.encode(), bytes, "equal resources have equal bytes");
    assert_eq!(second.notes.not_honoured, Vec::<String>::new(), "every encoded field is supported");
    first
}

pub(super) fn refused(kind: ResourceKind, yaml: &str, path: &str, reason: &str) {
    let rejection = read_yaml(kind, yaml).expect_err("refused");
    assert_eq!(rejection.error.path, path, "{rejection}");
    assert!(rejection.error.reason.contains(reason), "{rejection}");
}

const LISTENER: &str = r#"
name: inbound
address: {socket_address: {address: 0.0.0.0, port_value: 15006}}
use_original_dst: true
filter_chains:
- name: "80"
  filter_chain_match: {destination_port: 80, transport_protocol: tls, prefix_ranges: [{address_prefix: 10.0.0.0, prefix_len: 8}]}
  transport_socket:
    name: tls
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
      require_client_certificate: true
      common_tls_context:
        alpn_protocols: [h2, http/1.1]
        tls_certificate_sds_secret_configs: [{name: default}]
        combined_validation_context:
          default_validation_context:
            match_typed_subject_alt_names: [{san_type: URI, matcher: {prefix: "spiffe://mesh.local/"}}]
          validation_context_sds_secret_config: {name: trust, sds_config: {ads: {}}}
  filters:
  - name: http
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: inbound
      forward_client_cert_details: SANITIZE_SET
      set_current_client_cert_details: {uri: true}
      upgrade_configs: [{upgrade_type: websocket}]
      rds: {route_config_name: r, config_source: {ads: {}}}
      http_filters:
      - name: jwt
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication
          providers:
            idp: {issuer: "https://idp", audiences: [orders], forward: true, local_jwks: {inline_string: "{}"}}
            far: {issuer: "https://far", audiences: [orders], remote_jwks: {cache_duration: 60s, http_uri: {uri: "https://far/keys", cluster: far, timeout: 1s}}}
          rules:
          - {match: {prefix: /health}}
          - {match: {prefix: /}, requires: {requires_any: {requirements: [{provider_name: idp}, {provider_name: far}]}}}
      - name: rbac
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC
          rules:
            action: ALLOW
            policies:
              web:
                permissions: [{and_rules: {rules: [{url_path: {path: {prefix: /orders}}}, {header: {name: ":method", string_match: {exact: GET}}}, {not_rule: {destination_port: 1}}]}}]
                principals: [{authenticated: {principal_name: {exact: "spiffe://mesh.local/ns/default/sa/web"}}}, {direct_remote_ip: {address_prefix: 10.0.0.0, prefix_len: 8}}]
      - name: router
        typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
"#;

#[test]
fn listener_round_trips() {
    let Resource::Listener(listener) = round_trip(ResourceKind::Listener, LISTENER) else {
        panic!("a listener")
    };
    assert!(listener.use_original_destination && listener.bind);
    let chain = &listener.chains[0];
    let clients = &chain.tls.as_ref().expect("TLS").client_certificates;
    assert!(matches!(clients, ClientCertificateMode::Verify { required: true, .. }), "{clients:?}");
    let Filter::Http(http) = &chain.filter else { panic!("HTTP") };
    assert_eq!(http.filters.len(), 2);
    assert!(http.upgrades.websocket);
}

/// A listener with every setting of HTTP.
const EDGE: &str = r#"
name: edge
address: {socket_address: {address: 0.0.0.0, port_value: 8080}}
filter_chains:
- metadata:
    filter_metadata:
      other: {anything: 1}
      weft: {desync_mode: strictest, forwarded_client_port: true, target_limit_bytes: 1024,
             field_limit_bytes: 2048, stall_timeout_ms: 1500, host_port: canonical, path: strict}
  filters:
  - name: http
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: http
      codec_type: AUTO
      forward_client_cert_details: SANITIZE
      use_remote_address: true
      xff_num_trusted_hops: 2
      normalize_path: true
      merge_slashes: true
      path_with_escaped_slashes_action: UNESCAPE_AND_FORWARD
      max_request_headers_kb: 64
      request_timeout: 20s
      request_headers_timeout: 5s
      stream_idle_timeout: 0s
      common_http_protocol_options: {idle_timeout: 60s, max_connection_duration: 3600s, max_headers_count: 50,
                                     max_requests_per_connection: 10000, headers_with_underscores_action: DROP_HEADER}
      http2_protocol_options: {max_concurrent_streams: 128}
      upgrade_configs: [{upgrade_type: websocket}, {upgrade_type: CONNECT}]
      http_filters:
      - {name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
      rds: {route_config_name: r, config_source: {ads: {}}}
"#;

#[test]
fn http_settings_round_trip() {
    let Resource::Listener(listener) = round_trip(ResourceKind::Listener, EDGE) else {
        panic!("a listener")
    };
    let Filter::Http(http) = &listener.chains[0].filter else { panic!("HTTP") };
    let seconds = Duration::from_secs;
    let expected = HttpService {
        limits: HttpLimits {
            head_bytes: 65_536,
            target_bytes: 1024,
            header_bytes: 2048,
            header_count: 50,
            requests_per_connection: Some(10_000),
            streams: 128,
        },
        timeouts: HttpTimeouts {
            head: seconds(5),
            request: Some(seconds(20)),
            idle: seconds(60),
            stream_idle: StreamIdle::Set(None),
            stall: Some(Duration::from_millis(1500)),
            age: Some(seconds(3600)),
        },
        path: PathRules {
            normalize: true,
            merge_slashes: true,
            escaped_slashes: EscapedSlashes::Unescape,
            ambiguous: AmbiguousPath::Refuse,
        },
        desync: DesyncMode::Strictest,
        forwarded: ForwardedHeaders {
            addresses: ForwardedFor::Append,
            client_port: true,
            is_edge: true,
            trusted_hops: 2,
        },
        host_port: HostPort::Canonical,
        underscores: HeadersWithUnderscores::Drop,
        upgrades: Upgrades { websocket: true, connect: true },
        ..HttpService::new(RouteSource::Named("r".into()))
    };
    assert_eq!(**http, expected);
}

#[test]
fn strict_paths_refuse_escaped_slashes_although_the_action_keeps_them() {
    for action in ["IMPLEMENTATION_SPECIFIC_DEFAULT", "KEEP_UNCHANGED"] {
        let text = EDGE.replace("UNESCAPE_AND_FORWARD", action);
        let read = |mode: &str| {
            let text = text.replace("path: strict", &format!("path: {mode}"));
            let resource = read_yaml(ResourceKind::Listener, &text).expect("accepted").resource;
            let Resource::Listener(listener) = resource else { panic!("a listener") };
            let Filter::Http(http) = &listener.chains[0].filter else { panic!("HTTP") };
            http.path.escaped_slashes
        };
        assert_eq!(read("strict"), EscapedSlashes::Reject, "{action}");
        assert_eq!(read("as_sent"), EscapedSlashes::Keep, "{action}");
    }
}

#[test]
fn invalid_weft_metadata_is_refused_with_path_and_accepted_values() {
    let check = |ours: &str, field: &str, why: &str| {
        let text = format!(
            r#"
name: edge
address: {{socket_address: {{address: 0.0.0.0, port_value: 8080}}}}
filter_chains:
- metadata: {{filter_metadata: {{weft: {ours}}}}}
  filters: []
"#
        );
        let at = format!("filter_chains[0].metadata.filter_metadata[\"weft\"].fields[\"{field}\"]");
        refused(ResourceKind::Listener, &text, &at, why);
    };
    check("{desync_mode: strict}", "desync_mode", "must be monitor, defensive or strictest");
    check("{forwarded_for: add}", "forwarded_for", "use_remote_address");
    check("{target_limit_bytes: 0}", "target_limit_bytes", "a whole number above 0");
    check("{field_limit_bytes: 1.5}", "field_limit_bytes", "a whole number above 0");
    check("{desync: monitor}", "desync", "desync_mode");
}

#[test]
fn tcp_and_udp_proxies_round_trip() {
    round_trip(
        ResourceKind::Listener,
        r#"
name: vip
address: {socket_address: {protocol: UDP, address: "fd00::1", port_value: 53}}
bind_to_port: false
metadata: {filter_metadata: {weft: {allow_from: ["fd00::/64", 10.0.0.0/8]}}}
listener_filters:
- name: udp
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.filters.udp.udp_proxy.v3.UdpProxyConfig
    stat_prefix: u
    hash_policies: [{source_ip: true}]
    use_original_src_ip: true
    idle_timeout: 120s
    matcher: {on_no_match: {action: {name: route, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.udp.udp_proxy.v3.Route, cluster: dns}}}}
"#,
    );
    round_trip(
        ResourceKind::Listener,
        r#"
name: vip
address: {socket_address: {address: 10.96.0.1, port_value: 80}}
bind_to_port: false
listener_filters:
- name: original_src
  typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.listener.original_src.v3.OriginalSrc}
metadata: {filter_metadata: {weft: {idle_end: close, flow_seed: "4294967295"}}}
default_filter_chain:
  filters:
  - name: tcp
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
      stat_prefix: t
      hash_policy: [{filter_state: {key: weft.tcp_sequence}}]
      weighted_clusters: {clusters: [{name: a, weight: 1}, {name: b, weight: 3}]}
"#,
    );
}

#[test]
fn connect_timeout_of_zero_is_refused_as_in_envoy() {
    let cluster = |timeout| {
        format!(
            "{{name: any, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, connect_timeout: {timeout}}}"
        )
    };
    refused(ResourceKind::Cluster, &cluster("0s"), "connect_timeout", "more than 0s");
    round_trip(ResourceKind::Cluster, &cluster("0.001s"));
}

#[test]
fn clusters_round_trip() {
    round_trip(
        ResourceKind::Cluster,
        r#"
name: orders
type: EDS
eds_cluster_config: {service_name: orders-v1, eds_config: {ads: {}}}
lb_policy: LEAST_REQUEST
connect_timeout: 0.25s
typed_extension_protocol_options:
  envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
    "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
    use_downstream_protocol_config: {http2_protocol_options: {}}
transport_socket:
  name: tls
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
    sni: orders.mesh
    common_tls_context: {alpn_protocols: [h2], tls_certificate_sds_secret_configs: [{name: default}], combined_validation_context: {validation_context_sds_secret_config: {name: trust, sds_config: {ads: {}}}}}
"#,
    );
    round_trip(
        ResourceKind::Cluster,
        "{name: flows, type: STATIC, lb_policy: MAGLEV, maglev_lb_config: {table_size: 2039}, load_assignment: {cluster_name: flows, endpoints: [{lb_endpoints: [{load_balancing_weight: 3, endpoint: {address: {socket_address: {address: 10.0.0.1, port_value: 80}}}}]}]}}",
    );
    round_trip(
        ResourceKind::Cluster,
        "{name: any, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED}",
    );
    round_trip(
        ResourceKind::Cluster,
        "{name: dns, type: STRICT_DNS, load_assignment: {cluster_name: dns, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: idp.example, port_value: 443}}}}]}]}}",
    );
}

#[test]
fn endpoints_secrets_and_routes_round_trip() {
    round_trip(
        ResourceKind::Endpoints,
        "{cluster_name: orders, endpoints: [{lb_endpoints: [{health_status: DRAINING, endpoint: {address: {socket_address: {address: \"fd00::2\", port_value: 80}}}}]}]}",
    );
    round_trip(ResourceKind::Endpoints, "{cluster_name: empty}");
    round_trip(
        ResourceKind::Secret,
        "{name: trust, validation_context: {trusted_ca: {inline_string: PEM}, crl: {filename: /etc/crl.pem}}}",
    );
    round_trip(
        ResourceKind::Secret,
        "{name: id, tls_certificate: {certificate_chain: {inline_string: PEM}, private_key: {inline_string: PEM}}}",
    );
    round_trip(
        ResourceKind::Routes,
        r#"
name: r
most_specific_header_mutations_wins: true
response_headers_to_add: [{header: {key: x-d, value: ""}, keep_empty_value: true, append: false}]
virtual_hosts:
- name: orders
  domains: [orders.mesh, "*.orders.mesh"]
  request_headers_to_remove: [X-Internal-User]
  routes:
  - {name: a, match: {path_separated_prefix: /v1, headers: [{name: x-canary, present_match: true}, {name: x-b, string_match: {suffix: z}, invert_match: true}], query_parameters: [{name: q, string_match: {exact: "1"}}]}, route: {weighted_clusters: {clusters: [{name: a, weight: 9}, {name: b, weight: 1}]}, prefix_rewrite: /, timeout: 0s}}
  - {match: {path: /old}, redirect: {path_redirect: /new, https_redirect: true, response_code: FOUND}}
  - {match: {path: /r}, redirect: {regex_rewrite: {pattern: {regex: "^/r(.)"}, substitution: "/\\1"}, port_redirect: 8443, strip_query: true}}
  - {match: {path: /p}, redirect: {prefix_rewrite: /q}, response_headers_to_add: [{header: {key: x-a, value: "%REQ(x-b?:path):9% 100%%"}, append_action: ADD_IF_ABSENT}]}
  - match: {prefix: /w}
    route: {weighted_clusters: {clusters: [{name: a, weight: 1, request_headers_to_remove: [x-c]}]}, regex_rewrite: {pattern: {regex: a}, substitution: b}}
  - {match: {prefix: /}, direct_response: {status: 404, body: {inline_string: nothing here}}}
"#,
    );
}

const TOKENS: &str = r#"
name: edge
address: {socket_address: {address: 0.0.0.0, port_value: 8080}}
filter_chains:
- metadata: {filter_metadata: {weft: {jwt: {a: {any_audience: true, bound_to_certificate: true, ends_streams: true,
    claims: [{name: scope, format: space-separated-values, values: [read, list], all: true}]}}}}}
  filters:
  - name: http
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: http
      forward_client_cert_details: SANITIZE
      http_filters:
      - name: jwt
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication
          providers:
            a: {issuer: i, local_jwks: {filename: k}, from_headers: [{name: X-Token, value_prefix: "JWT "}],
                from_params: [t], from_cookies: [c], claim_to_headers: [{claim_name: a.b, header_name: x-b}],
                forward_payload_header: x-payload, payload_in_metadata: a, subjects: {prefix: s}, max_lifetime: 60s}
            b: {issuer: j, audiences: [x], local_jwks: {filename: k}}
          requirement_map: {both: {requires_all: {requirements: [{provider_name: a},
            {requires_any: {requirements: [{provider_and_audiences: {provider_name: b, audiences: [x]}}, {allow_missing: {}}]}}]}}}
          rules:
          - {match: {prefix: /a}, requirement_name: both}
          - {match: {prefix: /b}, requires: {allow_missing: {}}}
      - name: rbac
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC
          rules: {policies: {p: {permissions: [{any: true}], principals: [{metadata: {filter: envoy.filters.http.jwt_authn,
            path: [{key: a}, {key: groups}], value: {list_match: {one_of: {string_match: {exact: g}}}}}}]}}}
      - {name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
      rds: {route_config_name: r, config_source: {ads: {}}}
"#;

#[test]
fn jwt_settings_round_trip_and_invalid_ones_are_refused() {
    let Resource::Listener(listener) = round_trip(ResourceKind::Listener, TOKENS) else {
        panic!("a listener")
    };
    let Filter::Http(http) = &listener.chains[0].filter else { panic!("HTTP") };
    let weft_model::HttpFilter::Jwt(policy) = &http.filters[0] else { panic!("tokens") };
    let a = &policy.providers["a"];
    assert!(a.bound && a.ends_streams && a.audiences.is_empty());
    assert_eq!((a.token_locations.len(), a.claims.len(), a.claim_headers.len()), (3, 1, 1));
    assert_eq!(a.longest_life, Some(Duration::from_secs(60)));
    let any = |name: &str| JwtRequirement::Provider(name.into(), Vec::new());
    let narrower = JwtRequirement::Provider("b".into(), vec!["x".into()]);
    let optional = JwtRequirement::Any(vec![narrower, JwtRequirement::Missing]);
    let expected = [
        JwtRequirement::All(vec![any("a"), optional]),
        JwtRequirement::Any(vec![any("a"), any("b"), JwtRequirement::Missing]),
    ];
    assert_eq!(
        policy.rules.iter().flat_map(|rule| &rule.requires).collect::<Vec<_>>(),
        expected.iter().collect::<Vec<_>>()
    );
    let check = |from: &str, to: &str, reason: &str| {
        assert!(TOKENS.contains(from), "{from}");
        let rejection =
            read_yaml(ResourceKind::Listener, &TOKENS.replace(from, to)).expect_err("refused");
        assert!(rejection.error.reason.contains(reason), "{rejection}");
    };
    let unsaid = TOKENS.replace("any_audience: true, ", "");
    let warnings = read_yaml(ResourceKind::Listener, &unsaid).expect("accepted").notes.warnings;
    assert!(warnings.len() == 1 && warnings[0].contains("[\"a\"].audiences: none"), "{warnings:?}");
    check("jwt: {a:", "jwt: {z: {}, a:", "unknown provider \"z\"");
    check("format: space", "format: x", "single-string, string-array");
    check("values: [read, list]", "values: []", "at least one non-empty string");
    check("name: scope", "name: exp", "must not be iss, aud, exp");
    check("requirement_name: both", "requirement_name: all", "must be in requirement_map");
    check("{allow_missing: {}}]}}]}}}", "{allow_missing_or_failed: {}}]}}]}}}", "a forged token");
    check("name: X-Token", "name: \"x token\"", "invalid header name");
    check("filter: envoy.filters.http.jwt_authn", "filter: other", "unsupported filter \"other\"");
    check("[{key: a}, {key: groups}]", "[{key: a}]", "path to the claim");
}

#[test]
fn crl_settings_round_trip_and_invalid_ones_are_refused() {
    let secret = |more: &str| {
        format!(
            "name: trust\nvalidation_context:\n  trusted_ca: {{filename: r}}\n  crl: {{filename: c}}\n{more}"
        )
    };
    let ours = |settings: &str| {
        let kind = "type.googleapis.com/google.protobuf.Struct";
        secret(&format!(
            "  custom_validator_config: {{name: weft.revocation, typed_config: {{\"@type\": {kind}, value: {settings}}}}}"
        ))
    };
    let read = |yaml: &str| match round_trip(ResourceKind::Secret, yaml) {
        Resource::Secret(_, secret) => match secret.as_ref() {
            Secret::Validation(validation) => validation.policy,
            Secret::Identity(_) => panic!("a validation"),
        },
        _ => panic!("a secret"),
    };
    let at = "{uri: \"http://lists.test/a\", cluster: c, refresh_seconds: 60}";
    round_trip(ResourceKind::Secret, &ours(&format!("{{distribution_points: [{at}, {at}]}}")));
    let default = RevocationPolicy::default();
    assert_eq!(read(&secret("")), default);
    let leaf = RevocationPolicy { depth: RevocationDepth::Leaf, ..default };
    assert_eq!(read(&secret("  only_verify_leaf_cert_crl: true")), leaf);
    assert_eq!(read(&ours("{depth: leaf}")), leaf);
    let settings =
        "{mode: soft, on_expired: warn, drain_seconds: 30, entries_limit: 5, bytes_limit: 6}";
    let expected = RevocationPolicy {
        mode: RevocationMode::Soft,
        on_expired: ExpiredCrlAction::Warn,
        drain: Duration::from_secs(30),
        entries_limit: 5,
        bytes_limit: 6,
        ..default
    };
    assert_eq!(read(&ours(settings)), expected);
    let check = |yaml: &str, field: &str, reason: &str| {
        let path = format!("validation_context.custom_validator_config{field}");
        refused(ResourceKind::Secret, yaml, &path, reason);
    };
    let value = |field: &str| format!(".typed_config.fields[\"{field}\"]");
    check(
        &ours("{mode: maybe}"),
        &value("mode"),
        "invalid value \"maybe\": must be one of off, soft, strict",
    );
    check(&ours("{on_expired: 1}"), &value("on_expired"), "must be one of ignore, warn, deny");
    check(&ours("{drain_seconds: -1}"), &value("drain_seconds"), "a whole number");
    check(&ours("{drain_seconds: 1.5}"), &value("drain_seconds"), "a whole number");
    let points = |one: &str| ours(&format!("{{distribution_points: [{one}]}}"));
    check(&points(""), &value("distribution_points"), "a list of 1 to 30 distribution points");
    check(&ours("{distribution_points: a}"), &value("distribution_points"), "a list of 1 to 30");
    let first = format!("{}.list_value.values[0]", value("distribution_points"));
    check(&points("a"), &first, "an object with uri and cluster");
    let uri = "invalid uri \"ldap://a\": must be http://HOST/PATH";
    check(&points("{uri: \"ldap://a\", cluster: c}"), &format!("{first}.uri"), uri);
    let cluster = format!("{first}.cluster");
    check(&points("{uri: \"http://a/b\"}"), &cluster, "this field is missing");
    let other = format!("{first}.struct_value.fields[\"url\"]");
    check(&points("{url: \"http://a/b\"}"), &other, "must be one of uri, cluster, refresh_seconds");
    check(
        &ours("{moed: soft}"),
        &value("moed"),
        "unknown field \"moed\": must be one of mode, on_expired",
    );
    let other = secret("  custom_validator_config: {name: envoy.tls.cert_validator.spiffe}");
    check(&other, ".name", "must be weft.revocation");
}

#[test]
fn accept_untrusted_is_refused_together_with_conditions() {
    let listener = |context: &str| {
        let own = "common_tls_context:\n        ";
        let from = LISTENER.find(own).expect("a context") + own.len();
        let to = from + LISTENER[from..].find("filters:").expect("filters");
        let identity =
            "tls_certificates: [{certificate_chain: {filename: c}, private_key: {filename: k}}]";
        let tail = "\n  ";
        [&LISTENER[..from], identity, "\n        ", context, tail, &LISTENER[to..]].concat()
    };
    let any = "validation_context: {trust_chain_verification: ACCEPT_UNTRUSTED}";
    let Resource::Listener(read) = round_trip(ResourceKind::Listener, &listener(any)) else {
        panic!("a listener")
    };
    let clients = &read.chains[0].tls.as_ref().expect("TLS").client_certificates;
    assert_eq!(*clients, ClientCertificateMode::PassThrough { required: true });
    let field = "filter_chains[0].transport_socket.typed_config.common_tls_context.\
                 validation_context.trust_chain_verification";
    let check = |more: &str, asked: &str| {
        let context =
            format!("validation_context: {{trust_chain_verification: ACCEPT_UNTRUSTED, {more}}}");
        refused(ResourceKind::Listener, &listener(&context), field, asked);
    };
    check("trusted_ca: {filename: r}", "together with trusted_ca");
    check("crl: {filename: r}", "together with crl");
    let names = "match_typed_subject_alt_names: [{san_type: URI, matcher: {exact: a}}]";
    check(names, "together with names");
    let email = "match_typed_subject_alt_names: [{san_type: EMAIL, matcher: {exact: a}}]";
    let context =
        format!("validation_context: {{trust_chain_verification: ACCEPT_UNTRUSTED, {email}}}");
    let of_names =
        field.replace("trust_chain_verification", "match_typed_subject_alt_names[0].san_type");
    refused(ResourceKind::Listener, &listener(&context), &of_names, "unsupported type EMAIL");
    let served = "{name: s, validation_context: {trust_chain_verification: ACCEPT_UNTRUSTED}}";
    refused(ResourceKind::Secret, served, "validation_context.trusted_ca", "missing");
}

#[test]
fn errors_have_the_path_of_their_field() {
    refused(
        ResourceKind::Cluster,
        "{name: c, type: STATIC}",
        "load_assignment",
        "must have endpoints",
    );
    refused(
        ResourceKind::Cluster,
        "{name: c, type: EDS, eds_cluster_config: {}, lb_policy: RING_HASH}",
        "lb_policy",
        "RING_HASH",
    );
    refused(
        ResourceKind::Cluster,
        "{name: c, type: EDS, eds_cluster_config: {}, lb_policy: MAGLEV, maglev_lb_config: {table_size: 100}}",
        "maglev_lb_config.table_size",
        "prime",
    );
    refused(
        ResourceKind::Endpoints,
        "{cluster_name: c, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: localhost, port_value: 80}}}}]}]}",
        "endpoints[0].lb_endpoints[0].endpoint.address.socket_address.address",
        "localhost",
    );
    refused(
        ResourceKind::Endpoints,
        "{cluster_name: c, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 10.0.0.1, port_value: 70000}}}}]}]}",
        "endpoints[0].lb_endpoints[0].endpoint.address.socket_address.port_value",
        "70000",
    );
    refused(
        ResourceKind::Secret,
        "{name: s, validation_context: {}}",
        "validation_context.trusted_ca",
        "missing",
    );
    refused(
        ResourceKind::Routes,
        "{name: r, virtual_hosts: [{name: h, domains: [a]}, {name: i, domains: [A]}]}",
        "virtual_hosts",
        "duplicate domain",
    );
    refused(
        ResourceKind::Routes,
        "{name: r, virtual_hosts: [{name: h, domains: [a], routes: [{match: {case_sensitive: true}, route: {cluster: c}}]}]}",
        "virtual_hosts[0].routes[0].match",
        "one of prefix",
    );
    refused(
        ResourceKind::Listener,
        &LISTENER.replace("destination_port: 80", "destination_port: 70000"),
        "filter_chains[0].filter_chain_match.destination_port",
        "70000",
    );
    refused(
        ResourceKind::Listener,
        &LISTENER.replace(
            "require_client_certificate: true",
            "require_client_certificate: true\n      require_sni: true",
        ),
        "filter_chains[0].transport_socket.typed_config.require_sni",
        "weaken security",
    );
}

#[test]
fn unknown_extension_is_refused_unless_it_is_optional() {
    let unknown = |optional: bool| {
        let any = prost_reflect::prost_types::Any {
            type_url: "type.googleapis.com/does.not.Exist".into(),
            value: Vec::new(),
        };
        let mut message = message(ResourceKind::Listener, LISTENER);
        let chains = message
            .get_field_by_name_mut("filter_chains")
            .and_then(|v| v.as_list_mut())
            .expect("chains");
        let chain = chains[0].as_message_mut().expect("a chain");
        let filter =
            chain.get_field_by_name_mut("filters").and_then(|v| v.as_list_mut()).expect("filters")
                [0]
            .as_message_mut()
            .expect("a filter");
        let config = filter
            .get_field_by_name_mut("typed_config")
            .and_then(|v| v.as_message_mut())
            .expect("a config");
        let url = config
            .get_field_by_name("type_url")
            .and_then(|v| v.as_str().map(str::to_owned))
            .expect("a type");
        let bytes =
            config.get_field_by_name("value").and_then(|v| v.as_bytes().cloned()).expect("bytes");
        let mut manager = descriptor::decode(&url, &bytes).expect("a manager");
        let kind = descriptor::message(
            "envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter",
        )
        .expect("known");
        let mut extra = DynamicMessage::new(kind);
        extra.set_field_by_name("name", prost_reflect::Value::String("x".into()));
        extra.set_field_by_name("is_optional", prost_reflect::Value::Bool(optional));
        let mut dynamic =
            DynamicMessage::new(descriptor::message("google.protobuf.Any").expect("known"));
        dynamic.transcode_from(&any).expect("an Any");
        extra.set_field_by_name("typed_config", prost_reflect::Value::Message(dynamic));
        let filters = manager
            .get_field_by_name_mut("http_filters")
            .and_then(|v| v.as_list_mut())
            .expect("filters");
        filters.insert(0, prost_reflect::Value::Message(extra));
        use prost_reflect::prost::Message as _;
        config.set_field_by_name(
            "value",
            prost_reflect::Value::Bytes(manager.encode_to_vec().into()),
        );
        read(ResourceKind::Listener, message, String::new())
    };
    let rejection = unknown(false).expect_err("refused");
    assert!(rejection.to_string().contains("does.not.Exist"), "{rejection}");
    assert_eq!(
        rejection.error.path,
        "filter_chains[0].filters[0].typed_config.http_filters[0].typed_config"
    );
    assert!(unknown(true).is_ok());
}

#[test]
fn settings_without_effect_are_listed() {
    let accepted = read_yaml(ResourceKind::Cluster, "{name: c, type: EDS, eds_cluster_config: {}, preconnect_policy: {per_upstream_preconnect_ratio: 1.5}}").expect("accepted");
    assert_eq!(accepted.notes.not_honoured, ["preconnect_policy"]);
    // Field 2047 of a cluster, which does not exist.
    let mut bytes = accepted.resource.encode();
    bytes.extend([0xf8, 0x7f, 0x01]);
    assert_eq!(
        decode(ResourceKind::Cluster, &bytes).expect("accepted").notes.not_honoured,
        ["unknown field 2047"]
    );
}

/// A network RBAC filter with DENY rules and ALLOW dry-run rules.
const WATCHED: &str = r#"
name: l
address: {socket_address: {address: 0.0.0.0, port_value: 1}}
filter_chains:
- filters:
  - name: doors
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC
      stat_prefix: doors
      rules: {action: DENY, policies: {no: {permissions: [{any: true}], principals: [{direct_remote_ip: {address_prefix: 10.0.0.0, prefix_len: 8}}]}}}
      shadow_rules: {policies: {yes: {permissions: [{destination_port: 1}], principals: [{any: true}]}}}
  - name: tcp
    typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: t, cluster: c}
"#;

#[test]
fn network_rbac_rules_round_trip() {
    let Resource::Listener(listener) = round_trip(ResourceKind::Listener, WATCHED) else {
        panic!("a listener")
    };
    let [rules] = listener.chains[0].rules.as_slice() else { panic!("one filter") };
    let action = |rules: &Option<weft_model::Rbac>| rules.as_ref().map(|rules| rules.action);
    let denies = weft_model::RbacAction::Deny;
    let allows = weft_model::RbacAction::Allow;
    assert_eq!((action(&rules.rules), action(&rules.shadow)), (Some(denies), Some(allows)));
    // Dry-run rules may have an unsupported condition; enforced rules may not.
    let unknown = |rules: &str| WATCHED.replace(rules, &rules.replace("any: true", "metadata: {}"));
    let watching = "yes: {permissions: [{destination_port: 1}], principals: [{any: true}]";
    let Resource::Listener(listener) =
        read_yaml(ResourceKind::Listener, &unknown(watching)).expect("accepted").resource
    else {
        panic!("a listener")
    };
    assert_eq!(listener.chains[0].rules[0].shadow, None);
    refused(
        ResourceKind::Listener,
        &unknown("no: {permissions: [{any: true}]"),
        "filter_chains[0].filters[0].typed_config.rules.policies[\"no\"].permissions[0]",
        "unsupported permission",
    );
    let (head, tail) = WATCHED.split_once("  - name: doors").expect("a filter");
    let tcp = tail.split_once("  - name: tcp").expect("a filter").1;
    refused(
        ResourceKind::Listener,
        &format!("{head}  - name: tcp{tcp}  - name: tcp{tcp}"),
        "filter_chains[0].filters[0].typed_config",
        "before the last filter: must be RBAC",
    );
}

#[test]
fn unknown_types_in_ignored_fields_are_listed_equally_from_file_and_wire() {
    let unknown = "{name: x, typed_config: {'@type': type.googleapis.com/does.not.Exist, a: 1}}";
    let fields = format!("tracing: {{provider: {unknown}}}\n      access_log: [{unknown}]\n");
    let listener = LISTENER.replacen(
        "stat_prefix: inbound\n",
        &format!("stat_prefix: inbound\n      {fields}"),
        1,
    );
    let by_file = read_yaml(ResourceKind::Listener, &listener).expect("accepted");
    let bytes = prost::Message::encode_to_vec(&message(ResourceKind::Listener, &listener));
    let by_wire = decode(ResourceKind::Listener, &bytes).expect("accepted");
    assert_eq!(by_file, by_wire);
    let noted = |end: &str| by_wire.notes.not_honoured.iter().any(|path| path.ends_with(end));
    assert!(noted(".tracing"), "{by_wire:?}");
    assert!(noted(".access_log[0].typed_config (does.not.Exist is not supported)"), "{by_wire:?}");
}

#[test]
fn access_loggers_are_read_as_sinks_and_round_trip() {
    let listener = |loggers: &str| {
        let fields = format!("stat_prefix: inbound\n      access_log: [{loggers}]\n");
        LISTENER.replacen("stat_prefix: inbound\n", &fields, 1)
    };
    let logger = |kind: &str, rest: &str| {
        let name = format!("type.googleapis.com/envoy.extensions.access_loggers.{kind}");
        format!("{{name: x, typed_config: {{'@type': {name}{rest}}}}}")
    };
    let file = |path: &str| logger("file.v3.FileAccessLog", &format!(", path: {path}"));
    let check = |loggers: &[String], expected: &[&str]| {
        let Resource::Listener(read) =
            round_trip(ResourceKind::Listener, &listener(&loggers.join(", ")))
        else {
            panic!("a listener expected");
        };
        let filters = read.chains.iter().map(|chain| &chain.filter);
        let sinks = filters.into_iter().find_map(|filter| match filter {
            Filter::Http(http) => Some(http.access_log.clone()),
            Filter::Tcp(_) => None,
        });
        let sinks = sinks.expect("the listener has an HTTP filter");
        let names: Vec<String> = sinks.iter().map(ToString::to_string).collect();
        assert_eq!(names, expected);
    };
    let stdout = logger("stream.v3.StdoutAccessLog", "");
    let stderr = logger("stream.v3.StderrAccessLog", "");
    check(&[], &[]);
    check(
        &[stderr, file("/var/log/access"), stdout.clone()],
        &["stderr", "/var/log/access", "stdout"],
    );
    check(&[file("/dev/stdout"), stdout], &["stdout"]);
    check(&[file("/dev/stderr")], &["stderr"]);
    let unnamed = listener(&logger("file.v3.FileAccessLog", ""));
    let rejection = read_yaml(ResourceKind::Listener, &unnamed).expect_err("refused");
    assert!(rejection.error.path.ends_with("access_log[0].typed_config.path"), "{rejection}");
}

/// A field of a security message that this version does not know by name.
fn with_unknown_field(mut bytes: Vec<u8>) -> Vec<u8> {
    // Field 9999, a varint of 1.
    bytes.extend([0xf8, 0xf0, 0x04, 0x01]);
    bytes
}

#[test]
fn unknown_field_is_refused_in_a_security_message_and_listed_elsewhere() {
    let secret = "{name: s, validation_context: {trusted_ca: {filename: /roots.pem}}}";
    let secret = read_yaml(ResourceKind::Secret, secret).expect("a secret").resource.encode();
    let rejection = decode(ResourceKind::Secret, &with_unknown_field(secret)).expect_err("refused");
    assert_eq!(rejection.error.path, "unknown field 9999");
    assert!(rejection.error.reason.contains("weaken security"), "{rejection}");

    let table = "{name: r, virtual_hosts: []}";
    let table = read_yaml(ResourceKind::Routes, table).expect("a table").resource.encode();
    let accepted = decode(ResourceKind::Routes, &with_unknown_field(table)).expect("accepted");
    assert_eq!(accepted.notes.not_honoured, ["unknown field 9999"]);
}

#[test]
fn unread_field_inside_a_security_message_refuses_the_resource_by_default() {
    let context = "filter_chains[0].transport_socket.typed_config";
    for (field, path) in [
        ("require_sni: true", "require_sni"),
        ("ocsp_staple_policy: MUST_STAPLE", "ocsp_staple_policy"),
    ] {
        let yaml = LISTENER.replace(
            "require_client_certificate: true",
            &format!("require_client_certificate: true\n      {field}"),
        );
        refused(ResourceKind::Listener, &yaml, &format!("{context}.{path}"), "weaken security");
    }
}

#[test]
fn watched_directories_of_secrets_are_listed() {
    let yaml = r#"
name: s
validation_context:
  watched_directory: {path: /etc}
  trusted_ca: {filename: /roots.pem, watched_directory: {path: /etc}}
"#;
    let notes = read_yaml(ResourceKind::Secret, yaml).expect("accepted").notes.not_honoured;
    let of_roots = "validation_context.trusted_ca.watched_directory";
    assert_eq!(notes, ["validation_context.watched_directory", of_roots]);
}

#[test]
fn unsupported_dry_run_rules_are_listed_and_refuse_nothing() {
    let yaml = r#"
name: l
address: {socket_address: {address: 127.0.0.1, port_value: 1}}
filter_chains:
- filters:
  - name: http
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: http
      http_filters:
      - name: rbac
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC
          SHADOW: {policies: {p: {permissions: [{any: true}], principals: [{any: true}],
                                  condition: {call_expr: {function: f}}}}}
      - {name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
      rds: {route_config_name: r, config_source: {ads: {}}}
"#;
    let accepted = read_yaml(ResourceKind::Listener, &yaml.replace("SHADOW", "shadow_rules"));
    let notes = accepted.expect("accepted").notes.not_honoured;
    assert!(notes.iter().any(|path| path.ends_with(".condition")), "{notes:?}");
    let condition = "filter_chains[0].filters[0].typed_config.http_filters[0].typed_config.rules.policies[\"p\"].condition";
    refused(ResourceKind::Listener, &yaml.replace("SHADOW", "rules"), condition, "weaken security");
}

#[test]
fn inline_data_that_is_not_text_round_trips() {
    let crl = "{name: s, validation_context: {trusted_ca: {filename: /a.pem}, crl: {inline_bytes: /wAB}}}";
    let Resource::Secret(_, secret) = round_trip(ResourceKind::Secret, crl) else {
        panic!("a secret")
    };
    let Secret::Validation(validation) = &*secret else { panic!("a validation context") };
    assert_eq!(validation.revocations, Some(DataSource::inline([0xff, 0, 1])));
}

#[test]
fn dump_has_the_field_names_of_the_definition_and_no_secret_values() {
    let mut snapshot = Snapshot::default();
    let listener = LISTENER
        .replace("use_original_dst: true", "metadata: {filter_metadata: {weft: {flow_seed: '7'}}}");
    let cluster =
        "{name: c, type: STATIC, connect_timeout: 0.25s, load_assignment: {cluster_name: c}}";
    let key = "{name: k, tls_certificate: {certificate_chain: {inline_string: CHAIN}, private_key: {inline_string: KEY}}}";
    for (kind, yaml) in [
        (ResourceKind::Listener, &*listener),
        (ResourceKind::Cluster, cluster),
        (ResourceKind::Secret, key),
    ] {
        insert(&mut snapshot, read_yaml(kind, yaml).expect("accepted").resource);
    }
    let dump = dump(&snapshot);
    let at = |path: &str| dump.pointer(path).unwrap_or_else(|| panic!("{path}: {dump:#}"));
    assert_eq!(at("/clusters/c/connect_timeout"), "0.250s");
    assert_eq!(at("/clusters/c/type"), "STATIC");
    assert_eq!(at("/secrets/k/tls_certificate/certificate_chain/inline_string"), "CHAIN");
    assert_eq!(at("/secrets/k/tls_certificate/private_key"), "[redacted]");
    let listener = at("/listeners/inbound");
    assert_eq!(listener["metadata"]["filter_metadata"]["weft"]["flow_seed"], "[redacted]");
    let manager = &listener["filter_chains"][0]["filters"][0]["typed_config"];
    assert_eq!(manager["rds"]["route_config_name"], "r");
}
