//! Caches verified tokens. Each worker has its own cache.
//!
//! A result depends on the keys and settings of an issuer, which are identified by the issuer number in the key: after a change the
//! token is verified again. Validity times are checked at each use. Invalid tokens have their own space, so that a client that
//! sends many of them evicts no valid ones.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use serde_json::{Map, Value};

use super::claims::TokenTimes;
use super::fault::TokenRejection;

/// The bytes of the valid tokens and the number of invalid tokens that are kept.
const GOOD_BYTES: usize = 8 * 1024 * 1024;
const BAD: usize = 4096;

/// The SHA-256 of a token, and the number of the issuer that verified it.
type TokenCacheKey = ([u8; 32], u64);

/// The contents of a verified token.
#[derive(Debug)]
pub(crate) struct VerifiedToken {
    pub(crate) claims: Map<String, Value>,
    pub(crate) times: TokenTimes,
    /// The payload as received, in base64url.
    pub(crate) payload: Box<str>,
}

/// The verified tokens of a worker.
#[derive(Debug, Default)]
pub(crate) struct TokenCache {
    good: RefCell<TwoGenerationMap<Rc<VerifiedToken>>>,
    bad: RefCell<TwoGenerationMap<TokenRejection>>,
}

/// A cache of two generations. When the young one is full, it replaces the old one. An entry that is used moves to the young
/// generation, so used entries stay without any list of uses.
#[derive(Debug)]
struct TwoGenerationMap<V> {
    young: HashMap<TokenCacheKey, V>,
    old: HashMap<TokenCacheKey, V>,
    weight: usize,
}

impl<V> Default for TwoGenerationMap<V> {
    fn default() -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), weight: 0 }
    }
}

impl<V: Clone> TwoGenerationMap<V> {
    fn get(
        &mut self,
        key: &TokenCacheKey,
        weight: impl Fn(&V) -> usize,
        limit: usize,
    ) -> Option<V> {
        if let Some(value) = self.young.get(key) {
            return Some(value.clone());
        }
        let value = self.old.remove(key)?;
        self.put(*key, value.clone(), weight(&value), limit);
        Some(value)
    }

    fn put(&mut self, key: TokenCacheKey, value: V, weight: usize, limit: usize) {
        if self.weight + weight > limit / 2 {
            self.old = std::mem::take(&mut self.young);
            self.weight = 0;
        }
        self.weight += weight;
        self.young.insert(key, value);
    }
}

impl TokenCache {
    /// The cached result for a token.
    pub(crate) fn get(
        &self,
        key: &TokenCacheKey,
    ) -> Option<Result<Rc<VerifiedToken>, TokenRejection>> {
        let good = self.good.borrow_mut().get(key, |checked| weight(checked), GOOD_BYTES);
        if let Some(checked) = good {
            return Some(Ok(checked));
        }
        self.bad.borrow_mut().get(key, |_| 1, BAD).map(Err)
    }

    /// Stores a valid token.
    pub(crate) fn put_good(&self, key: TokenCacheKey, checked: Rc<VerifiedToken>) {
        let weight = weight(&checked);
        self.good.borrow_mut().put(key, checked, weight, GOOD_BYTES);
    }

    /// Stores an invalid token.
    pub(crate) fn put_bad(&self, key: TokenCacheKey, refused: TokenRejection) {
        self.bad.borrow_mut().put(key, refused, 1, BAD);
    }

    #[cfg(test)]
    fn len(&self) -> [usize; 2] {
        let good = self.good.borrow();
        let bad = self.bad.borrow();
        [good.young.len() + good.old.len(), bad.young.len() + bad.old.len()]
    }
}

/// The approximate size of a token in bytes: its payload, and several times as much for the parsed claims.
fn weight(checked: &VerifiedToken) -> usize {
    512 + 4 * checked.payload.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authenticate::fault::TokenFault;

    fn key(number: u32) -> TokenCacheKey {
        let mut digest = [0; 32];
        digest.iter_mut().zip(number.to_be_bytes()).for_each(|(to, from)| *to = from);
        (digest, 1)
    }

    fn checked(bytes: usize) -> Rc<VerifiedToken> {
        let times = TokenTimes { from: 0.0, issued: 0.0, until: 1.0 };
        Rc::new(VerifiedToken { claims: Map::new(), times, payload: "a".repeat(bytes).into() })
    }

    #[test]
    fn cache_is_bounded_keeps_used_tokens_and_invalid_tokens_evict_no_valid_ones() {
        let cache = TokenCache::default();
        let used = key(u32::MAX);
        cache.put_good(used, checked(100));
        for number in 0..100_000 {
            cache.put_bad(key(number), TokenRejection::format("x"));
            cache.put_good(key(number), checked(1000));
            assert!(cache.get(&used).is_some_and(|found| found.is_ok()), "{number}");
        }
        let [good, bad] = cache.len();
        assert!(bad <= BAD && bad > BAD / 4, "{bad}");
        assert!(good * weight(&checked(1000)) <= GOOD_BYTES + weight(&checked(1000)), "{good}");
        assert!(good > 500, "{good}");
        assert!(cache.get(&key(5)).is_none());
        let last = cache.get(&(key(99_999).0, 2));
        assert!(
            last.is_none(),
            "the token was not verified with the keys of another issuer number"
        );
    }

    #[test]
    fn invalid_token_keeps_its_rejection() {
        let cache = TokenCache::default();
        let refused = TokenRejection::new(TokenFault::Signature, "its signature is wrong");
        cache.put_bad(key(1), refused);
        assert_eq!(cache.get(&key(1)).map(|found| found.map(drop)), Some(Err(refused)));
    }
}
