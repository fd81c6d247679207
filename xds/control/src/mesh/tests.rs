//! All errors of a file are reported at once, with their lines.

use std::time::Duration;

use weft_model::{FlowKey, IdleEnd, StringMatch};

use super::*;

const VALID: &str = r#"trust_domain: mesh.local
service_ranges: [10.96.0.0/16]
services:
- name: web
  addresses: [10.96.0.1]
  ports: [{port: 80, target: 8080, protocol: http}]
  endpoints: [{address: 10.90.1.1}]
- name: orders
  addresses: [10.96.0.2]
  ports: [{port: 80, target: 8080, protocol: http}]
  endpoints: [{address: 10.90.2.1}, {address: 10.90.2.2, weight: 3}]
  balance: least_requests
routes:
- name: orders
  parentRefs: [{name: orders}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /v1}, method: GET}]
    backendRefs: [{name: orders, port: 80}]
    timeouts: {request: 10s}
security:
  policies:
  - service: orders
    allow: [{from: [web], methods: [GET], paths: [/v1]}]
  revocations: [0a0b]
"#;

/// The file with another protocol on every port, and without settings that only HTTP has.
fn opaque(text: &str, protocol: &str) -> String {
    let (before, rest) = text.split_once("routes:").expect("routes");
    let (_, after) = rest.split_once("security:").expect("policies");
    format!("{before}security:{after}")
        .replace(", methods: [GET], paths: [/v1]", "")
        .replace("http", protocol)
}

fn errors(text: &str) -> Vec<String> {
    let problems = Mesh::parse(text, Path::new(".")).expect_err("errors");
    problems.iter().map(ToString::to_string).collect()
}

#[test]
fn valid_file_is_accepted() {
    let mesh = Mesh::parse(VALID, Path::new(".")).expect("a valid file");
    assert_eq!(mesh.services["orders"].endpoints[1].1, 3);
    let web = StringMatch::Exact("spiffe://mesh.local/ns/default/sa/web".into());
    assert_eq!(mesh.policies[0].allow[0].from, [web]);
    assert_eq!(mesh.routes[0].rules[0].timeout, Some(Duration::from_secs(10)));
}

#[test]
fn every_error_is_reported_with_its_line() {
    let text = VALID
        .replace("addresses: [10.96.0.2]", "addresses: [10.96.0.1]")
        .replace("request: 10s", "request: soon")
        .replace("from: [web]", "from: [wbe]")
        .replace("0a0b", "0a0");
    let found = errors(&text);
    for expected in [
        "line 9: services[1].addresses[0]: invalid address 10.96.0.1: already used by service \"web\"",
        "line 19: routes[0].rules[0].timeouts.request: invalid duration \"soon\": must be such as 500ms",
        "line 23: security.policies[0].allow[0].from[0]: unknown service \"wbe\"",
        "line 24: security.revocations[0]: invalid serial number \"0a0\"",
    ] {
        assert!(found.iter().any(|line| line.starts_with(expected)), "{expected} in {found:#?}");
    }
    assert_eq!(found.len(), 4, "{found:#?}");
}

#[test]
fn endpoint_in_a_service_range_is_refused() {
    let wanted =
        VALID.replacen("endpoints: [{address: ", "endpoints: [{address: 10.96.7.7}, {address: ", 1);
    let found = errors(&wanted);
    assert_eq!(found.len(), 1, "{found:#?}");
    let expected =
        "endpoints[0].address: invalid address 10.96.7.7: must be the address of a workload";
    assert!(found[0].contains(expected), "{found:?}");
}

#[test]
fn affinity_is_refused_on_http_ports() {
    let wanted = VALID.replace("balance: least_requests", "affinity: client_address");
    let found = errors(&wanted);
    assert_eq!(found.len(), 1, "{found:#?}");
    let expected =
        "line 12: services[1].affinity: invalid affinity client_address: port 80 carries HTTP";
    assert!(found[0].starts_with(expected), "{found:?}");
    let mesh = Mesh::parse(&opaque(&wanted, "tcp"), Path::new("."));
    let mesh = mesh.expect("a valid file");
    assert_eq!(mesh.services["orders"].flow_key, FlowKey::SourceAddress);
    assert_eq!(mesh.services["web"].flow_key, FlowKey::FiveTuple);
    let sequence = opaque(&wanted, "tcp").replace("client_address", "tcp_sequence");
    let mesh = Mesh::parse(&sequence, Path::new(".")).expect("a valid file");
    assert_eq!(mesh.services["orders"].flow_key, FlowKey::WithSequence);
    let found = errors(&sequence.replace("protocol: tcp", "protocol: udp"));
    let expected =
        "services[1].affinity: invalid affinity tcp_sequence: the service has no tcp port";
    assert!(found.iter().any(|error| error.contains(expected)), "{found:?}");
}

