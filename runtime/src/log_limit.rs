//! Limits log lines about refusals: one line per interval, with the number of refusals in it.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// How often a line of one kind is logged, at most.
const INTERVAL: Duration = Duration::from_secs(10);

/// Lets one event of a kind in each ten seconds be logged, on one thread.
#[derive(Debug, Default)]
pub struct LogLimit {
    next: Cell<Option<Instant>>,
    held_back: Cell<u64>,
}

impl LogLimit {
    /// Counts an event. Gives how many events the line covers, this one included, when one may be logged
    /// now.
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
    #[allow(clippy::disallowed_methods, reason = "a time to count from")]
    fn one_line_in_ten_seconds_stands_for_all_events() {
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
