//! Values that sidecars would refuse or that have no effect are errors or warnings with line and field.

use std::path::Path;

use crate::mesh::Mesh;

fn mesh(route_match: &str, filter: &str, issuer: &str) -> String {
    format!(
        r#"trust_domain: mesh.local
service_ranges: [10.96.0.0/16]
services:
- {{name: api, addresses: [10.96.0.2], ports: [{{port: 80, target: 8000, protocol: http}}]}}
routes:
- name: r
  parentRefs: [{{name: api}}]
  rules:
  - matches: [{route_match}]
    filters: [{filter}]
    backendRefs: [{{name: api, port: 80}}]
- name: elsewhere
  parentRefs: [{{name: api}}]
  rules:
  - filters: [{{type: RequestRedirect, requestRedirect: {{hostname: a.example}}}}]
security:
  issuers:
    login: {{issuer: me, audiences: [a], jwks_uri: 'http://a/', jwks_address: '10.1.1.1:80', {issuer}}}
  policies:
  - {{service: api, allow: [{{from: [api], token: login}}]}}
"#
    )
}

fn check(text: &str, expected: Option<&str>) {
    let problems = Mesh::parse(text, Path::new(".")).err().unwrap_or_default();
    let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
    match expected {
        None => assert_eq!(problems, Vec::<String>::new(), "{text}"),
        Some(expected) => {
            assert!(problems.len() == 1 && problems[0].starts_with(expected), "{problems:#?}");
        }
    }
}

#[test]
fn invalid_claim_header_is_refused() {
    let claim = |header: &str| mesh("", "", &format!("claim_headers: {{email: '{header}'}}"));
    for valid in ["x-user", "X-User", "x.user"] {
        check(&claim(valid), None);
    }
    let at = "line 18: security.issuers[\"login\"].claim_headers[\"email\"]: invalid header";
    for header in ["Expect", "trailer", "HOST", "te", "Content-Length", "", "x_user", "x user"] {
        check(&claim(header), Some(at));
    }
    check(&mesh("", "", "claim_headers: {'': x-user}"), Some("line 18: security.issuers"));
    let claims = "claims: [{name: scope, values: ['']}]";
    check(&mesh("", "", claims), Some("line 18: security.issuers[\"login\"].claims[0].values: "));
}

#[test]
fn match_that_no_request_can_meet_is_refused() {
    let at = "line 9: routes[0].rules[0].matches[0]";
    let good = "{path: {value: /a/}, method: GET, headers: [{name: X-A, value: ''}], queryParams: [{name: q, value: ''}]}";
    check(&mesh(good, "", ""), None);
    for path in
        ["/", "/a/", "/a%20b", "/%61", "/a.b", "/.well-known/x", "/group%2Fproject", "/100%25"]
    {
        check(&mesh(&format!("{{path: {{value: '{path}'}}}}"), "", ""), None);
    }
    for (wrong, place) in [
        ("{path: {value: '/a?b'}}", "path.value: invalid path \"/a?b\": must start with /"),
        ("{path: {type: Exact, value: '/a#b'}}", "path.value: invalid path"),
        ("{path: {value: a}}", "path.value: invalid path"),
        ("{path: {value: /a/../b}}", "path.value: invalid path \"/a/../b\": can never match"),
        (
            "{path: {type: Exact, value: /a//b}}",
            "path.value: invalid path \"/a//b\": can never match",
        ),
        ("{path: {value: /./a}}", "path.value: invalid path \"/./a\": can never match"),
        ("{path: {value: /a/%2e%2E/b}}", "path.value: invalid path"),
        ("{path: {value: /100%}}", "path.value: invalid path \"/100%\": % must be followed"),
        ("{path: {value: /a%zz}}", "path.value: invalid path \"/a%zz\": % must be followed"),
        ("{path: {value: /a%00}}", "path.value: invalid path \"/a%00\": must not contain %00"),
        ("{path: {value: '/a\\b'}}", "path.value: invalid path \"/a\\\\b\": must not contain"),
        ("{path: {value: /ä}}", "path.value: invalid path \"/ä\": must consist of printable ASCII"),
        ("{method: ''}", "method: invalid method"),
        ("{headers: [{name: '', value: a}]}", "headers[0].name: invalid header name"),
        ("{headers: [{name: 'x a', value: a}]}", "headers[0].name: invalid header name"),
        ("{queryParams: [{name: '', value: a}]}", "queryParams[0].name: invalid name"),
    ] {
        check(&mesh(wrong, "", ""), Some(&format!("{at}.{place}")));
    }
}

