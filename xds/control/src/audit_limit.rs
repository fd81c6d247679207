//! How many lines of the audit log a minute may be about refusals: whoever asks in vain must not fill the disk.

use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_secs(60);
const LINES_PER_WINDOW: u32 = 60;

/// What of a minute's lines has been written.
#[derive(Debug, Default)]
pub(crate) struct AuditLimit {
    since: Option<Instant>,
    written: u32,
    suppressed: u64,
}

/// Whether a line is written.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum AuditDecision {
    /// It is, and so many before it were not.
    Write {
        /// How many.
        suppressed: u64,
    },
    /// It is not.
    Suppress,
}

impl AuditLimit {
    /// Asks for one line.
    pub(crate) fn take(&mut self, now: Instant) -> AuditDecision {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            let suppressed = std::mem::take(&mut self.suppressed);
            (self.since, self.written) = (Some(now), 1);
            return AuditDecision::Write { suppressed };
        }
        if self.written < LINES_PER_WINDOW {
            self.written += 1;
            return AuditDecision::Write { suppressed: 0 };
        }
        self.suppressed += 1;
        AuditDecision::Suppress
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::monotonic;

    #[test]
    fn lines_beyond_those_of_a_minute_are_counted_and_reported_with_the_next() {
        let (mut limit, start) = (AuditLimit::default(), monotonic());
        for _ in 0..LINES_PER_WINDOW {
            assert_eq!(limit.take(start), AuditDecision::Write { suppressed: 0 });
        }
        assert_eq!(limit.take(start + WINDOW / 2), AuditDecision::Suppress);
        assert_eq!(limit.take(start + WINDOW / 2), AuditDecision::Suppress);
        assert_eq!(limit.take(start + WINDOW), AuditDecision::Write { suppressed: 2 });
        assert_eq!(limit.take(start + WINDOW), AuditDecision::Write { suppressed: 0 });
    }
}
