//! What the decision about a request depends on besides the request: the connection, the plan, time and randomness.

use std::time::{Instant, SystemTime};

use crate::authenticate::TokenCache;
use crate::connection::ClientConnection;
use crate::plan::SidecarPlan;

/// What a decision depends on besides the request.
#[derive(Clone, Copy)]
pub(crate) struct DecisionContext<'p> {
    /// Where the request arrived.
    pub(crate) connection: &'p ClientConnection,
    pub(crate) plan: &'p SidecarPlan,
    /// The tokens that were verified before. They save work and change no decision.
    pub(crate) tokens: &'p TokenCache,
    pub(crate) time: DecisionTime,
    /// Any number, for the weighted choice among clusters.
    pub(crate) random: u32,
}

/// The time of a decision, on both clocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DecisionTime {
    pub(crate) monotonic: Instant,
    pub(crate) wall: SystemTime,
}

impl DecisionTime {
    /// The monotonic time at which the wall clock will show `deadline`.
    pub(crate) fn until(self, deadline: SystemTime) -> Instant {
        self.monotonic + deadline.duration_since(self.wall).unwrap_or_default()
    }
}
