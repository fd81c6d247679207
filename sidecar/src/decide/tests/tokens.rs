//! Tokens: which are accepted, until when, and what the service gets of them.

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use weft_model::{
    DataSource, JwtPolicy, JwtProvider, JwtRequirement, JwtRule, KeySource, Permission, Principal,
    RbacPolicy, StringMatch, TokenLocation,
};

use super::*;
use crate::http::test_head::{get, request};
use crate::plan::test_model::{ISSUER, provider};

const SECOND: Duration = Duration::from_secs(1);

fn key(seed: u8) -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).expect("a key")
}

/// The key set with one key.
fn keys(key: &Ed25519KeyPair) -> KeySource {
    let x = URL_SAFE_NO_PAD.encode(key.public_key());
    let set = json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "k", "x": x}]});
    KeySource::Local(DataSource::inline(set.to_string()))
}

fn signed_by(key: &Ed25519KeyPair, header: &Value, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let text = format!("{}.{}", part(header), part(claims));
    let signature = URL_SAFE_NO_PAD.encode(key.sign(text.as_bytes()));
    format!("{text}.{signature}")
}

/// A token of the issuer, with these claims besides `iss`, `sub` and an `exp` in ten seconds.
fn token(claims: &Value) -> String {
    let mut all = json!({"iss": ISSUER, "sub": "ann", "exp": NOW + 10});
    let all_claims = all.as_object_mut().expect("an object");
    for (name, value) in claims.as_object().expect("an object") {
        all_claims.insert(name.clone(), value.clone());
    }
    all_claims.retain(|_, value| !value.is_null());
    signed_by(&key(1), &json!({"alg": "EdDSA", "kid": "k"}), &all)
}

fn bearer(token: &str) -> RequestHead {
    request("GET", "/", &[("authorization", &format!("Bearer {token}"))])
}

/// A setup that requires a token of the issuer for paths below `/`, except `/public`.
fn requiring(change: impl FnOnce(&mut JwtProvider)) -> Setup {
    let mut provider = provider(keys(&key(1)));
    change(&mut provider);
    requiring_of(provider, JwtRequirement::Provider("issuer".into(), Vec::new()))
}

fn requiring_of(provider: JwtProvider, requirement: JwtRequirement) -> Setup {
    let rule = |path: &str, requires| JwtRule {
        matches: RouteMatch { path: prefix(path), ..RouteMatch::any() },
        requires,
    };
    let policy = JwtPolicy {
        providers: [("issuer".into(), provider)].into(),
        rules: vec![rule("/public", None), rule("/", Some(requirement))],
        passes_preflight: false,
    };
    Setup::default().filter(HttpFilter::Jwt(Arc::new(policy)))
}

