//! Every reason why the agent refuses a flow.

use std::io;

use nix::errno::Errno;
use weft_runtime::access::{RefusalInfo, ResponseFlag};

macro_rules! refusals {
    ($($(#[doc = $doc:literal])+ $name:ident: $reason:literal, $flag:expr, $details:literal, $action:literal;)+) => {
        /// Why a connection or a datagram is not carried.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum FlowRefusal {
            $($(#[doc = $doc])+ $name,)+
        }

        impl FlowRefusal {
            /// All refusals, in the order of the enum, which is that of their counters.
            pub(crate) const ALL: &[Self] = &[$(Self::$name,)+];

            /// What logs, metrics and documentation say about it.
            pub(crate) const fn info(self) -> RefusalInfo {
                match self {
                    $(Self::$name => RefusalInfo {
                        reason: $reason,
                        status: 0,
                        grpc_status: 0,
                        flag: $flag,
                        details: $details,
                        meaning: &[$($doc),+],
                        action: $action,
                    },)+
                }
            }
        }
    };
}

refusals! {
    /// The connection or flow limit, or the limit of open files, is reached.
    Limit: "limit", Some(ResponseFlag::Overflow), "overflow",
        "Raise `--connection-limit`, `--flow-limit` or the limit of open files, or add nodes.";
    /// The connection reached a capture port without a redirect: a mistake or a loop.
    NotRedirected: "not_redirected", None, "not_redirected",
        "Connect to the address of the service, not to the capture port; check `weft redirect verify`.";
    /// The security group of the service does not admit the client.
    NotAllowed: "not_allowed", Some(ResponseFlag::Unauthorized), "security_group_denied",
        "Add the client to `allow_from` of the service, if it may connect.";
    /// No service listens on the destination.
    NoService: "no_service", Some(ResponseFlag::NoRoute), "service_not_found",
        "Check the addresses and ports of the service; `weft flow explain` prints what the agent knows.";
    /// The service has no endpoint.
    NoEndpoint: "no_endpoint", Some(ResponseFlag::NoHealthyUpstream), "no_healthy_upstream",
        "Start an endpoint of the service, or correct `endpoints`.";
    /// No endpoint could be reached.
    Unreachable: "unreachable", Some(ResponseFlag::UpstreamConnectionFailure), "upstream_connection_failure",
        "Check that the endpoint runs and that the node has a route to it.";
}

impl FlowRefusal {
    /// The word in metrics.
    pub(crate) fn reason(self) -> &'static str {
        self.info().reason
    }
}

/// Every refusal, for the reference pages.
pub fn refusals() -> impl Iterator<Item = RefusalInfo> {
    FlowRefusal::ALL.iter().map(|refusal| refusal.info())
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
        for (position, refusal) in FlowRefusal::ALL.iter().enumerate() {
            assert_eq!(*refusal as usize, position, "{refusal:?}");
            let same = FlowRefusal::ALL.iter().filter(|other| other.reason() == refusal.reason());
            assert_eq!(same.count(), 1, "{refusal:?}");
        }
    }
}
