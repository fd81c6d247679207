//! Published keys that must not verify tokens, and unusual forms of keys that must.

use aws_lc_rs::digest;
use aws_lc_rs::signature::{self, RsaPublicKeyComponents};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use crate::front::{TokenCase, TokenFront, case};
use crate::issuer::{SigningKey, from_hex, rsa_pair};

/// Checks that none of these keys verifies a token that it signed.
#[track_caller]
pub(crate) fn check(keys: &[(&str, SigningKey)]) {
    let cases: Vec<TokenCase> = keys.iter().map(|(name, key)| case(*name, key.good())).collect();
    let published: Vec<Value> = keys.iter().map(|(_, key)| key.jwk.clone()).collect();
    TokenFront::start(&published).assert_rejected(&cases);
}

fn decoded(text: &Value) -> Vec<u8> {
    URL_SAFE_NO_PAD
        .decode(text.as_str().expect("the member is a string"))
        .expect("the member is base64url")
}

/// An RSA key with exponent 1: anyone can forge its signatures, because each is the padded message
/// itself.
fn with_exponent_1() -> SigningKey {
    let key = SigningKey::rsa(&rsa_pair(), "RS256").with_member("e", "AQ");
    SigningKey::signing(key.jwk, |message| {
        // RFC 8017, section 9.2.
        let digest_info = from_hex("3031300d060960864801650304020105000420");
        let digest_info =
            [&digest_info, digest::digest(&digest::SHA256, message).as_ref()].concat();
        let filling = vec![0xff; 256 - 3 - digest_info.len()];
        [&[0, 1], &filling[..], &[0], &digest_info].concat()
    })
}

#[test]
fn weak_rsa_key_verifies_no_token() {
    let short = SigningKey::rsa_of_1024_bits();
    // The signature is valid: a verifier that accepts short keys accepts it.
    let [n, e] = ["n", "e"].map(|part| decoded(&short.jwk[part]));
    let public = RsaPublicKeyComponents { n, e };
    let lax = &signature::RSA_PKCS1_1024_8192_SHA256_FOR_LEGACY_USE_ONLY;
    public.verify(lax, b"x", &short.signature("x")).expect("the signature is valid");
    check(&[("RSA of 1024 bits", short), ("exponent 1", with_exponent_1())]);
}

#[test]
fn published_hmac_secret_verifies_no_token() {
    let secret = [7; 64];
    check(&[
        ("HS256", SigningKey::secret("HS256", &secret)),
        ("HS384", SigningKey::secret("HS384", &secret)),
        ("HS512", SigningKey::secret("HS512", &secret)),
        ("an empty secret", SigningKey::secret("HS256", b"")),
        ("a secret for ES256", SigningKey::secret("HS256", &secret).with_member("alg", "ES256")),
    ]);
}

#[test]
fn key_for_another_purpose_or_curve_verifies_no_token() {
    let ecdsa = || SigningKey::ecdsa("ES256").with_member("kid", "other");
    let curved = |curve: &str| SigningKey::ed25519().with_member("crv", curve);
    check(&[
        ("X25519", curved("X25519")),
        ("Ed448", curved("Ed448")),
        ("Ed25519 in lower case", curved("ed25519")),
        ("use is enc", ecdsa().with_member("use", "enc")),
        ("use is unknown", ecdsa().with_member("use", "tls")),
        ("use is empty", ecdsa().with_member("use", "")),
        ("another curve", ecdsa().with_member("crv", "P-384")),
        ("an unsupported curve", ecdsa().with_member("crv", "secp256k1")),
        ("another key type", ecdsa().with_member("kty", "RSA")),
        ("a point that is not on the curve", ecdsa().with_member("y", ecdsa().jwk["y"].clone())),
        ("a coordinate that is too short", ecdsa().with_member("x", "AA")),
        ("no coordinate", ecdsa().with_member("x", "")),
    ]);
}

