//! Detects that the wall clock was set, by comparing it with the monotonic clock. Sans-io: both times are
//! arguments.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

/// The most that the wall clock may deviate from the monotonic clock between two checks: more than a slewed
/// clock deviates, less than what affects certificate validation.
const TOLERANCE: Duration = Duration::from_secs(10);
/// How long a clock must be steady after a jump until its time is trusted.
pub const SETTLE_TIME: Duration = Duration::from_secs(15);

static JUMPS: AtomicU64 = AtomicU64::new(0);
static SKEW_SECONDS: AtomicU64 = AtomicU64::new(0);

/// The number of times the wall clock of this process has jumped.
pub(crate) fn jumps() -> u64 {
    JUMPS.load(Relaxed)
}

/// The difference between this host's clock and the control plane's at the last measurement, in seconds.
pub(crate) fn skew_seconds() -> u64 {
    SKEW_SECONDS.load(Relaxed)
}

/// Records the difference between this host's clock and the control plane's.
pub fn report_skew(skew: Duration) {
    SKEW_SECONDS.store(skew.as_secs(), Relaxed);
}

/// Watches a wall clock for jumps.
#[derive(Debug)]
pub struct ClockWatch {
    /// The two times at the last check that found them in agreement.
    wall: SystemTime,
    monotonic: Instant,
    unsettled: Option<Unsettled>,
}

#[derive(Debug)]
struct Unsettled {
    /// When the wall clock jumped, and the time that it jumped to.
    since: Instant,
    to: SystemTime,
}

/// The result of one check of the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockCheck {
    /// The wall clock advances with the monotonic clock.
    Steady,
    /// The wall clock has jumped since the last check.
    Jumped(ClockJump),
    /// The wall clock jumped less than [`SETTLE_TIME`] ago.
    Unsettled,
    /// [`SETTLE_TIME`] has passed since the jump: the new time is trusted from now on.
    Settled,
    /// The jump was undone: the wall clock shows the time that it would show without the jump.
    Restored,
}

impl ClockCheck {
    /// Whether timestamps may be taken from the clock.
    #[must_use]
    pub fn is_steady(self) -> bool {
        matches!(self, Self::Steady | Self::Settled | Self::Restored)
    }
}

/// A jump of the wall clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockJump {
    /// The clock moved into the future.
    Ahead(Duration),
    /// The clock moved into the past.
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

/// The absolute difference of two times.
#[must_use]
pub fn absolute_difference(one: SystemTime, other: SystemTime) -> Duration {
    one.duration_since(other).unwrap_or_else(|error| error.duration())
}

impl ClockWatch {
    /// Starts watching a clock whose current time is trusted.
    #[must_use]
    pub fn new(wall: SystemTime, monotonic: Instant) -> Self {
        Self { wall, monotonic, unsettled: None }
    }

    /// Compares both clocks with the last check.
    pub fn check(&mut self, wall: SystemTime, monotonic: Instant) -> ClockCheck {
        let expected = self.wall + monotonic.saturating_duration_since(self.monotonic);
        let was_unsettled = self.unsettled.is_some();
        if absolute_difference(wall, expected) <= TOLERANCE {
            self.wall = wall;
            self.monotonic = monotonic;
            self.unsettled = None;
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

    #[expect(clippy::disallowed_methods, reason = "any moment will do")]
    fn start() -> (ClockWatch, SystemTime, Instant) {
        let wall = SystemTime::UNIX_EPOCH + 20_000 * DAY;
        let monotonic = Instant::now();
        (ClockWatch::new(wall, monotonic), wall, monotonic)
    }

    #[test]
    fn slewed_clock_is_steady_however_large_the_total_deviation() {
        let (mut watch, mut wall, mut monotonic) = start();
        for _ in 0..100 {
            wall += 9 * SECOND;
            monotonic += SECOND;
            assert_eq!(watch.check(wall, monotonic), ClockCheck::Steady);
        }
    }

    #[test]
    fn undone_jump_restores_the_clock() {
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
    fn clock_is_trusted_again_after_the_settle_time() {
        let (mut watch, wall, monotonic) = start();
        let check = |watch: &mut ClockWatch, at: Duration, by: Duration| {
            watch.check(wall + at + by, monotonic + at)
        };
        assert_eq!(check(&mut watch, SECOND, DAY), ClockCheck::Jumped(ClockJump::Ahead(DAY)));
        // Another jump restarts the settle time.
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
