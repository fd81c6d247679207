//! JSON Web Signature and JSON Web Key test vectors of C2SP/wycheproof (Apache-2.0).
//!
//! The vectors are read from `../shared/suites` beside the workspace or from the folder in `WEFT_SUITES`; without them the tests
//! are skipped. Their payloads are not claims, so they test signatures only; `integration/tests/tokens` tests whole tokens.

#![expect(clippy::print_stderr, reason = "a test says which vectors it left out")]

use std::path::PathBuf;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use weft_certs::{KeySet, SignatureVerdict};

use super::token::SignedToken;

/// Vectors that are rejected although they are marked valid, with the reason.
const STRICTER: [(&str, &[u64], &str); 4] = [
    (
        SIGNATURES,
        &[1, 348, 352, 357, 358, 359, 372, 373, 376, 377],
        "a shared secret is not a public key",
    ),
    (KEYS, &[2, 13, 14, 15], "a shared secret is not a public key"),
    (SIGNATURES, &[346, 350], "the key is for PS256, the token for PS384"),
    (SIGNATURES, &[347, 351], "the key is for ES521, which is not an algorithm"),
];

/// Vectors that are accepted although they are marked invalid, with the reason.
const LAXER: [(&str, &[u64], &str); 1] =
    [(KEYS, &[7], "the ROCA weakness of a key is its issuer's concern")];

const SIGNATURES: &str = "json_web_signature_test.json";
const KEYS: &str = "json_web_key_test.json";

/// A file of vectors; none, with a message, when it is missing.
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

/// Whether one of these keys verifies this signature.
fn verifies(keys: &Value, token: &str) -> bool {
    let set = if keys["keys"].is_array() { keys.clone() } else { json!({"keys": [keys]}) };
    let Ok(set) = KeySet::parse(set.to_string().as_bytes()) else { return false };
    let Ok(signed) = SignedToken::read(token) else { return false };
    URL_SAFE_NO_PAD.decode(signed.payload).is_ok()
        && set.verify(signed.signed_text()) == SignatureVerdict::Signed
}

/// The numbers of the vectors with another result than marked, with a description.
fn mismatches_in(name: &str, vectors: &Value) -> Vec<(u64, String)> {
    let mut count = 0;
    let mut mismatches = Vec::new();
    for group in vectors["testGroups"].as_array().unwrap() {
        // Where all keys are shared secrets, the group has no public half.
        let keys = group.get("public").unwrap_or_else(|| &group["private"]);
        for test in group["tests"].as_array().unwrap() {
            count += 1;
            let accepted = verifies(keys, test["jws"].as_str().unwrap());
            if accepted != (test["result"] == "valid") {
                let description =
                    format!("{name}: {} {} {test:?}", group["comment"], test["result"]);
                mismatches.push((test["tcId"].as_u64().unwrap(), description));
            }
        }
    }
    assert_eq!(vectors["numberOfTests"], count);
    mismatches
}

fn check(name: &str) {
    let Some(vectors) = vectors(name) else { return };
    let mut mismatches = mismatches_in(name, &vectors);
    for (file, numbers, _) in STRICTER.iter().chain(&LAXER) {
        for number in numbers.iter().filter(|_| *file == name) {
            let position = mismatches.iter().position(|(other, _)| other == number);
            assert!(position.is_some(), "{name}: vector {number} has the marked result");
            mismatches.remove(position.unwrap());
        }
    }
    assert!(mismatches.is_empty(), "{}: {mismatches:#?}", mismatches.len());
}

#[test]
fn signature_vectors_have_the_expected_results() {
    check(SIGNATURES);
}

#[test]
fn key_vectors_have_the_expected_results() {
    check(KEYS);
}
