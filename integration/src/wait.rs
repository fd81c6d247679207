//! Waits for events elsewhere. [`pause`] alone waits for a time.

use std::fmt;
use std::time::{Duration, Instant};

/// How long anything may take. Far more than it does on an idle machine: only a test that fails waits
/// so long.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// How long it may take until certificates that live for a minute are renewed, or over.
const DUE_TIME: Duration = Duration::from_secs(75);

/// Looks again and again, until there is something to see.
///
/// # Panics
/// When there is nothing at the deadline; the message says what was awaited.
pub fn eventually<T>(awaited: impl fmt::Display, look: impl FnMut() -> Option<T>) -> T {
    within(DEADLINE, Duration::from_millis(10), &awaited, look)
}

/// The same for what comes with a certificate that lives for a minute: when it is due, or over.
///
/// # Panics
/// When there is nothing by then; the message says what was awaited.
pub fn within_certificate_lifetime<T>(
    awaited: impl fmt::Display,
    look: impl FnMut() -> Option<T>,
) -> T {
    within(DUE_TIME, Duration::from_millis(250), &awaited, look)
}

/// Waits for a time: between two requests of a client with a pace, or while nothing may happen. Everything
/// else has an event to wait for.
#[allow(clippy::disallowed_methods, reason = "the one place where tests let time pass")]
pub fn pause(time: Duration) {
    std::thread::sleep(time);
}

#[allow(clippy::disallowed_methods, reason = "a deadline is measured by the clock")]
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
        assert!(Instant::now() < end, "waited {time:?} in vain: {awaited}");
        pause(interval);
    }
}
