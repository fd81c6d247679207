//! Tokens that were verified before. Each worker has its own.
//!
//! What is kept was proved by certain keys and settings of an issuer, which the number of the issuer stands
//! for: with others it is asked again. Whether a token is good at this moment is asked each time. Bad tokens
//! are remembered in a room of their own, so that whoever sends many of them takes nothing from the others.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use serde_json::{Map, Value};

use super::claims::TokenTimes;
use super::fault::TokenRejection;

/// How many bytes the good ones may take, and how many bad ones there may be.
const GOOD_BYTES: usize = 8 * 1024 * 1024;
const BAD: usize = 4096;

/// A token, by its SHA-256, and the number of the issuer that was asked.
type TokenCacheKey = ([u8; 32], u64);

/// What a good token says.
#[derive(Debug)]
pub(crate) struct VerifiedToken {
    pub(crate) claims: Map<String, Value>,
    pub(crate) times: TokenTimes,
    /// The payload as it stood, base64url.
    pub(crate) payload: Box<str>,
}

/// The tokens that a worker has verified.
#[derive(Debug, Default)]
pub(crate) struct TokenCache {
    good: RefCell<TwoGenerationMap<Rc<VerifiedToken>>>,
    bad: RefCell<TwoGenerationMap<TokenRejection>>,
}

/// What was used lately, and before that. When the first is full, the second goes, and so on: what is used
/// stays, at no cost but a second look.
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
    /// What was found out about a token.
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

    /// Remembers a good one.
    pub(crate) fn put_good(&self, key: TokenCacheKey, checked: Rc<VerifiedToken>) {
        let weight = weight(&checked);
        self.good.borrow_mut().put(key, checked, weight, GOOD_BYTES);
    }

    /// Remembers a bad one.
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

/// About how many bytes a token takes: its payload, and the same again as values.
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
    fn it_is_bounded_keeps_what_is_used_and_bad_ones_take_nothing_from_good_ones() {
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
        assert!(last.is_none(), "other keys have not been asked");
    }

    #[test]
    fn a_bad_one_is_bad_for_its_reason() {
        let cache = TokenCache::default();
        let refused = TokenRejection::new(TokenFault::Signature, "its signature is wrong");
        cache.put_bad(key(1), refused);
        assert_eq!(cache.get(&key(1)).map(|found| found.map(drop)), Some(Err(refused)));
    }
}
