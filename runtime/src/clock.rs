//! Reads the monotonic clock and the wall clock. Decisions take the time as an argument; the code around them reads it
//! here.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The monotonic clock.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the place where the data plane reads the clock")]
pub fn now() -> Instant {
    Instant::now()
}

/// The wall clock.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the place where the data plane reads the clock")]
pub fn wall_clock() -> SystemTime {
    SystemTime::now()
}

/// The wall clock, in seconds since the Unix epoch.
#[must_use]
pub fn unix_seconds() -> u64 {
    wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The wall clock, in milliseconds since the Unix epoch.
#[must_use]
pub fn unix_ms() -> u128 {
    wall_clock().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
}