#[test]
fn unknown_field_is_refused_with_its_line() {
    let found = errors(&VALID.replace("balance:", "balanse:"));
    assert!(found[0].contains("balanse") && found[0].contains("12"), "{found:?}");
}

#[test]
fn idle_settings_are_refused_on_http_ports() {
    let http = "{port: 80, target: 8080, protocol: http}]\n  endpoints: [{address: 10.90.2.1}";
    let with =
        |port: &str| VALID.replace(http, &format!("{port}]\n  endpoints: [{{address: 10.90.2.1}}"));
    let taken = with("{port: 80, protocol: tcp, idle_timeout: 10m, idle_end: close}");
    let mesh = Mesh::parse(&opaque(&taken, "tcp"), Path::new(".")).expect("a valid file");
    let port = &mesh.services["orders"].ports[0];
    assert_eq!(port.idle_timeout, Some(Duration::from_secs(600)));
    assert_eq!(port.idle_end, Some(IdleEnd::Close));
    for (port, expected) in [
        (
            "{port: 80, protocol: http, idle_timeout: 10m}",
            "idle_timeout: no effect on this port: requires tcp or udp",
        ),
        (
            "{port: 80, protocol: tcp, idle_timeout: 0s}",
            "idle_timeout: invalid duration \"0s\": must be above zero",
        ),
        (
            "{port: 80, protocol: tcp, idle_timeout: soon}",
            "idle_timeout: invalid duration \"soon\"",
        ),
        (
            "{port: 80, protocol: udp, idle_end: reset}",
            "idle_end: no effect on this port: requires tcp",
        ),
        (
            "{port: 80, protocol: tcp, idle_end: fin}",
            "idle_end: invalid value \"fin\": must be reset or close",
        ),
    ] {
        let found = errors(&with(port));
        let expected = format!("line 10: services[1].ports[0].{expected}");
        assert!(found[0].starts_with(&expected), "{expected}: {found:#?}");
    }
}

#[test]
fn invalid_clause_is_refused_with_its_field() {
    let with = |clause: &str| {
        VALID.replace("{from: [web], methods: [GET], paths: [/v1]}", clause)
            .replace("security:\n", "security:\n  issuers: {login: {issuer: me, audiences: [a], jwks_uri: 'http://a/', jwks_address: '10.1.1.1:80'}}\n")
    };
    for valid in [
        "{from: ['spiffe://mesh.local/*'], from_addresses: [10.0.0.0/8, '::1'], ports: [80]}",
        "{from: ['spiffe://mesh.local/ns/a/*'], token: login, claims: {role: [admin, root]}}",
    ] {
        Mesh::parse(&with(valid), Path::new(".")).expect(valid);
    }
    for (clause, expected) in [
        (
            "{from: ['spiffe://mesh.local/ns/a*']}",
            "from[0]: invalid SPIFFE ID \"spiffe://mesh.local/ns/a*\"",
        ),
        ("{from: ['spiffe:///*']}", "from[0]: invalid SPIFFE ID \"spiffe://\""),
        (
            "{from: [web], from_addresses: [10.0.0.0/33]}",
            "from_addresses[0]: invalid address range \"10.0.0.0/33\"",
        ),
        ("{from: [web], ports: [81]}", "ports[0]: unknown port 81"),
        (
            "{from: [web], claims: {role: [admin]}}",
            "claims: requires token: the name of the issuer",
        ),
        ("{from: [web], token: login, claims: {role: []}}", "claims[\"role\"]: invalid empty list"),
        ("{from: []}", "from: invalid empty list"),
    ] {
        let found = errors(&with(clause));
        let expected = format!("line 24: security.policies[0].allow[0].{expected}");
        assert_eq!(found.len(), 1, "{clause}: {found:#?}");
        assert!(found[0].starts_with(&expected), "{expected}: {found:#?}");
    }
    let found =
        errors(&VALID.replace("    allow: [{from: [web], methods: [GET], paths: [/v1]}]\n", ""));
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].contains("policies[0]: no effect: allow and deny are empty"), "{found:?}");
}

fn warnings(text: &str) -> Vec<String> {
    let mesh = Mesh::parse(text, Path::new(".")).expect("a valid file");
    mesh.warnings.iter().map(ToString::to_string).collect()
}

/// A mesh with a service of every kind of port, and one policy.
fn with_policy(policy: &str) -> String {
    format!(
        r#"trust_domain: mesh.local
service_ranges: [10.96.0.0/16]
services:
- {{name: api, addresses: [10.96.0.2], ports: [{{port: 80, target: 8000, protocol: http}}]}}
- {{name: cache, addresses: [10.96.0.3], ports: [{{port: 6379, protocol: tcp}}]}}
- {{name: mixed, addresses: [10.96.0.4], ports: [{{port: 80, protocol: grpc}}, {{port: 81, protocol: tcp}}, {{port: 82, protocol: udp}}]}}
- {{name: names, addresses: [10.96.0.5], ports: [{{port: 53, protocol: udp}}]}}
- {{name: dns, addresses: [10.96.0.53], meshed: false, ports: [{{port: 53, protocol: udp}}]}}
security:
  issuers: {{login: {{issuer: me, audiences: [a], jwks_uri: 'http://a/', jwks_address: '10.1.1.1:80'}}}}
  policies:
  - {policy}
"#
    )
}