/// Requests with tokens, each with the seconds after [`NOW`] at which it is decided and the expected decision.
fn rows() -> Vec<(&'static str, RequestHead, u64, &'static str)> {
    let alg = json!({"alg": "EdDSA", "kid": "k"});
    let claims = json!({"iss": ISSUER, "exp": NOW + 10});
    let [signed, signature] = ["a", "b"].map(|sub| token(&json!({"sub": sub})));
    let (signed, _) = signed.rsplit_once('.').expect("a signature");
    let (_, signature) = signature.rsplit_once('.').expect("a signature");
    let forged = format!("{signed}.{signature}");
    let twice = {
        let value = format!("Bearer {}", token(&json!({})));
        request("GET", "/", &[("authorization", &value), ("authorization", &value)])
    };
    let allowed = "forward web GET a.test/";
    let missing = "refuse 401 jwt_header_not_present";
    let no_bearer = "refuse 401 jwt_request_format_invalid: not a bearer token";
    let format = "refuse 401 jwt_request_format_invalid: not a valid JWT";
    let several = "refuse 401 jwt_request_format_invalid: several tokens";
    let signature = "refuse 401 jwt_signature_validation_error: the signature is invalid";
    let key_id = "refuse 401 jwt_signature_validation_error: unknown signing key";
    let expired = "refuse 401 jwt_claim_value_invalid: the token has expired";
    let early = "refuse 401 jwt_claim_value_invalid: the token is not valid yet";
    let issuer = "refuse 401 jwt_claim_value_invalid: its issuer is not accepted here";
    let no_end = "refuse 401 jwt_claim_not_present: exp is missing";
    vec![
        ("no token", get("/"), 0, missing),
        ("no token where none is required", get("/public"), 0, "forward web GET a.test/public"),
        ("other credentials", request("GET", "/", &[("authorization", "Basic x")]), 0, no_bearer),
        ("no JWT", bearer("x"), 0, format),
        ("two tokens", twice, 0, several),
        ("valid token", bearer(&token(&json!({}))), 0, allowed),
        ("last second", bearer(&token(&json!({}))), 9, allowed),
        ("expired at this second", bearer(&token(&json!({}))), 10, expired),
        ("expired before", bearer(&token(&json!({"exp": NOW - 1}))), 0, expired),
        ("not valid yet", bearer(&token(&json!({"nbf": NOW + 5}))), 4, early),
        ("valid from this second", bearer(&token(&json!({"nbf": NOW + 5}))), 5, allowed),
        ("other issuer", bearer(&token(&json!({"iss": "https://other"}))), 0, issuer),
        ("no expiry", bearer(&token(&json!({"exp": null}))), 0, no_end),
        ("signature of other claims", bearer(&forged), 0, signature),
        ("other key", bearer(&signed_by(&key(2), &alg, &claims)), 0, signature),
        (
            "other key ID",
            bearer(&signed_by(&key(1), &json!({"alg": "EdDSA", "kid": "x"}), &claims)),
            0,
            key_id,
        ),
    ]
}

#[test]
fn only_a_valid_token_is_accepted() {
    for (name, head, seconds, expected) in rows() {
        let setup = Setup { wall: at(seconds), ..requiring(|_| ()) };
        assert_eq!(setup.decide(head), expected, "{name}");
    }
}

#[test]
fn cached_tokens_change_no_decision() {
    let tokens = TokenCache::default();
    // The first pass fills the cache, in part with tokens that have expired by the second.
    for pass in ["cold", "warm"] {
        for (name, head, seconds, expected) in rows() {
            let setup = Setup { wall: at(seconds), ..requiring(|_| ()) };
            let decision = setup.inspect(head, &tokens, |decision, head, _| text(decision, head));
            assert_eq!(decision, expected, "{name}, {pass} cache");
        }
    }
}

#[test]
fn token_is_required_by_every_reading_of_the_path() {
    let setup = requiring(|_| ());
    for path in ["/public/../x", "/public/..%2fx", "//public", "/public/..;/x"] {
        assert_eq!(setup.decide(get(path)), "refuse 401 jwt_header_not_present", "{path}");
    }
    assert_eq!(setup.decide(get("/public/%61")), "forward web GET a.test/public/%61");
}

#[test]
fn token_is_optional_where_it_may_be_missing_but_must_be_valid_where_it_is_sent() {
    let of_issuer = JwtRequirement::Provider("issuer".into(), Vec::new());
    let optional = || JwtRequirement::Any(vec![of_issuer.clone(), JwtRequirement::Missing]);
    let setup = || requiring_of(provider(keys(&key(1))), optional());
    let expired = "refuse 401 jwt_claim_value_invalid: the token has expired";
    check([
        ("no token", setup(), get("/"), "forward web GET a.test/"),
        ("valid token", setup(), bearer(&token(&json!({}))), "forward web GET a.test/"),
        ("expired token", setup(), bearer(&token(&json!({"exp": NOW}))), expired),
    ]);
}

