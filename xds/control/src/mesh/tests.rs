//! Every mistake is found at once, and told with its line.

use super::*;

const GOOD: &str = r#"trust_domain: mesh.local
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

fn mistakes(text: &str) -> Vec<String> {
    let problems = Mesh::parse(text, std::path::Path::new(".")).expect_err("mistakes");
    problems.iter().map(ToString::to_string).collect()
}

#[test]
fn a_good_file_is_taken() {
    let mesh = Mesh::parse(GOOD, std::path::Path::new(".")).expect("a good file");
    assert_eq!(mesh.services["orders"].endpoints[1].1, 3);
    let web = StringMatch::Exact("spiffe://mesh.local/ns/default/sa/web".into());
    assert_eq!(mesh.policies[0].allow[0].from, [web]);
    assert_eq!(mesh.routes[0].rules[0].timeout, Some(Duration::from_secs(10)));
}

#[test]
fn every_mistake_is_told_with_its_line() {
    let text = GOOD
        .replace("addresses: [10.96.0.2]", "addresses: [10.96.0.1]")
        .replace("request: 10s", "request: soon")
        .replace("from: [web]", "from: [wbe]")
        .replace("0a0b", "0a0");
    let found = mistakes(&text);
    for expected in [
        "line 9: services[1].addresses[0]: 10.96.0.1 is the address of \"web\" already",
        "line 19: routes[0].rules[0].timeouts.request: \"soon\" is no duration",
        "line 23: security.policies[0].allow[0].from[0]: there is no service \"wbe\"",
        "line 24: security.revocations[0]: \"0a0\" is no serial number",
    ] {
        assert!(found.iter().any(|line| line.starts_with(expected)), "{expected} in {found:#?}");
    }
    assert_eq!(found.len(), 4, "{found:#?}");
}

#[test]
fn an_endpoint_has_an_address_of_its_own() {
    let wanted =
        GOOD.replacen("endpoints: [{address: ", "endpoints: [{address: 10.96.7.7}, {address: ", 1);
    let found = mistakes(&wanted);
    assert_eq!(found.len(), 1, "{found:#?}");
    let expected = "endpoints[0].address: 10.96.7.7 lies in 10.96.0.0/16 of service_ranges";
    assert!(found[0].contains(expected), "{found:?}");
}

#[test]
fn affinity_is_for_ports_that_no_sidecar_balances() {
    let wanted = GOOD.replace("balance: least_requests", "affinity: client_address");
    let found = mistakes(&wanted);
    assert_eq!(found.len(), 1, "{found:#?}");
    let expected = "line 12: services[1].affinity: client_address is for tcp and udp";
    assert!(found[0].starts_with(expected), "{found:?}");
    let mesh = Mesh::parse(&wanted.replace("http", "tcp"), std::path::Path::new("."));
    let mesh = mesh.expect("a good file");
    assert_eq!(mesh.services["orders"].flow_key, FlowKey::SourceAddress);
    assert_eq!(mesh.services["web"].flow_key, FlowKey::FiveTuple);
    let sequence = wanted.replace("http", "tcp").replace("client_address", "tcp_sequence");
    let mesh = Mesh::parse(&sequence, std::path::Path::new(".")).expect("a good file");
    assert_eq!(mesh.services["orders"].flow_key, FlowKey::WithSequence);
    let found = mistakes(&sequence.replace("protocol: tcp", "protocol: udp"));
    let expected = "services[1].affinity: tcp_sequence is for tcp, and no port of the service is";
    assert!(found.iter().any(|mistake| mistake.contains(expected)), "{found:?}");
}

#[test]
fn an_unknown_field_is_refused_with_its_line() {
    let found = mistakes(&GOOD.replace("balance:", "balanse:"));
    assert!(found[0].contains("balanse") && found[0].contains("12"), "{found:?}");
}

#[test]
fn idle_settings_are_for_ports_that_no_sidecar_serves() {
    let http = "{port: 80, target: 8080, protocol: http}]\n  endpoints: [{address: 10.90.2.1}";
    let with =
        |port: &str| GOOD.replace(http, &format!("{port}]\n  endpoints: [{{address: 10.90.2.1}}"));
    let taken = with("{port: 80, protocol: tcp, idle_timeout: 10m, idle_end: close}");
    let mesh = Mesh::parse(&taken, std::path::Path::new(".")).expect("a good file");
    let port = &mesh.services["orders"].ports[0];
    assert_eq!(port.idle_timeout, Some(Duration::from_secs(600)));
    assert_eq!(port.idle_end, Some(IdleEnd::Close));
    for (port, expected) in [
        ("{port: 80, protocol: http, idle_timeout: 10m}", "idle_timeout: it is for tcp and udp"),
        (
            "{port: 80, protocol: tcp, idle_timeout: 0s}",
            "idle_timeout: \"0s\" is no duration above",
        ),
        ("{port: 80, protocol: tcp, idle_timeout: soon}", "idle_timeout: \"soon\" is no duration"),
        ("{port: 80, protocol: udp, idle_end: reset}", "idle_end: it is for tcp"),
        (
            "{port: 80, protocol: tcp, idle_end: fin}",
            "idle_end: \"fin\" is neither reset nor close",
        ),
    ] {
        let found = mistakes(&with(port));
        let expected = format!("line 10: services[1].ports[0].{expected}");
        assert!(found.iter().any(|line| line.starts_with(&expected)), "{expected}: {found:#?}");
        assert_eq!(found.len(), 1, "{found:#?}");
    }
}

#[test]
fn what_a_clause_cannot_mean_is_a_mistake() {
    let with = |clause: &str| {
        GOOD.replace("{from: [web], methods: [GET], paths: [/v1]}", clause)
            .replace("security:\n", "security:\n  issuers: {login: {issuer: me, audiences: [a], jwks_uri: 'http://a/', jwks_address: '10.1.1.1:80'}}\n")
    };
    for good in [
        "{from: ['spiffe://mesh.local/*'], from_addresses: [10.0.0.0/8, '::1'], ports: [80]}",
        "{from: ['spiffe://mesh.local/ns/a/*'], token: login, claims: {role: [admin, root]}}",
    ] {
        Mesh::parse(&with(good), std::path::Path::new(".")).expect(good);
    }
    for (clause, expected) in [
        ("{from: ['spiffe://mesh.local/ns/a*']}", "from[0]: \"spiffe://mesh.local/ns/a*\""),
        ("{from: ['spiffe:///*']}", "from[0]: \"spiffe://\""),
        ("{from: [web], from_addresses: [10.0.0.0/33]}", "from_addresses[0]: \"10.0.0.0/33\""),
        ("{from: [web], ports: [81]}", "ports[0]: the service has no port 81"),
        ("{from: [web], claims: {role: [admin]}}", "claims: whose? Name the issuer by token"),
        ("{from: [web], token: login, claims: {role: []}}", "claims[\"role\"]: there must be"),
        ("{from: []}", "from: it is empty"),
    ] {
        let found = mistakes(&with(clause));
        let expected = format!("line 24: security.policies[0].allow[0].{expected}");
        assert_eq!(found.len(), 1, "{clause}: {found:#?}");
        assert!(found[0].starts_with(&expected), "{expected}: {found:#?}");
    }
    let found =
        mistakes(&GOOD.replace("    allow: [{from: [web], methods: [GET], paths: [/v1]}]\n", ""));
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].contains("policies[0]: it neither allows nor denies anything"), "{found:?}");
}
