//! Every way the agent says no.

/// Why a connection or a datagram is not carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FlowRefusal {
    /// As many are carried already as are allowed, or as there are descriptors for.
    Limit,
    /// It reached a capture port without having been redirected: a mistake or a loop.
    NotRedirected,
    /// The service's security group does not let the client in.
    NotAllowed,
    /// No service answers for its destination.
    NoService,
    /// The service has no endpoint to offer.
    NoEndpoint,
    /// No endpoint could be reached.
    Unreachable,
}

impl FlowRefusal {
    /// All of them, in the order of their counters.
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
