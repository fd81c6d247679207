//! What a mesh becomes: closed, and different for each client.

use super::*;

fn views() -> Views {
    let text = r#"
trust_domain: mesh.local
service_ranges: [10.96.0.0/16]
services:
- {name: web, addresses: [10.96.0.1], ports: [{port: 80, target: 8080, protocol: http}], endpoints: [{address: 10.90.1.1}]}
- {name: orders, addresses: [10.96.0.2], ports: [{port: 80, target: 8080, protocol: http}, {port: 53, protocol: udp}], endpoints: [{address: 10.90.2.1}]}
security:
  policies:
  - {service: orders, allow: [{from: [web], paths: [/orders]}]}
"#;
    let mesh = Mesh::parse(text, std::path::Path::new(".")).unwrap_or_else(|p| panic!("{p:?}"));
    Views::new(&mesh, &Trust { roots: "ROOTS".into(), revocations: "LISTS".into() }, 7)
        .expect("closed views")
}

#[test]
fn a_client_sees_what_its_certificate_says_and_nothing_else() {
    let views = views();
    let see = |id: &str| {
        let peer = SpiffeId::parse(id).expect("an id");
        views.resources(&Node::default(), Some(&peer))
    };
    let web = see("spiffe://mesh.local/ns/default/sa/web").expect("a view");
    let orders = see("spiffe://mesh.local/ns/default/sa/orders").expect("a view");
    let agent = see("spiffe://mesh.local/ns/weft/sa/agent").expect("a view");
    assert_ne!(web, orders);
    assert!(agent.get(Kind::Secret, TRUST).is_none() && web.get(Kind::Secret, TRUST).is_some());
    assert!(agent.get(Kind::Listener, "orders|53/udp 10.96.0.2").is_some());
    assert!(see("spiffe://mesh.local/ns/other/sa/web").is_err());
    assert!(see("spiffe://other/ns/default/sa/web").is_err());
    assert!(see("spiffe://mesh.local/ns/default/sa/nobody").is_err());
    assert!(views.resources(&Node::default(), None).is_err());
}

#[test]
fn the_same_mesh_gives_the_same_versions() {
    let (a, b) = (views(), views());
    assert_eq!(a.agent, b.agent);
    assert_eq!(a.sidecars, b.sidecars);
}