#[test]
fn service_gets_verified_claims_and_no_claims_of_the_client() {
    let setup = |forward| {
        requiring(|provider| {
            provider.forward = forward;
            provider.claim_headers = vec![("sub".into(), "x-user".into())];
        })
    };
    let head = |path, headers: &[(&str, &str)]| {
        let forged = [("x-user", "root"), ("X_User", "root"), ("connection", "x-user")];
        request("GET", path, &[headers, &forged].concat())
    };
    let value = format!("Bearer {}", token(&json!({})));
    let with_token = || head("/", &[("authorization", &value)]);
    let forwarded = format!("forward web GET a.test/ [authorization: {value}, x-user: ann]");
    assert_eq!(setup(true).decide(with_token()), forwarded);
    assert_eq!(setup(false).decide(with_token()), "forward web GET a.test/ [x-user: ann]");
    let public = setup(false).decide(head("/public", &[("authorization", "Basic x")]));
    assert_eq!(public, "forward web GET a.test/public [authorization: Basic x]");
}

#[test]
fn token_that_is_removed_from_the_query_stays_in_the_original_target() {
    let setup = requiring(|provider| {
        provider.token_locations = vec![TokenLocation::QueryParameter("token".into())];
    });
    let target = format!("/x?token={}&a=1", token(&json!({})));
    let original = setup.forwarded(get(&target), |request, head| {
        assert_eq!(head.target, "/x?a=1");
        request.inputs.target.clone()
    });
    assert_eq!(original, Some(target));
}

#[test]
fn policies_match_on_claims_of_a_verified_token() {
    let claim =
        Principal::Claim("jwt".into(), vec!["role".into()], StringMatch::Exact("admin".into()));
    let policy = RbacPolicy { permissions: vec![Permission::Any], principals: vec![claim] };
    let rules = Rbac { action: RbacAction::Allow, policies: [("admins".into(), policy)].into() };
    let setup = requiring(|provider| provider.payload_name = Some("jwt".into()));
    let setup = setup.filter(enforced(rules));
    let decide = |claims| setup.decide(bearer(&token(&claims)));
    let denied = "refuse 403 not_allowed";
    assert_eq!(decide(json!({"role": "admin"})), "forward web GET a.test/");
    assert_eq!(decide(json!({"role": ["dev", "admin"]})), "forward web GET a.test/");
    assert_eq!(decide(json!({"role": "dev"})), denied);
    assert_eq!(decide(json!({})), denied);
    assert_eq!(setup.decide(get("/public")), denied);
}

#[test]
fn token_is_checked_before_policies_and_its_refusal_has_the_headers_of_the_route() {
    let setup = requiring(|_| ()).allowing_nothing().with(|setup| {
        let route = &mut setup.table.hosts[0].routes[0];
        route.mutations = on_response(overwrite("x-route", "%ROUTE_NAME%"));
    });
    let missing = "refuse 401 jwt_header_not_present response [x-route: route]";
    assert_eq!(setup.decide(get("/")), missing);
    let denied = "refuse 403 not_allowed response [x-route: route]";
    assert_eq!(setup.decide(bearer(&token(&json!({})))), denied);
}

#[test]
fn stream_ends_when_its_token_expires() {
    let setup = |ends_streams, leeway| {
        requiring(|provider| {
            provider.ends_streams = ends_streams;
            provider.leeway = leeway;
        })
    };
    let remaining = |setup: Setup, seconds: u64, exp: Value| {
        let setup = Setup { wall: at(seconds), ..setup };
        let head = bearer(&token(&json!({"exp": exp})));
        let until = setup.forwarded(head, |request, _| request.timeouts.until);
        until.map(|until| until - setup.monotonic)
    };
    let ends = |leeway| setup(true, SECOND * leeway);
    assert_eq!(remaining(ends(0), 0, json!(NOW + 10)), Some(SECOND * 10));
    assert_eq!(remaining(ends(0), 9, json!(NOW + 10)), Some(SECOND));
    assert_eq!(remaining(ends(3), 9, json!(NOW + 10)), Some(SECOND * 4));
    assert_eq!(remaining(ends(3), 12, json!(NOW + 10)), Some(SECOND));
    assert_eq!(remaining(ends(0), 0, json!(1e300)), None, "beyond the clock");
    assert_eq!(remaining(setup(false, SECOND), 0, json!(NOW + 10)), None);
    let public = ends(0).forwarded(get("/public"), |request, _| request.timeouts.until);
    assert_eq!(public, None);
}
