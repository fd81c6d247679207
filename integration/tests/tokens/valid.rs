//! Valid tokens: without these tests, a sidecar that rejects every token would pass.

use serde_json::json;

use crate::front::{TokenCase, TokenFront, bearer, case};
use crate::issuer::{
    AUDIENCE, SigningKey, TokenIssuer, claims, claims_with, claims_without, now, rsa_pair, without,
};

#[test]
fn token_of_each_supported_algorithm_is_accepted() {
    let issuer = TokenIssuer::new();
    let algorithms =
        ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"];
    let cases = algorithms.map(|algorithm| case(algorithm, issuer.key(algorithm).good()));
    TokenFront::of(&issuer).assert_accepted(&cases);
}

#[test]
fn every_valid_form_of_claims_is_accepted() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES256");
    let claiming =
        |name: &str, claim: &str, json: &str| case(name, key.claiming(claims_with(claim, json)));
    let now = now();
    let text = |seconds: u64| seconds.to_string();
    TokenFront::of(&issuer).assert_accepted(&[
        claiming("aud is an array", "aud", &json!([AUDIENCE]).to_string()),
        claiming("aud is one of several", "aud", &json!(["other", AUDIENCE]).to_string()),
        claiming("aud is written with escapes", "aud", r#""\u0073ervice""#),
        claiming("exp has a fraction", "exp", &format!("{}.5", now + 60)),
        claiming("exp has an exponent", "exp", "4.1e9"),
        claiming("exp is in the past within the leeway", "exp", &text(now - 30)),
        claiming("nbf is in the past", "nbf", &text(now - 60)),
        claiming("nbf has a fraction", "nbf", &format!("{}.25", now - 60)),
        claiming("nbf is 1970", "nbf", "0"),
        claiming("nbf is in the future within the leeway", "nbf", &text(now + 30)),
        claiming("iat is in the past", "iat", &text(now - 3600)),
        claiming("iat is in the future within the leeway", "iat", &text(now + 30)),
        claiming("a further claim that is an object", "realm_access", r#"{"roles":["a",1,null]}"#),
        claiming("a further claim that is null", "nickname", "null"),
        claiming("a further claim that is not ASCII", "name", "\"Ж\\n\\ud83d\\ude00\""),
        claiming("a further claim with twenty levels", "x", &nested(20)),
        claiming("jti and azp", "jti", r#""1","azp":"client""#),
        case("no sub", key.claiming(claims_without("sub"))),
        case("space around the JSON", key.claiming(format!(" \t\r\n{:#}\n ", claims()))),
    ]);
}

fn nested(levels: usize) -> String {
    format!("{}{}", "[".repeat(levels), "]".repeat(levels))
}

#[test]
fn every_valid_form_of_token_headers_is_accepted() {
    let issuer = TokenIssuer::new();
    let key = issuer.key("ES256");
    let headed = |name: &str, member: &str, value: serde_json::Value| {
        case(name, key.headed(key.header_with(member, value)))
    };
    let unnamed = |algorithm: &str| {
        let key = issuer.key(algorithm);
        let name = format!("no kid and one key of {algorithm}");
        case(name, key.headed(without(key.header(), "kid")))
    };
    TokenFront::of(&issuer).assert_accepted(&[
        case("no typ", key.headed(without(key.header(), "typ"))),
        headed("typ is JWT in lower case", "typ", json!("jwt")),
        headed("typ is at+jwt", "typ", json!("at+jwt")),
        headed("typ is at+jwt with application/", "typ", json!("application/at+jwt")),
        headed("an unknown member", "x", json!("y")),
        headed("an unknown member that is an object", "x", json!({"y": [1]})),
        headed("the issuer's own key in it", "jwk", key.jwk.clone()),
        unnamed("ES384"),
        unnamed("RS256"),
        unnamed("PS512"),
        unnamed("EdDSA"),
        case("no kid and two keys of ES256", key.headed(without(key.header(), "kid"))),
        case(
            "space in the JSON",
            key.headed(format!("\r\n {{ \"alg\" : \"ES256\", \"kid\":{} }}\t", key.jwk["kid"])),
        ),
        case(
            "alg is written with escapes",
            key.headed(format!(r#"{{"\u0061lg":"\u0045S256","kid":{}}}"#, key.jwk["kid"])),
        ),
    ]);
}

#[test]
fn bearer_scheme_is_case_insensitive() {
    let issuer = TokenIssuer::new();
    let front = TokenFront::of(&issuer);
    let token = issuer.key("ES256").good();
    let check = |field: &str| {
        let answer = front.ask("/", field);
        assert_eq!(answer.status, 200, "{field:?}: {answer:?}");
    };
    for scheme in ["Bearer", "bearer", "BEARER", "bEaReR"] {
        check(&format!("authorization: {scheme} {token}\r\n"));
    }
    check(&format!("AUTHORIZATION: Bearer {token}\r\n"));
    check(&format!("authorization:\t  Bearer {token} \t\r\n"));
    // RFC 9110, section 11.4: one space or more.
    check(&format!("authorization: Bearer   {token}\r\n"));
    check(&format!("cookie: token=x\r\n{}proxy-authorization: Basic eA==\r\n", bearer(&token)));
}

#[test]
fn every_valid_form_of_key_verifies_tokens() {
    let pair = rsa_pair();
    let bare = |mut key: SigningKey, kid: &str, member: &str| {
        key.jwk.as_object_mut().expect("a JWK is an object").remove(member);
        key.with_member("kid", kid)
    };
    let keys = [
        (
            "use is sig",
            SigningKey::ecdsa("ES256").with_member("kid", "1").with_member("use", "sig"),
        ),
        (
            "key_ops is verify",
            SigningKey::ecdsa("ES256")
                .with_member("kid", "2")
                .with_member("key_ops", json!(["verify"])),
        ),
        (
            "an unknown member",
            SigningKey::ecdsa("ES256").with_member("kid", "3").with_member("note", "y"),
        ),
        (
            "the first of two keys with one kid",
            SigningKey::ecdsa("ES384").with_member("kid", "same"),
        ),
        (
            "the second of two keys with one kid",
            SigningKey::ecdsa("ES384").with_member("kid", "same"),
        ),
        ("a kid that is empty", SigningKey::ecdsa("ES384").with_member("kid", "")),
        ("a kid that is not ASCII", SigningKey::ecdsa("ES384").with_member("kid", "ключ \n")),
        ("a kid that is a path", SigningKey::ecdsa("ES384").with_member("kid", "../../key")),
        ("RSA with use", SigningKey::rsa(&pair, "RS256").with_member("use", "sig")),
    ];
    let mut cases: Vec<TokenCase> =
        keys.iter().map(|(name, key)| case(*name, key.good())).collect();
    let mut published: Vec<_> = keys.iter().map(|(_, key)| key.jwk.clone()).collect();
    for algorithm in ["ES256", "ES384", "RS256", "RS384", "RS512"] {
        let new = || match algorithm {
            "ES256" | "ES384" => SigningKey::ecdsa(algorithm),
            _ => SigningKey::rsa(&pair, algorithm),
        };
        let key = new();
        let header = json!({"alg": algorithm, "kid": algorithm});
        cases.push(case(format!("no alg, {algorithm}"), key.headed(header.to_string())));
        published.push(bare(key, algorithm, "alg").jwk);
    }
    TokenFront::start(&published).assert_accepted(&cases);
}