#[test]
fn invalid_rewrite_or_redirect_is_refused() {
    let rewrite = |prefix: &str| {
        let path = format!("{{type: ReplacePrefixMatch, replacePrefixMatch: '{prefix}'}}");
        mesh("", &format!("{{type: URLRewrite, urlRewrite: {{path: {path}}}}}"), "")
    };
    for valid in ["", "/", "/a/", "/a%20b"] {
        check(&rewrite(valid), None);
    }
    let at = "line 10: routes[0].rules[0].filters[0].urlRewrite.path.replacePrefixMatch: invalid";
    for prefix in ["a", "/a b", "/a?b", "/a#b", "/a/../b", "/a//b", "/a%zz", "/a%00", "/ä"] {
        check(&rewrite(prefix), Some(at));
    }
    let redirect = |fields: &str| mesh("", "", "").replace("hostname: a.example", fields);
    let at = "line 15: routes[1].rules[0].filters[0].requestRedirect";
    for (fields, place) in [
        ("scheme: ftp", "scheme: invalid scheme"),
        ("hostname: ''", "hostname: invalid host name"),
        ("hostname: 'a b'", "hostname: invalid host name"),
        (
            "path: {type: ReplaceFullPath, replaceFullPath: ''}",
            "path.replaceFullPath: invalid path",
        ),
        (
            "path: {type: ReplaceFullPath, replaceFullPath: '/a?b'}",
            "path.replaceFullPath: invalid path \"/a?b\": must start with / and contain no ?",
        ),
        (
            "path: {type: ReplaceFullPath, replaceFullPath: '/a%zz'}",
            "path.replaceFullPath: invalid path \"/a%zz\": % must be followed",
        ),
    ] {
        check(&redirect(fields), Some(&format!("{at}.{place}")));
    }
    check(&redirect("scheme: https, path: {type: ReplaceFullPath, replaceFullPath: /a}"), None);
}

/// The warnings about paths of a mesh where a route of `shop` and `api` matches and rewrites, and `api` has this policy.
fn rewrite_warnings(matched: &str, prefix: &str, policy: &str) -> Vec<String> {
    let text = format!(
        r#"trust_domain: mesh.local
service_ranges: [10.96.0.0/16]
services:
- {{name: shop, addresses: [10.96.0.1], ports: [{{port: 80, protocol: http}}]}}
- {{name: api, addresses: [10.96.0.2], ports: [{{port: 80, protocol: http}}, {{port: 81, protocol: http}}]}}
routes:
- name: r
  parentRefs: [{{name: shop}}, {{name: api}}]
  rules:
  - matches: [{{path: {matched}}}]
    filters: [{{type: URLRewrite, urlRewrite: {{path: {{type: ReplacePrefixMatch, replacePrefixMatch: {prefix}}}}}}}]
    backendRefs: [{{name: api, port: 80}}]
security:
  policies:
  - service: shop
    allow: [{{from: ["*"], paths: [/v1/admin]}}]
  - service: api
    {policy}
"#
    );
    let mesh = Mesh::parse(&text, Path::new(".")).expect("a valid file");
    let warnings = mesh.warnings.iter().map(ToString::to_string);
    warnings.filter(|warning| warning.contains("rewritten")).collect()
}

