//! Keys that are published and must not verify a token all the same.

use aws_lc_rs::digest;
use aws_lc_rs::signature::{self, RsaPublicKeyComponents};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use crate::front::{Case, Front, case};
use crate::issuer::{Key, from_hex, rsa_pair};

/// Holds that none of these keys verifies what it has signed.
#[track_caller]
pub(crate) fn check(keys: &[(&str, Key)]) {
    let cases: Vec<Case> = keys.iter().map(|(name, key)| case(*name, key.good())).collect();
    let published: Vec<Value> = keys.iter().map(|(_, key)| key.jwk.clone()).collect();
    Front::start(&published).refuses(&cases);
}

fn decoded(text: &Value) -> Vec<u8> {
    URL_SAFE_NO_PAD.decode(text.as_str().expect("it is a text")).expect("it is base64")
}

/// A key by which everybody signs: its exponent is 1, so that a signature is what it is made of.
fn of_exponent_1() -> Key {
    let key = Key::rsa(&rsa_pair(), "RS256").saying("e", "AQ");
    Key::signing(key.jwk, |message| {
        // RFC 8017, section 9.2.
        let told = from_hex("3031300d060960864801650304020105000420");
        let told = [&told, digest::digest(&digest::SHA256, message).as_ref()].concat();
        let filling = vec![0xff; 256 - 3 - told.len()];
        [&[0, 1], &filling[..], &[0], &told].concat()
    })
}

#[test]
fn a_weak_key_does_not_verify() {
    let short = Key::rsa_of_1024_bits();
    // It does sign, as everybody finds who takes short keys.
    let [n, e] = ["n", "e"].map(|part| decoded(&short.jwk[part]));
    let public = RsaPublicKeyComponents { n, e };
    let lax = &signature::RSA_PKCS1_1024_8192_SHA256_FOR_LEGACY_USE_ONLY;
    public.verify(lax, b"x", &short.signature("x")).expect("the signature is right");
    check(&[("RSA of 1024 bits", short), ("exponent 1", of_exponent_1())]);
}

#[test]
fn a_published_secret_does_not_verify() {
    let secret = [7; 64];
    check(&[
        ("HS256", Key::secret("HS256", &secret)),
        ("HS384", Key::secret("HS384", &secret)),
        ("HS512", Key::secret("HS512", &secret)),
        ("an empty secret", Key::secret("HS256", b"")),
        ("a secret for ES256", Key::secret("HS256", &secret).saying("alg", "ES256")),
    ]);
}

#[test]
fn a_key_for_something_else_does_not_verify() {
    let ecdsa = || Key::ecdsa("ES256").saying("kid", "other");
    let curved = |curve: &str| Key::ed25519().saying("crv", curve);
    check(&[
        ("X25519", curved("X25519")),
        ("Ed448", curved("Ed448")),
        ("Ed25519 in lower case", curved("ed25519")),
        ("use is enc", ecdsa().saying("use", "enc")),
        ("use is unknown", ecdsa().saying("use", "tls")),
        ("use is empty", ecdsa().saying("use", "")),
        ("another curve", ecdsa().saying("crv", "P-384")),
        ("a curve that nobody knows", ecdsa().saying("crv", "secp256k1")),
        ("another kind", ecdsa().saying("kty", "RSA")),
        ("a point that is on no curve", ecdsa().saying("y", ecdsa().jwk["y"].clone())),
        ("a coordinate that is too short", ecdsa().saying("x", "AA")),
        ("no coordinate", ecdsa().saying("x", "")),
    ]);
}

