//! Schedules certificate renewal. Sans-io: `now` and the randomness are arguments.

use std::time::{Duration, SystemTime};

use weft_model::Backoff;

/// The time between two attempts.
const BACKOFF: Backoff =
    Backoff { first: Duration::from_secs(1), longest: Duration::from_secs(60) };
/// The minimum number of attempts that fit into the remaining lifetime of the certificate.
const ATTEMPTS_LEFT: u32 = 4;

/// If the clock is set back to more than this before the certificate's arrival, the certificate is renewed.
const CLOCK_STEP_LIMIT: Duration = Duration::from_secs(300);

/// The renewal schedule of one certificate.
#[derive(Debug, Clone)]
pub struct Rotation {
    since: SystemTime,
    not_after: SystemTime,
    due: SystemTime,
    failures: u32,
}

impl Rotation {
    /// Schedules the renewal of a certificate that arrived at `since` and expires at `not_after`: at half of that
    /// time, plus or minus up to a tenth of it. `random` is between 0 and 1.
    ///
    /// The schedule does not use `notBefore`: CAs backdate it, so half of a short lifetime could be over on arrival.
    /// A certificate that is already expired on arrival, by the local clock, is renewed after the minimum time.
    #[must_use]
    pub fn new(since: SystemTime, not_after: SystemTime, random: f64) -> Self {
        let life = not_after.duration_since(since).unwrap_or_default();
        let fraction = 0.4 + 0.2 * random.clamp(0.0, 1.0);
        Self {
            since,
            not_after,
            due: since + life.mul_f64(fraction).max(BACKOFF.first),
            failures: 0,
        }
    }

    /// The time of the first attempt.
    #[must_use]
    pub fn due(&self) -> SystemTime {
        self.due
    }

    /// Whether the first attempt is due: its time has come, or the clock is well before the arrival of the
    /// certificate, so it was wrong then or is wrong now.
    #[must_use]
    pub fn is_due(&self, now: SystemTime) -> bool {
        self.due <= now || now + CLOCK_STEP_LIMIT < self.since
    }

    /// Whether the certificate has expired.
    #[must_use]
    pub fn expired(&self, now: SystemTime) -> bool {
        self.not_after <= now
    }

    /// Records an attempt that failed at `now`, and returns the time until the next one. The time doubles with each
    /// failure, but several attempts fit into the remaining lifetime. `random` is between 0 and 1.
    ///
    /// The result is a duration and not a time of day, because the clock may be set back before the next attempt.
    #[must_use]
    pub fn failed(&mut self, now: SystemTime, random: f64) -> Duration {
        let mut ceiling = BACKOFF.delay(self.failures);
        // An expired certificate has no remaining lifetime to fit attempts into.
        if let Ok(left) = self.not_after.duration_since(now) {
            ceiling = ceiling.min((left / ATTEMPTS_LEFT).max(BACKOFF.first));
        }
        self.failures = self.failures.saturating_add(1);
        ceiling.mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_due_around_half_life_and_retried_with_backoff() {
        let start = SystemTime::UNIX_EPOCH;
        let day = Duration::from_secs(86_400);
        assert_eq!(Rotation::new(start, start + day, 0.5).due(), start + day / 2);
        assert_eq!(Rotation::new(start, start + day, 0.0).due(), start + day.mul_f64(0.4));
        assert_eq!(Rotation::new(start, start + day, 1.0).due(), start + day.mul_f64(0.6));
        let mut rotation = Rotation::new(start, start + day, 0.5);
        assert_eq!(rotation.failed(start, 1.0), Duration::from_secs(1));
        for _ in 0..10 {
            let _ = rotation.failed(start, 1.0);
        }
        assert_eq!(rotation.failed(start, 1.0), BACKOFF.longest);
        assert!(
            !rotation.expired(start + day - Duration::from_secs(1))
                && rotation.expired(start + day)
        );
    }

    #[test]
    fn certificate_from_a_future_clock_is_due_immediately() {
        let day = Duration::from_secs(86_400);
        let second = Duration::from_secs(1);
        let now = SystemTime::UNIX_EPOCH + 20_000 * day;
        let rotation = Rotation::new(now + day, now + 2 * day, 0.5);
        assert!(rotation.is_due(now));
        assert!(
            !rotation.is_due(now + day - CLOCK_STEP_LIMIT),
            "a small clock step causes no renewal"
        );
        assert!(rotation.is_due(now + day - CLOCK_STEP_LIMIT - second));
        assert!(!rotation.is_due(now + day + day / 2 - second));
        assert!(rotation.is_due(now + day + day / 2));
    }

    #[test]
    fn retry_delay_does_not_outlast_the_certificate() {
        let start = SystemTime::UNIX_EPOCH;
        let second = Duration::from_secs(1);
        let mut rotation = Rotation::new(start, start + 60 * second, 1.0);
        let mut now = rotation.due();
        let mut attempts = 0;
        while !rotation.expired(now) {
            now += rotation.failed(now, 1.0);
            attempts += 1;
            assert!(now <= start + 61 * second, "the last attempt is made {now:?}");
        }
        assert!((8..30).contains(&attempts), "{attempts} attempts within 24 s");
        assert_eq!(
            rotation.failed(now, 1.0),
            BACKOFF.longest,
            "an expired certificate has the maximum delay"
        );
    }

    #[test]
    fn certificate_expired_on_arrival_is_renewed_after_the_minimum_delay() {
        let start = SystemTime::UNIX_EPOCH;
        let second = Duration::from_secs(1);
        let now = start + 100 * second;
        assert_eq!(Rotation::new(now, start + 50 * second, 0.0).due(), now + BACKOFF.first);
    }
}