#[test]
fn policy_path_that_a_route_rewrites_gives_a_warning() {
    let check = |matched: &str, prefix: &str, path: &str, expected: Option<(&str, &str)>| {
        let policy = format!("deny: [{{from: ['*'], paths: [{path}]}}]");
        let warnings = rewrite_warnings(&format!("{{value: {matched}}}"), prefix, &policy);
        let expected = expected.map(|(before, after)| {
            format!(
                "line 18: security.policies[1].deny[0].paths[0]: path {before:?} is rewritten to {after:?} by route \
                 \"r\" before the policy of service \"api\" is evaluated; for requests through the route the policy \
                 must list the rewritten path"
            )
        });
        assert_eq!(warnings, Vec::from_iter(expected), "{matched} to {prefix}: {path}");
    };
    check("/v1", "/v2", "/v1/admin", Some(("/v1/admin", "/v2/admin")));
    check("/v1", "/", "/v1/admin", Some(("/v1/admin", "/admin")));
    check("/v1/admin", "/x", "/v1", Some(("/v1/admin", "/x")));
    check("/v1", "/v2", "'/v1/{item}'", Some(("/v1/x", "/v2/x")));
    check("/v1", "/v2", "'/v1*'", Some(("/v1", "/v2")));
    check("/api", "/api/v2", "/api/admin", Some(("/api/admin", "/api/v2/admin")));
    // Paths that the route does not match, that cover the rewritten path too, or that describe rewritten paths.
    check("/v1", "/v2", "/v2/admin", None);
    check("/v1", "/v2", "/v1x", None);
    check("/v1", "/v1/new", "/v1", None);
    check("/v1", "/v2", "'*.php'", None);
    check("/v1", "/v2", "'/{version}/admin'", None);
    check("/v1", "/v2", "'*'", None);
    check("/", "/api", "/api/admin", None);
    check("/v1", "/v1", "/v1/admin", None);
    check("/", "/api", "/admin", Some(("/admin", "/api/admin")));
}

#[test]
fn rewritten_path_that_a_policy_lists_gives_no_warning() {
    let check = |policy: &str, count: usize| {
        let warnings = rewrite_warnings("{value: /v1}", "/v2", policy);
        assert_eq!(warnings.len(), count, "{policy}: {warnings:#?}");
    };
    check("allow: [{from: [shop], paths: [/v1]}]", 1);
    check("allow: [{from: [shop], paths: [/v1, /v2]}]", 0);
    check("allow: [{from: [shop], paths: [/v1]}, {from: ['*'], paths: [/v2]}]", 0);
    check("allow: [{from: ['*'], paths: [/v1]}, {from: [shop], paths: [/v2]}]", 1);
    check("allow: [{from: [shop], paths: [/v1]}]\n    deny: [{from: [shop], paths: [/v2]}]", 1);
    check("deny: [{from: [shop], paths: [/v1], ports: [81]}]", 0);
    check("deny: [{from: [shop], paths: [/v1], methods: [PUT]}, {from: [shop], paths: [/v2]}]", 0);
    check("dry_run: true\n    deny: [{from: [shop], paths: [/v1]}]", 1);
}

#[test]
fn rewrite_of_an_exact_path_affects_no_longer_paths() {
    let check = |path: &str, count: usize| {
        let policy = format!("deny: [{{from: [shop], paths: [{path}]}}]");
        let warnings = rewrite_warnings("{type: Exact, value: /v1}", "/v2", &policy);
        assert_eq!(warnings.len(), count, "{path}: {warnings:#?}");
    };
    check("/v1", 1);
    check("/v1/admin", 0);
}