#[test]
fn key_verifies_only_its_declared_algorithm() {
    let pair = rsa_pair();
    let mut published = Vec::new();
    // The token names the real algorithm of the key.
    let mut called = |key: SigningKey, algorithm: &str| {
        let name = format!("{} declared as {algorithm:?}", key.jwk["alg"]);
        let token = key.good();
        published.push(key.with_member("alg", algorithm).jwk);
        case(name, token)
    };
    let others = ["ES384", "RS256", "EdDSA", "HS256", "none", "ECDH-ES", "es256", ""];
    let mut cases: Vec<TokenCase> =
        others.map(|algorithm| called(SigningKey::ecdsa("ES256"), algorithm)).into();
    for algorithm in ["RSA-OAEP", "RSA1_5", "RSA-OAEP-256", "PS256", "RS384", "ES256", "none"] {
        cases.push(called(SigningKey::rsa(&pair, "RS256"), algorithm));
    }
    for algorithm in ["ES256", "ECDH-ES", "HS256"] {
        cases.push(called(SigningKey::ed25519(), algorithm));
    }
    TokenFront::start(&published).assert_rejected(&cases);
}

#[test]
fn valid_keys_of_a_jwks_with_invalid_keys_are_used() {
    let good = SigningKey::ecdsa("ES384");
    let unknown = [
        json!({"kty": "OKP", "crv": "Ed448", "x": "AA", "kid": "key-ES384"}),
        json!({"kty": "AKP", "alg": "ML-DSA-44", "pub": "AA", "kid": "key-ES384"}),
        json!({"kty": "EC", "crv": "P-256", "kid": "key-ES384"}),
        json!({"kty": "nothing"}),
        json!({}),
    ];
    for key in unknown {
        TokenFront::start(&[key.clone(), good.jwk.clone()])
            .assert_accepted(&[case(key.to_string(), good.good())]);
    }
}

/// Puts a zero byte in front of a member of the key.
fn with_zero(key: SigningKey, part: &str) -> SigningKey {
    let bytes = [&[0], &decoded(&key.jwk[part])[..]].concat();
    key.with_member(part, URL_SAFE_NO_PAD.encode(bytes))
}

/// Writes a member of the key in another encoding.
fn rewritten(key: SigningKey, part: &str, write: fn(&str) -> String) -> SigningKey {
    let text = write(key.jwk[part].as_str().expect("the member is a string"));
    key.with_member(part, text)
}

/// Keys of issuers that follow RFC 7518 loosely.
#[test]
fn key_in_an_unusual_form_verifies() {
    let rsa = || SigningKey::rsa(&rsa_pair(), "RS256");
    let ecdsa = || SigningKey::ecdsa("ES256");
    let other_base64 = |text: &str| text.replace('-', "+").replace('_', "/");
    type Changed = fn(SigningKey) -> SigningKey;
    let odd: [(&str, SigningKey, Changed); 12] = [
        ("a leading zero in the modulus", rsa(), |key| with_zero(key, "n")),
        ("a leading zero in the exponent", rsa(), |key| with_zero(key, "e")),
        ("a leading zero in a coordinate", ecdsa(), |key| with_zero(key, "x")),
        ("padding", rsa(), |key| rewritten(key, "n", |text| format!("{text}=="))),
        ("the standard base64 alphabet", rewritten(rsa(), "n", other_base64), |key| key),
        ("certificates", rsa(), |key| {
            key.with_member("x5c", json!(["MIIB"])).with_member("x5t", "AA")
        }),
        ("x5c that is not an array", rsa(), |key| {
            key.with_member("x5c", "MIIB").with_member("x5u", 7)
        }),
        ("no use", ecdsa(), |key| {
            key.with_member("use", Value::Null).with_member("key_ops", Value::Null)
        }),
        ("an unknown operation", ecdsa(), |key| key.with_member("key_ops", json!(["verify", "x"]))),
        ("no algorithm", ecdsa(), |key| key.with_member("alg", Value::Null)),
        ("no kid", ecdsa(), |key| key.with_member("kid", Value::Null)),
        ("an unknown member", ecdsa(), |key| key.with_member("issuer", json!({"a": [1]}))),
    ];
    let mut cases = Vec::new();
    let mut published = Vec::new();
    for (name, key, change) in odd {
        cases.push(case(name, key.good()));
        published.push(change(key).jwk);
    }
    published.extend([json!({"kty": "AKP", "alg": "ML-DSA-44", "pub": "AA"}), json!(7)]);
    TokenFront::start(&published).assert_accepted(&cases);
}
