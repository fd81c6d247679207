//! Matchers: supported forms survive a round trip, unsupported ones are refused with the path of their field.

use super::{Resource, ResourceKind};

use super::tests::{refused, round_trip};

fn table(fields: &str, matches: &str) -> String {
    format!(
        "{{name: r, {fields} virtual_hosts: [{{name: v, domains: ['*'], routes: [
            {{match: {matches}, direct_response: {{status: 200}}}}]}}]}}"
    )
}

#[test]
fn route_matches_round_trip() {
    for matches in [
        "{prefix: '', case_sensitive: false}",
        "{path: /a, case_sensitive: false}",
        "{path_separated_prefix: /a, case_sensitive: false}",
        "{safe_regex: {google_re2: {}, regex: '/a|/b'}, case_sensitive: false}",
        "{prefix: /, grpc: {}}",
        "{prefix: /, runtime_fraction: {default_value: {numerator: 100}, runtime_key: a}}",
        "{prefix: /, runtime_fraction: {default_value: {numerator: 10000, denominator: TEN_THOUSAND}}}",
    ] {
        round_trip(ResourceKind::Routes, &table("", matches));
    }
    for header in [
        "present_match: false",
        "present_match: true, treat_missing_header_as_empty: true",
        "range_match: {start: -9223372036854775808, end: 9223372036854775807}",
        "safe_regex_match: {regex: a}",
        "exact_match: ''",
        "exact_match: a",
        "contains_match: a, invert_match: true",
        "string_match: {exact: ''}",
        "string_match: {exact: a, ignore_case: true}",
        "string_match: {prefix: a, ignore_case: true}",
        "string_match: {suffix: a, ignore_case: true}",
        "string_match: {contains: a, ignore_case: true}, treat_missing_header_as_empty: true",
        "string_match: {safe_regex: {regex: 'a.*'}}",
    ] {
        let matches = format!("{{prefix: /, headers: [{{name: x, {header}}}]}}");
        round_trip(ResourceKind::Routes, &table("", &matches));
    }
    for parameter in ["present_match: false", "string_match: {suffix: a, ignore_case: true}"] {
        let matches = format!("{{prefix: /, query_parameters: [{{name: q, {parameter}}}]}}");
        round_trip(ResourceKind::Routes, &table("", &matches));
    }
    let ignoring = table("ignore_port_in_host_matching: true,", "{prefix: /}");
    let Resource::Routes(ignoring) = round_trip(ResourceKind::Routes, &ignoring) else {
        panic!("routes")
    };
    assert!(ignoring.ignores_port);
}

#[test]
fn unsupported_route_matches_are_refused() {
    let at = "virtual_hosts[0].routes[0].match";
    for (matches, field, reason) in [
        ("{prefix: /, tls_context: {presented: true}}", ".tls_context", "not implemented"),
        ("{prefix: /, dynamic_metadata: [{filter: f}]}", ".dynamic_metadata", "not implemented"),
        ("{prefix: /, filter_state: [{key: k}]}", ".filter_state", "not implemented"),
        ("{prefix: /, cookies: [{name: c}]}", ".cookies", "not implemented"),
        (
            "{prefix: /, runtime_fraction: {default_value: {numerator: 50}}}",
            ".runtime_fraction",
            "use weighted_clusters",
        ),
        ("{path_separated_prefix: /}", ".path_separated_prefix", "two characters or more"),
        ("{path_separated_prefix: /a/}", ".path_separated_prefix", "no / at its end"),
        ("{path_separated_prefix: '/a?'}", ".path_separated_prefix", "no ? and #"),
        ("{safe_regex: {regex: ''}}", ".safe_regex.regex", "missing"),
        ("{safe_regex: {regex: '('}}", ".safe_regex.regex", "unclosed group"),
        ("{headers: []}", "", "one of prefix"),
        ("{prefix: /, headers: [{present_match: true}]}", ".headers[0].name", "missing"),
        (
            "{prefix: /, headers: [{name: x, prefix_match: ''}]}",
            ".headers[0].prefix_match",
            "missing",
        ),
        (
            "{prefix: /, headers: [{name: x, string_match: {contains: ''}}]}",
            ".headers[0].string_match.contains",
            "missing",
        ),
        (
            "{prefix: /, headers: [{name: x, string_match: {safe_regex: {regex: a}, ignore_case: true}}]}",
            ".headers[0].string_match.ignore_case",
            "write (?i)",
        ),
        (
            "{prefix: /, headers: [{name: x, string_match: {}}]}",
            ".headers[0].string_match",
            "safe_regex must be set",
        ),
        ("{prefix: /, query_parameters: [{}]}", ".query_parameters[0].name", "missing"),
    ] {
        refused(ResourceKind::Routes, &table("", matches), &format!("{at}{field}"), reason);
    }
    for field in [
        "vhost_header: x-host",
        "ignore_path_parameters_in_path_matching: true",
        "internal_only_headers: [x-admin]",
    ] {
        let name = field.split(':').next().unwrap_or_default();
        let table = table(&format!("{field},"), "{prefix: /}");
        refused(ResourceKind::Routes, &table, name, "not implemented");
    }
}

