//! Reads the monotonic clock and the wall clock: the only place in this crate that does.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The monotonic clock.
#[expect(clippy::disallowed_methods, reason = "the one place where this crate reads the clock")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// The wall clock.
#[expect(clippy::disallowed_methods, reason = "the one place where this crate reads the clock")]
pub(crate) fn wall_clock() -> SystemTime {
    SystemTime::now()
}

/// The wall clock, in seconds since the Unix epoch.
pub(crate) fn unix_seconds() -> u64 {
    wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The wall clock, in milliseconds since the Unix epoch.
pub(crate) fn unix_ms() -> u128 {
    wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
}
