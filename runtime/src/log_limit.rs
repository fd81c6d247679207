//! Limits repeated log lines: at most one line per interval, with the number of events that it covers.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// The shortest time between two lines of one kind.
const INTERVAL: Duration = Duration::from_secs(10);

/// Limits log lines of one kind to one per ten seconds, on one thread.
#[derive(Debug, Default)]
pub struct LogLimit {
    next: Cell<Option<Instant>>,
    held_back: Cell<u64>,
}

impl LogLimit {
    /// Counts an event. Returns the number of events since the last line, this one included, when a line may
    /// be logged now.
    pub fn event(&self, now: Instant) -> Option<u64> {
        let count = self.held_back.get() + 1;
        if self.next.get().is_some_and(|next| now < next) {
            self.held_back.set(count);
            return None;
        }
        self.next.set(Some(now + INTERVAL));
        self.held_back.set(0);
        Some(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a starting point for the test's own clock")]
    fn one_line_per_interval_covers_all_events_since_the_last_line() {
        let limit = LogLimit::default();
        let start = Instant::now();
        assert_eq!(limit.event(start), Some(1));
        for _ in 0..1_000 {
            assert_eq!(limit.event(start + Duration::from_secs(9)), None);
        }
        assert_eq!(limit.event(start + INTERVAL), Some(1_001));
        assert_eq!(limit.event(start + INTERVAL), None);
    }
}
