//! Why an endpoint gave no response that was forwarded. The variant says whether the request may be sent again.

use std::net::SocketAddr;

use crate::denial::Denial;
use crate::upstream_failure::ResponseFault;

/// Why no response was forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ExchangeFailure {
    /// The endpoint could not be connected to: nothing was sent.
    NotConnected(Denial),
    /// A reused connection was closed when the request was sent.
    Stale(ResponseFault),
    /// The endpoint reported that it did not process the request: it may be sent again, also when it is not idempotent.
    NotProcessed,
    /// The request is refused with this denial.
    Denied(Denial),
}

/// Logs a failed connection attempt and converts it. A full connection pool is not retried: other endpoints of the
/// cluster share its limit.
pub(super) fn connect_failure(address: SocketAddr, error: &std::io::Error) -> ExchangeFailure {
    tracing::debug!(%address, %error, "connecting to an endpoint failed");
    match Denial::unreached(error) {
        Denial::Overloaded => ExchangeFailure::Denied(Denial::Overloaded),
        denial => ExchangeFailure::NotConnected(denial),
    }
}
