//! Exponential backoff with full jitter between connection attempts.

use std::time::Duration;

/// The delays between attempts: the first is at most 100 ms, the longest at most 15 s.
#[derive(Debug, Clone)]
pub struct Backoff {
    failures: u32,
}

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(15);
/// The longest delay after the server closed a working stream, so that a fleet does not reconnect at once.
const AFTER_SUCCESS: Duration = Duration::from_secs(1);

impl Backoff {
    /// No attempt has failed yet.
    #[must_use]
    pub fn new() -> Self {
        Self { failures: 0 }
    }

    /// Resets the backoff after an answer of the server.
    pub fn answered(&mut self) {
        self.failures = 0;
    }

    /// The delay after a failed attempt. `random` is between 0 and 1.
    #[must_use]
    pub fn failed(&mut self, random: f64) -> Duration {
        let ceiling = FIRST.saturating_mul(2u32.saturating_pow(self.failures)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        ceiling.mul_f64(random.clamp(0.0, 1.0))
    }

    /// The delay after a stream that ended without an error. `random` is between 0 and 1.
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
    fn delays_double_up_to_the_longest_and_reset_after_an_answer() {
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
