//! Stores the fetched key sets, and decides when each is fetched again. Sans-io.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use weft_certs::KeySet;
use weft_model::{Name, UpstreamTls};

use super::fault::TokenFault;
use crate::fetch_schedule::{CacheTimes, FetchSchedule};

/// The shortest interval between fetches when a token names an unknown key.
const REFETCH_INTERVAL: Duration = Duration::from_secs(10);
/// The range of the cache time that a response may set.
const SHORTEST_AGE: Duration = Duration::from_secs(60);
const LONGEST_AGE: Duration = Duration::from_secs(24 * 3600);

/// Why a key set could not be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeyFetchError {
    pub(crate) fault: TokenFault,
    pub(crate) reason: String,
}

/// A fetched key set.
#[derive(Debug)]
pub(crate) struct FetchedKeySet {
    pub(crate) set: KeySet,
    pub(crate) max_age: Option<Duration>,
    /// The endpoint that served the key set.
    pub(crate) from: SocketAddr,
}

/// The issuer and the source of a key set. A set verifies tokens of this issuer only, and is kept only while it would be fetched
/// in the same way: two issuers may use the same URI for different servers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeyOrigin {
    /// The `iss` claim of the tokens.
    pub(crate) issuer: String,
    pub(crate) uri: String,
    /// The cluster that serves the URI.
    pub(crate) cluster: Name,
    /// The most redirects to follow.
    pub(crate) redirects: u8,
    /// The TLS settings of the cluster; none in plaintext.
    pub(crate) tls: Option<UpstreamTls>,
}

impl Hash for KeyOrigin {
    /// Leaves out the TLS settings: a cluster has one set of them at a time.
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        (&self.issuer, &self.uri, &self.cluster, self.redirects).hash(hasher);
    }
}

/// Set by workers when a token names an unknown key, and read by the planner.
pub(crate) type RefetchFlag = Arc<AtomicBool>;

/// The fetched key sets with their next fetch times. Bounded by the configuration: [`Self::retain`] drops sets that no provider
/// uses.
#[derive(Debug, Default)]
pub(crate) struct KeyStore {
    sets: HashMap<KeyOrigin, KeySetEntry>,
}

#[derive(Debug)]
struct KeySetEntry {
    set: Result<Arc<KeySet>, TokenFault>,
    schedule: FetchSchedule,
    /// The earliest time for a fetch because of an unknown key or a removed endpoint.
    refetch_from: Instant,
    refetch: RefetchFlag,
    /// The endpoint that served the key set.
    from: Option<SocketAddr>,
}

impl KeyStore {
    /// The key set of an origin, and the flag that requests another fetch; none before the first fetch.
    pub(crate) fn get(
        &self,
        origin: &KeyOrigin,
    ) -> (Result<Arc<KeySet>, TokenFault>, Option<RefetchFlag>) {
        match self.sets.get(origin) {
            Some(entry) => (entry.set.clone(), Some(entry.refetch.clone())),
            None => (Err(TokenFault::KeysTimeout), None),
        }
    }

    /// Whether a key set should be fetched now: its cache time has passed, a token has named an unknown key, or the endpoint that served
    /// it has left the cluster.
    pub(crate) fn is_due(
        &self,
        origin: &KeyOrigin,
        is_endpoint: impl Fn(SocketAddr) -> bool,
        now: Instant,
    ) -> bool {
        self.sets.get(origin).is_none_or(|entry| {
            let has_moved = || entry.from.is_some_and(|from| !is_endpoint(from));
            let is_asked = || entry.refetch.load(Relaxed) || has_moved();
            entry.schedule.is_due(now) || (entry.refetch_from <= now && is_asked())
        })
    }

    /// Clears the refetch flag when a fetch begins: a flag set later may be for a key that this fetch does not return.
    pub(crate) fn began(&self, origin: &KeyOrigin) {
        if let Some(entry) = self.sets.get(origin) {
            entry.refetch.store(false, Relaxed);
        }
    }

