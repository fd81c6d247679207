//! Key sets (RFC 7517) of issuers: which keys of a set may verify a token, and whether one does.

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED,
    EcdsaVerificationAlgorithm, ParsedPublicKey,
};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde_json::Value;

use super::token::{Signed, Signing};

/// The most keys of a set.
const KEY_LIMIT: usize = 100;
/// The largest set.
pub(crate) const SET_LIMIT_BYTES: usize = 1024 * 1024;
/// How many bits a modulus may have (RFC 7518, section 3.3; and one that costs no more than it should).
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// The keys of one issuer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct KeySet {
    keys: Vec<Key>,
}

/// A key, and the algorithms it may be used with.
struct Key {
    id: Option<String>,
    algorithms: &'static [Signing],
    verifier: Verifier,
    /// As it stood, by which one is told from another.
    text: String,
}

enum Verifier {
    Library(DecodingKey),
    /// A point of a curve, proved to be on it once; the library does so for every token, and does not know
    /// P-521.
    Point(ParsedPublicKey),
}

/// Why a set cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SetError {
    /// It is too long, or has too many keys.
    TooLarge(String),
    /// It is none, or has no key that can be used.
    Invalid(String),
}

/// What a set says of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// One of its keys has signed it.
    Signed,
    /// None has.
    Unsigned,
    /// It has no key of that name.
    UnknownKey,
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Key {}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").field("id", &self.id).field("algorithms", &self.algorithms).finish()
    }
}

impl KeySet {
    /// Reads a set. Keys of a kind that we cannot use are left out.
    ///
    /// # Errors
    /// When it is no key set, or holds no key that we can use.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, SetError> {
        #[derive(Deserialize)]
        struct Set {
            keys: Vec<Value>,
        }
        if bytes.len() > SET_LIMIT_BYTES {
            return Err(SetError::TooLarge(format!("it is larger than {SET_LIMIT_BYTES} bytes")));
        }
        // Some files begin with a byte order mark.
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let set: Set = serde_json::from_slice(bytes)
            .map_err(|error| SetError::Invalid(format!("it is no key set: {error}")))?;
        if set.keys.len() > KEY_LIMIT {
            return Err(SetError::TooLarge(format!("it holds more than {KEY_LIMIT} keys")));
        }
        let keys: Vec<Key> = set.keys.iter().filter_map(usable).collect();
        if keys.is_empty() {
            Err(SetError::Invalid("it holds no key that can verify a token".into()))
        } else {
            Ok(Self { keys })
        }
    }

    /// Whether a key of the set has signed a text, by an algorithm of its own. Keys may share a name, or
    /// have none.
    pub(crate) fn verify(&self, token: &Signed<'_>) -> Verdict {
        let named = |key: &&Key| match (&token.key, &key.id) {
            (Some(wanted), Some(id)) => wanted == id,
            _ => true,
        };
        let mut named = self.keys.iter().filter(named).peekable();
        if named.peek().is_none() {
            return Verdict::UnknownKey;
        }
        let mut fitting = named.filter(|key| key.algorithms.contains(&token.algorithm));
        if fitting.any(|key| key.verifies(token)) { Verdict::Signed } else { Verdict::Unsigned }
    }
}

impl Key {
    fn verifies(&self, token: &Signed<'_>) -> bool {
        let key = match &self.verifier {
            Verifier::Library(key) => key,
            Verifier::Point(key) => {
                let signature = URL_SAFE_NO_PAD.decode(token.signature);
                return signature
                    .is_ok_and(|bytes| key.verify_sig(token.text.as_bytes(), &bytes).is_ok());
            }
        };
        let algorithm = match token.algorithm {
            Signing::Rs256 => Algorithm::RS256,
            Signing::Rs384 => Algorithm::RS384,
            Signing::Rs512 => Algorithm::RS512,
            Signing::Ps256 => Algorithm::PS256,
            Signing::Ps384 => Algorithm::PS384,
            Signing::Ps512 => Algorithm::PS512,
            Signing::EdDsa => Algorithm::EdDSA,
            Signing::Es256 | Signing::Es384 | Signing::Es512 => return false,
        };
        jsonwebtoken::crypto::verify(token.signature, token.text.as_bytes(), key, algorithm)
            .unwrap_or(false)
    }
}

/// A key that can verify a token. A member that is null counts as absent; members that are of no use here, such
/// as `x5c`, are not looked at.
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
            let point = URL_SAFE_NO_PAD.encode(bytes(value, "x")?);
            let key = DecodingKey::from_ed_components(&point).ok()?;
            (&[Signing::EdDsa][..], Verifier::Library(key))
        }
        // A shared secret in a published set is a mistake.
        _ => return None,
    };
    let algorithms = match member("alg") {
        None => of_its_kind,
        Some(named) => {
            let word = named.as_str()?;
            let at = of_its_kind.iter().position(|algorithm| {
                Signing::WORDS.iter().any(|(known, meant)| *known == word && meant == algorithm)
            })?;
            of_its_kind.get(at..=at)?
        }
    };
    let id = member("kid").and_then(Value::as_str).map(str::to_owned);
    Some(Key { id, algorithms, verifier, text: value.to_string() })
}

/// A member in base64url. Some issuers pad it, or write the other base64.
fn bytes(value: &Value, name: &str) -> Option<Vec<u8>> {
    let text = value.get(name)?.as_str()?.trim_end_matches('=');
    URL_SAFE_NO_PAD.decode(text.replace('+', "-").replace('/', "_")).ok()
}

/// A number without the zeros before it: some issuers write a byte for the sign (RFC 7518, section 6.3.1.1, has
/// none).
fn number(value: &Value, name: &str) -> Option<Vec<u8>> {
    let bytes = bytes(value, name)?;
    let first = bytes.iter().position(|byte| *byte != 0)?;
    bytes.get(first..).map(<[u8]>::to_vec)
}

fn rsa(value: &Value) -> Option<(&'static [Signing], Verifier)> {
    let (modulus, exponent) = (number(value, "n")?, number(value, "e")?);
    let bits = modulus.len() * 8 - modulus.first()?.leading_zeros() as usize;
    if !RSA_BITS.contains(&bits) {
        return None;
    }
    let key = DecodingKey::from_rsa_raw_components(&modulus, &exponent);
    Some((
        &[
            Signing::Rs256,
            Signing::Rs384,
            Signing::Rs512,
            Signing::Ps256,
            Signing::Ps384,
            Signing::Ps512,
        ],
        Verifier::Library(key),
    ))
}

/// A point (SEC 1, section 2.3.3) that is on its curve. Coordinates are brought to the length of the field:
/// some issuers leave zeros out before them.
fn point(value: &Value) -> Option<(&'static [Signing], Verifier)> {
    let (curve, length, signing): (&'static EcdsaVerificationAlgorithm, usize, &'static [Signing]) =
        match value.get("crv")?.as_str()? {
            "P-256" => (&ECDSA_P256_SHA256_FIXED, 32, &[Signing::Es256]),
            "P-384" => (&ECDSA_P384_SHA384_FIXED, 48, &[Signing::Es384]),
            "P-521" => (&ECDSA_P521_SHA512_FIXED, 66, &[Signing::Es512]),
            _ => return None,
        };
    let coordinate = |name: &str| {
        let digits = number(value, name)?;
        let zeros = length.checked_sub(digits.len())?;
        Some([vec![0; zeros], digits].concat())
    };
    let uncompressed = [vec![4], coordinate("x")?, coordinate("y")?].concat();
    Some((signing, Verifier::Point(ParsedPublicKey::new(curve, uncompressed).ok()?)))
}
