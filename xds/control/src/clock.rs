//! The clocks of the control plane. No other module of this crate reads them.
//!
//! Certificates and CRLs have dates, and peers refuse them outside these dates. So no certificate is issued and no CRL
//! renewed while the wall clock has just jumped. A new revocation does not wait.

use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use weft_runtime::clock_watch::{ClockCheck, ClockWatch, SETTLE_TIME};

/// The wall clock, with detection of jumps.
#[derive(Debug)]
pub(crate) struct SteadyClock(Mutex<ClockWatch>);

impl SteadyClock {
    /// Takes the present time as correct.
    pub(crate) fn start() -> Self {
        Self(Mutex::new(ClockWatch::new(wall_clock(), monotonic())))
    }

    /// The time, unless the clock has just jumped.
    ///
    /// # Errors
    /// The clock jumped less than [`SETTLE_TIME`] ago.
    pub(crate) fn steady(&self) -> Result<SystemTime, String> {
        let now = wall_clock();
        let check = self.0.lock().unwrap_or_else(PoisonError::into_inner).check(now, monotonic());
        match check {
            ClockCheck::Jumped(jump) => tracing::warn!(
                %jump,
                settling = ?SETTLE_TIME,
                "clock jumped, signing paused"
            ),
            ClockCheck::Settled => tracing::warn!("clock steady again, signing resumed"),
            ClockCheck::Restored => tracing::info!("clock jump was reverted"),
            ClockCheck::Steady | ClockCheck::Unsettled => {}
        }
        if check.is_steady() {
            return Ok(now);
        }
        let seconds = SETTLE_TIME.as_secs();
        Err(format!(
            "the clock of the control plane jumped: nothing is signed until it has been steady for {seconds} s"
        ))
    }
}

#[expect(clippy::disallowed_methods, reason = "the only place of this crate that reads this clock")]
pub(crate) fn wall_clock() -> SystemTime {
    SystemTime::now()
}

#[expect(clippy::disallowed_methods, reason = "the only place of this crate that reads this clock")]
pub(crate) fn monotonic() -> Instant {
    Instant::now()
}
