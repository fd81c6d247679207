//! Limits the lines about refused requests in the audit log: a client whose requests are refused must not fill the disk.

use std::time::{Duration, Instant};

/// The window of the limit.
const WINDOW: Duration = Duration::from_secs(60);
/// How many lines may be written in a window.
const LINES_PER_WINDOW: u32 = 60;

/// Counts the lines of the current window.
#[derive(Debug, Default)]
pub(crate) struct AuditLimit {
    since: Option<Instant>,
    written: u32,
    suppressed: u64,
}

/// Whether to write a line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum AuditDecision {
    /// Write the line.
    Write {
        /// How many lines were suppressed before this one.
        suppressed: u64,
    },
    /// Suppress the line: the window's limit is reached.
    Suppress,
}

impl AuditLimit {
    /// Decides about one line.
    pub(crate) fn take(&mut self, now: Instant) -> AuditDecision {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            let suppressed = std::mem::take(&mut self.suppressed);
            self.since = Some(now);
            self.written = 1;
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
    fn lines_above_the_limit_are_suppressed_and_counted_in_the_next_line() {
        let mut limit = AuditLimit::default();
        let start = monotonic();
        for _ in 0..LINES_PER_WINDOW {
            assert_eq!(limit.take(start), AuditDecision::Write { suppressed: 0 });
        }
        assert_eq!(limit.take(start + WINDOW / 2), AuditDecision::Suppress);
        assert_eq!(limit.take(start + WINDOW / 2), AuditDecision::Suppress);
        assert_eq!(limit.take(start + WINDOW), AuditDecision::Write { suppressed: 2 });
        assert_eq!(limit.take(start + WINDOW), AuditDecision::Write { suppressed: 0 });
    }
}
