//! How many lines of the audit log a minute may be about refusals: whoever asks in vain must not fill the disk.

use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_secs(60);
const LINES: u32 = 60;

/// What of a minute's lines has been written.
#[derive(Debug, Default)]
pub(crate) struct Allowance {
    since: Option<Instant>,
    written: u32,
    suppressed: u64,
}

/// Whether a line is written.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is, and so many before it were not.
    Write {
        /// How many.
        suppressed: u64,
    },
    /// It is not.
    Suppress,
}

impl Allowance {
    /// Asks for one line.
    pub(crate) fn take(&mut self, now: Instant) -> Verdict {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            let suppressed = std::mem::take(&mut self.suppressed);
            (self.since, self.written) = (Some(now), 1);
            return Verdict::Write { suppressed };
        }
        if self.written < LINES {
            self.written += 1;
            return Verdict::Write { suppressed: 0 };
        }
        self.suppressed += 1;
        Verdict::Suppress
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::monotonic;

    #[test]
    fn lines_beyond_those_of_a_minute_are_counted_and_reported_with_the_next() {
        let (mut allowance, start) = (Allowance::default(), monotonic());
        for _ in 0..LINES {
            assert_eq!(allowance.take(start), Verdict::Write { suppressed: 0 });
        }
        assert_eq!(allowance.take(start + WINDOW / 2), Verdict::Suppress);
        assert_eq!(allowance.take(start + WINDOW / 2), Verdict::Suppress);
        assert_eq!(allowance.take(start + WINDOW), Verdict::Write { suppressed: 2 });
        assert_eq!(allowance.take(start + WINDOW), Verdict::Write { suppressed: 0 });
    }
}