/// A listener with an HTTP filter.
fn filtered(filter: &str) -> String {
    format!(
        r#"
name: l
address: {{socket_address: {{address: 127.0.0.1, port_value: 80}}}}
filter_chains:
- filters:
  - name: http
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: http
      http_filters:
      - name: filter
        typed_config: {filter}
      - {{name: router, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}
      route_config: {{name: r, virtual_hosts: [{{name: v, domains: ['*'], routes: [{{match: {{prefix: /}}, direct_response: {{status: 200}}}}]}}]}}
"#
    )
}

fn rules(action: &str, permission: &str, principal: &str) -> String {
    filtered(&format!(
        "{{'@type': type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC, rules: {{action: {action},
            policies: {{p: {{permissions: [{permission}], principals: [{principal}]}}}}}}}}"
    ))
}

#[test]
fn rbac_rules_of_every_kind_round_trip() {
    for permission in [
        "{destination_ip: {address_prefix: 10.0.0.0, prefix_len: 8}}",
        "{destination_port_range: {start: 80, end: 90}}",
        "{url_path: {path: {safe_regex: {regex: '/a.*'}}}}",
        "{not_rule: {or_rules: {rules: [{any: true}, {header: {name: ':path', range_match: {end: 1}}}]}}}",
    ] {
        round_trip(ResourceKind::Listener, &rules("DENY", permission, "{any: true}"));
    }
    for principal in [
        "{url_path: {path: {prefix: /A, ignore_case: true}}}",
        "{not_id: {and_ids: {ids: [{remote_ip: {address_prefix: '::', prefix_len: 0}}]}}}",
        "{authenticated: {principal_name: {safe_regex: {regex: 'spiffe://.*'}}}}",
    ] {
        round_trip(ResourceKind::Listener, &rules("LOG", "{any: true}", principal));
    }
}

#[test]
fn unsupported_rbac_rules_are_refused() {
    let policy = "filter_chains[0].filters[0].typed_config.http_filters[0].typed_config.rules.policies[\"p\"]";
    let any = "{any: true}";
    for (permission, principal, field, reason) in [
        ("{and_rules: {}}", any, ".permissions[0].and_rules.rules", "empty"),
        ("{or_rules: {}}", any, ".permissions[0].or_rules.rules", "empty"),
        (any, "{and_ids: {}}", ".principals[0].and_ids.ids", "empty"),
        (any, "{or_ids: {}}", ".principals[0].or_ids.ids", "empty"),
        ("", any, ".permissions", "empty"),
        (any, "", ".principals", "empty"),
        ("{requested_server_name: {exact: a}}", any, ".permissions[0]", "unsupported permission"),
        ("{metadata: {filter: f}}", any, ".permissions[0]", "unsupported permission"),
        (
            "{destination_port_range: {start: 80, end: 80}}",
            any,
            ".permissions[0].destination_port_range",
            "start < end",
        ),
        ("{destination_port: 65536}", any, ".permissions[0].destination_port", "at most 65535"),
        (any, "{filter_state: {key: k}}", ".principals[0]", "unsupported principal"),
        (
            any,
            "{remote_ip: {address_prefix: 10.0.0.0, prefix_len: 33}}",
            ".principals[0].remote_ip",
            "10.0.0.0/33",
        ),
    ] {
        let yaml = rules("ALLOW", permission, principal);
        refused(ResourceKind::Listener, &yaml, &format!("{policy}{field}"), reason);
    }
}

#[test]
fn unsupported_fields_that_change_trusted_headers_are_refused() {
    let any = "{any: true}";
    let plain = rules("ALLOW", any, any);
    let action = "direct_response: {status: 200}";
    let manager = "filter_chains[0].filters[0].typed_config";
    let route = format!("{manager}.route_config.virtual_hosts[0].routes[0].route");
    for (before, after, field) in [
        (
            "stat_prefix: http",
            "scheme_header_transformation: {scheme_to_overwrite: https}",
            format!("{manager}.scheme_header_transformation"),
        ),
        (
            "stat_prefix: http",
            "forward_proto_config: {https_destination_ports: [443]}",
            format!("{manager}.forward_proto_config"),
        ),
        (
            action,
            "route: {cluster: c, append_x_forwarded_host: true}",
            format!("{route}.append_x_forwarded_host"),
        ),
        (
            "domains: ['*'],",
            "domains: ['*'], route_specifiers: [{name: x}],",
            format!("{manager}.route_config.virtual_hosts[0].route_specifiers"),
        ),
    ] {
        assert!(plain.contains(before));
        refused(ResourceKind::Listener, &plain.replace(before, after), &field, "not implemented");
    }
}

#[test]
fn conditions_that_envoy_ignores_in_token_rules_are_refused() {
    let rule = |matches: &str| {
        filtered(&format!(
            "{{'@type': type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication,
                providers: {{a: {{issuer: i, audiences: [x], local_jwks: {{filename: k}}}}}},
                rules: [{{match: {matches}, requires: {{provider_name: a}}}}]}}"
        ))
    };
    round_trip(ResourceKind::Listener, &rule("{safe_regex: {regex: '/a.*'}}"));
    let at = "filter_chains[0].filters[0].typed_config.http_filters[0].typed_config.rules[0].match";
    for (field, value) in [
        ("grpc", "{}"),
        ("runtime_fraction", "{default_value: {numerator: 100}}"),
        ("tls_context", "{presented: true}"),
    ] {
        let yaml = rule(&format!("{{prefix: /, {field}: {value}}}"));
        refused(ResourceKind::Listener, &yaml, &format!("{at}.{field}"), "not implemented");
    }
}
