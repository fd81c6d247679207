//! Conditions that the steps wait for or require.

use std::time::Duration;

use weft_runtime::clock::now;

use super::roles::pause;

/// How long a configuration change may take to reach every process.
const CHANGE: Duration = Duration::from_secs(15);

/// Polls until the condition holds, for at most [`CHANGE`].
///
/// # Errors
/// The deadline passes first, or a poll fails.
pub(super) fn wait(
    what: &str,
    mut is_met: impl FnMut() -> Result<bool, String>,
) -> Result<(), String> {
    let deadline = now() + CHANGE;
    while !is_met()? {
        expect(now() < deadline, || format!("timed out after {CHANGE:?} waiting until {what}"))?;
        pause(Duration::from_millis(50));
    }
    Ok(())
}

/// An error unless the condition holds.
pub(super) fn expect(good: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if good { Ok(()) } else { Err(otherwise()) }
}
