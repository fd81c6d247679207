//! RBAC rules, compared with Envoy. Each rule has a policy that also requires the rule's own host, so that one filter
//! has many rules: with ALLOW a request passes if its rule matches, with DENY if it does not.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde_json::{Map, Value, json};
use weft_integration::bootstrap::{any, with};
use weft_integration::port;

use crate::comparison::{Case, compare, direct, host, listener, manager};
use crate::random::Random;
use crate::routes::{TARGETS, header_match, request, string_match};

const RBAC: &str = "envoy.extensions.filters.http.rbac.v3.RBAC";

const PATH_VALUES: &[&str] = &["", "/", "/a", "/A", "a", "/ab", "/a/b", "b", "/a?q=1", "q=1"];

fn url_path(random: &mut Random) -> Value {
    json!({"url_path": {"path": string_match(random, PATH_VALUES)}})
}

const RANGES: &[(&str, u32)] = &[
    ("127.0.0.1", 32),
    ("127.0.0.2", 32),
    ("127.0.0.0", 8),
    ("127.0.0.3", 31),
    ("127.0.0.9", 30),
    ("127.0.1.0", 24),
    ("10.0.0.0", 8),
    ("0.0.0.0", 0),
    ("128.0.0.0", 1),
    ("1.1.1.1", 32),
    ("::1", 128),
    ("::", 0),
    ("::ffff:127.0.0.1", 128),
    ("fd00::", 8),
];

fn range(random: &mut Random) -> Value {
    let (address, bits) = random.of(RANGES);
    // A missing `prefix_len` means 0.
    match random.one_in(12) {
        true => json!({"address_prefix": address}),
        false => json!({"address_prefix": address, "prefix_len": bits}),
    }
}

fn permission(random: &mut Random, ports: &[u16], depth: usize) -> Value {
    let nested = |random: &mut Random| -> Vec<Value> {
        (0..=random.below(3)).map(|_| permission(random, ports, depth - 1)).collect()
    };
    match random.below(if depth == 0 { 7 } else { 10 }) {
        0 => json!({"any": true}),
        1 | 2 => json!({"header": header_match(random)}),
        3 => url_path(random),
        4 => json!({"destination_ip": range(random)}),
        5 => {
            let port = i64::from(*random.of(ports));
            let start = port + *random.of(&[-1, 0, 1]);
            let end = start + *random.of(&[1, 2]);
            json!({"destination_port_range": {"start": start, "end": end}})
        }
        6 => json!({"destination_port": random.of(ports)}),
        7 => json!({"not_rule": permission(random, ports, depth - 1)}),
        8 => json!({"and_rules": {"rules": nested(random)}}),
        _ => json!({"or_rules": {"rules": nested(random)}}),
    }
}

fn principal(random: &mut Random, depth: usize) -> Value {
    let nested = |random: &mut Random| -> Vec<Value> {
        (0..=random.below(3)).map(|_| principal(random, depth - 1)).collect()
    };
    match random.below(if depth == 0 { 7 } else { 10 }) {
        0 => json!({"any": true}),
        1 => json!({"header": header_match(random)}),
        2 => url_path(random),
        3 => json!({"direct_remote_ip": range(random)}),
        4 => json!({"remote_ip": range(random)}),
        5 => json!({"source_ip": range(random)}),
        // Without TLS no client has an authenticated name.
        6 => json!({"authenticated": {"principal_name": {"exact": "spiffe://a/b"}}}),
        7 => json!({"not_id": principal(random, depth - 1)}),
        8 => json!({"and_ids": {"ids": nested(random)}}),
        _ => json!({"or_ids": {"ids": nested(random)}}),
    }
}

/// A policy that also requires the host of its number.
fn policy(random: &mut Random, ports: &[u16], number: usize) -> Value {
    let own = json!({"header": {"name": ":authority", "string_match": {"exact": host(number)}}});
    let with_own_host = |rule: Value| json!({"and_rules": {"rules": [own, rule]}});
    let permissions: Vec<Value> =
        (0..=random.below(4) / 3).map(|_| with_own_host(permission(random, ports, 2))).collect();
    let count = if random.one_in(2) { 0 } else { 1 + random.below(2) };
    let mut principals: Vec<Value> = (0..count).map(|_| principal(random, 2)).collect();
    if principals.is_empty() {
        principals.push(json!({"any": true}));
    }
    json!({"permissions": permissions, "principals": principals})
}

fn listeners(policies: &[Value], ports: &[u16]) -> Vec<Value> {
    let table = json!({"name": "all", "virtual_hosts": [{"name": "all", "domains": ["*"],
        "routes": [direct(&json!({"prefix": "/"}), "allowed")]}]});
    let named: Map<String, Value> = policies
        .iter()
        .enumerate()
        .map(|(number, policy)| (format!("p{number}"), policy.clone()))
        .collect();
    let any_address: IpAddr = Ipv4Addr::UNSPECIFIED.into();
    ports
        .iter()
        .zip(["ALLOW", "DENY", "LOG"])
        .map(|(port, action)| {
            let rbac = any(RBAC, json!({"rules": {"action": action, "policies": named}}));
            let filter = json!({"name": "rbac", "typed_config": rbac});
            let manager = manager(&table, &[filter], &json!({}));
            with(listener((any_address, *port).into(), manager), "name", json!(action))
        })
        .collect()
}

#[test]
fn rbac_rules_match_as_in_envoy() {
    let mut random = Random::new(8);
    let ports = [port::free(), port::free(), port::free()];
    let policies: Vec<Value> = (0..250).map(|number| policy(&mut random, &ports, number)).collect();
    let listeners = listeners(&policies, &ports);
    let address = |last: u8| IpAddr::from([127, 0, 0, last]);
    let address_pairs: Vec<(IpAddr, SocketAddr)> =
        [(0, 1, 1), (0, 2, 1), (1, 1, 1), (1, 3, 2), (0, 9, 3), (2, 1, 1)]
            .map(|(port, from, to)| (address(from), (address(to), ports[port]).into()))
            .to_vec();
    // Grouped by addresses, so that connections are reused.
    let mut cases = Vec::new();
    for (from, to) in &address_pairs {
        let is_log_action = to.port() == ports[2];
        for (number, policy) in policies.iter().enumerate() {
            for _ in 0..if is_log_action { 1 } else { 3 } {
                let target = *random.of(TARGETS);
                let request = request(&mut random, target, &host(number));
                let matcher = policy.to_string();
                cases.push(Case { matcher, request, from: *from, to: *to });
            }
        }
    }
    compare(&listeners, ports[0], &cases, 4000);
}
