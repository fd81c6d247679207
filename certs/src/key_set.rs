//! Key sets (RFC 7517): selects the keys that can verify tokens, and verifies signatures with them.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED,
    EcdsaVerificationAlgorithm, ParsedPublicKey,
};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde_json::Value;

/// The maximum number of keys in a set.
const KEY_LIMIT: usize = 100;
/// The maximum size of a key set in bytes.
pub const KEY_SET_LIMIT_BYTES: usize = 1024 * 1024;
/// The accepted size of an RSA modulus in bits: the minimum of RFC 7518, section 3.3, and a maximum that bounds the
/// cost of a verification.
const RSA_BITS: RangeInclusive<usize> = 2048..=8192;
/// The length of a public key of Ed25519 (RFC 8032, section 5.1.5).
const ED25519_BYTES: usize = 32;

/// A signature algorithm of tokens (RFC 7518, section 3.1; RFC 8037, section 3.1). None of them uses a shared
/// secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of the RFCs")]
pub enum SignatureAlgorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    Es512,
    EdDsa,
}

impl SignatureAlgorithm {
    /// Parses the name of an algorithm (`alg`). None if the algorithm is not accepted.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "RS256" => Self::Rs256,
            "RS384" => Self::Rs384,
            "RS512" => Self::Rs512,
            "PS256" => Self::Ps256,
            "PS384" => Self::Ps384,
            "PS512" => Self::Ps512,
            "ES256" => Self::Es256,
            "ES384" => Self::Es384,
            "ES512" => Self::Es512,
            "EdDSA" => Self::EdDsa,
            _ => return None,
        })
    }
}

/// A text with its signature, from a token (RFC 7515, section 7.1).
#[derive(Debug, Clone, Copy)]
pub struct SignedText<'a> {
    /// The algorithm that the token's header names.
    pub algorithm: SignatureAlgorithm,
    /// The key ID (`kid`).
    pub key_id: Option<&'a str>,
    /// The signed text.
    pub text: &'a str,
    /// The signature, base64url.
    pub signature: &'a str,
}

/// The keys of one issuer (RFC 7517, section 5).
#[derive(Debug, PartialEq, Eq)]
pub struct KeySet {
    keys: Vec<Key>,
}

/// A key with its permitted algorithms.
struct Key {
    id: Option<String>,
    algorithms: &'static [SignatureAlgorithm],
    verifier: KeyVerifier,
    /// The key as JSON; two keys are equal when their texts are.
    text: String,
}

enum KeyVerifier {
    Library(DecodingKey),
    /// An EC public key, checked once to be on its curve. The library repeats the check for every token and does not
    /// support P-521.
    Point(ParsedPublicKey),
}

/// An error of [`KeySet::parse`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySetError {
    /// The set has too many bytes or keys.
    TooLarge(String),
    /// The text is not a key set, or has no usable key.
    Invalid(String),
}

/// The result of verifying a token with a key set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignatureVerdict {
    /// A key of the set made the signature.
    Signed,
    /// No key of the set made the signature.
    Unsigned,
    /// The set has no key with this key ID.
    UnknownKey,
}

impl fmt::Display for KeySetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge(reason) | Self::Invalid(reason) => f.write_str(reason),
        }
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Key {}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("id", &self.id).field("algorithms", &self.algorithms).finish()
    }
}

impl KeySet {
    /// Reads a set. Keys that cannot verify a token are left out.
    ///
    /// # Errors
    /// The bytes are not a key set, exceed a limit, or have no key for the verification of signatures.
    pub fn parse(bytes: &[u8]) -> Result<Self, KeySetError> {
        #[derive(Deserialize)]
        struct Set {
            keys: Vec<Value>,
        }
        if bytes.len() > KEY_SET_LIMIT_BYTES {
            return Err(KeySetError::TooLarge(format!(
                "invalid key set: must have {KEY_SET_LIMIT_BYTES} bytes at most"
            )));
        }
        // Some files begin with a byte order mark.
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let set: Set = serde_json::from_slice(bytes).map_err(|error| {
            KeySetError::Invalid(format!(
                "invalid key set: {error}: must be a JSON object with a list \"keys\" (RFC 7517)"
            ))
        })?;
        if set.keys.len() > KEY_LIMIT {
            return Err(KeySetError::TooLarge(format!(
                "invalid key set: must have {KEY_LIMIT} keys at most"
            )));
        }
        let keys: Vec<Key> = set.keys.iter().filter_map(usable).collect();
        if keys.is_empty() {
            Err(KeySetError::Invalid(without_usable(&set.keys)))
        } else {
            Ok(Self { keys })
        }
    }

