//! Waiting for what happens elsewhere, never for a time to pass.

use std::fmt;
use std::time::{Duration, Instant};

/// How long anything may take. Far more than it does on an idle machine: only a test that fails waits
/// so long.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Looks again and again, until there is something to see.
///
/// # Panics
/// When there is nothing at the deadline; the message says what was awaited.
pub fn eventually<T>(awaited: impl fmt::Display, look: impl FnMut() -> Option<T>) -> T {
    eventually_within(DEADLINE, awaited, look)
}

/// The same for what is due only in some time.
///
/// # Panics
/// When there is nothing after that.
#[allow(
    clippy::disallowed_methods,
    reason = "the one place that pauses between two looks at what no event announces"
)]
pub fn eventually_within<T>(
    time: Duration,
    awaited: impl fmt::Display,
    mut look: impl FnMut() -> Option<T>,
) -> T {
    let end = Instant::now() + time;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < end, "waited {time:?} in vain: {awaited}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
