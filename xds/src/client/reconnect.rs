//! When to connect to the server again: exponential backoff with full jitter.

use std::time::Duration;

use weft_model::Backoff;

/// The ceilings of the delays after failed attempts.
const BACKOFF: Backoff =
    Backoff { first: Duration::from_millis(100), longest: Duration::from_secs(15) };
/// The longest delay after the server closed a working stream, so that a fleet does not reconnect at once.
const AFTER_SUCCESS: Duration = Duration::from_secs(1);

/// The delays between connection attempts.
#[derive(Debug, Default)]
pub(super) struct ReconnectDelays {
    failures: u32,
}

impl ReconnectDelays {
    /// Resets the backoff after an answer of the server.
    pub(super) fn answered(&mut self) {
        self.failures = 0;
    }

    /// The delay after a failed attempt. `random` is between 0 and 1.
    pub(super) fn failed(&mut self, random: f64) -> Duration {
        let ceiling = BACKOFF.delay(self.failures);
        self.failures = self.failures.saturating_add(1);
        ceiling.mul_f64(random.clamp(0.0, 1.0))
    }

    /// The delay after a stream that ended without an error. `random` is between 0 and 1.
    pub(super) fn closed(&self, random: f64) -> Duration {
        AFTER_SUCCESS.mul_f64(random.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_longest_and_reset_after_an_answer() {
        let mut delays = ReconnectDelays::default();
        let waits: Vec<_> = (0..10).map(|_| delays.failed(1.0)).collect();
        assert_eq!(waits[0], BACKOFF.first);
        assert_eq!(waits[1], BACKOFF.first * 2);
        assert_eq!(waits[9], BACKOFF.longest);
        assert_eq!(delays.failed(0.0), Duration::ZERO);
        delays.answered();
        assert_eq!(delays.failed(1.0), BACKOFF.first);
    }

    #[test]
    fn working_stream_is_opened_again_within_a_second() {
        let delays = ReconnectDelays::default();
        assert_eq!(delays.closed(0.0), Duration::ZERO);
        assert_eq!(delays.closed(1.0), AFTER_SUCCESS);
    }
}