#[test]
fn method_of_a_route_is_case_insensitive() {
    use weft_model::{HeaderMatch, StringMatch};
    let mesh = Mesh::parse(&mesh("{method: get}", "", ""), Path::new(".")).expect("a valid file");
    let method = StringMatch::ExactIgnoreCase("get".into());
    let expected = vec![HeaderMatch::new(":method", method)];
    assert_eq!(mesh.routes[0].rules[0].matches[0].headers, expected);
}

#[test]
fn empty_audience_of_an_issuer_is_refused() {
    let text = mesh("", "", "").replace("audiences: [a]", "audiences: [a, '']");
    check(&text, Some("line 18: security.issuers[\"login\"].audiences[1]: invalid audience \"\""));
}

/// A mesh with one more service, on line 5.
fn with_service(fields: &str) -> String {
    let service = format!("- {{name: more, {fields}}}\n");
    mesh("", "", "").replace("routes:\n", &format!("{service}routes:\n"))
}

#[test]
fn endpoint_with_a_non_unicast_address_is_refused() {
    let service = |address: &str| {
        with_service(&format!(
            "ports: [{{port: 80, protocol: tcp}}], endpoints: [{{address: '{address}'}}]"
        ))
    };
    for valid in ["10.1.0.1", "127.0.0.1", "::1", "fd00::1", "10.1.0.255"] {
        check(&service(valid), None);
    }
    let wrong = ["0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255", "::ffff:224.0.0.1"];
    for address in wrong {
        let at = "line 5: services[1].endpoints[0].address: invalid address";
        check(&service(address), Some(&format!("{at} {address}: must be a unicast address")));
    }
}

#[test]
fn setting_without_effect_at_any_port_is_refused() {
    let service = |protocol: &str, setting: &str| {
        with_service(&format!("ports: [{{port: 80, protocol: {protocol}}}], {setting}"))
    };
    let limits = "http: {limits: {request_headers: 10}}";
    check(&service("grpc", limits), None);
    check(&service("tcp", limits), Some("line 5: services[1].http: no effect"));
    check(&service("udp", "http: {}"), Some("line 5: services[1].http: no effect"));
    check(&service("tcp", "balance: least_requests"), None);
    let at = "line 5: services[1].balance: no effect";
    check(&service("udp", "balance: round_robin"), Some(at));
}

#[test]
fn empty_allow_from_gives_a_warning() {
    let warnings = |ranges: &str| {
        let fields = format!("ports: [{{port: 80, protocol: udp}}], allow_from: [{ranges}]");
        let mesh = Mesh::parse(&with_service(&fields), Path::new(".")).expect("a valid file");
        let warnings = mesh.warnings.iter().map(ToString::to_string);
        warnings.filter(|warning| warning.contains("allow_from")).collect::<Vec<_>>()
    };
    assert_eq!(warnings("10.0.0.0/8"), Vec::<String>::new());
    let at = "line 5: services[1].allow_from: empty list: agents drop every new flow";
    let found = warnings("");
    assert!(found.len() == 1 && found[0].starts_with(at), "{found:?}");
}

#[test]
fn address_of_a_service_without_ports_gives_a_warning() {
    let warnings = |fields: &str| {
        let mesh = Mesh::parse(&with_service(fields), Path::new(".")).expect("a valid file");
        let warnings = mesh.warnings.iter().map(ToString::to_string);
        warnings.filter(|warning| warning.contains("it has no ports")).collect::<Vec<_>>()
    };
    assert_eq!(warnings("ports: []"), Vec::<String>::new());
    let found = warnings("ports: [], addresses: [10.96.0.9]");
    let at = "line 5: services[1].ports: no caller can reach service \"more\": it has no ports";
    assert!(found.len() == 1 && found[0].starts_with(at), "{found:?}");
    assert_eq!(warnings("ports: [], endpoints: [{address: 10.1.0.1}]").len(), 1);
}

