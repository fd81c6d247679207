//! The resources of a mesh: references are complete, and each client receives its own set.

use weft_model::{Balance, SpiffeId};
use weft_xds::client::XdsNode;
use weft_xds::server::{ResourceProvider, ResourceSet};

use std::net::Ipv4Addr;
use std::sync::Arc;

use weft_xds::translate::ResourceKind;

use super::trust::TRUST;
use super::*;

fn mesh() -> Mesh {
    let text = r#"
trust_domain: mesh.local
service_ranges: [10.96.0.0/16]
services:
- {name: web, addresses: [10.96.0.1], ports: [{port: 80, target: 8080, protocol: http}], endpoints: [{address: 10.90.1.1}]}
- {name: orders, addresses: [10.96.0.2], ports: [{port: 80, target: 8080, protocol: http}, {port: 53, protocol: udp}], endpoints: [{address: 10.90.2.1}]}
routes:
- {name: r, parentRefs: [{name: orders}], rules: [{matches: [{path: {value: /web}}], backendRefs: [{name: web, port: 80}]}]}
security:
  policies:
  - {service: orders, allow: [{from: [web], paths: [/orders]}]}
"#;
    Mesh::parse(text, std::path::Path::new(".")).unwrap_or_else(|p| panic!("{p:?}"))
}

fn views_after(mesh: &Mesh, earlier: &Views) -> Views {
    let trust = Trust { roots: "ROOTS".into(), revocations: "LISTS".into() };
    Views::new(Arc::new(mesh.clone()), &trust, 7, earlier).expect("closed views")
}

fn views() -> Views {
    views_after(&mesh(), &Views::default())
}

/// The sets of the agent and of some sidecars.
fn all_sets(views: &Views) -> Vec<Option<Arc<ResourceSet>>> {
    let ids =
        ["ns/weft/sa/agent", "ns/default/sa/web", "ns/default/sa/orders", "ns/default/sa/new"];
    let set = |id: &str| {
        let peer = SpiffeId::parse(&format!("spiffe://mesh.local/{id}")).expect("an id");
        views.resources(&XdsNode::default(), Some(&peer)).ok()
    };
    ids.into_iter().map(set).collect()
}

#[test]
fn client_receives_the_set_of_its_certificate_only() {
    let views = views();
    let set_of = |id: &str| {
        let peer = SpiffeId::parse(id).expect("an id");
        views.resources(&XdsNode::default(), Some(&peer))
    };
    let web = set_of("spiffe://mesh.local/ns/default/sa/web").expect("a view");
    let orders = set_of("spiffe://mesh.local/ns/default/sa/orders").expect("a view");
    let agent = set_of("spiffe://mesh.local/ns/weft/sa/agent").expect("a view");
    assert_ne!(web, orders);
    assert!(
        agent.get(ResourceKind::Secret, TRUST).is_none()
            && web.get(ResourceKind::Secret, TRUST).is_some()
    );
    assert!(agent.get(ResourceKind::Listener, "orders|53/udp 10.96.0.2").is_some());
    assert!(set_of("spiffe://mesh.local/ns/other/sa/web").is_err());
    assert!(set_of("spiffe://other/ns/default/sa/web").is_err());
    assert!(set_of("spiffe://mesh.local/ns/default/sa/unknown").is_err());
    assert!(views.resources(&XdsNode::default(), None).is_err());
}

#[test]
fn equal_meshes_have_equal_versions() {
    assert_eq!(all_sets(&views()), all_sets(&views()));
}

/// One change of a mesh.
fn change(mesh: &mut Mesh, step: usize) {
    let web = mesh.services.get("web").cloned();
    let orders = mesh.services.get_mut("orders").expect("present");
    match step % 9 {
        0 => orders.endpoints.push((Ipv4Addr::new(10, 90, 2, 9).into(), 1)),
        1 => orders.balance = Balance::LeastRequests,
        2 => mesh.routes.clear(),
        3 => mesh.policies.clear(),
        4 => {
            let web = web.expect("present");
            let addresses = vec![Ipv4Addr::new(10, 96, 0, 3).into()];
            let new = Service { name: "new".into(), addresses, ..web };
            mesh.services.insert("new".into(), new);
        }
        5 => drop(mesh.services.remove("web")),
        6 => orders.meshed = !orders.meshed,
        7 => mesh.outbound = crate::mesh::OutboundPolicy::Open,
        _ => *mesh = self::mesh(),
    }
}

