//! Every reason for which the sidecar refuses a request.
//!
//! The set is closed: each variant has an HTTP status, a gRPC status, a response flag, and words in logs and metrics. The
//! words never come from the text of an error. The statuses are those of AWS load balancers where AWS defines one.
//! `docs/errors.md` is generated from the list.

use std::io;

use weft_runtime::access::{RefusalInfo, ResponseFlag};

use crate::authenticate::TokenFault;
use crate::http::desync::DesyncReason;
use crate::upstream_failure::{ConnectFailure, ResponseFault};

/// Defines the denials from one list: the reason in metrics and bodies, HTTP status, gRPC status, response flag,
/// `response_code_details`, and what to do. The gRPC statuses follow grpc/grpc `doc/http-grpc-status-mapping.md`, with
/// DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED and UNIMPLEMENTED where the sidecar knows more than the mapping. The details are
/// Envoy's where Envoy has a word for the case.
macro_rules! denials {
    ($($(#[doc = $doc:literal])+ $name:ident $(($payload:ty))?:
        $reason:literal, $status:literal, $grpc:literal, $flag:expr, $details:literal, $action:literal;)+) => {
        /// Why a request is refused.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Denial {
            $($(#[doc = $doc])+ $name $(($payload))?,)+
            /// The request departs from strict HTTP/1.1 in a way that the desync mode refuses. Counted as malformed.
            Desync(DesyncReason),
            /// The request needs a token and has no valid one.
            Token(TokenFault, &'static str),
        }

        impl Denial {
            /// The denials apart from those of tokens.
            const OWN: &[RefusalInfo] = &[$(RefusalInfo {
                reason: $reason,
                status: $status,
                grpc_status: $grpc,
                flag: $flag,
                details: $details,
                meaning: &[$($doc),+],
                action: $action,
            },)+];

            /// The word in metrics and bodies.
            pub(crate) fn reason(self) -> &'static str {
                match self {
                    $(Self::$name { .. } => $reason,)+
                    Self::Desync(_) => Self::MALFORMED,
                    Self::Token(fault, _) => fault.info().reason,
                }
            }
        }
    };
}

denials! {
    /// The request violates HTTP, is ambiguous, or departs from strict HTTP/1.1 in a way that the desync mode refuses.
    Malformed(&'static str): "malformed", 400, 13, Some(ResponseFlag::DownstreamProtocolError),
        "malformed", "Correct the client. The body and `error_detail` say what is wrong.";
    /// No policy allows the request, or a policy denies it.
    NotAllowed: "not_allowed", 403, 7, Some(ResponseFlag::Unauthorized),
        "rbac_access_denied", "`weft why` prints the policy that decides; `matched_policy` names a policy that denies.";
    /// No route matches the request.
    NoRoute: "no_route", 404, 12, Some(ResponseFlag::NoRoute),
        "route_not_found", "Check `host` and path of the request against the routes of the service.";
    /// The method is never served, or its protocol upgrade is not enabled.
    MethodNotAllowed(&'static str): "method_not_allowed", 405, 12, None,
        "method_not_allowed", "Use another method, or enable CONNECT or WebSocket on the listener.";
    /// The head took too long to arrive.
    HeadTimeout: "head_timeout", 408, 4, Some(ResponseFlag::StreamIdleTimeout),
        "request_header_timeout", "Look for a slow client or network; `http.timeouts` sets the limit.";
    /// The body took too long to arrive.
    BodyTimeout: "body_timeout", 408, 4, Some(ResponseFlag::StreamIdleTimeout),
        "request_body_timeout", "Look for a slow client or network; `http.timeouts` sets the limit.";
    /// The body exceeds the size limit.
    BodyTooLarge: "body_too_large", 413, 8, None,
        "request_payload_too_large", "Send a smaller body.";
    /// The request target exceeds the length limit.
    TargetTooLong: "target_too_long", 414, 8, Some(ResponseFlag::DownstreamProtocolError),
        "request_target_too_long", "Send a shorter path or query, or raise the limit of the listener.";
    /// The head exceeds the size limit or the limit on the number of headers.
    HeadTooLarge: "head_too_large", 431, 8, Some(ResponseFlag::DownstreamProtocolError),
        "request_headers_too_large", "Send fewer or smaller headers, or raise `http.limits`.";
    /// The client closed the connection or stream before the response. No client sees this status.
    ClientGone: "client_gone", 460, 1, Some(ResponseFlag::DownstreamConnectionTermination),
        "downstream_remote_disconnect", "Compare the timeout of the client with `duration_us`.";
    /// `x-forwarded-for` has too many addresses.
    TooManyForwarders: "too_many_forwarders", 463, 8, Some(ResponseFlag::InvalidRequestHeader),
        "too_many_forwarders", "Look for a loop between proxies, or for a client that sets the header.";
    /// The upstream's HTTP version cannot express the request.
    ProtocolMismatch(&'static str): "protocol_mismatch", 464, 12, None,
        "protocol_mismatch", "Set the protocol of the service to HTTP/2.";
    /// The request has an unknown transfer coding or upgrade protocol.
    NotImplemented(&'static str): "not_implemented", 501, 12, Some(ResponseFlag::DownstreamProtocolError),
        "not_implemented", "Use `chunked` or no transfer coding, and WebSocket as the only upgrade.";
    /// The endpoint closed the connection or sent an invalid response.
    UpstreamBroken(ResponseFault): "upstream_broken", 502, 14, Some(ResponseFlag::UpstreamProtocolError),
        "upstream_reset_before_response_started", "`upstream_failure_reason` says what the endpoint did.";
    /// The limit on concurrent requests or connections is reached.
    Overloaded: "overloaded", 503, 8, Some(ResponseFlag::Overflow),
        "overflow", "Add endpoints, or raise the limits of the cluster or the window limit of the sidecar.";
    /// The service is unknown or has no endpoint.
    NoEndpoint: "no_endpoint", 503, 14, Some(ResponseFlag::NoHealthyUpstream),
        "no_healthy_upstream", "Start an endpoint of the service; `/config_dump` lists clusters and endpoints.";
    /// No endpoint could be connected to, or none proved its identity.
    Unreachable(ConnectFailure): "unreachable", 503, 14, Some(ResponseFlag::UpstreamConnectionFailure),
        "upstream_connection_failure", "`upstream_failure_reason` names the cause.";
    /// No endpoint accepted the connection in time.
    ConnectTimeout(ConnectFailure): "connect_timeout", 504, 14, Some(ResponseFlag::UpstreamConnectionFailure),
        "upstream_connection_timeout", "Check network and load of the endpoint, or raise `connect_timeout`.";
    /// The response took too long.
    UpstreamTimeout: "upstream_timeout", 504, 4, Some(ResponseFlag::UpstreamRequestTimeout),
        "upstream_response_timeout", "Look for a slow endpoint, or raise the timeout of the route.";
    /// The HTTP version is not supported.
    UnknownVersion: "unknown_version", 505, 12, Some(ResponseFlag::DownstreamProtocolError),
        "unknown_http_version", "Use HTTP/1.0, HTTP/1.1 or HTTP/2.";
}

impl Denial {
    /// The reason of malformed requests.
    const MALFORMED: &'static str = "malformed";

    /// The number of reasons.
    pub(crate) const COUNT: usize = Self::OWN.len() + TokenFault::ALL.len();

    /// Every denial, in the order of the counters.
    pub(crate) fn all() -> impl Iterator<Item = RefusalInfo> {
        let tokens = TokenFault::ALL.iter().map(|fault| fault.info());
        Self::OWN.iter().copied().chain(tokens)
    }

    /// The words of all reasons, in the order of their counters.
    pub(crate) fn reasons() -> impl Iterator<Item = &'static str> {
        Self::all().map(|info| info.reason)
    }

    /// What logs, metrics and clients get.
    pub(crate) fn info(self) -> RefusalInfo {
        match self {
            Self::Token(fault, _) => fault.info(),
            other => {
                let own = Self::OWN.iter().find(|info| info.reason == other.reason());
                debug_assert!(own.is_some(), "every denial is in the list");
                own.copied().unwrap_or_else(|| TokenFault::Internal.info())
            }
        }
    }

    /// The denial for a failed connection attempt to an endpoint.
    pub(crate) fn unreached(error: &io::Error) -> Self {
        let failure = ConnectFailure::of(error);
        match error.kind() {
            io::ErrorKind::QuotaExceeded => Self::Overloaded,
            io::ErrorKind::TimedOut => Self::ConnectTimeout(failure),
            _ => Self::Unreachable(failure),
        }
    }

    /// The index of its counter.
    pub(crate) fn index(self) -> usize {
        Self::reasons().position(|reason| reason == self.reason()).unwrap_or(0)
    }

    /// The HTTP status the client sees.
    pub(crate) fn status(self) -> u16 {
        self.info().status
    }

    /// The gRPC status.
    pub(crate) fn grpc_status(self) -> u8 {
        self.info().grpc_status
    }

    /// The response flag in the access log.
    pub(crate) fn flag(self) -> Option<ResponseFlag> {
        match self {
            Self::UpstreamBroken(fault) => Some(fault.flag()),
            other => other.info().flag,
        }
    }

    /// Why an endpoint failed, for the access log; none where the denial is not about one, or says enough.
    pub(crate) fn upstream_failure(self) -> Option<&'static str> {
        match self {
            Self::UpstreamBroken(fault) => Some(fault.word()),
            Self::Unreachable(failure) | Self::ConnectTimeout(failure) => failure.word(),
            _ => None,
        }
    }

    /// What exactly was wrong with the request, as text for people; empty where the reason is enough. The client gets no
    /// details about endpoints.
    pub(crate) fn detail(self) -> &'static str {
        match self {
            Self::Malformed(detail)
            | Self::Token(_, detail)
            | Self::MethodNotAllowed(detail)
            | Self::ProtocolMismatch(detail)
            | Self::NotImplemented(detail) => detail,
            Self::Desync(reason) => reason.detail(),
            _ => "",
        }
    }

    /// Whether the connection must be closed, because the client may interpret the following bytes differently.
    pub(crate) fn ends_connection(self) -> bool {
        matches!(
            self,
            Self::Malformed(_)
                | Self::Desync(_)
                | Self::NotImplemented(_)
                | Self::UnknownVersion
                | Self::TargetTooLong
                | Self::HeadTooLarge
                | Self::HeadTimeout
                | Self::BodyTimeout
        )
    }

    /// The response body: the reason and detail, never any part of the request.
    pub(crate) fn body(self) -> String {
        match self.detail() {
            "" => format!("{}\n", self.reason()),
            detail => format!("{}: {detail}\n", self.reason()),
        }
    }

    /// The `www-authenticate` value of a 401 (RFC 6750, section 3).
    pub(crate) fn challenge(self) -> Option<&'static str> {
        match self {
            // Without a bearer token no token error can be reported.
            Self::Token(TokenFault::Missing, _) => Some("Bearer"),
            Self::Token(_, detail) if detail == TokenFault::NO_BEARER => Some("Bearer"),
            Self::Token(..) if self.status() == 401 => Some("Bearer error=\"invalid_token\""),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_denial_has_its_statuses_and_counter() {
        let mut seen = Vec::new();
        let mut check = |denial: Denial, status: u16, grpc: u8, reason: &'static str| {
            assert_eq!(
                (denial.status(), denial.grpc_status(), denial.reason()),
                (status, grpc, reason)
            );
            assert_eq!(Denial::reasons().nth(denial.index()), Some(reason));
            seen.push(reason);
        };
        check(Denial::Malformed("x"), 400, 13, "malformed");
        check(Denial::Desync(DesyncReason::BadUri), 400, 13, "malformed");
        check(Denial::NotAllowed, 403, 7, "not_allowed");
        check(Denial::NoRoute, 404, 12, "no_route");
        check(Denial::MethodNotAllowed("x"), 405, 12, "method_not_allowed");
        check(Denial::HeadTimeout, 408, 4, "head_timeout");
        check(Denial::BodyTimeout, 408, 4, "body_timeout");
        check(Denial::BodyTooLarge, 413, 8, "body_too_large");
        check(Denial::TargetTooLong, 414, 8, "target_too_long");
        check(Denial::HeadTooLarge, 431, 8, "head_too_large");
        check(Denial::ClientGone, 460, 1, "client_gone");
        check(Denial::TooManyForwarders, 463, 8, "too_many_forwarders");
        check(Denial::ProtocolMismatch("x"), 464, 12, "protocol_mismatch");
        check(Denial::NotImplemented("x"), 501, 12, "not_implemented");
        check(Denial::UpstreamBroken(ResponseFault::Closed), 502, 14, "upstream_broken");
        check(Denial::Overloaded, 503, 8, "overloaded");
        check(Denial::NoEndpoint, 503, 14, "no_endpoint");
        check(Denial::Unreachable(ConnectFailure::Refused), 503, 14, "unreachable");
        check(Denial::ConnectTimeout(ConnectFailure::Timeout), 504, 14, "connect_timeout");
        check(Denial::UpstreamTimeout, 504, 4, "upstream_timeout");
        check(Denial::UnknownVersion, 505, 12, "unknown_version");
        for fault in TokenFault::ALL {
            let info = fault.info();
            check(Denial::Token(*fault, "x"), info.status, 16, info.reason);
        }
        seen.dedup();
        assert_eq!(seen, Denial::reasons().collect::<Vec<_>>());
        assert_eq!(seen.len(), Denial::COUNT);
    }
}
