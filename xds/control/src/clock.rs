//! The clocks of a control plane, read here alone. What it signs carries dates, and others refuse what is not
//! good yet or any more: so nothing is signed while the wall clock has just jumped.

use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use weft_runtime::clock::{ClockCheck, ClockWatch, SETTLE_TIME};

/// The wall clock, watched.
#[derive(Debug)]
pub(crate) struct SteadyClock(Mutex<ClockWatch>);

impl SteadyClock {
    /// A clock that is taken as it is now.
    pub(crate) fn start() -> Self {
        Self(Mutex::new(ClockWatch::new(wall_clock(), monotonic())))
    }

    /// The time, unless the clock has just jumped.
    ///
    /// # Errors
    /// When it has.
    pub(crate) fn steady(&self) -> Result<SystemTime, String> {
        let now = wall_clock();
        let look = self.0.lock().unwrap_or_else(PoisonError::into_inner).check(now, monotonic());
        match look {
            ClockCheck::Jumped(jump) => tracing::warn!(
                %jump,
                settling = ?SETTLE_TIME,
                "the clock jumped: nothing is signed until it has been steady"
            ),
            ClockCheck::Settled => tracing::warn!("the clock is steady after its jump"),
            ClockCheck::Restored => tracing::info!("the jump of the clock was taken back"),
            ClockCheck::Steady | ClockCheck::Unsettled => {}
        }
        if look.is_steady() {
            return Ok(now);
        }
        let seconds = SETTLE_TIME.as_secs();
        Err(format!(
            "the clock of the control plane jumped; nothing is signed until it has been steady for {seconds} s"
        ))
    }
}

#[allow(clippy::disallowed_methods, reason = "the edge where this crate's clock is read")]
pub(crate) fn wall_clock() -> SystemTime {
    SystemTime::now()
}

#[allow(clippy::disallowed_methods, reason = "the edge where this crate's clock is read")]
pub(crate) fn monotonic() -> Instant {
    Instant::now()
}