#[test]
fn views_after_a_change_equal_views_built_from_nothing() {
    let mut mesh = mesh();
    let mut views = views();
    for step in 0..27 {
        // Not every set is requested between two changes.
        if step % 2 == 0 {
            drop(all_sets(&views));
        }
        change(&mut mesh, step);
        views = views_after(&mesh, &views);
        let fresh = views_after(&mesh, &Views::default());
        assert_eq!(all_sets(&views), all_sets(&fresh), "after step {step}");
    }
}

#[test]
fn inbound_listener_is_not_encoded_again_after_changes_of_another_service() {
    let mut mesh = mesh();
    let mut views = views();
    let inbound = |views: &Views| {
        let web = all_sets(views).into_iter().flatten().nth(1).expect("the set of web");
        web.get(ResourceKind::Listener, "inbound").expect("an inbound listener").bytes.clone()
    };
    let before = inbound(&views);
    for last in [8, 9] {
        let orders = mesh.services.get_mut("orders").expect("present");
        orders.endpoints.push((Ipv4Addr::new(10, 90, 2, last).into(), 1));
        views = views_after(&mesh, &views);
    }
    assert!(Arc::ptr_eq(&before, &inbound(&views)));
}

/// Debug builds decode each encoded resource, so this test also runs those checks.
#[test]
fn resources_of_each_protocol_are_decodable() {
    let text = r#"
trust_domain: mesh.local
service_ranges: [10.96.0.0/16, 'fd00::/64']
outbound: open
services:
- {name: all, addresses: [10.96.0.1, 'fd00::1'], endpoints: [{address: 10.90.1.1, weight: 3}], ports: [
    {port: 80, target: 8080, protocol: http}, {port: 81, target: 8081, protocol: http2},
    {port: 82, target: 8082, protocol: grpc}, {port: 83, target: 8083, protocol: tcp},
    {port: 84, target: 8084, protocol: udp}]}
- {name: plain, meshed: false, addresses: [10.96.0.2], ports: [
    {port: 80, target: 8080, protocol: http}, {port: 81, target: 8081, protocol: http2},
    {port: 83, target: 8083, protocol: tcp}]}
"#;
    let mesh = Mesh::parse(text, std::path::Path::new(".")).unwrap_or_else(|p| panic!("{p:?}"));
    let views = views_after(&mesh, &Views::default());
    let peer = SpiffeId::parse("spiffe://mesh.local/ns/default/sa/all").expect("an id");
    let set = views.resources(&XdsNode::default(), Some(&peer)).expect("a set");
    for kind in ResourceKind::ALL {
        for (name, published) in set.of(kind) {
            let accepted = weft_xds::translate::decode(kind, &published.bytes);
            assert_eq!(accepted.map(|a| a.resource.name().clone()), Ok(name.clone()));
        }
    }
}

const PORT: u16 = 80;

/// The filters of `api` in a mesh with this policy.
fn checks_of(policy: &str) -> Vec<HttpFilter> {
    let text = format!(
        r#"
trust_domain: mesh.local
service_ranges: [10.96.0.0/16]
services:
- {{name: api, addresses: [10.96.0.1], ports: [{{port: {PORT}, target: 8080, protocol: http}}]}}
security:
  issuers:
    login: {{issuer: me, audiences: [a], jwks_uri: 'http://a/', jwks_address: '10.1.1.1:80'}}
    other: {{issuer: you, audiences: [a], jwks_uri: 'http://b/', jwks_address: '10.1.1.2:80'}}
  policies: [{{service: api, {policy}}}]
"#
    );
    let mesh = Mesh::parse(&text, std::path::Path::new(".")).unwrap_or_else(|p| panic!("{p:?}"));
    let service = &mesh.services["api"];
    checks(&mesh, service, &service.ports[0])
}

/// The token rules: path and requirement.
fn token_rules(policy: &str) -> Vec<(weft_model::PathMatch, Option<weft_model::JwtRequirement>)> {
    checks_of(policy)
        .into_iter()
        .filter_map(|check| match check {
            HttpFilter::Jwt(policy) => Some(policy.rules.clone()),
            HttpFilter::Rbac(_) => None,
        })
        .flatten()
        .map(|rule| (rule.matches.path, rule.requires))
        .collect()
}