#[test]
fn a_key_verifies_by_the_algorithm_that_it_says() {
    let pair = rsa_pair();
    let mut published = Vec::new();
    // The token says what the key is in truth.
    let mut called = |key: Key, algorithm: &str| {
        let name = format!("{} that is called {algorithm:?}", key.jwk["alg"]);
        let token = key.good();
        published.push(key.saying("alg", algorithm).jwk);
        case(name, token)
    };
    let others = ["ES384", "RS256", "EdDSA", "HS256", "none", "ECDH-ES", "es256", ""];
    let mut cases: Vec<Case> =
        others.map(|algorithm| called(Key::ecdsa("ES256"), algorithm)).into();
    for algorithm in ["RSA-OAEP", "RSA1_5", "RSA-OAEP-256", "PS256", "RS384", "ES256", "none"] {
        cases.push(called(Key::rsa(&pair, "RS256"), algorithm));
    }
    for algorithm in ["ES256", "ECDH-ES", "HS256"] {
        cases.push(called(Key::ed25519(), algorithm));
    }
    Front::start(&published).refuses(&cases);
}

#[test]
fn a_set_is_used_for_the_keys_in_it_that_are_good() {
    let good = Key::ecdsa("ES384");
    let unknown = [
        json!({"kty": "OKP", "crv": "Ed448", "x": "AA", "kid": "key-ES384"}),
        json!({"kty": "AKP", "alg": "ML-DSA-44", "pub": "AA", "kid": "key-ES384"}),
        json!({"kty": "EC", "crv": "P-256", "kid": "key-ES384"}),
        json!({"kty": "nothing"}),
        json!({}),
    ];
    for key in unknown {
        Front::start(&[key.clone(), good.jwk.clone()]).takes(&[case(key.to_string(), good.good())]);
    }
}

/// A key's member with a zero byte before it.
fn with_zero(key: Key, part: &str) -> Key {
    let bytes = [&[0], &decoded(&key.jwk[part])[..]].concat();
    key.saying(part, URL_SAFE_NO_PAD.encode(bytes))
}

/// A key's member, written in another way.
fn rewritten(key: Key, part: &str, write: fn(&str) -> String) -> Key {
    let text = write(key.jwk[part].as_str().expect("it is a text"));
    key.saying(part, text)
}

/// Keys as issuers publish them that follow RFC 7518 loosely.
#[test]
fn key_in_an_unusual_form_verifies() {
    let (rsa, ecdsa) = (|| Key::rsa(&rsa_pair(), "RS256"), || Key::ecdsa("ES256"));
    let other_base64 = |text: &str| text.replace('-', "+").replace('_', "/");
    type Changed = fn(Key) -> Key;
    let odd: [(&str, Key, Changed); 12] = [
        ("a zero before the modulus", rsa(), |key| with_zero(key, "n")),
        ("a zero before the exponent", rsa(), |key| with_zero(key, "e")),
        ("a zero before a coordinate", ecdsa(), |key| with_zero(key, "x")),
        ("padding", rsa(), |key| rewritten(key, "n", |text| format!("{text}=="))),
        ("the other base64", rewritten(rsa(), "n", other_base64), |key| key),
        ("certificates", rsa(), |key| key.saying("x5c", json!(["MIIB"])).saying("x5t", "AA")),
        ("certificates in no list", rsa(), |key| key.saying("x5c", "MIIB").saying("x5u", 7)),
        ("no use", ecdsa(), |key| key.saying("use", Value::Null).saying("key_ops", Value::Null)),
        ("an unknown operation", ecdsa(), |key| key.saying("key_ops", json!(["verify", "x"]))),
        ("no algorithm", ecdsa(), |key| key.saying("alg", Value::Null)),
        ("no name", ecdsa(), |key| key.saying("kid", Value::Null)),
        ("an unknown member", ecdsa(), |key| key.saying("issuer", json!({"a": [1]}))),
    ];
    let (mut cases, mut published) = (Vec::new(), Vec::new());
    for (name, key, change) in odd {
        cases.push(case(name, key.good()));
        published.push(change(key).jwk);
    }
    published.extend([json!({"kty": "AKP", "alg": "ML-DSA-44", "pub": "AA"}), json!(7)]);
    Front::start(&published).takes(&cases);
}