#[test]
fn policies_that_no_sidecar_can_enforce_are_refused() {
    let allow = |service: &str, clause: &str| format!("{{service: {service}, allow: [{clause}]}}");
    let deny = |service: &str, clause: &str| {
        format!("{{service: {service}, allow: [{{from: [\"*\"]}}], deny: [{clause}]}}")
    };
    for (policy, expected) in [
        (allow("dns", "{from: [api]}"), "service: invalid service \"dns\": meshed is false"),
        (
            deny("cache", "{from: [api], methods: [POST]}"),
            "deny[0]: port 6379 carries tcp, where methods",
        ),
        (
            allow("cache", "{from: [api], paths: [/a]}"),
            "allow[0]: port 6379 carries tcp, where paths",
        ),
        (
            allow("cache", "{from: [api], token: login}"),
            "allow[0]: port 6379 carries tcp, where token",
        ),
        (allow("names", "{from: [api]}"), "allow[0]: port 53 carries udp"),
        (
            deny("mixed", "{from: [api], methods: [GET]}"),
            "deny[0]: port 81 carries tcp, where methods",
        ),
        (deny("mixed", "{from: [api]}"), "deny[0]: port 82 carries udp"),
        (deny("mixed", "{from: [api]}"), "limit the clause to ports: [80, 81]"),
        (
            deny("mixed", "{from: [api], ports: [80, 81], paths: [/a]}"),
            "deny[0].ports[1]: port 81 carries tcp",
        ),
        (allow("mixed", "{from: [api], ports: [82]}"), "allow[0].ports[0]: port 82 carries udp"),
        (
            allow("mixed", "{from: [api], ports: [81], token: login}"),
            "ports[0]: port 81 carries tcp, where token",
        ),
    ] {
        let found = errors(&with_policy(&policy));
        let line = "line 12: security.policies[0].";
        assert!(
            found.iter().any(|found| found.starts_with(line) && found.contains(expected)),
            "{policy}: {found:#?}"
        );
    }
    for policy in [
        deny("mixed", "{from: [api], ports: [80], methods: [GET]}"),
        deny("mixed", "{from: [api], ports: [80, 81]}"),
        deny("cache", "{from: [api], from_addresses: [10.0.0.0/8]}"),
        allow("mixed", "{from: [api], paths: [/a]}"),
    ] {
        Mesh::parse(&with_policy(&policy), Path::new(".")).expect(&policy);
    }
}

#[test]
fn clauses_that_can_never_match_are_refused() {
    for (clause, expected) in [
        ("{from: [api], paths: [/a/../b]}", "paths[0]: invalid path \"/a/../b\": can never match"),
        ("{from: [api], paths: [/a, b]}", "paths[1]: invalid path \"b\": must start with /"),
        (
            "{from: [api], paths: ['/items/{id']}",
            "paths[0]: invalid path \"/items/{id\": must close",
        ),
        ("{from: [api], paths: [{type: Exact, value: a}]}", "paths[0]: invalid path \"a\""),
        ("{from: [api], paths: [{type: Regex, value: /a}]}", "must be Exact or PathPrefix"),
        ("{from: [api], paths: []}", "paths: invalid empty list"),
        ("{from: [api], methods: []}", "methods: invalid empty list"),
        ("{from: [api], ports: []}", "ports: invalid empty list"),
        ("{from: [api], from_addresses: []}", "from_addresses: invalid empty list"),
        ("{from: [api], token: login, claims: {}}", "claims: invalid empty list"),
        ("{from: []}", "from: invalid empty list"),
        ("{from: [api], methods: ['GET POST']}", "methods[0]: invalid method \"GET POST\""),
        ("{from: [api], methods: ['P*']}", "methods[0]: invalid method \"P*\""),
        ("{from: [api], methods: ['']}", "methods[0]: invalid method \"\""),
        ("{from: [api], methods: [GET, trace]}", "methods[1]: invalid method \"trace\""),
        ("{from: [nosuch]}", "from[0]: unknown service \"nosuch\""),
        ("{from: ['*', nosuch]}", "from[1]: unknown service \"nosuch\""),
        ("{from: ['api*']}", "from[0]: unknown service"),
        ("{from: [dns]}", "from[0]: invalid caller \"dns\": meshed is false"),
        ("{from: ['spiffe://other/ns/a/sa/b']}", "from[0]: invalid caller \"spiffe://other/"),
        ("{from: ['spiffe://other/*']}", "from[0]: invalid caller \"spiffe://other/*\""),
        ("{from: ['spiffe://mesh.local']}", "from[0]: "),
    ] {
        let found = errors(&with_policy(&format!("{{service: api, allow: [{clause}]}}")));
        assert_eq!(found.len(), 1, "{clause}: {found:#?}");
        let line = "line 12: security.policies[0].allow[0].";
        assert!(found[0].starts_with(line) && found[0].contains(expected), "{clause}: {found:#?}");
        let denied = format!("{{service: api, allow: [{{from: [api]}}], deny: [{clause}]}}");
        let is_trace = clause.contains("trace");
        let parsed = Mesh::parse(&with_policy(&denied), Path::new("."));
        assert_eq!(parsed.is_ok(), is_trace, "as a deny clause: {clause}");
    }
}