    /// Verifies a signature with the keys of the set and their permitted algorithms. Several keys may have the same
    /// key ID, and keys without an ID match every token.
    #[must_use]
    pub fn verify(&self, signed: SignedText<'_>) -> SignatureVerdict {
        let named = |key: &&Key| match (signed.key_id, &key.id) {
            (Some(wanted), Some(id)) => wanted == *id,
            _ => true,
        };
        let mut named = self.keys.iter().filter(named).peekable();
        if named.peek().is_none() {
            return SignatureVerdict::UnknownKey;
        }
        let mut fitting = named.filter(|key| key.algorithms.contains(&signed.algorithm));
        if fitting.any(|key| key.verifies(signed)) {
            SignatureVerdict::Signed
        } else {
            SignatureVerdict::Unsigned
        }
    }
}

impl Key {
    fn verifies(&self, signed: SignedText<'_>) -> bool {
        let key = match &self.verifier {
            KeyVerifier::Library(key) => key,
            KeyVerifier::Point(key) => {
                let signature = URL_SAFE_NO_PAD.decode(signed.signature);
                return signature
                    .is_ok_and(|bytes| key.verify_sig(signed.text.as_bytes(), &bytes).is_ok());
            }
        };
        let algorithm = match signed.algorithm {
            SignatureAlgorithm::Rs256 => Algorithm::RS256,
            SignatureAlgorithm::Rs384 => Algorithm::RS384,
            SignatureAlgorithm::Rs512 => Algorithm::RS512,
            SignatureAlgorithm::Ps256 => Algorithm::PS256,
            SignatureAlgorithm::Ps384 => Algorithm::PS384,
            SignatureAlgorithm::Ps512 => Algorithm::PS512,
            SignatureAlgorithm::EdDsa => Algorithm::EdDSA,
            SignatureAlgorithm::Es256 | SignatureAlgorithm::Es384 | SignatureAlgorithm::Es512 => {
                return false;
            }
        };
        jsonwebtoken::crypto::verify(signed.signature, signed.text.as_bytes(), key, algorithm)
            .unwrap_or(false)
    }
}

/// Describes a set without usable keys.
fn without_usable(keys: &[Value]) -> String {
    let kinds: BTreeSet<&str> = keys.iter().filter_map(|key| key.get("kty")?.as_str()).collect();
    let found = match kinds.len() {
        0 => "no key".to_owned(),
        _ => format!("keys of type {}", Vec::from_iter(kinds).join(", ")),
    };
    format!(
        "invalid key set with {found}: must have a public key for signatures: RSA of {} to {} bits, EC of P-256, \
         P-384 or P-521, or OKP of Ed25519",
        RSA_BITS.start(),
        RSA_BITS.end()
    )
}

/// Returns the key if it can verify tokens. A member that is null is treated as absent; members that are not needed,
/// such as `x5c`, are ignored.
fn usable(value: &Value) -> Option<Key> {
    let member = |name: &str| value.get(name).filter(|member| !member.is_null());
    if member("use").is_some_and(|used| used != "sig") {
        return None;
    }
    let verifies = |operations: &Vec<Value>| operations.iter().any(|one| one == "verify");
    if member("key_ops").is_some_and(|all| !all.as_array().is_some_and(verifies)) {
        return None;
    }
    let (of_its_kind, verifier) = match member("kty")?.as_str()? {
        "RSA" => rsa(value)?,
        "EC" => point(value)?,
        "OKP" if member("crv")? == "Ed25519" => {
            let point = bytes(value, "x").filter(|point| point.len() == ED25519_BYTES)?;
            let key = DecodingKey::from_ed_components(&URL_SAFE_NO_PAD.encode(point)).ok()?;
            (&[SignatureAlgorithm::EdDsa][..], KeyVerifier::Library(key))
        }
        // Symmetric keys are rejected: a secret in a published set is a mistake.
        _ => return None,
    };
    let algorithms = match member("alg") {
        None => of_its_kind,
        Some(named) => {
            let word = named.as_str()?;
            let algorithm = SignatureAlgorithm::parse(word)?;
            let at = of_its_kind.iter().position(|one| *one == algorithm)?;
            of_its_kind.get(at..=at)?
        }
    };
    let id = member("kid").and_then(Value::as_str).map(str::to_owned);
    Some(Key { id, algorithms, verifier, text: value.to_string() })
}

