//! The delays between attempts of something that keeps failing.

use std::time::Duration;

/// Delays that double from the first to the longest. The caller counts the failures and adds jitter, because the time and
/// randomness of a decision are arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// The delay after the first failure.
    pub first: Duration,
    /// The longest delay.
    pub longest: Duration,
}

impl Backoff {
    /// The delay after a failure that follows `earlier` failures in a row.
    #[must_use]
    pub fn delay(self, earlier: u32) -> Duration {
        self.first.saturating_mul(2u32.saturating_pow(earlier)).min(self.longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: Backoff =
        Backoff { first: Duration::from_millis(100), longest: Duration::from_secs(15) };

    #[test]
    fn delays_double_up_to_the_longest() {
        let delays: Vec<u128> = (0..10).map(|earlier| BACKOFF.delay(earlier).as_millis()).collect();
        assert_eq!(delays, [100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 15_000, 15_000]);
    }

    #[test]
    fn delay_after_any_number_of_failures_is_at_most_the_longest() {
        for earlier in [31, 32, 33, 1_000, u32::MAX] {
            assert_eq!(BACKOFF.delay(earlier), BACKOFF.longest, "{earlier}");
        }
        let endless = Backoff { longest: Duration::MAX, ..BACKOFF };
        assert_eq!(endless.delay(u32::MAX), BACKOFF.first * u32::MAX);
    }

    #[test]
    fn longest_below_the_first_delay_limits_it() {
        let short = Backoff { longest: Duration::from_millis(1), ..BACKOFF };
        assert_eq!(short.delay(0), short.longest);
    }
}