#[test]
fn port_that_no_caller_can_reach_gives_a_warning() {
    let found = warnings(&with_policy("{service: api, allow: [{from: [api]}]}"));
    let unreachable = |line: usize, place: &str, name: &str, port: u16| {
        format!(
            "line {line}: services{place}: no caller can reach service {name:?} port {port}: no policy allows a call"
        )
    };
    assert_eq!(
        found,
        [
            unreachable(5, "[1].ports[0]", "cache", 6379),
            unreachable(6, "[2].ports[0]", "mixed", 80),
            unreachable(6, "[2].ports[1]", "mixed", 81),
        ]
    );
    // A dry run allows no request, and a denial of every call leaves none.
    for policy in [
        "{service: api, dry_run: true, allow: [{from: [api]}]}",
        "{service: api, deny: [{from: [api]}]}",
        "{service: api, allow: [{from: [api]}], deny: [{from: [\"*\"]}]}",
    ] {
        let found = warnings(&with_policy(policy));
        assert!(found[0].contains("no caller can reach service \"api\" port 80"), "{found:#?}");
    }
    let found = warnings(&with_policy("{service: mixed, allow: [{from: [api], methods: [PSOT]}]}"));
    let has = |text: &str| found.iter().any(|found| found.contains(text));
    assert!(has("service \"mixed\" port 81: no policy allows a call"), "{found:#?}");
    assert!(has("no policy of service \"mixed\" is enforced on udp port 82"), "{found:#?}");
    assert!(has("allow[0].methods[0]: unknown HTTP method \"PSOT\""), "{found:#?}");
    let denied = "deny: [{from: [\"*\"], token: login, claims: {role: [guest]}}]";
    let found =
        warnings(&with_policy(&format!("{{service: api, allow: [{{from: [api]}}], {denied}}}")));
    assert!(
        found.iter().any(|found| found.contains("deny[0].token: a caller can avoid")),
        "{found:#?}"
    );
    let required = "{service: api, allow: [{from: [api], token: login}], ";
    let found = warnings(&with_policy(&format!("{required}{denied}}}")));
    assert!(!found.iter().any(|found| found.contains("can avoid")), "{found:#?}");
}

#[test]
fn route_may_select_one_port_of_a_service() {
    let with = |parent: &str| {
        VALID.replace("parentRefs: [{name: orders}]", &format!("parentRefs: [{parent}]"))
            .replace("{port: 80, target: 8080, protocol: http}]\n  endpoints: [{address: 10.90.2.1}", "{port: 80, target: 8080, protocol: http}, {port: 81, protocol: grpc}, {port: 82, protocol: tcp}]\n  endpoints: [{address: 10.90.2.1}")
    };
    let mesh = Mesh::parse(&with("{name: orders, port: 81}"), Path::new("."));
    let mesh = mesh.expect("a valid file");
    let orders = &mesh.services["orders"];
    let takes: Vec<bool> =
        orders.ports.iter().map(|port| mesh.routes[0].is_of(orders, port)).collect();
    assert_eq!(takes, [false, true, false]);
    for (parent, expected) in [
        (
            "{name: orders, port: 83}",
            "parentRefs[0].port: invalid port 83: service \"orders\" has no",
        ),
        (
            "{name: orders, port: 82}",
            "parentRefs[0].port: invalid port 82: must be an http, http2 or grpc port",
        ),
        ("{name: order}", "parentRefs[0].name: unknown service \"order\""),
    ] {
        let found = errors(&with(parent));
        assert_eq!(found.len(), 1, "{found:#?}");
        assert!(found[0].contains(expected), "{found:#?}");
    }
}

