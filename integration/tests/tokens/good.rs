//! What must be taken: a sidecar that refuses everything would pass all the rest.

use serde_json::json;

use crate::front::{Case, Front, bearer, case};
use crate::issuer::{
    AUDIENCE, Issuer, Key, claims, claims_saying, claims_without, now, rsa_pair, without,
};

#[test]
fn a_token_of_each_algorithm_is_taken() {
    let issuer = Issuer::new();
    let algorithms =
        ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"];
    let cases = algorithms.map(|algorithm| case(algorithm, issuer.key(algorithm).good()));
    Front::of(&issuer).takes(&cases);
}

#[test]
fn claims_of_every_good_kind_are_taken() {
    let issuer = Issuer::new();
    let key = issuer.key("ES256");
    let claiming =
        |name: &str, claim: &str, json: &str| case(name, key.claiming(claims_saying(claim, json)));
    let now = now();
    let said = |seconds: u64| seconds.to_string();
    Front::of(&issuer).takes(&[
        claiming("aud is an array", "aud", &json!([AUDIENCE]).to_string()),
        claiming("aud is one of several", "aud", &json!(["other", AUDIENCE]).to_string()),
        claiming("aud is written with escapes", "aud", r#""\u0073ervice""#),
        claiming("exp has a fraction", "exp", &format!("{}.5", now + 60)),
        claiming("exp has an exponent", "exp", "4.1e9"),
        claiming("exp is over within the leeway", "exp", &said(now - 30)),
        claiming("nbf is past", "nbf", &said(now - 60)),
        claiming("nbf has a fraction", "nbf", &format!("{}.25", now - 60)),
        claiming("nbf is 1970", "nbf", "0"),
        claiming("nbf is to come within the leeway", "nbf", &said(now + 30)),
        claiming("iat is past", "iat", &said(now - 3600)),
        claiming("iat is to come within the leeway", "iat", &said(now + 30)),
        claiming("a claim more that is an object", "realm_access", r#"{"roles":["a",1,null]}"#),
        claiming("a claim more that is null", "nickname", "null"),
        claiming("a claim more that is not ASCII", "name", "\"Ж\\n\\ud83d\\ude00\""),
        claiming("a claim more that is nested twenty levels", "x", &nested(20)),
        claiming("jti and azp", "jti", r#""1","azp":"client""#),
        case("no sub", key.claiming(claims_without("sub"))),
        case("space around the JSON", key.claiming(format!(" \t\r\n{:#}\n ", claims()))),
    ]);
}

fn nested(levels: usize) -> String {
    format!("{}{}", "[".repeat(levels), "]".repeat(levels))
}

#[test]
fn headers_of_every_good_kind_are_taken() {
    let issuer = Issuer::new();
    let key = issuer.key("ES256");
    let headed = |name: &str, member: &str, value: serde_json::Value| {
        case(name, key.headed(key.header_with(member, value)))
    };
    let unnamed = |algorithm: &str| {
        let key = issuer.key(algorithm);
        let name = format!("no kid and one key of {algorithm}");
        case(name, key.headed(without(key.header(), "kid")))
    };
    Front::of(&issuer).takes(&[
        case("no typ", key.headed(without(key.header(), "typ"))),
        headed("typ is JWT in lower case", "typ", json!("jwt")),
        headed("typ is at+jwt", "typ", json!("at+jwt")),
        headed("typ is at+jwt with its tree", "typ", json!("application/at+jwt")),
        headed("a member that nobody knows", "x", json!("y")),
        headed("a member that nobody knows is an object", "x", json!({"y": [1]})),
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
fn a_scheme_has_no_case() {
    let issuer = Issuer::new();
    let (front, token) = (Front::of(&issuer), issuer.key("ES256").good());
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
fn keys_of_every_good_kind_verify() {
    let pair = rsa_pair();
    let bare = |mut key: Key, kid: &str, member: &str| {
        key.jwk.as_object_mut().expect("it is an object").remove(member);
        key.saying("kid", kid)
    };
    let keys = [
        ("use is sig", Key::ecdsa("ES256").saying("kid", "1").saying("use", "sig")),
        (
            "key_ops is verify",
            Key::ecdsa("ES256").saying("kid", "2").saying("key_ops", json!(["verify"])),
        ),
        ("a member that nobody knows", Key::ecdsa("ES256").saying("kid", "3").saying("note", "y")),
        ("one of two with a kid", Key::ecdsa("ES384").saying("kid", "same")),
        ("the other of two with a kid", Key::ecdsa("ES384").saying("kid", "same")),
        ("a kid that is empty", Key::ecdsa("ES384").saying("kid", "")),
        ("a kid that is not ASCII", Key::ecdsa("ES384").saying("kid", "ключ \n")),
        ("a kid that is a path", Key::ecdsa("ES384").saying("kid", "../../key")),
        ("RSA with use", Key::rsa(&pair, "RS256").saying("use", "sig")),
    ];
    let mut cases: Vec<Case> = keys.iter().map(|(name, key)| case(*name, key.good())).collect();
    let mut published: Vec<_> = keys.iter().map(|(_, key)| key.jwk.clone()).collect();
    for algorithm in ["ES256", "ES384", "RS256", "RS384", "RS512"] {
        let new = || match algorithm {
            "ES256" | "ES384" => Key::ecdsa(algorithm),
            _ => Key::rsa(&pair, algorithm),
        };
        let key = new();
        let header = json!({"alg": algorithm, "kid": algorithm});
        cases.push(case(format!("no alg, {algorithm}"), key.headed(header.to_string())));
        published.push(bare(key, algorithm, "alg").jwk);
    }
    Front::start(&published).takes(&cases);
}
