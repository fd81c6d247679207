//! Key sets (RFC 7517) of issuers: read from a file, or fetched and kept fresh.
//!
//! Loading is control work: it happens beside the workers, and what they see is a finished set. A
//! set that cannot be fetched or read leaves the last good one in force.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet, KeyAlgorithm};
use jsonwebtoken::{Algorithm, DecodingKey};

/// The most keys of a set.
const KEY_LIMIT: usize = 1000;
/// The largest set.
pub(crate) const SET_LIMIT_BYTES: usize = 1024 * 1024;

/// The keys of one issuer.
#[derive(Debug)]
pub(crate) struct KeySet {
    keys: Vec<Key>,
}

/// A key, and the algorithms it may be used with.
pub(crate) struct Key {
    id: Option<String>,
    algorithms: &'static [Algorithm],
    pub(crate) key: DecodingKey,
}

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
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() > SET_LIMIT_BYTES {
            return Err(format!("it is larger than {SET_LIMIT_BYTES} bytes"));
        }
        let set: JwkSet =
            serde_json::from_slice(bytes).map_err(|error| format!("it is no key set: {error}"))?;
        if set.keys.len() > KEY_LIMIT {
            return Err(format!("it holds more than {KEY_LIMIT} keys"));
        }
        let keys: Vec<Key> = set.keys.iter().filter_map(usable).collect();
        if keys.is_empty() {
            Err("it holds no key that can verify a token".into())
        } else {
            Ok(Self { keys })
        }
    }

    /// The keys that may have signed a token with this header. Duplicate and missing ids are allowed.
    pub(crate) fn candidates<'a>(
        &'a self,
        id: Option<&'a str>,
        algorithm: Algorithm,
    ) -> impl Iterator<Item = &'a Key> {
        self.keys.iter().filter(move |key| {
            let named = id.is_none() || key.id.is_none() || key.id.as_deref() == id;
            named && key.algorithms.contains(&algorithm)
        })
    }
}

fn usable(jwk: &Jwk) -> Option<Key> {
    use jsonwebtoken::jwk::PublicKeyUse;
    if jwk.common.public_key_use.as_ref().is_some_and(|used| *used != PublicKeyUse::Signature) {
        return None;
    }
    let algorithms: &'static [Algorithm] = match (&jwk.common.key_algorithm, &jwk.algorithm) {
        (Some(KeyAlgorithm::RS256), AlgorithmParameters::RSA(_)) => &[Algorithm::RS256],
        (Some(KeyAlgorithm::RS384), AlgorithmParameters::RSA(_)) => &[Algorithm::RS384],
        (Some(KeyAlgorithm::RS512), AlgorithmParameters::RSA(_)) => &[Algorithm::RS512],
        (Some(KeyAlgorithm::PS256), AlgorithmParameters::RSA(_)) => &[Algorithm::PS256],
        (Some(KeyAlgorithm::PS384), AlgorithmParameters::RSA(_)) => &[Algorithm::PS384],
        (Some(KeyAlgorithm::PS512), AlgorithmParameters::RSA(_)) => &[Algorithm::PS512],
        (None, AlgorithmParameters::RSA(_)) => {
            &[Algorithm::RS256, Algorithm::RS384, Algorithm::RS512]
        }
        (None | Some(KeyAlgorithm::ES256), AlgorithmParameters::EllipticCurve(ec))
            if ec.curve == EllipticCurve::P256 =>
        {
            &[Algorithm::ES256]
        }
        (None | Some(KeyAlgorithm::ES384), AlgorithmParameters::EllipticCurve(ec))
            if ec.curve == EllipticCurve::P384 =>
        {
            &[Algorithm::ES384]
        }
        (None | Some(KeyAlgorithm::EdDSA), AlgorithmParameters::OctetKeyPair(_)) => {
            &[Algorithm::EdDSA]
        }
        // A shared secret in a published set is a mistake, and the rest cannot be used.
        _ => return None,
    };
    let key = DecodingKey::from_jwk(jwk).ok()?;
    Some(Key { id: jwk.common.key_id.clone(), algorithms, key })
}

/// The fetched sets by URI, each with when it should be fetched again. Sans-io.
#[derive(Debug, Default)]
pub(crate) struct KeyStore {
    sets: HashMap<String, Fetched>,
}

#[derive(Debug)]
struct Fetched {
    set: Option<Arc<KeySet>>,
    due: Instant,
    failures: u32,
}

/// The longest wait after failures.
const LONGEST_RETRY: Duration = Duration::from_secs(30);

impl KeyStore {
    /// A store that has fetched nothing.
    #[must_use]
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// The set of a URI, as far as it was fetched.
    pub(crate) fn get(&self, uri: &str) -> Option<Arc<KeySet>> {
        self.sets.get(uri).and_then(|fetched| fetched.set.clone())
    }

    /// Whether a set should be fetched now.
    pub(crate) fn is_due(&self, uri: &str, now: Instant) -> bool {
        self.sets.get(uri).is_none_or(|fetched| fetched.due <= now)
    }

    /// Takes the outcome of a fetch; whether the set is another than before.
    pub(crate) fn fetched(
        &mut self,
        uri: &str,
        outcome: Result<KeySet, String>,
        cache: Duration,
        now: Instant,
    ) -> bool {
        let entry =
            self.sets.entry(uri.to_owned()).or_insert(Fetched { set: None, due: now, failures: 0 });
        match outcome {
            Ok(set) => {
                entry.set = Some(Arc::new(set));
                entry.due = now + cache.max(Duration::from_secs(1));
                entry.failures = 0;
                true
            }
            Err(reason) => {
                let wait = Duration::from_secs(1)
                    .saturating_mul(2u32.saturating_pow(entry.failures))
                    .min(LONGEST_RETRY);
                entry.failures = entry.failures.saturating_add(1);
                entry.due = now + wait;
                tracing::warn!(
                    uri,
                    reason,
                    ?wait,
                    "keys could not be fetched; the last good ones stay"
                );
                false
            }
        }
    }
}
