//! Principals of client certificates over mutual TLS, compared with Envoy.

use std::sync::Arc;

use rustls::ClientConfig;
use serde_json::{Map, Value, json};
use weft_integration::authority::PemIdentity;
use weft_integration::bootstrap::{any, bootstrap, listener};
use weft_integration::mesh_pki::{IdentityFiles, MeshPki, spiffe_id};
use weft_integration::port;
use weft_integration::sidecar_pair::TestSidecar;
use weft_integration::tls_client::{TlsClient, client_config_trusting};
use weft_integration::tls_contexts::verify_mode;

use crate::comparison::{Case, Outcome, check, direct, envoy, host, manager};
use crate::random::Random;
use crate::routes::string_match;

const RBAC: &str = "envoy.extensions.filters.http.rbac.v3.RBAC";

fn client(pki: &MeshPki, identity: &IdentityFiles) -> Arc<ClientConfig> {
    let read = |path: &std::path::Path| std::fs::read_to_string(path).expect("the file exists");
    let chain = read(&identity.certificate);
    let key = read(&identity.key);
    let holder = PemIdentity { chain, key, serial: identity.serial.clone() };
    client_config_trusting(&read(&pki.root()), &holder, "server", "http/1.1")
}

/// Sends requests over one connection.
fn send_all(port: u16, client: &Arc<ClientConfig>, cases: &[Case]) -> Vec<Outcome> {
    let mut caller = TlsClient::connect(port, client);
    cases
        .iter()
        .map(|case| {
            assert!(caller.send(&case.request), "the connection is open");
            let mut answer = String::new();
            loop {
                let more = caller.receive(4096);
                assert!(!more.is_empty(), "{answer}");
                answer.push_str(&String::from_utf8_lossy(&more));
                let is_complete = answer.split_once("\r\n\r\n").is_some_and(|(head, body)| {
                    let length =
                        head.lines().find_map(|line| line.strip_prefix("content-length: "));
                    body.len()
                        == length
                            .map_or(0, |length| length.parse().expect("the length is a number"))
                });
                if is_complete {
                    break;
                }
            }
            let status = answer.get(9..12).and_then(|status| status.parse().ok());
            (status.expect("the response has a status"), String::new())
        })
        .collect()
}

#[test]
fn certificate_principals_match_as_in_envoy() {
    let pki = MeshPki::create();
    let server = pki.issue("server");
    let clients = ["web", "Web-1", "orders"].map(|name| client(&pki, &pki.issue(name)));
    let mut random = Random::new(10);
    let names: Vec<String> = ["web", "Web-1", "WEB", "orders", ""].map(spiffe_id).to_vec();
    let parts = ["", "spiffe://", "SPIFFE://", "/sa/web", "/sa/", "web", "-1", "order", "Web"];
    let values: Vec<&str> = names.iter().map(String::as_str).chain(parts).collect();
    let policies: Map<String, Value> = (0..80)
        .map(|number| {
            let own =
                json!({"header": {"name": ":authority", "string_match": {"exact": host(number)}}});
            let name = match random.below(8) {
                0 => json!({}),
                1 => json!({"principal_name": {"safe_regex": {"regex": "spiffe://.*/sa/[a-z]+"}}}),
                2 => json!({"principal_name": {"safe_regex": {"regex": ".*(?i)WEB.*"}}}),
                _ => json!({"principal_name": string_match(&mut random, &values)}),
            };
            let principal = json!({"authenticated": name});
            let principal = if random.one_in(4) { json!({"not_id": principal}) } else { principal };
            (format!("p{number}"), json!({"permissions": [own], "principals": [principal]}))
        })
        .collect();
    let rbac = any(RBAC, json!({"rules": {"policies": policies}}));
    let table = json!({"name": "all", "virtual_hosts": [{"name": "all", "domains": ["*"],
        "routes": [direct(&json!({"prefix": "/"}), "allowed")]}]});
    let manager = manager(&table, &[json!({"name": "rbac", "typed_config": rbac})], &json!({}));
    let admin = port::free();
    let port = port::free();
    let tls = verify_mode(&server, &pki.root(), &pki.crl_file());
    let config = bootstrap(admin, &[listener("inbound", port, manager, Some(tls))], &[]);
    let cases: Vec<Case> = (0..80)
        .map(|number| {
            let policy = policies.get(&format!("p{number}")).expect("the policy exists");
            let request = format!("GET / HTTP/1.1\r\nhost: {}\r\n\r\n", host(number));
            Case::new(policy, port, request.into_bytes())
        })
        .collect();
    let all = |clients: &[Arc<ClientConfig>]| -> Vec<Vec<Outcome>> {
        clients.iter().map(|client| send_all(port, client, &cases)).collect()
    };
    let mut peer = envoy(&pki, &config, admin, port);
    let envoys = all(&clients);
    peer.kill();
    let sidecar = TestSidecar::start("weft", &pki, port, admin, &config);
    let wefts = all(&clients);
    drop(sidecar);
    for (envoys, wefts) in envoys.iter().zip(&wefts) {
        check(&cases, envoys, wefts);
        let matched = envoys.iter().filter(|(status, _)| *status == 200).count();
        assert!((10..70).contains(&matched), "{matched} of 80 cases match");
    }
}
