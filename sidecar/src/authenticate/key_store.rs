//! The fetched key sets: when which is fetched again. Sans-io.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::fault::TokenFault;
use super::keys::KeySet;
use crate::fetch::wait_after;

/// How long a set is kept at least where a token names a key that is not in it.
const ASKED_AGAIN: Duration = Duration::from_secs(10);
/// How long an answer may say that it is good.
const SHORTEST_AGE: Duration = Duration::from_secs(60);
const LONGEST_AGE: Duration = Duration::from_secs(24 * 3600);

/// Why a set could not be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FetchError {
    pub(crate) fault: TokenFault,
    pub(crate) reason: String,
}

/// A set that was fetched, and how long the answer said that it is good.
#[derive(Debug)]
pub(crate) struct FetchedSet {
    pub(crate) set: KeySet,
    pub(crate) age: Option<Duration>,
}

/// Whether a token has named a key that is not there. Workers say so, whoever fetches looks.
pub(crate) type Wish = Arc<AtomicBool>;

/// The fetched sets by URI, each with when it should be fetched again.
#[derive(Debug, Default)]
pub(crate) struct KeyStore {
    sets: HashMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    set: Result<Arc<KeySet>, TokenFault>,
    due: Instant,
    /// From when on a wish is heard.
    heard: Instant,
    failures: u32,
    wish: Wish,
}

impl KeyStore {
    /// The set of a URI as far as it was fetched, and where to wish for another.
    pub(crate) fn get(&self, uri: &str) -> (Result<Arc<KeySet>, TokenFault>, Option<Wish>) {
        match self.sets.get(uri) {
            Some(entry) => (entry.set.clone(), Some(entry.wish.clone())),
            None => (Err(TokenFault::KeysTimeout), None),
        }
    }

    /// Whether a set should be fetched now.
    pub(crate) fn is_due(&self, uri: &str, now: Instant) -> bool {
        self.sets.get(uri).is_none_or(|entry| {
            entry.due <= now || (entry.heard <= now && entry.wish.load(Relaxed))
        })
    }

    /// Says that a fetch has begun: what is wished from now on, it may not bring.
    pub(crate) fn began(&self, uri: &str) {
        if let Some(entry) = self.sets.get(uri) {
            entry.wish.store(false, Relaxed);
        }
    }

    /// Takes the outcome of a fetch; whether what there is is another than before.
    pub(crate) fn fetched(
        &mut self,
        uri: &str,
        outcome: Result<FetchedSet, FetchError>,
        cache: Duration,
        now: Instant,
    ) -> bool {
        let entry = self.sets.entry(uri.to_owned()).or_insert_with(|| Entry {
            set: Err(TokenFault::KeysTimeout),
            due: now,
            heard: now,
            failures: 0,
            wish: Wish::default(),
        });
        entry.heard = now + ASKED_AGAIN;
        match outcome {
            Ok(FetchedSet { set, age }) => {
                let age = age.map(|age| age.clamp(SHORTEST_AGE, LONGEST_AGE));
                entry.due = now + age.unwrap_or_else(|| cache.max(Duration::from_secs(1)));
                entry.failures = 0;
                if entry.set.as_ref().is_ok_and(|held| **held == set) {
                    return false;
                }
                entry.set = Ok(Arc::new(set));
                true
            }
            Err(FetchError { fault, reason }) => {
                let wait = wait_after(entry.failures);
                entry.failures = entry.failures.saturating_add(1);
                entry.due = now + wait;
                tracing::warn!(
                    uri,
                    reason,
                    ?wait,
                    "keys could not be fetched; the last good ones stay"
                );
                let is_new = entry.set.as_ref().is_err_and(|held| *held != fault);
                if entry.set.is_err() {
                    entry.set = Err(fault);
                }
                is_new
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::LONGEST_WAIT;

    const KEYS: &[u8] = br#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

    fn good(age: Option<u64>) -> Result<FetchedSet, FetchError> {
        let set = KeySet::parse(KEYS).expect("a set");
        Ok(FetchedSet { set, age: age.map(Duration::from_secs) })
    }

    fn bad(fault: TokenFault) -> Result<FetchedSet, FetchError> {
        Err(FetchError { fault, reason: "x".into() })
    }

    #[allow(clippy::disallowed_methods, reason = "a test begins somewhere")]
    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn a_key_that_is_not_there_is_asked_for_once_in_ten_seconds() {
        let (mut store, start) = (KeyStore::default(), start());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(store.is_due("u", start));
        assert!(store.fetched("u", good(None), LONGEST_AGE, start));
        let (_, wish) = store.get("u");
        let wish = wish.expect("it was fetched");
        assert!(!store.is_due("u", at(100)));
        wish.store(true, Relaxed);
        assert!(!store.is_due("u", at(9)));
        assert!(store.is_due("u", at(10)));
        store.began("u");
        assert!(!store.fetched("u", good(None), LONGEST_AGE, at(10)), "it is the same set");
        assert!(!store.is_due("u", at(30)), "the wish was met");
        // One that is wished while a fetch is under way is not.
        store.began("u");
        wish.store(true, Relaxed);
        store.fetched("u", good(None), LONGEST_AGE, at(10));
        assert!(store.is_due("u", at(20)));
        store.began("u");
        wish.store(true, Relaxed);
        assert!(store.is_due("u", at(20)));
    }

    #[test]
    fn the_answer_says_how_long_it_is_good_within_bounds() {
        let start = start();
        let check = |age, cache, expected| {
            let mut store = KeyStore::default();
            store.fetched("u", good(age), Duration::from_secs(cache), start);
            let due = |seconds| store.is_due("u", start + Duration::from_secs(seconds));
            assert!(!due(expected - 1) && due(expected), "{age:?} {cache}");
        };
        check(None, 600, 600);
        check(Some(120), 600, 120);
        check(Some(0), 600, 60);
        check(Some(u64::MAX / 2), 600, 24 * 3600);
        check(None, 0, 1);
    }

    #[test]
    fn the_last_good_set_outlives_failures_and_the_last_failure_is_told_before_there_is_one() {
        let (mut store, start) = (KeyStore::default(), start());
        let fault = |store: &KeyStore| store.get("u").0.err();
        assert_eq!(fault(&store), Some(TokenFault::KeysTimeout));
        assert!(store.fetched("u", bad(TokenFault::KeysFailed), LONGEST_AGE, start));
        assert_eq!(fault(&store), Some(TokenFault::KeysFailed));
        assert!(!store.is_due("u", start) && store.is_due("u", start + Duration::from_secs(1)));
        assert!(store.fetched("u", good(None), LONGEST_AGE, start));
        assert!(!store.fetched("u", bad(TokenFault::KeysInvalid), LONGEST_AGE, start));
        assert_eq!(fault(&store), None);
        for _ in 0..10 {
            store.fetched("u", bad(TokenFault::KeysInvalid), LONGEST_AGE, start);
        }
        assert!(store.is_due("u", start + LONGEST_WAIT));
    }
}
