//! When to try again: exponential, with full jitter.

use std::time::Duration;

/// The waits between attempts. The first is up to 100 ms, the longest up to 15 s.
#[derive(Debug, Clone)]
pub struct Backoff {
    failures: u32,
}

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(15);
/// After a stream that worked and was closed in good order, so that a fleet does not come back at once.
const AFTER_SUCCESS: Duration = Duration::from_secs(1);

impl Backoff {
    /// No attempt has failed yet.
    #[must_use]
    pub fn new() -> Self {
        Self { failures: 0 }
    }

    /// The server answered: the next failure is the first again.
    pub fn answered(&mut self) {
        self.failures = 0;
    }

    /// How long to wait after a failed attempt. `random` is between 0 and 1.
    #[must_use]
    pub fn failed(&mut self, random: f64) -> Duration {
        let ceiling = FIRST.saturating_mul(2u32.saturating_pow(self.failures)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        ceiling.mul_f64(random.clamp(0.0, 1.0))
    }

    /// How long to wait after a stream that had answered. `random` is between 0 and 1.
    #[must_use]
    pub fn closed(&self, random: f64) -> Duration {
        AFTER_SUCCESS.mul_f64(random.clamp(0.0, 1.0))
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_start_over() {
        let mut backoff = Backoff::new();
        let waits: Vec<_> = (0..10).map(|_| backoff.failed(1.0)).collect();
        assert_eq!(waits[0], FIRST);
        assert_eq!(waits[1], FIRST * 2);
        assert_eq!(waits[9], LONGEST);
        assert_eq!(backoff.failed(0.0), Duration::ZERO);
        backoff.answered();
        assert_eq!(backoff.failed(1.0), FIRST);
    }
}
