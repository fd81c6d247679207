//! Algorithms that a token must not choose (RFC 8725, sections 2.1 and 3.1): `none`, HMAC with the
//! public key, and an algorithm that is not the key's.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::front::{TokenCase, TokenFront, case};
use crate::issuer::{SigningKey, TokenIssuer, claims, unsigned, without};

#[test]
fn token_with_alg_none_is_rejected() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES256");
    let stranger = SigningKey::ecdsa("ES256");
    let spellings = [
        json!("none"),
        json!("None"),
        json!("NONE"),
        json!("nOnE"),
        json!(" none"),
        json!("none "),
        json!("none\u{0}"),
        json!(""),
        json!(" "),
        json!("null"),
        Value::Null,
        json!(0),
        json!(256),
        json!(true),
        json!(["none"]),
        json!(["ES256"]),
        json!({"name": "ES256"}),
    ];
    let mut headers: Vec<(String, String)> =
        spellings.map(|alg| (alg.to_string(), key.header_with("alg", alg))).into();
    headers.push(("missing".to_owned(), without(key.header(), "alg")));
    let mut cases = Vec::new();
    for (name, header) in headers {
        let text = unsigned(&header, claims().to_string());
        cases.push(case(format!("alg {name}, no signature"), format!("{text}.")));
        cases.push(case(format!("alg {name}, signed by another key"), stranger.sealed(&text)));
        cases.push(case(format!("alg {name}, signed by the issuer"), key.sealed(&text)));
    }
    TokenFront::of(&issuer).assert_rejected(&cases);
}

fn pem(kind: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let lines: Vec<&str> =
        text.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN {kind}-----\n{}\n-----END {kind}-----\n", lines.join("\n"))
}

#[test]
fn token_signed_with_the_public_key_as_hmac_secret_is_rejected() {
    let issuer = TokenIssuer::new();
    let mut cases = Vec::new();
    for algorithm in ["RS256", "PS512", "ES256", "ES384", "EdDSA"] {
        let key = issuer.key(algorithm);
        let pem = pem("PUBLIC KEY", &key.der);
        let part = key.jwk.get("n").or_else(|| key.jwk.get("x")).and_then(Value::as_str);
        let part = part.expect("the key has a modulus or a coordinate");
        let secrets: [(&str, Vec<u8>); 7] = [
            ("PEM", pem.clone().into()),
            ("PEM without the final line break", pem.trim_end().into()),
            ("DER", key.der.clone()),
            ("JWK", key.jwk.to_string().into()),
            ("key set", json!({"keys": [key.jwk]}).to_string().into()),
            ("modulus or coordinate", part.into()),
            ("nothing", Vec::new()),
        ];
        for (name, secret) in secrets {
            for hash in ["HS256", "HS384", "HS512"] {
                let forged = SigningKey::secret(hash, &secret).headed(key.header_with("alg", hash));
                cases.push(case(format!("{hash} with {name} of {algorithm}"), forged));
            }
        }
    }
    // The PEM forms are equivalent for one hash; the others are tried with the first key only.
    cases.retain(|(name, _)| name.starts_with("HS256") || name.ends_with("RS256"));
    TokenFront::of(&issuer).assert_rejected(&cases);
}

#[test]
fn token_with_an_algorithm_other_than_its_keys_is_rejected() {
    let issuer = TokenIssuer::new();
    let mut cases: Vec<TokenCase> = Vec::new();
    let all = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"];
    for (signing, named) in all.iter().flat_map(|one| all.map(|other| (*one, other))) {
        let key = issuer.key(signing);
        let other = issuer.key(named);
        if signing == named {
            continue;
        }
        // Signed with the key of the kid, or with one algorithm but labelled with another.
        let header = key.header_with("kid", other.jwk["kid"].clone());
        cases.push(case(format!("{signing} with the kid of {named}"), key.headed(header)));
        let header = key.header_with("alg", named);
        cases.push(case(format!("signed by {signing}, labelled {named}"), key.headed(header)));
    }
    TokenFront::of(&issuer).assert_rejected(&cases);
}

#[test]
fn misspelled_algorithm_is_rejected() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES256");
    let spellings = [
        "es256",
        "Es256",
        "ES256 ",
        " ES256",
        "ES256\n",
        "ES-256",
        "ES256K",
        "ES",
        "SHA256withECDSA",
        "ES256,none",
        "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha256",
        "ES999",
        "ＥＳ256",
    ];
    let cases =
        spellings.map(|alg| case(format!("alg {alg:?}"), key.headed(key.header_with("alg", alg))));
    TokenFront::of(&issuer).assert_rejected(&cases);
}
