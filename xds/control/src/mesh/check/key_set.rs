//! Checks a key set (RFC 7517) of a file: sidecars must be able to verify a token with one of its keys.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED,
    EcdsaVerificationAlgorithm, ParsedPublicKey,
};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use serde_json::Value;

/// The most keys of a set and the largest set that sidecars take.
const KEY_LIMIT: usize = 100;
const SET_LIMIT_BYTES: usize = 1024 * 1024;
/// The bits of a modulus that sidecars take (RFC 7518, section 3.3).
const RSA_BITS: RangeInclusive<usize> = 2048..=8192;

const RSA_ALGORITHMS: [&str; 6] = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"];

#[derive(Deserialize)]
struct Set {
    keys: Vec<Value>,
}

/// Checks that sidecars can verify tokens with a set.
///
/// # Errors
/// The bytes are no key set, exceed a limit of sidecars, or have no key for the verification of signatures.
pub(super) fn check(bytes: &[u8]) -> Result<(), String> {
    if bytes.len() > SET_LIMIT_BYTES {
        return Err(format!("invalid key set: must have {SET_LIMIT_BYTES} bytes at most"));
    }
    // Some files begin with a byte order mark.
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let set: Set = serde_json::from_slice(bytes).map_err(|error| {
        format!("invalid key set: {error}: must be a JSON object with a list \"keys\" (RFC 7517)")
    })?;
    if set.keys.len() > KEY_LIMIT {
        return Err(format!("invalid key set: must have {KEY_LIMIT} keys at most"));
    }
    if set.keys.iter().any(|key| is_usable(key).is_some()) {
        return Ok(());
    }
    let kinds: BTreeSet<&str> =
        set.keys.iter().filter_map(|key| key.get("kty")?.as_str()).collect();
    let found = match kinds.len() {
        0 => "no key".to_owned(),
        _ => format!("keys of type {}", Vec::from_iter(kinds).join(", ")),
    };
    Err(format!(
        "invalid key set with {found}: must have a public key for signatures: RSA of {} to {} bits, EC of P-256, \
         P-384 or P-521, or OKP of Ed25519",
        RSA_BITS.start(),
        RSA_BITS.end()
    ))
}

/// Some when a key can verify a token. A member that is null counts as absent.
fn is_usable(key: &Value) -> Option<()> {
    let member = |name: &str| key.get(name).filter(|member| !member.is_null());
    let is_for_signatures = member("use").is_none_or(|used| used == "sig");
    let verifies = |operations: &Vec<Value>| operations.iter().any(|one| one == "verify");
    let may_verify = member("key_ops").is_none_or(|all| all.as_array().is_some_and(verifies));
    let algorithms = match member("kty")?.as_str()? {
        "RSA" => rsa(key)?,
        "EC" => point(key)?,
        "OKP" if member("crv")? == "Ed25519" && bytes(key, "x")?.len() == 32 => &["EdDSA"],
        _ => return None,
    };
    let has_algorithm = member("alg").is_none_or(|named| algorithms.iter().any(|one| named == one));
    (is_for_signatures && may_verify && has_algorithm).then_some(())
}

/// A member in base64url. Some issuers pad it, or write the other base64.
fn bytes(key: &Value, name: &str) -> Option<Vec<u8>> {
    let text = key.get(name)?.as_str()?.trim_end_matches('=');
    URL_SAFE_NO_PAD.decode(text.replace('+', "-").replace('/', "_")).ok()
}

/// A number without leading zeros.
fn number(key: &Value, name: &str) -> Option<Vec<u8>> {
    let bytes = bytes(key, name)?;
    let first = bytes.iter().position(|byte| *byte != 0)?;
    bytes.get(first..).map(<[u8]>::to_vec)
}

fn rsa(key: &Value) -> Option<&'static [&'static str]> {
    let modulus = number(key, "n")?;
    number(key, "e")?;
    let bits = modulus.len() * 8 - modulus.first()?.leading_zeros() as usize;
    RSA_BITS.contains(&bits).then_some(&RSA_ALGORITHMS)
}

/// The algorithm of a point that is on its curve.
fn point(key: &Value) -> Option<&'static [&'static str]> {
    let (curve, length, algorithm): (&'static EcdsaVerificationAlgorithm, usize, &'static [_]) =
        match key.get("crv")?.as_str()? {
            "P-256" => (&ECDSA_P256_SHA256_FIXED, 32, &["ES256"]),
            "P-384" => (&ECDSA_P384_SHA384_FIXED, 48, &["ES384"]),
            "P-521" => (&ECDSA_P521_SHA512_FIXED, 66, &["ES512"]),
            _ => return None,
        };
    let coordinate = |name: &str| {
        let digits = number(key, name)?;
        let zeros = length.checked_sub(digits.len())?;
        Some([vec![0; zeros], digits].concat())
    };
    let uncompressed = [vec![4], coordinate("x")?, coordinate("y")?].concat();
    ParsedPublicKey::new(curve, uncompressed).ok().map(|_| algorithm)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The key of RFC 7517, appendix A.1.
    const POINT: &str = r#""kty":"EC","crv":"P-256","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM""#;
    /// The key of RFC 8037, appendix A.2.
    const EDWARDS: &str =
        r#""kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo""#;
    const SECRET: &str = r#""kty":"oct","k":"c2VjcmV0""#;

    fn set(keys: &[&str]) -> String {
        let keys: Vec<String> = keys.iter().map(|key| format!("{{{key}}}")).collect();
        format!("{{\"keys\":[{}]}}", keys.join(","))
    }

    #[test]
    fn key_set_with_a_key_for_signatures_is_accepted() {
        let rsa = |bytes: usize| {
            let modulus = URL_SAFE_NO_PAD.encode(vec![255; bytes]);
            format!(r#""kty":"RSA","n":"{modulus}","e":"AQAB""#)
        };
        let signing = format!(r#"{POINT},"use":"sig","alg":"ES256","key_ops":["verify"]"#);
        for keys in [&[POINT][..], &[EDWARDS], &[SECRET, POINT], &[&rsa(256)], &[&signing]] {
            assert_eq!(check(set(keys).as_bytes()), Ok(()), "{keys:?}");
        }
        assert_eq!(check(format!("\u{feff}{}", set(&[POINT])).as_bytes()), Ok(()));
        let short = set(&[&rsa(255)]);
        assert!(check(short.as_bytes()).is_err_and(|reason| reason.contains("2048 to 8192 bits")));
    }

    #[test]
    fn key_set_without_a_key_for_signatures_is_refused() {
        let check = |text: &str, expected: &str| {
            let reason = check(text.as_bytes()).expect_err(text);
            assert!(reason.starts_with(expected), "{text}: {reason}");
        };
        for text in ["", "{}", "[]", "keys", "{\"keys\": 1}"] {
            check(text, "invalid key set: ");
        }
        check(&set(&[]), "invalid key set with no key: must have a public key for signatures");
        check(&set(&[SECRET]), "invalid key set with keys of type oct: must have a public key");
        let with = |member: &str| set(&[&format!("{POINT},{member}")]);
        for member in [r#""use":"enc""#, r#""alg":"RS256""#, r#""key_ops":["sign"]"#] {
            check(&with(member), "invalid key set with keys of type EC: ");
        }
        check(&set(&[&POINT.replace("4Etl6", "4Etl7")]), "invalid key set with keys of type EC");
        check(&set(&[POINT; 101]), "invalid key set: must have 100 keys at most");
    }
}
