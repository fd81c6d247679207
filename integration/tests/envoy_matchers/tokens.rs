//! Rules for tokens, compared with Envoy: a request that matches a rule has no token, so it gets 401.

use std::net::Ipv4Addr;

use serde_json::{Value, json};
use weft_integration::bootstrap::{any, with};
use weft_integration::port;

use crate::comparison::{Case, compare, direct, host, listener, manager};
use crate::random::Random;
use crate::routes::{PATH_TARGETS, header_match, path_match, query_match, request};

const JWT: &str = "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication";

/// The public key of RFC 7517, appendix A.1.
const KEYS: &str = r#"{"keys": [{"kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": "1",
    "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4", "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"}]}"#;

/// A rule that also requires the host of its number.
fn rule(random: &mut Random, number: usize) -> Value {
    let own = json!({"name": ":authority", "string_match": {"exact": host(number)}});
    let mut headers = vec![own];
    if random.one_in(2) {
        headers.push(header_match(random));
    }
    let matches = with(path_match(random), "headers", json!(headers));
    let matches = match random.one_in(3) {
        true => with(matches, "query_parameters", json!([query_match(random)])),
        false => matches,
    };
    json!({"match": matches, "requires": {"provider_name": "issuer"}})
}

#[test]
fn token_rules_match_as_in_envoy() {
    let mut random = Random::new(9);
    let rules: Vec<Value> = (0..200).map(|number| rule(&mut random, number)).collect();
    let keys = json!({"inline_string": KEYS});
    let provider =
        json!({"issuer": "https://issuer.example", "audiences": ["a"], "local_jwks": keys});
    let filter = json!({"name": "jwt", "typed_config":
        any(JWT, json!({"providers": {"issuer": provider}, "rules": rules}))});
    let table = json!({"name": "all", "virtual_hosts": [{"name": "all", "domains": ["*"],
        "routes": [direct(&json!({"prefix": "/"}), "allowed")]}]});
    let port = port::free();
    let manager = manager(&table, &[filter], &json!({}));
    let listener = listener((Ipv4Addr::LOCALHOST, port).into(), manager);
    let mut cases = Vec::new();
    for (number, rule) in rules.iter().enumerate() {
        for _ in 0..10 {
            let target = *random.of(PATH_TARGETS);
            cases.push(Case::new(rule, port, request(&mut random, target, &host(number))));
        }
    }
    compare(&[listener], port, &cases, 2000);
}
