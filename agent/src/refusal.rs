//! Every reason why the agent refuses a flow.

use std::io;

use nix::errno::Errno;

/// Why a connection or a datagram is not carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FlowRefusal {
    /// The connection or flow limit, or the limit of open files, is reached.
    Limit,
    /// The connection reached a capture port without a redirect: a mistake or a loop.
    NotRedirected,
    /// The security group of the service does not admit the client.
    NotAllowed,
    /// No service listens on the destination.
    NoService,
    /// The service has no endpoint.
    NoEndpoint,
    /// No endpoint could be reached.
    Unreachable,
}

impl FlowRefusal {
    /// All refusals, in the order of the enum, which is that of their counters.
    pub(crate) const ALL: [Self; 6] = [
        Self::Limit,
        Self::NotRedirected,
        Self::NotAllowed,
        Self::NoService,
        Self::NoEndpoint,
        Self::Unreachable,
    ];

    /// The word in logs and metrics.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Limit => "limit",
            Self::NotRedirected => "not_redirected",
            Self::NotAllowed => "not_allowed",
            Self::NoService => "no_service",
            Self::NoEndpoint => "no_endpoint",
            Self::Unreachable => "unreachable",
        }
    }
}

/// The refusal for a failed connect: running out of file descriptors is the agent's own limit.
pub(crate) fn connect_refusal(error: &io::Error) -> FlowRefusal {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EMFILE | Errno::ENFILE) => FlowRefusal::Limit,
        _ => FlowRefusal::Unreachable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_is_listed_at_its_own_position_with_its_own_reason() {
        for (position, refusal) in FlowRefusal::ALL.into_iter().enumerate() {
            assert_eq!(refusal as usize, position, "{refusal:?}");
            let same = FlowRefusal::ALL.into_iter().filter(|r| r.reason() == refusal.reason());
            assert_eq!(same.count(), 1, "{refusal:?}");
            // A new variant needs a place in the list: the compiler asks for it here.
            match refusal {
                FlowRefusal::Limit
                | FlowRefusal::NotRedirected
                | FlowRefusal::NotAllowed
                | FlowRefusal::NoService
                | FlowRefusal::NoEndpoint
                | FlowRefusal::Unreachable => {}
            }
        }
    }
}
