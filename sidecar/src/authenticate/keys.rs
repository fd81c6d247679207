//! Key sets (RFC 7517) of issuers: which keys of a set may verify a token, and whether one does.

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED,
    EcdsaVerificationAlgorithm, ParsedPublicKey,
};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::jwk::{
    AlgorithmParameters, EllipticCurve, EllipticCurveKeyParameters, Jwk, KeyOperations,
    PublicKeyUse,
};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;

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
            keys: Vec<serde_json::Value>,
        }
        if bytes.len() > SET_LIMIT_BYTES {
            return Err(SetError::TooLarge(format!("it is larger than {SET_LIMIT_BYTES} bytes")));
        }
        let set: Set = serde_json::from_slice(bytes)
            .map_err(|error| SetError::Invalid(format!("it is no key set: {error}")))?;
        if set.keys.len() > KEY_LIMIT {
            return Err(SetError::TooLarge(format!("it holds more than {KEY_LIMIT} keys")));
        }
        let keys: Vec<Key> = set.keys.into_iter().filter_map(usable).collect();
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

fn usable(value: serde_json::Value) -> Option<Key> {
    let text = value.to_string();
    // As it stands: the library does not know the words of all algorithms.
    let named = value.get("alg").map(|word| word.as_str().map(str::to_owned));
    let jwk: Jwk = serde_json::from_value(value).ok()?;
    let common = &jwk.common;
    if common.public_key_use.as_ref().is_some_and(|used| *used != PublicKeyUse::Signature) {
        return None;
    }
    if common.key_operations.as_ref().is_some_and(|all| !all.contains(&KeyOperations::Verify)) {
        return None;
    }
    let algorithms = algorithms(&jwk.algorithm, named)?;
    let verifier = match &jwk.algorithm {
        AlgorithmParameters::EllipticCurve(ec) => Verifier::Point(point(ec)?),
        _ => Verifier::Library(DecodingKey::from_jwk(&jwk).ok()?),
    };
    Some(Key { id: common.key_id.clone(), algorithms, verifier, text })
}

/// What a key may be used with: the algorithm that it names, and else those of its kind. A shared secret in
/// a published set is a mistake.
fn algorithms(
    key: &AlgorithmParameters,
    named: Option<Option<String>>,
) -> Option<&'static [Signing]> {
    let of_its_kind: &'static [Signing] = match key {
        AlgorithmParameters::RSA(rsa) if RSA_BITS.contains(&bits(&rsa.n)?) => &[
            Signing::Rs256,
            Signing::Rs384,
            Signing::Rs512,
            Signing::Ps256,
            Signing::Ps384,
            Signing::Ps512,
        ],
        AlgorithmParameters::EllipticCurve(ec) => match ec.curve {
            EllipticCurve::P256 => &[Signing::Es256],
            EllipticCurve::P384 => &[Signing::Es384],
            EllipticCurve::P521 => &[Signing::Es512],
            _ => return None,
        },
        AlgorithmParameters::OctetKeyPair(pair) if pair.curve == EllipticCurve::Ed25519 => {
            &[Signing::EdDsa]
        }
        _ => return None,
    };
    let Some(named) = named else {
        return Some(of_its_kind);
    };
    let word = named?;
    let at = of_its_kind.iter().position(|algorithm| {
        Signing::WORDS.iter().any(|(known, meant)| *known == word && meant == algorithm)
    })?;
    of_its_kind.get(at..=at)
}

/// How many bits a number in base64url has.
fn bits(number: &str) -> Option<usize> {
    let bytes = URL_SAFE_NO_PAD.decode(number).ok()?;
    let digits = bytes.iter().position(|byte| *byte != 0).and_then(|first| bytes.get(first..))?;
    Some(digits.len() * 8 - digits.first()?.leading_zeros() as usize)
}

/// A point (SEC 1, section 2.3.3) that is on its curve.
fn point(ec: &EllipticCurveKeyParameters) -> Option<ParsedPublicKey> {
    let (curve, length): (&'static EcdsaVerificationAlgorithm, _) = match ec.curve {
        EllipticCurve::P256 => (&ECDSA_P256_SHA256_FIXED, 32),
        EllipticCurve::P384 => (&ECDSA_P384_SHA384_FIXED, 48),
        EllipticCurve::P521 => (&ECDSA_P521_SHA512_FIXED, 66),
        _ => return None,
    };
    let coordinate =
        |text: &str| URL_SAFE_NO_PAD.decode(text).ok().filter(|bytes| bytes.len() == length);
    let uncompressed = [vec![4], coordinate(&ec.x)?, coordinate(&ec.y)?].concat();
    ParsedPublicKey::new(curve, uncompressed).ok()
}