#[test]
fn paths_and_headers_are_passed_as_sent_unless_a_service_says_otherwise() {
    use weft_model::{EscapedSlashes, HeadersWithUnderscores};
    let with =
        |settings: &str| VALID.replace("balance: least_requests", &format!("http: {settings}"));
    let orders = |settings: &str| {
        let mesh = Mesh::parse(&with(settings), Path::new(".")).expect("a valid file");
        mesh.services["orders"].clone()
    };
    let default = orders("{}");
    assert_eq!(default.paths.ambiguous, weft_model::AmbiguousPath::RouteNormalized);
    assert!(!default.paths.normalize && !default.paths.merge_slashes);
    assert_eq!(default.paths.escaped_slashes, EscapedSlashes::Keep);
    assert_eq!(default.underscores, HeadersWithUnderscores::Allow);
    let set = orders(
        "{paths: {normalize: true, merge_slashes: true, escaped_slashes: reject}, headers_with_underscores: drop}",
    );
    assert!(set.paths.normalize && set.paths.merge_slashes);
    assert_eq!(set.paths.escaped_slashes, EscapedSlashes::Reject);
    assert_eq!(set.underscores, HeadersWithUnderscores::Drop);
    for (settings, expected) in [
        (
            "{paths: {escaped_slashes: decode}}",
            "line 12: services[1].http.paths.escaped_slashes: invalid value \"decode\": must be keep, reject",
        ),
        (
            "{headers_with_underscores: keep}",
            "line 12: services[1].http.headers_with_underscores: invalid value \"keep\": must be allow, drop or reject",
        ),
    ] {
        let found = errors(&with(settings));
        assert!(found.len() == 1 && found[0].starts_with(expected), "{found:#?}");
    }
}

#[test]
fn key_server_settings_are_parsed_or_refused_with_their_field() {
    let with = |keys: &str| {
        let issuer = format!("{{issuer: me, audiences: [a], {keys}}}");
        VALID.replace("security:\n", &format!("security:\n  issuers: {{login: {issuer}}}\n"))
    };
    let keys = |text: &str| {
        let mesh = Mesh::parse(&with(text), Path::new(".")).expect(text);
        mesh.issuers["login"].keys.clone()
    };
    let TokenKeys::Http(server) = keys("jwks_uri: 'https://login.example/keys', jwks_redirects: 2")
    else {
        panic!("keys come from a server");
    };
    assert_eq!((server.host.as_str(), server.port, server.address), ("login.example", 443, None));
    assert_eq!((server.roots, server.redirects), (Some(KeyServerRoots::System), 2));
    for (text, address, roots) in [
        ("jwks_uri: 'http://login.example/'", None, None),
        ("jwks_uri: 'http://a/', jwks_address: '10.1.1.1:80'", Some("10.1.1.1:80"), None),
        ("jwks_uri: 'https://10.1.1.2/'", Some("10.1.1.2:443"), Some(KeyServerRoots::System)),
        (
            "jwks_uri: 'https://a/', jwks_address: '10.1.1.1:8443'",
            Some("10.1.1.1:8443"),
            Some(KeyServerRoots::System),
        ),
    ] {
        let TokenKeys::Http(server) = keys(text) else { panic!("{text}") };
        let address = address.map(|address| address.parse().expect("an address"));
        assert_eq!((server.address, server.roots), (address, roots), "{text}");
    }
    for (text, expected) in [
        ("jwks_uri: 'ftp://a/'", ".jwks_uri: invalid URI"),
        ("jwks_uri: 'https://a/', jwks_redirects: 6", ".jwks_redirects: invalid value 6"),
        ("jwks_uri: 'https://a/', jwks_roots_file: /none", ".jwks_roots_file: /none"),
        ("jwks_uri: 'https://a/', jwks_roots_file: /dev/null", ".jwks_roots_file: /dev/null"),
        ("jwks_uri: 'http://a/', jwks_roots_file: /dev/null", ".jwks_roots_file: no effect"),
        ("jwks_file: /dev/null", ".jwks_file: /dev/null: invalid key set: EOF"),
        ("jwks_file: a, jwks_uri: 'https://a/'", ": set one of jwks_file and jwks_uri"),
        ("forward: true", ": set one of jwks_file and jwks_uri"),
    ] {
        let found = errors(&with(text));
        let expected = format!("security.issuers[\"login\"]{expected}");
        assert!(found.iter().any(|line| line.contains(&expected)), "{expected}: {found:#?}");
        assert_eq!(found.len(), 1, "{found:#?}");
    }
}

#[test]
fn invalid_name_hides_no_other_error_of_the_service() {
    let text = r#"trust_domain: mesh.local
service_ranges: [10.96.0.0/16]
services:
- name: Web
  addresses: [10.97.0.1]
  ports: [{port: 0, protocol: http}]
  endpoints: [{address: 10.96.0.9}]
"#;
    let found = errors(text);
    for (found, expected) in found.iter().zip([
        "line 4: services[0].name: invalid service name \"Web\": must match [a-z0-9-]{1,63}",
        "line 5: services[0].addresses[0]: invalid address 10.97.0.1: must be in one of",
        "line 6: services[0].ports[0].port: invalid value 0: must be 1 to 65535",
        "line 7: services[0].endpoints[0].address: invalid address 10.96.0.9: must be the address of a workload",
    ]) {
        assert!(found.starts_with(expected), "{expected}: {found}");
    }
    assert_eq!(found.len(), 4, "{found:#?}");
}

