//! When a certificate is due for renewal. Sans-io: `now` and the randomness are arguments.

use std::time::{Duration, SystemTime};

/// The shortest wait between two attempts.
const SHORTEST_RETRY: Duration = Duration::from_secs(1);
/// The longest.
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// The life of one certificate, from when it was issued to when it must be replaced.
#[derive(Debug, Clone)]
pub struct Rotation {
    not_after: SystemTime,
    due: SystemTime,
    failures: u32,
}

impl Rotation {
    /// A certificate that is good from `not_before` to `not_after`: due at half of its life, moved
    /// by up to a tenth of it either way. `random` is between 0 and 1.
    #[must_use]
    pub fn new(not_before: SystemTime, not_after: SystemTime, random: f64) -> Self {
        let life = not_after.duration_since(not_before).unwrap_or_default();
        let fraction = 0.4 + 0.2 * random.clamp(0.0, 1.0);
        Self { not_after, due: not_before + life.mul_f64(fraction), failures: 0 }
    }

    /// When the next attempt should be made.
    #[must_use]
    pub fn due(&self) -> SystemTime {
        self.due
    }

    /// Whether the certificate is no longer good.
    #[must_use]
    pub fn expired(&self, now: SystemTime) -> bool {
        self.not_after <= now
    }

    /// An attempt failed at `now`: the next one waits, longer each time. `random` is between 0 and 1.
    pub fn failed(&mut self, now: SystemTime, random: f64) {
        let ceiling =
            SHORTEST_RETRY.saturating_mul(2u32.saturating_pow(self.failures)).min(LONGEST_RETRY);
        self.failures = self.failures.saturating_add(1);
        self.due = now + ceiling.mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0));
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
        rotation.failed(start, 1.0);
        assert_eq!(rotation.due(), start + Duration::from_secs(1));
        for _ in 0..10 {
            rotation.failed(start, 1.0);
        }
        assert_eq!(rotation.due(), start + LONGEST_RETRY);
        assert!(
            !rotation.expired(start + day - Duration::from_secs(1))
                && rotation.expired(start + day)
        );
    }
}
