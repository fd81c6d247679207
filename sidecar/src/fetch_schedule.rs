//! Decides when a document is fetched again. Sans-io.

use std::time::{Duration, Instant};

use weft_model::Backoff;

/// The waits between failed attempts.
pub(crate) const BACKOFF: Backoff =
    Backoff { first: Duration::from_secs(1), longest: Duration::from_secs(30) };

/// How long a fetched document is used before it is fetched again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CacheTimes {
    /// Where the response sets no time.
    pub(crate) default: Duration,
    /// The range of the times that a response may set.
    pub(crate) shortest: Duration,
    pub(crate) longest: Duration,
}

/// When a document is fetched next: after its cache time, or after a wait that doubles with each failure.
#[derive(Debug)]
pub(crate) struct FetchSchedule {
    due: Instant,
    /// The attempts that failed since the last success.
    failures: u32,
}

impl FetchSchedule {
    /// The schedule of a document to fetch at once.
    pub(crate) fn new(now: Instant) -> Self {
        Self { due: now, failures: 0 }
    }

    /// Whether the document should be fetched now.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.due <= now
    }

    /// Schedules the next fetch after a response that may be cached for `max_age`.
    pub(crate) fn succeeded(&mut self, max_age: Option<Duration>, times: CacheTimes, now: Instant) {
        let age = max_age.map(|age| age.max(times.shortest).min(times.longest));
        self.due = now + age.unwrap_or(times.default);
        self.failures = 0;
    }

    /// Schedules the next attempt after a failed one, and returns the wait.
    pub(crate) fn failed(&mut self, now: Instant) -> Duration {
        let wait = BACKOFF.delay(self.failures);
        self.failures = self.failures.saturating_add(1);
        self.due = now + wait;
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "tests need a start time")]
    fn start() -> Instant {
        Instant::now()
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    const TIMES: CacheTimes = CacheTimes {
        default: Duration::from_secs(600),
        shortest: Duration::from_secs(60),
        longest: Duration::from_secs(3600),
    };

    #[test]
    fn document_is_fetched_at_once_and_again_after_its_cache_time() {
        let now = start();
        let rows = [
            (None, 600),
            (Some(60), 60),
            (Some(0), 60),
            (Some(59), 60),
            (Some(61), 61),
            (Some(3600), 3600),
            (Some(u64::MAX / 2), 3600),
        ];
        for (max_age, expected) in rows {
            let mut schedule = FetchSchedule::new(now);
            assert!(schedule.is_due(now));
            schedule.succeeded(max_age.map(seconds), TIMES, now);
            assert!(!schedule.is_due(now + seconds(expected - 1)), "{max_age:?}");
            assert!(schedule.is_due(now + seconds(expected)), "{max_age:?}");
        }
    }

    #[test]
    fn wait_doubles_with_each_failure_up_to_its_limit_and_restarts_after_a_success() {
        let now = start();
        let mut schedule = FetchSchedule::new(now);
        for expected in [1, 2, 4, 8, 16, 30, 30] {
            assert_eq!(schedule.failed(now), seconds(expected));
            assert!(!schedule.is_due(now + seconds(expected) - Duration::from_nanos(1)));
            assert!(schedule.is_due(now + seconds(expected)));
        }
        for _ in 0..40 {
            schedule.failed(now);
        }
        assert_eq!(schedule.failed(now), BACKOFF.longest, "a long outage does not overflow");
        schedule.succeeded(None, TIMES, now);
        assert_eq!(schedule.failed(now), seconds(1));
    }
}
