//! Tests of route evaluation, and of policies for the path that arrives at each destination.

use std::path::Path;

use weft_model::SpiffeId;

use super::*;

const MESH: &str = r#"
trust_domain: mesh.test
service_ranges: [10.96.0.0/16]
services:
- {name: web, addresses: [10.96.0.1], ports: [{port: 80, protocol: http}]}
- {name: batch, meshed: false, ports: [{port: 80, protocol: http}]}
- {name: orders, addresses: [10.96.0.2], ports: [{port: 80, target: 8080, protocol: http}]}
- {name: canary, addresses: [10.96.0.3], ports: [{port: 80, target: 8080, protocol: http}, {port: 90, protocol: tcp}]}
- {name: legacy, addresses: [10.96.0.4], meshed: false, ports: [{port: 80, protocol: http}]}
routes:
- name: r
  parentRefs: [{name: orders}]
  hostnames: [other.test]
  rules:
  - matches: [{path: {value: /v1}}]
    backendRefs: [{name: canary, port: 80}]
- name: r
  parentRefs: [{name: orders}, {name: legacy}]
  rules:
  - matches: [{path: {value: /v1}}]
    filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /v2/}}}]
    backendRefs: [{name: orders, port: 80}]
  - matches: [{path: {value: /split}}]
    backendRefs: [{name: orders, port: 80, weight: 9}, {name: canary, port: 80}, {name: web, port: 80, weight: 0}]
  - matches: [{path: {value: /old}}]
    filters: [{type: RequestRedirect, requestRedirect: {hostname: new.test, statusCode: 301}}]
  - matches: [{path: {value: /out}}]
    backendRefs: [{name: legacy, port: 80}]
security:
  policies:
  - service: orders
    allow: [{from: [web], paths: [/v1, /v2, /split]}]
    deny: [{from: ["*"], paths: [/v1/admin, /v2/secret]}]
  - service: canary
    allow: [{from: [web], paths: [/none], ports: [80]}]
"#;

fn mesh() -> Mesh {
    Mesh::parse(MESH, Path::new(".")).expect("a good file")
}

/// The decision about a GET of `web`, or of another service.
fn decided<'m>(
    mesh: &'m Mesh,
    from: &str,
    to: &str,
    target: &str,
    host: &str,
) -> RouteDecision<'m> {
    let caller = SpiffeId::parse(&format!("spiffe://mesh.test/ns/default/sa/{from}"));
    let request = WhyRequest {
        caller: caller.expect("an id"),
        method: "GET",
        target,
        authority: host,
        headers: &[],
        address: None,
        token: None,
        claims: &[],
    };
    let service = &mesh.services[to];
    let port = port_of(service, 80).expect("the service has the port");
    let callee = Callee { service, port };
    decide(mesh, mesh.services.get(from), callee, &request)
}

fn judged(is_refused: bool, clause: Option<&str>) -> PolicyOutcome {
    PolicyOutcome::Evaluated(PolicyDecision {
        is_refused,
        clause: clause.map(str::to_owned),
        shadow: None,
    })
}

fn rule(path: &str) -> RuleLocation<'static> {
    RuleLocation { route: "r", path: path.to_owned() }
}

fn destination(service: &str, weight: u32, outcome: PolicyOutcome) -> Destination<'_> {
    Destination { service, port: 80, weight, rewritten: None, outcome }
}

#[test]
fn policies_of_destination_see_the_rewritten_path() {
    let mesh = mesh();
    let check = |target: &str, arrives: &str, outcome: PolicyOutcome| {
        let rewritten = Some(arrives.to_owned());
        let one = Destination { rewritten, ..destination("orders", 1, outcome) };
        let expected =
            RouteDecision::Routed { rule: rule("routes[1].rules[0]"), destinations: vec![one] };
        assert_eq!(decided(&mesh, "web", "orders", target, "orders"), expected, "{target}");
    };
    check("/v1/admin", "/v2/admin", judged(false, Some("orders.allow[0]")));
    check("/v1/admin?q=1", "/v2/admin?q=1", judged(false, Some("orders.allow[0]")));
    check("/v1/secret", "/v2/secret", judged(true, Some("orders.deny[0]")));
    check("/x/../v1/%73ecret", "/v2/secret", judged(true, Some("orders.deny[0]")));
}

#[test]
fn every_weighted_destination_is_evaluated() {
    let mesh = mesh();
    let destinations = vec![
        destination("orders", 9, judged(false, Some("orders.allow[0]"))),
        destination("canary", 1, judged(true, None)),
    ];
    let expected = RouteDecision::Routed { rule: rule("routes[1].rules[1]"), destinations };
    assert_eq!(decided(&mesh, "web", "orders", "/split", "orders:80"), expected);
}

#[test]
fn redirect_reaches_no_destination() {
    let mesh = mesh();
    let decision = decided(&mesh, "web", "orders", "/old/x", "orders");
    let RouteDecision::Redirected { rule: place, redirect } = decision else {
        panic!("{decision:?}");
    };
    assert_eq!(place, rule("routes[1].rules[2]"));
    assert_eq!((redirect.status, redirect.host.as_deref()), (301, Some("new.test")));
}

#[test]
fn host_name_selects_the_route() {
    let mesh = mesh();
    let destinations = vec![destination("canary", 1, judged(true, None))];
    let expected = RouteDecision::Routed { rule: rule("routes[0].rules[0]"), destinations };
    assert_eq!(decided(&mesh, "web", "orders", "/v1/x", "Other.test:80"), expected);
}

#[test]
fn request_without_a_matching_rule_goes_to_the_called_service() {
    let mesh = mesh();
    let direct = |has_routes, outcome| RouteDecision::Direct { has_routes, outcome };
    let decision = decided(&mesh, "web", "orders", "/v2/secret", "orders");
    assert_eq!(decision, direct(true, judged(true, Some("orders.deny[0]"))));
    let decision = decided(&mesh, "web", "canary", "/none", "canary");
    assert_eq!(decision, direct(false, judged(false, Some("canary.allow[0]"))));
}

#[test]
fn routes_of_unmeshed_service_apply_only_to_callers_with_a_sidecar() {
    let mesh = mesh();
    let outside = || {
        let reason = "service \"legacy\" is outside the mesh; no policy is enforced";
        PolicyOutcome::NotEnforced(reason.into())
    };
    let expected = RouteDecision::Direct { has_routes: false, outcome: outside() };
    assert_eq!(decided(&mesh, "batch", "legacy", "/v1/admin", "legacy"), expected);
    let rewritten = Some("/v2/secret".to_owned());
    let outcome = judged(true, Some("orders.deny[0]"));
    let one = Destination { rewritten, ..destination("orders", 1, outcome) };
    let expected =
        RouteDecision::Routed { rule: rule("routes[1].rules[0]"), destinations: vec![one] };
    assert_eq!(decided(&mesh, "web", "legacy", "/v1/secret", "legacy"), expected);
    let destinations = vec![destination("legacy", 1, outside())];
    let expected = RouteDecision::Routed { rule: rule("routes[1].rules[3]"), destinations };
    assert_eq!(decided(&mesh, "web", "orders", "/out", "orders"), expected);
}
