//! When a certificate is due for renewal. Sans-io: `now` and the randomness are arguments.

use std::time::{Duration, SystemTime};

/// The shortest wait between two attempts.
const SHORTEST_RETRY: Duration = Duration::from_secs(1);
/// The longest.
const LONGEST_RETRY: Duration = Duration::from_secs(60);
/// How many attempts fit at least into what is left of the certificate's life.
const ATTEMPTS_LEFT: u32 = 4;

/// A clock that is set back by more has left the time in which the certificate came.
const SET_BACK: Duration = Duration::from_secs(300);

/// The life of one certificate, from when we got it to when it must be replaced.
#[derive(Debug, Clone)]
pub struct Rotation {
    since: SystemTime,
    not_after: SystemTime,
    due: SystemTime,
    failures: u32,
}

impl Rotation {
    /// A certificate that we have from `since` on, and that is good until `not_after`: due at half of
    /// that, moved by up to a tenth of it either way. `random` is between 0 and 1.
    ///
    /// Not from when it says that it is good: authorities date that back, so half of a short life would be
    /// over before it began. One that is over as we get it, by our clock, is no reason to hurry either.
    #[must_use]
    pub fn new(since: SystemTime, not_after: SystemTime, random: f64) -> Self {
        let life = not_after.duration_since(since).unwrap_or_default();
        let fraction = 0.4 + 0.2 * random.clamp(0.0, 1.0);
        Self {
            since,
            not_after,
            due: since + life.mul_f64(fraction).max(SHORTEST_RETRY),
            failures: 0,
        }
    }

    /// When the first attempt should be made.
    #[must_use]
    pub fn due(&self) -> SystemTime {
        self.due
    }

    /// Whether the first attempt should be made now: the time for it has come, or the clock shows a time well
    /// before the certificate came, so that it was wrong then or is now.
    #[must_use]
    pub fn is_due(&self, now: SystemTime) -> bool {
        self.due <= now || now + SET_BACK < self.since
    }

    /// Whether the certificate is no longer good.
    #[must_use]
    pub fn expired(&self, now: SystemTime) -> bool {
        self.not_after <= now
    }

    /// An attempt failed at `now`: how long to wait before the next one, longer each time, but never so
    /// long that the certificate could end before some more were made. `random` is between 0 and 1.
    ///
    /// A wait and no time of day: by a clock that is set back meanwhile, that would lie in the far future.
    #[must_use]
    pub fn failed(&mut self, now: SystemTime, random: f64) -> Duration {
        let mut ceiling =
            SHORTEST_RETRY.saturating_mul(2u32.saturating_pow(self.failures)).min(LONGEST_RETRY);
        // For one that is over there is nothing to be late for.
        if let Ok(left) = self.not_after.duration_since(now) {
            ceiling = ceiling.min((left / ATTEMPTS_LEFT).max(SHORTEST_RETRY));
        }
        self.failures = self.failures.saturating_add(1);
        ceiling.mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_due_around_half_life_and_retried_ever_more_slowly() {
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
        assert_eq!(rotation.failed(start, 1.0), LONGEST_RETRY);
        assert!(
            !rotation.expired(start + day - Duration::from_secs(1))
                && rotation.expired(start + day)
        );
    }

    #[test]
    fn certificate_that_came_in_the_future_is_due_now() {
        let (day, second) = (Duration::from_secs(86_400), Duration::from_secs(1));
        let now = SystemTime::UNIX_EPOCH + 20_000 * day;
        let rotation = Rotation::new(now + day, now + 2 * day, 0.5);
        assert!(rotation.is_due(now));
        assert!(!rotation.is_due(now + day - SET_BACK), "a clock that is slewed is no reason");
        assert!(rotation.is_due(now + day - SET_BACK - second));
        assert!(!rotation.is_due(now + day + day / 2 - second));
        assert!(rotation.is_due(now + day + day / 2));
    }

    #[test]
    fn no_wait_outlasts_the_certificate() {
        let (start, second) = (SystemTime::UNIX_EPOCH, Duration::from_secs(1));
        let mut rotation = Rotation::new(start, start + 60 * second, 1.0);
        let (mut now, mut attempts) = (rotation.due(), 0);
        while !rotation.expired(now) {
            now += rotation.failed(now, 1.0);
            attempts += 1;
            assert!(now <= start + 61 * second, "the last attempt is made {now:?}");
        }
        assert!((8..30).contains(&attempts), "{attempts} attempts within 24 s");
        assert_eq!(rotation.failed(now, 1.0), LONGEST_RETRY, "there is no hurry any more");
    }

    #[test]
    fn one_that_is_over_as_it_comes_is_renewed_without_haste() {
        let (start, second) = (SystemTime::UNIX_EPOCH, Duration::from_secs(1));
        let now = start + 100 * second;
        assert_eq!(Rotation::new(now, start + 50 * second, 0.0).due(), now + SHORTEST_RETRY);
    }
}
