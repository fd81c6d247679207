//! Tokens and keys that a lenient verifier would accept.

use serde_json::json;

use crate::claims::with_claim_values;
use crate::front::{TokenCase, TokenFront, case};
use crate::issuer::{SigningKey, TokenIssuer, claims, claims_with, now};
use crate::json::{invalid_utf8, malformed_inside};
use crate::key_sets;

/// RFC 7518, section 3.4.
#[test]
fn es512_token_is_accepted() {
    let issuer = TokenIssuer::new();
    TokenFront::of(&issuer).assert_accepted(&[case("ES512", issuer.key("ES512").good())]);
}

/// RFC 7519, section 4.1.6: `iat` is the time at which the token was issued, a number.
#[test]
fn token_with_iat_in_the_future_is_rejected() {
    let issuer = TokenIssuer::new();
    let seconds = [now() + 3600, now() + 120].map(|seconds| seconds.to_string());
    let text = format!("\"{}\"", now() - 60);
    let texts: [&str; 8] = [&seconds[0], &seconds[1], &text, "1e400", "1e300", "[]", "{}", "true"];
    TokenFront::of(&issuer).assert_rejected(&with_claim_values(&issuer, "iat", &texts));
}

/// RFC 7519, section 4.1.1: `iss` is one string or URI.
#[test]
fn token_with_several_issuers_is_rejected() {
    let issuer = TokenIssuer::new();
    let texts = ["[\"https://issuer\"]", "[\"https://other\",\"https://issuer\"]"];
    TokenFront::of(&issuer).assert_rejected(&with_claim_values(&issuer, "iss", &texts));
}

/// RFC 7515, section 4.1.11: `crit` is a non-empty array; RFC 7797, section 7: a JWT never uses an
/// unencoded payload.
#[test]
fn token_with_unencoded_payload_is_rejected() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES256");
    TokenFront::of(&issuer).assert_rejected(&[
        case("crit is null", key.headed(key.header_with("crit", json!(null)))),
        case("b64 is false", key.headed(key.header_with("b64", json!(false)))),
    ]);
}

/// RFC 7515, section 4.1.1: `alg` is a string.
#[test]
fn token_with_an_alg_that_is_no_string_is_rejected() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES256");
    let header = key.header_with("alg", json!({"ES256": null}));
    TokenFront::of(&issuer).assert_rejected(&[case("an object", key.headed(header))]);
}

/// RFC 7519, section 7.2, step 10, and RFC 8259, sections 8.1, 8.2 and 9.
#[test]
fn claims_with_invalid_json_inside_are_rejected() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES256");
    let mut cases: Vec<TokenCase> = malformed_inside()
        .map(|(name, json)| case(name, key.claiming(claims_with("x", &json))))
        .into();
    let bytes = invalid_utf8(&claims().to_string());
    cases.extend(bytes.map(|(name, bytes)| case(name, key.claiming(bytes))));
    TokenFront::of(&issuer).assert_rejected(&cases);
}

/// RFC 7515, section 4.1.4, and RFC 7519, sections 4.1.2 and 4.1.5: each has a type.
#[test]
fn token_with_null_for_a_typed_member_is_rejected() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES384");
    let member = |name: &str| {
        case(format!("{name} in the header"), key.headed(key.header_with(name, json!(null))))
    };
    let claim = |name: &str| case(name, key.claiming(claims_with(name, "null")));
    TokenFront::of(&issuer).assert_rejected(&[
        member("kid"),
        member("typ"),
        claim("nbf"),
        claim("sub"),
    ]);
}

/// RFC 7517, section 4.3.
#[test]
fn key_without_verify_operation_verifies_no_token() {
    let key = |operations: serde_json::Value| {
        SigningKey::ecdsa("ES256").with_member("key_ops", operations)
    };
    key_sets::check(&[
        ("encrypt", key(json!(["encrypt"]))),
        ("sign", key(json!(["sign"]))),
        ("deriveKey and wrapKey", key(json!(["deriveKey", "wrapKey"]))),
        ("none", key(json!([]))),
        ("an unknown operation", key(json!(["Verify"]))),
        ("encrypt, with use sig", key(json!(["encrypt"])).with_member("use", "sig")),
        (
            "encrypt, for RSA",
            SigningKey::rsa(&crate::issuer::rsa_pair(), "RS256")
                .with_member("key_ops", json!(["encrypt"])),
        ),
    ]);
}

/// RFC 8037, section 2.
#[test]
fn eddsa_key_of_another_curve_verifies_no_token() {
    let curved =
        |curve: &str| SigningKey::ed25519().with_member("crv", curve).with_member("kid", curve);
    key_sets::check(&[("P-256", curved("P-256")), ("P-384", curved("P-384"))]);
}
