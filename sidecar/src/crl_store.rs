//! Stores the CRLs fetched from distribution points, and decides when each is fetched again. Sans-io.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use weft_certs::check_crls;
use weft_model::DistributionPoint;

use crate::fetch::{FetchFailure, FetchResponse, Validators};
use crate::fetch_schedule::{CacheTimes, FetchSchedule};
use crate::plan::downloads::CrlSources;

/// The shortest cache time that a response may set. The longest is the refresh interval of the distribution point.
const SHORTEST_AGE: Duration = Duration::from_secs(10);

/// The fetched CRLs by distribution point.
#[derive(Debug, Default)]
pub(crate) struct CrlStore {
    crls: HashMap<DistributionPoint, CrlEntry>,
}

#[derive(Debug)]
struct CrlEntry {
    list: Option<Bytes>,
    /// Increases each time the CRL changes.
    number: u64,
    validators: Validators,
    schedule: FetchSchedule,
    /// Why the last attempt failed.
    problem: Option<String>,
}

impl CrlStore {
    /// The CRL of a distribution point, if one was fetched.
    pub(crate) fn list(&self, point: &DistributionPoint) -> Option<&Bytes> {
        self.crls.get(point)?.list.as_ref()
    }

    /// A number that increases each time the CRL of a distribution point changes.
    pub(crate) fn number(&self, point: &DistributionPoint) -> u64 {
        self.crls.get(point).map_or(0, |entry| entry.number)
    }

    /// Why the last attempt at a distribution point failed.
    pub(crate) fn problem(&self, point: &DistributionPoint) -> Option<&str> {
        self.crls.get(point)?.problem.as_deref()
    }

    /// The validators of the stored CRL, to fetch it only if it changed.
    pub(crate) fn validators(&self, point: &DistributionPoint) -> Validators {
        self.crls.get(point).map(|entry| entry.validators.clone()).unwrap_or_default()
    }

    /// Whether a distribution point should be fetched now.
    pub(crate) fn is_due(&self, point: &DistributionPoint, now: Instant) -> bool {
        self.crls.get(point).is_none_or(|entry| entry.schedule.is_due(now))
    }

    /// Drops the distribution points that the configuration no longer names, and the validators of CRLs that were refused: with
    /// them the server would answer every request with "not modified".
    pub(crate) fn settle(&mut self, crl_sources: &CrlSources) {
        self.crls.retain(|point, _| crl_sources.contains(point));
        for point in crl_sources.refused() {
            if let Some(entry) = self.crls.get_mut(point) {
                entry.validators = Validators::default();
            }
        }
    }

