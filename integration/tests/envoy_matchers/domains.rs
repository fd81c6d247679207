//! Virtual hosts by their domains, compared with Envoy.

use std::net::Ipv4Addr;

use serde_json::{Value, json};
use weft_integration::bootstrap::with;
use weft_integration::port;

use crate::comparison::{Case, compare, direct, listener, manager};
use crate::random::Random;

const DOMAINS: &[&str] = &[
    "*",
    "a.example",
    "A.example",
    "a.example:80",
    "a.example:8080",
    "*.example",
    "*.a.example",
    "*a.example",
    "*-v1.example",
    "*.example:80",
    "*:8080",
    "a.*",
    "a.b.*",
    "a*",
    "a.example:*",
    "b.a.example",
    "localhost",
    "[::1]",
    "[::1]:80",
    "[::1]:*",
    "*:1]",
    "10.0.0.1",
    "10.0.0.*",
    "*.0.1",
    "example",
    "*xample",
];

const HOSTS: &[&str] = &[
    "a.example",
    "A.Example",
    "a.example:80",
    "a.example:8080",
    "A.EXAMPLE:8080",
    "a.example:443",
    "b.example",
    "b.example:80",
    "b.a.example",
    "b.a.example:80",
    "x-v1.example",
    "x-v1.example:80",
    "-v1.example",
    "a.b",
    "a.b.c",
    "a.b.c:8080",
    "a",
    "ab",
    "localhost",
    "localhost:80",
    "[::1]",
    "[::1]:80",
    "[::1]:443",
    "10.0.0.1",
    "10.0.0.1:80",
    "example",
    "example:80",
    "example.",
    "a.example.",
    "other.test",
    "other.test:8080",
];

/// A table of virtual hosts with distinct domains.
fn table(random: &mut Random) -> Value {
    let mut hosts = Vec::new();
    let mut used: Vec<String> = Vec::new();
    for number in 0..=random.below(7) {
        let mut domains = Vec::new();
        for _ in 0..=random.below(2) {
            let domain = *random.of(DOMAINS);
            let lower = domain.to_ascii_lowercase();
            if !used.contains(&lower) {
                used.push(lower);
                domains.push(domain);
            }
        }
        if domains.is_empty() {
            continue;
        }
        let name = format!("host {number}");
        let routes = [direct(&json!({"prefix": "/"}), &name)];
        hosts.push(json!({"name": name, "domains": domains, "routes": routes}));
    }
    let table = json!({"name": "all", "virtual_hosts": hosts});
    match random.below(3) {
        0 => with(table, "ignore_port_in_host_matching", json!(true)),
        _ => table,
    }
}

#[test]
fn virtual_hosts_are_matched_as_by_envoy() {
    let mut random = Random::new(7);
    let mut listeners = Vec::new();
    let mut cases = Vec::new();
    let mut first = 0;
    for number in 0..80 {
        let port = port::free();
        first = if number == 0 { port } else { first };
        let table = table(&mut random);
        let fields = match random.below(6) {
            0 => json!({"strip_any_host_port": true}),
            _ => json!({}),
        };
        listeners.push(listener((Ipv4Addr::LOCALHOST, port).into(), manager(&table, &[], &fields)));
        let hosts: Vec<(&Value, &Value)> = table["virtual_hosts"]
            .as_array()
            .expect("virtual hosts are a list")
            .iter()
            .map(|host| (&host["name"], &host["domains"]))
            .collect();
        let matcher = json!({"hosts": hosts, "ignores": table["ignore_port_in_host_matching"], "http": fields});
        for host in HOSTS {
            let request = format!("GET / HTTP/1.1\r\nhost: {host}\r\n\r\n");
            cases.push(Case::new(&matcher, port, request.into_bytes()));
        }
    }
    compare(&listeners, first, &cases, 2400);
}