    /// This origin with the TLS settings that its key set was fetched with, while the cluster with those settings is missing.
    pub(crate) fn last_of(&self, origin: KeyOrigin) -> KeyOrigin {
        let is_it =
            |held: &&KeyOrigin| KeyOrigin { tls: origin.tls.clone(), ..(*held).clone() } == origin;
        self.sets.keys().find(is_it).cloned().unwrap_or(origin)
    }

    /// Drops the key sets of all other origins.
    pub(crate) fn retain(&mut self, origins: &[KeyOrigin]) {
        self.sets.retain(|origin, _| origins.contains(origin));
    }

    /// Stores the result of a fetch. Returns whether the key set or the fault changed.
    pub(crate) fn fetched(
        &mut self,
        origin: &KeyOrigin,
        outcome: Result<FetchedKeySet, KeyFetchError>,
        cache: Duration,
        now: Instant,
    ) -> bool {
        let entry = self.sets.entry(origin.clone()).or_insert_with(|| KeySetEntry {
            set: Err(TokenFault::KeysTimeout),
            schedule: FetchSchedule::new(now),
            refetch_from: now,
            refetch: RefetchFlag::default(),
            from: None,
        });
        entry.refetch_from = now + REFETCH_INTERVAL;
        match outcome {
            Ok(FetchedKeySet { set, max_age, from }) => {
                entry.from = Some(from);
                let times = CacheTimes {
                    default: cache.max(Duration::from_secs(1)),
                    shortest: SHORTEST_AGE,
                    longest: LONGEST_AGE,
                };
                entry.schedule.succeeded(max_age, times, now);
                if entry.set.as_ref().is_ok_and(|held| **held == set) {
                    return false;
                }
                entry.set = Ok(Arc::new(set));
                true
            }
            Err(KeyFetchError { fault, reason }) => {
                let wait = entry.schedule.failed(now);
                tracing::warn!(
                    uri = origin.uri,
                    issuer = origin.issuer,
                    cluster = &*origin.cluster,
                    reason,
                    ?wait,
                    "failed to fetch keys, the last good keys stay in force"
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
    use crate::fetch_schedule::BACKOFF;

    const KEYS: &[u8] = br#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

    fn origin(issuer: &str) -> KeyOrigin {
        let uri = "http://keys.test/".into();
        let cluster = "keys".into();
        KeyOrigin { issuer: issuer.into(), uri, cluster, redirects: 0, tls: None }
    }

    fn tls(sni: &str) -> Option<UpstreamTls> {
        Some(UpstreamTls {
            identity: None,
            validation: Some(weft_model::SecretSource::Named("trust".into())),
            names: Vec::new(),
            sni: Some(sni.into()),
            alpn: Vec::new(),
            parameters: weft_model::TlsParameters::default(),
        })
    }

    fn good(max_age: Option<u64>) -> Result<FetchedKeySet, KeyFetchError> {
        let set = KeySet::parse(KEYS).expect("a set");
        let from = ([127, 0, 0, 1], 80).into();
        Ok(FetchedKeySet { set, max_age: max_age.map(Duration::from_secs), from })
    }

    fn bad(fault: TokenFault) -> Result<FetchedKeySet, KeyFetchError> {
        Err(KeyFetchError { fault, reason: "x".into() })
    }

    #[expect(clippy::disallowed_methods, reason = "tests need a start time")]
    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn unknown_key_causes_a_fetch_at_most_every_ten_seconds() {
        let mut store = KeyStore::default();
        let start = start();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(store.is_due(&origin("a"), |_| true, start));
        assert!(store.fetched(&origin("a"), good(None), LONGEST_AGE, start));
        let (_, refetch) = store.get(&origin("a"));
        let refetch = refetch.expect("it was fetched");
        assert!(!store.is_due(&origin("a"), |_| true, at(100)));
        refetch.store(true, Relaxed);
        assert!(!store.is_due(&origin("a"), |_| true, at(9)));
        assert!(store.is_due(&origin("a"), |_| true, at(10)));
        store.began(&origin("a"));
        assert!(
            !store.fetched(&origin("a"), good(None), LONGEST_AGE, at(10)),
            "it is the same set"
        );
        assert!(!store.is_due(&origin("a"), |_| true, at(30)), "the fetch cleared the flag");
        // A flag set during a fetch stays set.
        store.began(&origin("a"));
        refetch.store(true, Relaxed);
        store.fetched(&origin("a"), good(None), LONGEST_AGE, at(10));
        assert!(store.is_due(&origin("a"), |_| true, at(20)));
        store.began(&origin("a"));
        refetch.store(true, Relaxed);
        assert!(store.is_due(&origin("a"), |_| true, at(20)));
    }

    #[test]
    fn cache_time_of_the_response_is_used_within_bounds() {
        let start = start();
        let check = |max_age, cache, expected| {
            let mut store = KeyStore::default();
            store.fetched(&origin("a"), good(max_age), Duration::from_secs(cache), start);
            let due = |seconds| {
                store.is_due(&origin("a"), |_| true, start + Duration::from_secs(seconds))
            };
            assert!(!due(expected - 1) && due(expected), "{max_age:?} {cache}");
        };
        check(None, 600, 600);
        check(Some(120), 600, 120);
        check(Some(0), 600, 60);
        check(Some(u64::MAX / 2), 600, 24 * 3600);
        check(None, 0, 1);
    }

    #[test]
    fn last_good_set_outlives_failures_and_the_first_fetch_reports_its_failure() {
        let mut store = KeyStore::default();
        let start = start();
        let fault = |store: &KeyStore| store.get(&origin("a")).0.err();
        assert_eq!(fault(&store), Some(TokenFault::KeysTimeout));
        assert!(store.fetched(&origin("a"), bad(TokenFault::KeysFailed), LONGEST_AGE, start));
        assert_eq!(fault(&store), Some(TokenFault::KeysFailed));
        assert!(
            !store.is_due(&origin("a"), |_| true, start)
                && store.is_due(&origin("a"), |_| true, start + Duration::from_secs(1))
        );
        assert!(store.fetched(&origin("a"), good(None), LONGEST_AGE, start));
        assert!(!store.fetched(&origin("a"), bad(TokenFault::KeysInvalid), LONGEST_AGE, start));
        assert_eq!(fault(&store), None);
        for _ in 0..10 {
            store.fetched(&origin("a"), bad(TokenFault::KeysInvalid), LONGEST_AGE, start);
        }
        assert!(store.is_due(&origin("a"), |_| true, start + BACKOFF.longest));
    }

    #[test]
    fn set_of_one_issuer_is_not_used_for_another_issuer_cluster_uri_or_tls_setting() {
        let mut store = KeyStore::default();
        let start = start();
        let own = KeyOrigin { tls: tls("a"), ..origin("a") };
        store.fetched(&own, good(None), LONGEST_AGE, start);
        assert!(store.get(&own).0.is_ok());
        for other in [
            KeyOrigin { issuer: "b".into(), ..own.clone() },
            KeyOrigin { cluster: "other".into(), ..own.clone() },
            KeyOrigin { uri: "http://keys.test/other".into(), ..own.clone() },
            KeyOrigin { redirects: 1, ..own.clone() },
            KeyOrigin { tls: tls("b"), ..own.clone() },
            KeyOrigin { tls: None, ..own.clone() },
        ] {
            let (set, refetch) = store.get(&other);
            assert!(set.is_err() && refetch.is_none(), "{other:?}");
            assert!(store.is_due(&other, |_| true, start), "{other:?}");
        }
        assert_eq!(store.last_of(origin("a")), own, "its cluster is missing");
        assert_eq!(store.last_of(origin("b")), origin("b"));
        store.retain(std::slice::from_ref(&own));
        assert!(store.get(&own).0.is_ok());
        store.retain(&[origin("a")]);
        assert!(store.get(&own).0.is_err(), "no provider uses it");
    }

    #[test]
    fn set_is_fetched_again_when_its_endpoint_left_the_cluster_but_not_within_ten_seconds() {
        let mut store = KeyStore::default();
        let start = start();
        store.fetched(&origin("a"), good(None), LONGEST_AGE, start);
        let due = |has_left: bool, seconds| {
            store.is_due(&origin("a"), |_| !has_left, start + Duration::from_secs(seconds))
        };
        assert!(!due(false, 100) && due(true, 10));
        assert!(!due(true, 9));
    }
}