    /// Stores the result of a fetch. Returns whether the CRL or the problem changed.
    pub(crate) fn fetched(
        &mut self,
        point: &DistributionPoint,
        outcome: Result<FetchResponse, FetchFailure>,
        now: Instant,
    ) -> bool {
        let entry = self.crls.entry(point.clone()).or_insert_with(|| CrlEntry {
            list: None,
            number: 0,
            validators: Validators::default(),
            schedule: FetchSchedule::new(now),
            problem: None,
        });
        let outcome = outcome.and_then(|answer| match answer.body.as_deref().map(check_crls) {
            Some(Err(reason)) => {
                Err(FetchFailure::Failed(format!("the response is not a CRL: {reason}")))
            }
            Some(Ok(())) | None => Ok(answer),
        });
        match outcome {
            Ok(FetchResponse { body, validators, max_age, from: _ }) => {
                let times = CacheTimes {
                    default: point.refresh,
                    shortest: SHORTEST_AGE,
                    longest: point.refresh.max(SHORTEST_AGE),
                };
                entry.schedule.succeeded(max_age, times, now);
                entry.validators = validators;
                let was_well = entry.problem.take().is_none();
                match body {
                    Some(list) if entry.list.as_ref() != Some(&list) => {
                        entry.list = Some(list);
                        entry.number += 1;
                        true
                    }
                    _ => !was_well,
                }
            }
            Err(failure) => {
                entry.schedule.failed(now);
                let problem = Some(failure.to_string());
                let is_new = entry.problem != problem;
                entry.problem = problem;
                is_new
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::SystemTime;

    use weft_certs::Authority;
    use weft_model::{DataSource, RevocationPolicy, Validation};

    use super::*;

    pub(crate) fn point() -> DistributionPoint {
        let refresh = Duration::from_secs(300);
        DistributionPoint { uri: "http://crl.test/a".into(), cluster: "crl".into(), refresh }
    }

    pub(crate) fn validation(point: &DistributionPoint) -> Validation {
        Validation {
            roots: DataSource::File("root.pem".into()),
            revocations: None,
            points: vec![point.clone()],
            policy: RevocationPolicy::default(),
            names: Vec::new(),
        }
    }

    /// A PEM CRL with this number.
    pub(crate) fn list(number: u64) -> String {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let files = Authority::create("mesh.test", now).unwrap();
        let authority = Authority::load(files, "mesh.test").unwrap();
        authority.crls(&[], number, now, Duration::from_secs(60)).unwrap()
    }

    pub(crate) fn answer(
        list: Option<&str>,
        max_age: Option<u64>,
    ) -> Result<FetchResponse, FetchFailure> {
        let body = list.map(|list| Bytes::copy_from_slice(list.as_bytes()));
        let max_age = max_age.map(Duration::from_secs);
        let validators = Validators::dated("Thu, 26 Nov 2026 19:00:00 GMT");
        let from = ([127, 0, 0, 1], 80).into();
        Ok(FetchResponse { body, validators, max_age, from })
    }

    #[expect(clippy::disallowed_methods, reason = "tests need a start time")]
    pub(crate) fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn crl_is_kept_until_another_valid_one_is_fetched() {
        let mut store = CrlStore::default();
        let point = point();
        let now = start();
        assert!(store.is_due(&point, now));
        let failed = |reason: &str| Err(FetchFailure::Failed(reason.into()));
        assert!(store.fetched(&point, failed("away"), now));
        assert!(!store.fetched(&point, failed("away"), now), "the problem did not change");
        assert_eq!((store.list(&point), store.problem(&point)), (None, Some("away")));
        let [one, two] = [1, 2].map(list);
        assert!(store.fetched(&point, answer(Some(&one), None), now));
        assert_eq!((store.number(&point), store.problem(&point)), (1, None));
        assert!(!store.fetched(&point, answer(None, None), now), "the CRL was not modified");
        assert!(!store.fetched(&point, answer(Some(&one), None), now), "the bytes are the same");
        assert!(store.fetched(&point, failed("away"), now));
        assert!(store.fetched(&point, answer(None, None), now), "the problem was solved");
        for none in [
            "",
            "<html>Please sign in</html>",
            "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n",
        ] {
            let known = store.validators(&point);
            store.fetched(&point, answer(Some(none), None), now);
            assert!(
                store.problem(&point).unwrap().starts_with("the response is not a CRL"),
                "{none}"
            );
            assert_eq!(store.list(&point).map(|list| &list[..]), Some(one.as_bytes()), "{none}");
            assert_eq!(store.validators(&point), known, "{none}");
        }
        assert!(store.fetched(&point, answer(Some(&two), None), now));
        assert_eq!(store.list(&point).map(|list| &list[..]), Some(two.as_bytes()));
        assert_ne!(store.validators(&point), Validators::default());
        // The next fetch must get a refused CRL again, so its validators are dropped.
        let validation = validation(&point);
        let crl_sources = |is_refused| {
            let mut crl_sources = CrlSources::default();
            crl_sources.add(&validation, is_refused);
            crl_sources
        };
        store.settle(&crl_sources(false));
        assert_ne!(store.validators(&point), Validators::default());
        store.settle(&crl_sources(true));
        assert_eq!(store.validators(&point), Validators::default());
        assert!(store.list(&point).is_some());
        store.settle(&CrlSources::default());
        assert_eq!(store.list(&point), None);
    }

    #[test]
    fn distribution_point_is_fetched_again_after_its_refresh_interval_or_cache_time() {
        let point = point();
        let now = start();
        let check = |outcome: Result<FetchResponse, FetchFailure>, expected: u64| {
            let mut store = CrlStore::default();
            store.fetched(&point, outcome, now);
            let due = |seconds| store.is_due(&point, now + Duration::from_secs(seconds));
            assert!(!due(expected - 1) && due(expected), "{expected}");
        };
        let list = list(1);
        check(answer(Some(&list), None), 300);
        check(answer(Some(&list), Some(60)), 60);
        check(answer(Some(&list), Some(0)), 10);
        check(answer(Some(&list), Some(u64::MAX / 2)), 300);
        check(Err(FetchFailure::Timeout("late".into())), 1);
    }
}
