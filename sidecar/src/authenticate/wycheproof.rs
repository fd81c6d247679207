//! Signatures and keys of others, judged as they say: the JSON Web Signature and JSON Web Key vectors of
//! C2SP/wycheproof (Apache-2.0).
//!
//! They are read where they are present, in `../shared/suites` beside the workspace or in the folder that
//! `WEFT_SUITES` names. What they sign are no claims, so that a whole token cannot be made of them; the
//! tokens of `integration/tests/tokens` are whole.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test stops at what it did not expect, and says what it left out"
)]

use std::path::PathBuf;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use weft_certs::{KeySet, SignatureVerdict};

use super::token::SignedToken;

/// What is refused although it is said to be valid.
const STRICTER: [(&str, &[u64], &str); 4] = [
    (SIGNATURES, &[1, 348, 352, 357, 358, 359, 372, 373, 376, 377], "a shared secret is no key"),
    (KEYS, &[2, 13, 14, 15], "a shared secret is no key"),
    (SIGNATURES, &[346, 350], "the key is of PS256, the token of PS384"),
    (SIGNATURES, &[347, 351], "the key is of ES521, which is no algorithm"),
];

/// What is taken although it is said to be invalid.
const LAXER: [(&str, &[u64], &str); 1] =
    [(KEYS, &[7], "how a key was generated is its issuer's concern, who would know of ROCA")];

const SIGNATURES: &str = "json_web_signature_test.json";
const KEYS: &str = "json_web_key_test.json";

/// A file of vectors; none when it is not there, which the test then says.
fn vectors(name: &str) -> Option<Value> {
    let beside = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/suites");
    let folder = std::env::var_os("WEFT_SUITES").map_or(beside, PathBuf::from);
    let file = folder.join("wycheproof").join(name);
    if !file.exists() {
        eprintln!("skipped: there is no {}", file.display());
        return None;
    }
    Some(serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap())
}

/// Whether one of these keys has signed this, up to what a payload says.
fn verifies(keys: &Value, token: &str) -> bool {
    let set = if keys["keys"].is_array() { keys.clone() } else { json!({"keys": [keys]}) };
    let Ok(set) = KeySet::parse(set.to_string().as_bytes()) else { return false };
    let Ok(signed) = SignedToken::read(token) else { return false };
    URL_SAFE_NO_PAD.decode(signed.payload).is_ok()
        && set.verify(signed.signed_text()) == SignatureVerdict::Signed
}

/// The numbers of what is judged otherwise than it should be, with what is said of each.
fn judged_otherwise(name: &str, vectors: &Value) -> Vec<(u64, String)> {
    let mut count = 0;
    let mut otherwise = Vec::new();
    for group in vectors["testGroups"].as_array().unwrap() {
        // Where all keys are shared secrets, there is no public half.
        let keys = group.get("public").unwrap_or_else(|| &group["private"]);
        for test in group["tests"].as_array().unwrap() {
            count += 1;
            let taken = verifies(keys, test["jws"].as_str().unwrap());
            if taken != (test["result"] == "valid") {
                let told = format!("{name}: {} {} {test:?}", group["comment"], test["result"]);
                otherwise.push((test["tcId"].as_u64().unwrap(), told));
            }
        }
    }
    assert_eq!(vectors["numberOfTests"], count);
    otherwise
}

fn check(name: &str) {
    let Some(vectors) = vectors(name) else { return };
    let mut otherwise = judged_otherwise(name, &vectors);
    for (file, numbers, _) in STRICTER.iter().chain(&LAXER) {
        for number in numbers.iter().filter(|_| *file == name) {
            let place = otherwise.iter().position(|(other, _)| other == number);
            assert!(place.is_some(), "{name}: {number} is judged as they say");
            otherwise.remove(place.unwrap());
        }
    }
    assert!(otherwise.is_empty(), "{}: {otherwise:#?}", otherwise.len());
}

#[test]
fn signatures_are_judged_as_they_say() {
    check(SIGNATURES);
}

#[test]
fn keys_are_judged_as_they_say() {
    check(KEYS);
}
