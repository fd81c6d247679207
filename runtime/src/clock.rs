//! Notices that the wall clock was set, by comparing it with the monotonic clock. Sans-io: both times are
//! arguments.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

/// By how much the wall clock may leave the monotonic one between two looks: more than a clock that is slewed
/// does, and less than what matters to a certificate.
const TOLERANCE: Duration = Duration::from_secs(10);
/// How long a clock has to be steady after a jump until what it shows is taken for the time.
pub const SETTLE_TIME: Duration = Duration::from_secs(15);

static JUMPS: AtomicU64 = AtomicU64::new(0);
static SKEW_SECONDS: AtomicU64 = AtomicU64::new(0);

/// How often the wall clock of this process has jumped.
pub(crate) fn jumps() -> u64 {
    JUMPS.load(Relaxed)
}

/// By how much this host's clock differed from the control plane's when that was last seen, in seconds.
pub(crate) fn skew_seconds() -> u64 {
    SKEW_SECONDS.load(Relaxed)
}

/// Reports by how much this host's clock differs from the control plane's.
pub fn report_skew(skew: Duration) {
    SKEW_SECONDS.store(skew.as_secs(), Relaxed);
}

/// A wall clock, followed.
#[derive(Debug)]
pub struct ClockWatch {
    /// When the two clocks last agreed.
    wall: SystemTime,
    monotonic: Instant,
    unsettled: Option<Unsettled>,
}

#[derive(Debug)]
struct Unsettled {
    /// When the wall clock jumped, and to what.
    since: Instant,
    to: SystemTime,
}

/// What a look at the clock has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockCheck {
    /// The wall clock goes as the monotonic one does.
    Steady,
    /// It has jumped since the last look.
    Jumped(ClockJump),
    /// It jumped less than [`SETTLE_TIME`] ago.
    Unsettled,
    /// What it jumped to is taken for the time from now on.
    Settled,
    /// It shows again what it would without its jump.
    Restored,
}

impl ClockCheck {
    /// Whether dates may be taken from the clock.
    #[must_use]
    pub fn is_steady(self) -> bool {
        matches!(self, Self::Steady | Self::Settled | Self::Restored)
    }
}

/// A jump of the wall clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockJump {
    /// Into the future.
    Ahead(Duration),
    /// Into the past.
    Back(Duration),
}

impl std::fmt::Display for ClockJump {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ahead(by) => write!(f, "{} s ahead", by.as_secs()),
            Self::Back(by) => write!(f, "{} s back", by.as_secs()),
        }
    }
}

/// How far a time is from another.
#[must_use]
pub fn absolute_difference(one: SystemTime, other: SystemTime) -> Duration {
    one.duration_since(other).unwrap_or_else(|error| error.duration())
}

impl ClockWatch {
    /// Begins at a time that is taken as it is.
    #[must_use]
    pub fn new(wall: SystemTime, monotonic: Instant) -> Self {
        Self { wall, monotonic, unsettled: None }
    }

    /// Looks at both clocks.
    pub fn check(&mut self, wall: SystemTime, monotonic: Instant) -> ClockCheck {
        let expected = self.wall + monotonic.saturating_duration_since(self.monotonic);
        let was_unsettled = self.unsettled.is_some();
        if absolute_difference(wall, expected) <= TOLERANCE {
            (self.wall, self.monotonic, self.unsettled) = (wall, monotonic, None);
            return if was_unsettled { ClockCheck::Restored } else { ClockCheck::Steady };
        }
        let continues = self.unsettled.as_ref().is_some_and(|jump| {
            let since = monotonic.saturating_duration_since(jump.since);
            absolute_difference(wall, jump.to + since) <= TOLERANCE
        });
        match &self.unsettled {
            Some(jump) if continues => {
                if monotonic.saturating_duration_since(jump.since) < SETTLE_TIME {
                    return ClockCheck::Unsettled;
                }
                *self = Self::new(wall, monotonic);
                ClockCheck::Settled
            }
            _ => {
                self.unsettled = Some(Unsettled { since: monotonic, to: wall });
                JUMPS.fetch_add(1, Relaxed);
                ClockCheck::Jumped(match wall.duration_since(expected) {
                    Ok(by) => ClockJump::Ahead(by),
                    Err(error) => ClockJump::Back(error.duration()),
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const DAY: Duration = Duration::from_secs(24 * 3600);

    #[allow(clippy::disallowed_methods, reason = "any moment will do")]
    fn start() -> (ClockWatch, SystemTime, Instant) {
        let (wall, monotonic) = (SystemTime::UNIX_EPOCH + 20_000 * DAY, Instant::now());
        (ClockWatch::new(wall, monotonic), wall, monotonic)
    }

    #[test]
    fn slewed_clock_is_steady_however_far_it_gets() {
        let (mut watch, mut wall, mut monotonic) = start();
        for _ in 0..100 {
            wall += 9 * SECOND;
            monotonic += SECOND;
            assert_eq!(watch.check(wall, monotonic), ClockCheck::Steady);
        }
    }

    #[test]
    fn jump_that_is_taken_back_leaves_the_time_as_it_was() {
        for (jumped, jump) in [(true, ClockJump::Ahead(DAY)), (false, ClockJump::Back(DAY))] {
            let (mut watch, wall, monotonic) = start();
            let wrong = |at: u32| {
                let right = wall + at * SECOND;
                if jumped { right + DAY } else { right - DAY }
            };
            assert_eq!(watch.check(wrong(1), monotonic + SECOND), ClockCheck::Jumped(jump));
            assert_eq!(watch.check(wrong(8), monotonic + 8 * SECOND), ClockCheck::Unsettled);
            let right = wall + 9 * SECOND;
            assert_eq!(watch.check(right, monotonic + 9 * SECOND), ClockCheck::Restored);
            assert_eq!(watch.check(right + SECOND, monotonic + 10 * SECOND), ClockCheck::Steady);
        }
    }

    #[test]
    fn clock_that_stays_where_it_jumped_to_is_taken_after_the_settling_time() {
        let (mut watch, wall, monotonic) = start();
        let check = |watch: &mut ClockWatch, at: Duration, by: Duration| {
            watch.check(wall + at + by, monotonic + at)
        };
        assert_eq!(check(&mut watch, SECOND, DAY), ClockCheck::Jumped(ClockJump::Ahead(DAY)));
        // Another jump begins the wait anew.
        let again = check(&mut watch, 10 * SECOND, 2 * DAY);
        assert_eq!(again, ClockCheck::Jumped(ClockJump::Ahead(2 * DAY)));
        let end = 10 * SECOND + SETTLE_TIME;
        assert_eq!(check(&mut watch, end - SECOND, 2 * DAY), ClockCheck::Unsettled);
        assert_eq!(check(&mut watch, end, 2 * DAY), ClockCheck::Settled);
        assert_eq!(check(&mut watch, end + SECOND, 2 * DAY), ClockCheck::Steady);
        let back = check(&mut watch, end + 2 * SECOND, Duration::ZERO);
        assert_eq!(back, ClockCheck::Jumped(ClockJump::Back(2 * DAY)));
    }
}