#[test]
fn backend_at_a_udp_port_is_refused() {
    let ports =
        "ports: [{port: 53, protocol: udp}, {port: 54, protocol: udp}, {port: 54, protocol: tcp}]";
    let text = |number: u16| {
        let backend = format!("backendRefs: [{{name: more, port: {number}}}]");
        with_service(ports).replacen("backendRefs: [{name: api, port: 80}]", &backend, 1)
    };
    let at =
        "line 12: routes[0].rules[0].backendRefs[0].port: invalid port 53: must not be a udp port";
    check(&text(53), Some(at));
    check(&text(54), None);
}

/// The warnings about routes, ranges and addresses of a mesh with these services and routes, from lines 4 and 6 on.
fn route_warnings(services: &str, routes: &str) -> Vec<String> {
    let text = format!(
        r#"trust_domain: mesh.local
service_ranges: [10.96.0.0/16]
services:
- {{name: web, addresses: [10.96.0.1], ports: [{{port: 80, protocol: http}}, {{port: 81, protocol: http}}]}}
{services}
routes:
{routes}
security:
  policies: [{{service: web, allow: [{{from: ["*"]}}]}}]
"#
    );
    let mesh = Mesh::parse(&text, Path::new(".")).unwrap_or_else(|p| panic!("{p:#?}\n{text}"));
    mesh.warnings.iter().map(ToString::to_string).collect()
}

#[test]
fn route_without_services_or_rules_gives_a_warning() {
    let check = |route: &str, expected: &str| {
        let found = route_warnings("", route);
        assert_eq!(found, [format!("line 7: routes[0].{expected}")]);
    };
    check(
        "- {name: r, parentRefs: [], rules: [{backendRefs: [{name: web, port: 80}]}]}",
        "parentRefs: route \"r\" has no effect: it has no services",
    );
    check(
        "- {name: r, parentRefs: [{name: web}], rules: []}",
        "rules: route \"r\" has no effect: it has no rules",
    );
}

#[test]
fn rule_that_no_request_reaches_gives_a_warning() {
    let rule =
        |matches: &str| format!("{{matches: [{matches}], backendRefs: [{{name: web, port: 80}}]}}");
    let route = |parent: &str, first: &str, second: &str| {
        let first = rule(first);
        let second = rule(second);
        route_warnings(
            "",
            &format!(
                "- {{name: a, parentRefs: [{{name: web}}], rules: [{first}]}}\n\
                 - {{name: b, parentRefs: [{parent}], rules: [{second}]}}"
            ),
        )
    };
    let expected = "line 8: routes[1].rules[0]: no request reaches this rule: rules are tried in order, and \
                    routes[0].rules[0] matches the same requests";
    let web = "{name: web}";
    for (first, second) in [
        ("", ""),
        ("", "{path: {value: /a}}"),
        ("{path: {value: /a}}", "{path: {value: /a/}}"),
        ("{path: {value: /a}}", "{path: {value: /a/b}, method: GET}"),
        ("{path: {value: /a}}", "{path: {type: Exact, value: /a}}"),
        ("{path: {type: Exact, value: /a}}", "{path: {type: Exact, value: /a}}"),
        (
            "{headers: [{name: x, value: '1'}]}",
            "{headers: [{name: X, value: '1'}, {name: y, value: '2'}]}",
        ),
        ("{path: {value: /a}}, {path: {value: /b}}", "{path: {value: /b/c}}, {path: {value: /a}}"),
    ] {
        assert_eq!(route(web, first, second), [expected], "{first} before {second}");
        assert_eq!(route("{name: web, port: 81}", first, second), [expected], "{second}");
    }
    for (first, second) in [
        ("{path: {value: /a}}", ""),
        ("{path: {value: /a}}", "{path: {value: /ab}}"),
        ("{path: {type: Exact, value: /a}}", "{path: {value: /a}}"),
        ("{path: {value: /a}, method: GET}", "{path: {value: /a}}"),
        ("{queryParams: [{name: q, value: '1'}]}", "{queryParams: [{name: q, value: '2'}]}"),
        ("{path: {value: /a}}", "{path: {value: /a}}, {path: {value: /b}}"),
    ] {
        assert_eq!(route(web, first, second), Vec::<String>::new(), "{first} before {second}");
    }
    // Another port or another host name has a list of routes of its own.
    let all = rule("");
    for (first, second) in [
        ("parentRefs: [{name: web, port: 80}]", "parentRefs: [{name: web, port: 81}]"),
        ("parentRefs: [{name: web, port: 80}]", "parentRefs: [{name: web}]"),
        ("parentRefs: [{name: web}], hostnames: [a.test]", "parentRefs: [{name: web}]"),
    ] {
        let routes = format!(
            "- {{name: a, {first}, rules: [{all}]}}\n- {{name: b, {second}, rules: [{all}]}}"
        );
        assert_eq!(route_warnings("", &routes), Vec::<String>::new(), "{routes}");
    }
}

