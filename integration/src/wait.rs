//! Waits for conditions with a deadline. Only [`pause`] waits for a fixed time.

use std::fmt;
use std::time::{Duration, Instant};

/// The deadline of any wait. It is far longer than needed on an idle machine, so only a failing
/// test waits this long.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// The deadline for the renewal or expiry of certificates that live for a minute.
const CERTIFICATE_DEADLINE: Duration = Duration::from_secs(75);

/// Calls `look` until it returns a value.
///
/// # Panics
/// If `look` returns nothing before the deadline; the message names the condition.
pub fn eventually<T>(awaited: impl fmt::Display, look: impl FnMut() -> Option<T>) -> T {
    within(DEADLINE, Duration::from_millis(10), &awaited, look)
}

/// Calls `look` until it returns a value, with a deadline for the renewal or expiry of a
/// certificate that lives for a minute.
///
/// # Panics
/// If `look` returns nothing before the deadline; the message names the condition.
pub fn within_certificate_lifetime<T>(
    awaited: impl fmt::Display,
    look: impl FnMut() -> Option<T>,
) -> T {
    within(CERTIFICATE_DEADLINE, Duration::from_millis(250), &awaited, look)
}

/// Sleeps: between two requests of a paced client, or while a test checks that nothing happens.
/// Everything else waits for a condition.
#[expect(clippy::disallowed_methods, reason = "the only place where tests sleep")]
pub fn pause(time: Duration) {
    std::thread::sleep(time);
}

#[expect(clippy::disallowed_methods, reason = "a deadline is measured with the clock")]
fn within<T>(
    time: Duration,
    interval: Duration,
    awaited: &dyn fmt::Display,
    mut look: impl FnMut() -> Option<T>,
) -> T {
    let end = Instant::now() + time;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < end, "not reached within {time:?}: {awaited}");
        pause(interval);
    }
}