/// Decodes a base64url member. Padding and the standard alphabet are accepted, because some issuers use them.
fn bytes(value: &Value, name: &str) -> Option<Vec<u8>> {
    let text = value.get(name)?.as_str()?.trim_end_matches('=');
    URL_SAFE_NO_PAD.decode(text.replace('+', "-").replace('/', "_")).ok()
}

/// Decodes a number and strips leading zeros: some issuers write a sign byte, which RFC 7518, section 6.3.1.1, does
/// not allow.
fn number(value: &Value, name: &str) -> Option<Vec<u8>> {
    let bytes = bytes(value, name)?;
    let first = bytes.iter().position(|byte| *byte != 0)?;
    bytes.get(first..).map(<[u8]>::to_vec)
}

fn rsa(value: &Value) -> Option<(&'static [SignatureAlgorithm], KeyVerifier)> {
    let modulus = number(value, "n")?;
    let exponent = number(value, "e")?;
    let bits = modulus.len() * 8 - modulus.first()?.leading_zeros() as usize;
    if !RSA_BITS.contains(&bits) {
        return None;
    }
    let key = DecodingKey::from_rsa_raw_components(&modulus, &exponent);
    Some((
        &[
            SignatureAlgorithm::Rs256,
            SignatureAlgorithm::Rs384,
            SignatureAlgorithm::Rs512,
            SignatureAlgorithm::Ps256,
            SignatureAlgorithm::Ps384,
            SignatureAlgorithm::Ps512,
        ],
        KeyVerifier::Library(key),
    ))
}

/// Reads a point (SEC 1, section 2.3.3) and checks that it is on its curve. Coordinates are padded to the length of
/// the field, because some issuers omit leading zeros.
fn point(value: &Value) -> Option<(&'static [SignatureAlgorithm], KeyVerifier)> {
    let (curve, length, signing): (
        &'static EcdsaVerificationAlgorithm,
        usize,
        &'static [SignatureAlgorithm],
    ) = match value.get("crv")?.as_str()? {
        "P-256" => (&ECDSA_P256_SHA256_FIXED, 32, &[SignatureAlgorithm::Es256]),
        "P-384" => (&ECDSA_P384_SHA384_FIXED, 48, &[SignatureAlgorithm::Es384]),
        "P-521" => (&ECDSA_P521_SHA512_FIXED, 66, &[SignatureAlgorithm::Es512]),
        _ => return None,
    };
    let coordinate = |name: &str| {
        let digits = number(value, name)?;
        let zeros = length.checked_sub(digits.len())?;
        Some([vec![0; zeros], digits].concat())
    };
    let uncompressed = [vec![4], coordinate("x")?, coordinate("y")?].concat();
    Some((signing, KeyVerifier::Point(ParsedPublicKey::new(curve, uncompressed).ok()?)))
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
            assert!(KeySet::parse(set(keys).as_bytes()).is_ok(), "{keys:?}");
        }
        assert!(KeySet::parse(format!("\u{feff}{}", set(&[POINT])).as_bytes()).is_ok());
        let short = set(&[&rsa(255)]);
        let refused = KeySet::parse(short.as_bytes()).expect_err("the modulus is too short");
        assert!(refused.to_string().contains("2048 to 8192 bits"), "{refused}");
    }

    #[test]
    fn key_set_without_a_key_for_signatures_is_refused() {
        let check = |text: &str, expected: &str| {
            let reason = KeySet::parse(text.as_bytes()).expect_err(text).to_string();
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