#[test]
fn token_of_a_deny_clause_is_verified_and_optional() {
    use weft_model::JwtRequirement::{Any, Missing, Provider};
    use weft_model::PathMatch::{Prefix, Segments};
    let login = || Provider("login".into(), Vec::new());
    let other = || Provider("other".into(), Vec::new());
    let any = |path: &str| Segments(path.into());
    let guest = "deny: [{from: ['*'], paths: [/a/b], token: login, claims: {role: [guest]}}]";
    assert_eq!(
        token_rules(&format!("allow: [{{from: [api], paths: [/a, /c]}}], {guest}")),
        [(any("/a"), Some(Any(vec![login(), Missing]))), (any("/c"), None)]
    );
    // An allow clause with a token requires it; two such clauses accept either token.
    assert_eq!(
        token_rules(
            "allow: [{from: [api], paths: [/a], token: login}, {from: [api]}, {from: ['*'], paths: [/a], token: other}]"
        ),
        [(any("/a"), Some(Any(vec![login(), other()]))), (Prefix("/".into()), None)]
    );
    assert_eq!(token_rules("allow: [{from: [api]}]"), []);
}

#[test]
fn responses_have_no_timeout_unless_a_route_sets_one() {
    let text = r#"
trust_domain: mesh.local
service_ranges: [10.96.0.0/16]
services:
- {name: api, addresses: [10.96.0.1], ports: [{port: 80, target: 8080, protocol: http}, {port: 81, protocol: http2}]}
routes:
- name: slow
  parentRefs: [{name: api, port: 81}]
  rules: [{backendRefs: [{name: api, port: 81}], timeouts: {request: 3s}}]
"#;
    let mesh = Mesh::parse(text, std::path::Path::new(".")).expect("a valid file");
    let snapshot = sidecar::outbound_configuration(&mesh);
    let timeouts = |table: &str| -> Vec<Option<std::time::Duration>> {
        let routes = snapshot.routes[table].hosts.iter().flat_map(|host| &host.routes);
        let timeout = |route: &weft_model::Route| match &route.action {
            weft_model::RouteAction::Forward { timeout, .. } => *timeout,
            weft_model::RouteAction::Redirect(_) | weft_model::RouteAction::Respond { .. } => None,
        };
        routes.map(timeout).collect()
    };
    assert_eq!(timeouts("api|80"), [None]);
    assert_eq!(timeouts("api|81"), [Some(std::time::Duration::from_secs(3)), None]);
}

#[test]
fn agents_receive_no_http_listeners() {
    let text = r#"
trust_domain: mesh.local
service_ranges: [10.96.0.0/16]
services:
- {name: web, addresses: [10.96.0.1], endpoints: [{address: 10.90.1.1}], ports: [
    {port: 80, target: 8080, protocol: http}, {port: 81, target: 8081, protocol: http2},
    {port: 82, target: 8082, protocol: grpc}, {port: 83, target: 8083, protocol: tcp}]}
"#;
    let mesh = Mesh::parse(text, std::path::Path::new(".")).unwrap_or_else(|p| panic!("{p:?}"));
    let snapshot = agent::all_services(&mesh);
    let chains = snapshot.listeners.values().flat_map(|listener| listener.all_chains());
    let chains: Vec<_> = chains.collect();
    assert!(chains.len() >= 4);
    assert!(chains.iter().all(|chain| matches!(chain.filter, weft_model::Filter::Tcp(_))));
}

