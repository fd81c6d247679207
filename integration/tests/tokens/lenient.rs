//! What a lenient reader, and our own once, would take.

use serde_json::json;

use crate::claims::saying;
use crate::front::{Case, Front, case};
use crate::issuer::{Issuer, Key, claims, claims_saying, now};
use crate::json::{no_text, spoilt_inside};
use crate::key_sets;

/// RFC 7518, section 3.4.
#[test]
fn a_token_of_es512_is_taken() {
    let issuer = Issuer::new();
    Front::of(&issuer).takes(&[case("ES512", issuer.key("ES512").good())]);
}

/// RFC 7519, section 4.1.6: it is the time at which a token was made, and a number.
#[test]
fn a_token_was_made_before_now() {
    let issuer = Issuer::new();
    let seconds = [now() + 3600, now() + 120].map(|seconds| seconds.to_string());
    let text = format!("\"{}\"", now() - 60);
    let texts: [&str; 8] = [&seconds[0], &seconds[1], &text, "1e400", "1e300", "[]", "{}", "true"];
    Front::of(&issuer).refuses(&saying(&issuer, "iat", &texts));
}

/// RFC 7519, section 4.1.1: it is one text or URI.
#[test]
fn a_token_has_one_issuer() {
    let issuer = Issuer::new();
    let texts = ["[\"https://issuer\"]", "[\"https://other\",\"https://issuer\"]"];
    Front::of(&issuer).refuses(&saying(&issuer, "iss", &texts));
}

/// RFC 7515, section 4.1.11: it is an array that is not empty; RFC 7797, section 7: a token's payload is
/// never plain.
#[test]
fn a_token_without_base64_is_refused() {
    let issuer = Issuer::new();
    let key = issuer.key("ES256");
    Front::of(&issuer).refuses(&[
        case("crit is null", key.headed(key.header_with("crit", json!(null)))),
        case("b64 is false", key.headed(key.header_with("b64", json!(false)))),
    ]);
}

/// RFC 7515, section 4.1.1: it is a text.
#[test]
fn an_algorithm_is_a_text() {
    let issuer = Issuer::new();
    let key = issuer.key("ES256");
    let header = key.header_with("alg", json!({"ES256": null}));
    Front::of(&issuer).refuses(&[case("an object", key.headed(header))]);
}

/// RFC 7519, section 7.2, step 10, and RFC 8259, sections 8.1, 8.2 and 9.
#[test]
fn claims_are_json_throughout() {
    let issuer = Issuer::new();
    let key = issuer.key("ES256");
    let mut cases: Vec<Case> = spoilt_inside()
        .map(|(name, json)| case(name, key.claiming(claims_saying("x", &json))))
        .into();
    let bytes = no_text(&claims().to_string());
    cases.extend(bytes.map(|(name, bytes)| case(name, key.claiming(bytes))));
    Front::of(&issuer).refuses(&cases);
}

/// RFC 7515, section 4.1.4, and RFC 7519, sections 4.1.2 and 4.1.5: each has its kind.
#[test]
fn null_is_no_value() {
    let issuer = Issuer::new();
    let key = issuer.key("ES384");
    let member = |name: &str| {
        case(format!("{name} in the header"), key.headed(key.header_with(name, json!(null))))
    };
    let claim = |name: &str| case(name, key.claiming(claims_saying(name, "null")));
    Front::of(&issuer).refuses(&[member("kid"), member("typ"), claim("nbf"), claim("sub")]);
}

/// RFC 7517, section 4.3.
#[test]
fn a_key_that_is_not_for_verifying_does_not() {
    let key = |operations: serde_json::Value| Key::ecdsa("ES256").saying("key_ops", operations);
    key_sets::check(&[
        ("encrypt", key(json!(["encrypt"]))),
        ("sign", key(json!(["sign"]))),
        ("deriveKey and wrapKey", key(json!(["deriveKey", "wrapKey"]))),
        ("none", key(json!([]))),
        ("one that nobody knows", key(json!(["Verify"]))),
        ("encrypt, and use is sig", key(json!(["encrypt"])).saying("use", "sig")),
        (
            "encrypt, for RSA",
            Key::rsa(&crate::issuer::rsa_pair(), "RS256").saying("key_ops", json!(["encrypt"])),
        ),
    ]);
}

/// RFC 8037, section 2.
#[test]
fn a_key_of_eddsa_is_of_ed25519() {
    let curved = |curve: &str| Key::ed25519().saying("crv", curve).saying("kid", curve);
    key_sets::check(&[("P-256", curved("P-256")), ("P-384", curved("P-384"))]);
}
