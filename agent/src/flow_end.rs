//! How a connection or flow ended, for its access log record.

use weft_runtime::access::{ResponseFlag, TerminationDetails};

use crate::forward::tcp::RelayOutcome;
use crate::refusal::FlowRefusal;

/// How a connection or flow ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FlowEnd {
    /// The agent carried the flow until this end.
    Carried(TerminationDetails),
    /// The agent refused the flow.
    Refused(FlowRefusal),
}

impl FlowEnd {
    /// The response flag in the access log.
    pub(crate) fn flag(self) -> Option<ResponseFlag> {
        match self {
            Self::Carried(end) => end.flag(),
            Self::Refused(refusal) => refusal.info().flag,
        }
    }

    /// The termination details in the access log.
    pub(crate) fn details(self) -> &'static str {
        match self {
            Self::Carried(end) => end.word(),
            Self::Refused(refusal) => refusal.info().details,
        }
    }
}

impl From<RelayOutcome> for FlowEnd {
    fn from(outcome: RelayOutcome) -> Self {
        Self::Carried(match outcome {
            RelayOutcome::Closed => TerminationDetails::Closed,
            RelayOutcome::Reset => TerminationDetails::Reset,
            RelayOutcome::Idle => TerminationDetails::IdleTimeout,
            RelayOutcome::Aborted => TerminationDetails::DrainTimeout,
        })
    }
}