#[test]
fn errors_of_parsing_and_of_checks_are_reported_together() {
    let text = "\
trust_domain: mesh.local
service_range: [10.96.0.0/16]
services:
- name: Web
  addresses: [10.96.0.1, 10.96]
  ports: [{port: eighty, protocol: http}, {port: 0, protocol: sctp}]
  adresses: [10.96.0.3]
- name: orders
  ports: [{port: 80, protocol: http}]
  balance: random
  balance: least_requests
  endpoints: {address: 10.90.2.1}
security:
  policies:
  - service: orders
    allow: [{form: [web]}]
  revocations: [xyz]
  post_quantum: perhaps
";
    let found = Mesh::parse(text, Path::new(".")).expect_err("errors");
    let lines: Vec<String> =
        found.iter().map(|problem| format!("{}: {}", problem.line, problem.text)).collect();
    let begins = |line: &str| lines.iter().any(|found| found.starts_with(line));
    for expected in [
        "1: service_ranges: this field is missing",
        "2: service_range: unknown field \"service_range\": must be one of trust_domain, ",
        "4: services[0].name: invalid service name \"Web\"",
        "5: services[0].addresses[1]: invalid value \"10.96\": invalid IP address syntax",
        "6: services[0].ports[0].port: invalid value \"eighty\": must be a whole number, 1 to 65535",
        "6: services[0].ports[1].protocol: invalid value \"sctp\": must be one of http, http2, ",
        "7: services[0].adresses: unknown field \"adresses\": must be one of name, addresses, ",
        "11: services[1].balance: this field is repeated",
        "12: services[1].endpoints: invalid value {...}: must be a list",
        "16: security.policies[0].allow[0].from: this field is missing",
        "16: security.policies[0].allow[0].form: unknown field \"form\": must be one of from, ",
        "17: security.revocations[0]: invalid serial number \"xyz\"",
        "18: security.post_quantum: invalid value \"perhaps\": must be one of prefer",
    ] {
        assert!(begins(expected), "{expected}: {lines:#?}");
    }
    let numbers: Vec<u64> = found.iter().map(|problem| problem.line).collect();
    assert!(numbers.is_sorted(), "{lines:#?}");
    // A reference to a service whose ports could not be read is not reported.
    assert!(!lines.iter().any(|line| line.contains("unknown service")), "{lines:#?}");
}

#[test]
fn reference_to_an_issuer_that_cannot_be_read_is_not_reported() {
    let issuers = "security:\n  issuers: {login: 5}\n";
    let token = |name: &str| {
        let allow = format!("allow: [{{from: [web], token: {name}}}]");
        format!("{issuers}  policies: [{{service: web, {allow}}}]\n")
    };
    let services = "services: [{name: web, ports: [{port: 80, protocol: http}]}]\n";
    let head = "trust_domain: mesh.local\nservice_ranges: [10.96.0.0/16]\n";
    let found = errors(&format!("{head}{services}{}", token("login")));
    assert!(found.len() == 1 && found[0].contains("security.issuers[\"login\"]"), "{found:#?}");
    let found = errors(&format!("{head}{services}{}", token("logout")));
    assert!(found.len() == 2 && found[1].contains("unknown issuer \"logout\""), "{found:#?}");
}

#[test]
fn references_are_checked_if_another_service_cannot_be_read() {
    let check = |orders: &str, expected: &[&str]| {
        let text = format!(
            r#"trust_domain: mesh.local
service_ranges: [10.96.0.0/16]
services:
- {{name: web, ports: [{{port: 80, protocol: http}}]}}
- {orders}
routes:
- {{name: a, parentRefs: [{{name: orders}}], rules: [{{backendRefs: [{{name: orders, port: 81}}]}}]}}
- {{name: b, parentRefs: [{{name: ordres}}], rules: [{{backendRefs: [{{name: web, port: 81}}]}}]}}
security:
  policies:
  - {{service: orders, allow: [{{from: [orders, wbe], ports: [81]}}]}}
  - {{service: web, allow: [{{from: [orders], ports: [81]}}]}}
"#
        );
        let found = errors(&text);
        let is_service = |line: &&String| line.contains("services[1]");
        assert_eq!(found.iter().filter(is_service).count(), 1, "{found:#?}");
        let references: Vec<&String> = found.iter().filter(|line| !is_service(line)).collect();
        assert_eq!(references.len(), expected.len(), "{orders}: {found:#?}");
        for (line, expected) in references.iter().zip(expected) {
            assert!(line.contains(expected), "{expected}: {line}");
        }
    };
    let of_web = [
        "routes[1].parentRefs[0].name: unknown service \"ordres\"",
        "routes[1].rules[0].backendRefs[0].port: unknown port 81",
        "security.policies[0].allow[0].from[1]: unknown service \"wbe\"",
        "security.policies[1].allow[0].ports[0]: unknown port 81",
    ];
    check("{name: orders, ports: [{port: eighty, protocol: http}]}", &of_web);
    check("{name: orders, ports: 80}", &of_web);
    check("{name: orders}", &of_web);
    let without_names = [of_web[1], of_web[3]];
    check("{name: [orders], ports: [{port: 81, protocol: http}]}", &without_names);
    check("{ports: [{port: 81, protocol: http}]}", &without_names);
    check("orders", &without_names);
    let all = [
        "routes[0].rules[0].backendRefs[0].port: unknown port 81",
        of_web[0],
        of_web[1],
        of_web[2],
        "security.policies[0].allow[0].ports[0]: unknown port 81",
        of_web[3],
    ];
    check("{name: orders, ports: [{port: 80, protocol: http}], endpoints: 1}", &all);
    check("{name: orders, ports: [{port: 80, protocol: http}], colour: red}", &all);
}