#[test]
fn route_that_cannot_apply_to_a_tcp_port_gives_a_warning() {
    let mixed = "- {name: mixed, meshed: false, addresses: [10.96.0.9], ports: [{port: 80, protocol: http}, {port: 90, protocol: tcp}]}";
    let route = |parent: &str| {
        let routes = format!(
            "- {{name: r, parentRefs: [{parent}], rules: [{{backendRefs: [{{name: mixed, port: 80}}]}}]}}"
        );
        route_warnings(mixed, &routes)
    };
    let expected = "line 7: routes[0].parentRefs[0]: route \"r\" does not apply to port 90 of service \"mixed\": it \
                    carries tcp; set the port in parentRefs";
    assert_eq!(route("{name: mixed}"), [expected]);
    assert_eq!(route("{name: mixed, port: 80}"), Vec::<String>::new());
}

#[test]
fn service_that_has_no_address_and_no_route_gives_a_warning() {
    let service = |fields: &str| {
        let service = format!("- {{name: more, meshed: false, {fields}}}");
        let route = "- {name: r, parentRefs: [{name: web}], rules: [{backendRefs: [{name: web, port: 80}]}]}";
        route_warnings(&service, route)
    };
    let expected = "line 5: services[1].addresses: no caller can reach service \"more\": it has no addresses, and no \
                    route sends requests to it";
    assert_eq!(service("addresses: [], ports: [{port: 80, protocol: http}]"), [expected]);
    assert_eq!(service("ports: []"), Vec::<String>::new());
    let routed = route_warnings(
        "- {name: more, meshed: false, ports: [{port: 80, protocol: http}]}",
        "- {name: r, parentRefs: [{name: web}], rules: [{backendRefs: [{name: more, port: 80}]}]}",
    );
    assert_eq!(routed, Vec::<String>::new());
}

#[test]
fn address_range_with_host_bits_gives_a_warning() {
    let text = mesh("", "", "")
        .replace("[10.96.0.0/16]", "[10.96.0.1/16]")
        .replace("- {name: api, ", "- {name: api, allow_from: ['fd00::1/64', 10.0.0.0/8], ")
        .replace(
            "from: [api], token",
            "from: [api], from_addresses: [10.1.2.3, 10.1.2.3/31], token",
        );
    let parsed = Mesh::parse(&text, Path::new(".")).expect("a valid file");
    let warnings: Vec<String> = parsed
        .warnings
        .iter()
        .map(ToString::to_string)
        .filter(|warning| warning.contains("host bits"))
        .collect();
    assert_eq!(
        warnings,
        [
            "line 2: service_ranges[0]: range \"10.96.0.1/16\" has host bits set and is read as 10.96.0.0/16",
            "line 4: services[0].allow_from[0]: range \"fd00::1/64\" has host bits set and is read as fd00::/64",
            "line 20: security.policies[0].allow[0].from_addresses[1]: range \"10.1.2.3/31\" has host bits set and \
             is read as 10.1.2.2/31",
        ]
    );
}