#[test]
fn meshed_peers_use_tls_1_3_only_and_key_servers_may_use_tls_1_2() {
    let text = r#"
trust_domain: mesh.local
service_ranges: [10.96.0.0/16]
services:
- {name: web, addresses: [10.96.0.1], endpoints: [{address: 10.90.1.1}], ports: [
    {port: 80, target: 8080, protocol: http}, {port: 83, target: 8083, protocol: tcp}]}
security:
  issuers: {idp: {issuer: "https://idp.test", audiences: [web], jwks_uri: "https://idp.test/keys"}}
  policies: [{service: web, allow: [{from: ["*"], ports: [80], token: idp}]}]
"#;
    let mesh = Mesh::parse(text, std::path::Path::new(".")).unwrap_or_else(|p| panic!("{p:?}"));
    let snapshots = [sidecar::inbound_configuration(&mesh), sidecar::outbound_configuration(&mesh)];
    let chains = snapshots.iter().flat_map(|snapshot| snapshot.listeners.values());
    let inbound: Vec<_> = chains
        .flat_map(|listener| listener.all_chains())
        .filter_map(|chain| chain.tls.as_ref())
        .map(|tls| &tls.parameters)
        .collect();
    let clusters = snapshots.iter().flat_map(|snapshot| snapshot.clusters.values());
    let (outbound, outside): (Vec<_>, Vec<_>) =
        clusters.filter_map(|cluster| cluster.tls.as_ref()).partition(|tls| tls.identity.is_some());
    let meshed = weft_model::TlsParameters::meshed(mesh.groups);
    assert!(!inbound.is_empty() && !outbound.is_empty() && !outside.is_empty());
    assert!(inbound.into_iter().all(|parameters| *parameters == meshed));
    assert!(outbound.into_iter().all(|tls| tls.parameters == meshed));
    let open = weft_model::TlsParameters::default();
    assert!(outside.into_iter().all(|tls| tls.parameters == open));
}

#[test]
fn prefix_rewrites_in_generated_routes_are_the_same_for_envoy() {
    use weft_model::{PathMatch, PathRewrite, RouteAction};
    let rewritten = |path: &str, replacement: &str, target: &str| {
        let text = format!(
            r#"
trust_domain: mesh.local
service_ranges: [10.96.0.0/16]
services: [{{name: api, addresses: [10.96.0.1], ports: [{{port: 80, target: 8080, protocol: http}}]}}]
routes:
- name: r
  parentRefs: [{{name: api}}]
  rules:
  - matches: [{{path: {{value: {path}}}}}]
    filters: [{{type: URLRewrite, urlRewrite: {{path: {{type: ReplacePrefixMatch, replacePrefixMatch: '{replacement}'}}}}}}]
    backendRefs: [{{name: api, port: 80}}]
"#
        );
        let mesh =
            Mesh::parse(&text, std::path::Path::new(".")).unwrap_or_else(|p| panic!("{p:?}"));
        let views = views_after(&mesh, &Views::default());
        let peer = SpiffeId::parse("spiffe://mesh.local/ns/default/sa/api").expect("an id");
        let set = views.resources(&XdsNode::default(), Some(&peer)).expect("a set");
        let encoded = set.get(ResourceKind::Routes, "api|80").expect("a route table");
        let decoded =
            weft_xds::translate::decode(ResourceKind::Routes, &encoded.bytes).expect("decoded");
        let weft_xds::translate::Resource::Routes(table) = decoded.resource else {
            panic!("another kind")
        };
        let route = &table.hosts[0].routes[0];
        let RouteAction::Forward { path_rewrite, .. } = &route.action else { panic!("no cluster") };
        // As Envoy: it concatenates the strings.
        match (path_rewrite, &route.matches.path) {
            (None, _) => target.to_owned(),
            (
                Some(PathRewrite::Prefix(prefix)),
                PathMatch::Segments(matched) | PathMatch::Prefix(matched),
            ) => {
                format!("{prefix}{}", target.strip_prefix(matched.as_str()).expect("matched"))
            }
            (Some(PathRewrite::Regex(substitution)), _) => substitution.apply(target),
            other => panic!("{other:?}"),
        }
    };
    for (path, replacement, target, expected) in [
        ("/v1", "/v2", "/v1/admin", "/v2/admin"),
        ("/v1", "/v2/", "/v1/admin", "/v2/admin"),
        ("/v1/", "/v2/", "/v1/admin", "/v2/admin"),
        ("/v1", "", "/v1/admin", "/admin"),
        ("/v1", "/", "/v1/admin", "/admin"),
        ("/v1", "/", "/v1", "/"),
        ("/", "/v2", "/admin", "/v2/admin"),
        ("/", "/v2/", "/admin", "/v2/admin"),
        ("/", "/", "/admin", "/admin"),
    ] {
        assert_eq!(rewritten(path, replacement, target), expected, "{path} to {replacement}");
    }
}