#[test]
fn http_limits_of_a_port_override_those_of_the_service() {
    use weft_model::StreamIdle;
    let text = VALID.replace(
        "balance: least_requests",
        "http: {limits: {request_headers_kib: 96, response_headers: 1000}, timeouts: {stream_idle: 10m}}",
    );
    let mesh = Mesh::parse(&text, Path::new(".")).expect("a valid file");
    let tuning = mesh.services["orders"].ports[0].http;
    assert_eq!((tuning.request_head_bytes, tuning.response_headers), (96 * 1024, 1000));
    assert_eq!((tuning.request_headers, tuning.response_head_bytes), (100, 60 * 1024));
    let minutes = Duration::from_secs(600);
    assert_eq!(tuning.stream_idle, StreamIdle::Set(Some(minutes)));
    let text = text.replace(
        "{port: 80, target: 8080, protocol: http}]\n  endpoints: [{address: 10.90.2.1}",
        "{port: 80, target: 8080, protocol: http, http: {limits: {request_headers_kib: 8}, \
         timeouts: {stream_idle: 0s}}}]\n  endpoints: [{address: 10.90.2.1}",
    );
    let mesh = Mesh::parse(&text, Path::new(".")).expect("a valid file");
    let tuning = mesh.services["orders"].ports[0].http;
    assert_eq!((tuning.request_head_bytes, tuning.response_headers), (8 * 1024, 1000));
    assert_eq!(tuning.stream_idle, StreamIdle::Set(None));
}

#[test]
fn http_limits_out_of_range_are_refused_with_their_line() {
    for (settings, expected) in [
        (
            "{limits: {request_headers_kib: 0}}",
            "limits.request_headers_kib: invalid value 0: must be 1 to 8192",
        ),
        ("{limits: {request_headers_kib: 8193}}", "limits.request_headers_kib: invalid value 8193"),
        (
            "{limits: {response_headers: 1025}}",
            "limits.response_headers: invalid value 1025: must be 1 to 1024",
        ),
        ("{limits: {request_headers: 0}}", "limits.request_headers: invalid value 0"),
        ("{limits: {response_headers_kib: 0}}", "limits.response_headers_kib: invalid value 0"),
        ("{timeouts: {stream_idle: soon}}", "timeouts.stream_idle: invalid duration \"soon\""),
    ] {
        let text = VALID.replace("balance: least_requests", &format!("http: {settings}"));
        let found = errors(&text);
        let expected = format!("line 12: services[1].http.{expected}");
        assert!(found.len() == 1 && found[0].starts_with(&expected), "{found:#?}");
    }
    let port = "{port: 80, target: 8080, protocol: http}]\n  endpoints: [{address: 10.90.2.1}";
    assert!(VALID.contains(port));
    let text = VALID.replace(port, &port.replace("protocol: http", "protocol: tcp, http: {}"));
    assert!(errors(&text).iter().any(|line| line.contains("http: no effect on this port")));
}

