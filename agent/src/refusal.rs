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
    /// All refusals, in the order of their counters.
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