#[test]
fn token_of_a_dry_run_that_no_enforced_policy_verifies_is_refused() {
    let file = |enforced: &str, watching: &str| {
        let enforced = format!("{{service: api, {enforced}}}");
        let issuers = "{login: {issuer: me, audiences: [a], jwks_uri: 'http://a/', jwks_address: '10.1.1.1:80'},              other: {issuer: you, audiences: [a], jwks_uri: 'http://b/', jwks_address: '10.1.1.2:80'}}";
        with_policy(&enforced).replace(
            "{login: {issuer: me, audiences: [a], jwks_uri: 'http://a/', jwks_address: '10.1.1.1:80'}}",
            issuers,
        ) + &format!("  - {{service: api, dry_run: true, {watching}}}
")
    };
    let login = "allow: [{from: [api], paths: [/a], token: login}]";
    for (enforced, watching) in [
        ("allow: [{from: [api]}]", login),
        ("allow: [{from: [api], token: other}]", login),
        ("allow: [{from: [api]}, {from: [api], paths: [/a/b], token: login}]", login),
        ("allow: [{from: [api], methods: [GET], token: login}, {from: [api]}]", login),
        ("allow: [{from: [api]}]", "deny: [{from: [api], token: login}]"),
    ] {
        let found = errors(&file(enforced, watching));
        assert_eq!(found.len(), 1, "{enforced}: {found:#?}");
        let kind = watching.split(':').next().unwrap();
        let expected =
            format!("line 13: security.policies[1].{kind}[0].token: port 80: no enforced");
        assert!(found[0].starts_with(&expected), "{enforced}: {found:#?}");
    }
    for (enforced, watching) in [
        ("allow: [{from: [api], token: login}]", login),
        ("allow: [{from: [api]}, {from: [api], paths: [/a], token: login}]", login),
        (
            "allow: [{from: [api]}, {from: [api], paths: [/a], token: login}]",
            "deny: [{from: [api], paths: [/a/b], token: login}]",
        ),
        ("allow: [{from: [api], paths: [/other]}]", login),
        ("allow: [{from: [api]}], deny: [{from: [api], token: login}]", login),
        ("allow: [{from: [api]}]", "allow: [{from: [api], paths: [/a]}]"),
    ] {
        let text = file(enforced, watching);
        Mesh::parse(&text, Path::new(".")).unwrap_or_else(|p| panic!("{enforced}: {p:?}"));
    }
}

#[test]
fn second_address_of_a_family_is_refused_with_its_line() {
    let ranges = VALID.replace("[10.96.0.0/16]", "[10.96.0.0/16, 'fd00::/64']");
    let with = |addresses: &str| ranges.replace("addresses: [10.96.0.1]", addresses);
    let good = with("addresses: [10.96.0.1, 'fd00::1']");
    Mesh::parse(&good, Path::new(".")).expect("one of each family");
    let found = errors(&with("addresses: [10.96.0.1, 'fd00::1', 10.96.0.7]"));
    let expected = "line 5: services[0].addresses[2]: invalid address 10.96.0.7 beside 10.96.0.1";
    assert!(found.len() == 1 && found[0].starts_with(expected), "{found:#?}");
}

#[test]
fn missing_or_invalid_field_is_reported_once() {
    let with_ids = VALID.replace(
        "from: [web]",
        "from: [web, 'spiffe://mesh.local/ns/a/*', 'spiffe://mesh.local/ns/a/sa/b']",
    );
    let missing = |line: u64, path: &str| format!("line {line}: {path}: this field is missing");
    for (from, to, expected) in [
        ("trust_domain: mesh.local\n", "", missing(1, "trust_domain")),
        (
            "trust_domain: mesh.local",
            "trust_domain: Mesh",
            "line 1: trust_domain: invalid trust domain \"Mesh\": must match [a-z0-9._-]{1,255}".into(),
        ),
        ("service_ranges: [10.96.0.0/16]\n", "", missing(1, "service_ranges")),
        (
            "service_ranges: [10.96.0.0/16]",
            "service_ranges: []",
            "line 2: service_ranges: invalid empty list: must contain the addresses of all services".into(),
        ),
        ("- name: orders\n  parentRefs", "- parentRefs", missing(15, "routes[0].name")),
        ("  parentRefs: [{name: orders}]\n", "", missing(15, "routes[0].parentRefs")),
        ("- name: web\n  addresses", "- addresses", missing(5, "services[0].name")),
    ] {
        assert!(with_ids.contains(from), "{from}");
        let found = errors(&with_ids.replace(from, to));
        // The line of a missing field is that of the map which should have it.
        let text = |line: &str| line.split_once(": ").map(|(_, text)| text.to_owned());
        assert_eq!(found.len(), 1, "{from}: {found:#?}");
        assert_eq!(text(&found[0]), text(&expected), "{from}");
    }
}

#[test]
fn numbers_out_of_range_are_reported_in_one_form() {
    for (from, to, expected) in [
        ("port: 80,", "port: 0,", "ports[0].port: invalid value 0: must be 1 to 65535"),
        ("port: 80,", "port: 70000,", "ports[0].port: invalid value 70000: must be 1 to 65535"),
        (
            "port: 80,",
            "port: x,",
            "ports[0].port: invalid value \"x\": must be a whole number, 1 to",
        ),
        ("weight: 3", "weight: -3", "weight: invalid value -3: must be 0 to 4294967295"),
        ("weight: 3", "weight: 0", "weight: invalid value 0: must be 1 to 4294967295"),
        (
            "balance: least_requests",
            "http: {limits: {request_headers: 0}}",
            "request_headers: invalid value 0: must be 1 to 1024",
        ),
    ] {
        let found = errors(&VALID.replace(from, to));
        assert!(found[0].contains(expected), "{expected}: {found:#?}");
    }
}

#[test]
fn duration_of_several_units_is_accepted() {
    let text = VALID.replace("request: 10s", "request: 1h1m30s");
    let mesh = Mesh::parse(&text, Path::new(".")).expect("a valid file");
    assert_eq!(mesh.routes[0].rules[0].timeout, Some(Duration::from_secs(3690)));
}
