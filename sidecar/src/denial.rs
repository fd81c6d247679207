//! Every reason for which the sidecar refuses a request.
//!
//! The set is closed: each variant has an HTTP status, a gRPC status, and a word in logs and metrics. The word never
//! comes from the text of an error. The statuses are those of AWS load balancers where AWS defines one.

use std::io;

use crate::authenticate::TokenFault;
use crate::http::desync::DesyncReason;
use crate::upstream_failure::{ConnectFailure, ResponseFault};

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Denial {
    /// The request violates HTTP or is ambiguous.
    Malformed(&'static str),
    /// The request departs from strict HTTP/1.1 in a way that the desync mode refuses.
    Desync(DesyncReason),
    /// The request needs a token and has no valid one.
    Token(TokenFault, &'static str),
    /// No policy allows the request.
    NotAllowed,
    /// No route matches the request.
    NoRoute,
    /// The method is never served.
    MethodNotAllowed(&'static str),
    /// The head took too long to arrive.
    HeadTimeout,
    /// The body took too long to arrive.
    BodyTimeout,
    /// The body exceeds the size limit.
    BodyTooLarge,
    /// The request target exceeds the length limit.
    TargetTooLong,
    /// The head exceeds the size limit or the limit on the number of headers.
    HeadTooLarge,
    /// The client closed the connection or stream before the response. No client sees this status.
    ClientGone,
    /// `x-forwarded-for` has too many addresses.
    TooManyForwarders,
    /// The upstream's HTTP version cannot express the request.
    ProtocolMismatch(&'static str),
    /// The request has an unknown transfer coding or upgrade protocol.
    NotImplemented(&'static str),
    /// The endpoint closed the connection or sent an invalid response.
    UpstreamBroken(ResponseFault),
    /// The limit on concurrent requests or connections is reached.
    Overloaded,
    /// The service is unknown or has no endpoint.
    NoEndpoint,
    /// No endpoint could be connected to, or none proved its identity.
    Unreachable(ConnectFailure),
    /// No endpoint accepted the connection in time.
    ConnectTimeout(ConnectFailure),
    /// The response took too long.
    UpstreamTimeout,
    /// The HTTP version is not supported.
    UnknownVersion,
}

/// The word in logs and metrics, the HTTP status and the gRPC status of a denial. The gRPC statuses follow grpc/grpc
/// `doc/http-grpc-status-mapping.md`, with DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED and UNIMPLEMENTED where the sidecar knows
/// more than the mapping.
type DenialRow = (&'static str, u16, u8);

impl Denial {
    fn row(self) -> DenialRow {
        match self {
            Self::Malformed(_) | Self::Desync(_) => ("malformed", 400, 13),
            Self::Token(fault, _) => {
                let (word, status) = fault.row();
                (word, status, 16)
            }
            Self::NotAllowed => ("not_allowed", 403, 7),
            Self::NoRoute => ("no_route", 404, 12),
            Self::MethodNotAllowed(_) => ("method_not_allowed", 405, 12),
            Self::HeadTimeout => ("head_timeout", 408, 4),
            Self::BodyTimeout => ("body_timeout", 408, 4),
            Self::BodyTooLarge => ("body_too_large", 413, 8),
            Self::TargetTooLong => ("target_too_long", 414, 8),
            Self::HeadTooLarge => ("head_too_large", 431, 8),
            Self::ClientGone => ("client_gone", 460, 1),
            Self::TooManyForwarders => ("too_many_forwarders", 463, 8),
            Self::ProtocolMismatch(_) => ("protocol_mismatch", 464, 12),
            Self::NotImplemented(_) => ("not_implemented", 501, 12),
            Self::UpstreamBroken(_) => ("upstream_broken", 502, 14),
            Self::Overloaded => ("overloaded", 503, 8),
            Self::NoEndpoint => ("no_endpoint", 503, 14),
            Self::Unreachable(_) => ("unreachable", 503, 14),
            Self::ConnectTimeout(_) => ("connect_timeout", 504, 14),
            Self::UpstreamTimeout => ("upstream_timeout", 504, 4),
            Self::UnknownVersion => ("unknown_version", 505, 12),
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

    /// The words of all reasons, in the order of their counters.
    pub(crate) const REASONS: [&'static str; 31] = [
        "malformed",
        "jwt_header_not_present",
        "jwt_request_format_invalid",
        "jwt_signature_validation_error",
        "jwt_claim_not_present",
        "jwt_claim_format_invalid",
        "jwt_claim_value_invalid",
        "jwks_request_timeout",
        "jwks_response_size_exceeded",
        "jwks_request_failed",
        "jwks_response_invalid",
        "jwt_validation_internal_error",
        "not_allowed",
        "no_route",
        "method_not_allowed",
        "head_timeout",
        "body_timeout",
        "body_too_large",
        "target_too_long",
        "head_too_large",
        "client_gone",
        "too_many_forwarders",
        "protocol_mismatch",
        "not_implemented",
        "upstream_broken",
        "overloaded",
        "no_endpoint",
        "unreachable",
        "connect_timeout",
        "upstream_timeout",
        "unknown_version",
    ];

    /// The index of its counter.
    pub(crate) fn index(self) -> usize {
        Self::REASONS.iter().position(|reason| *reason == self.reason()).unwrap_or(0)
    }

    /// The word in logs and metrics.
    pub(crate) fn reason(self) -> &'static str {
        self.row().0
    }

    /// The HTTP status the client sees.
    pub(crate) fn status(self) -> u16 {
        self.row().1
    }

    /// The gRPC status.
    pub(crate) fn grpc_status(self) -> u8 {
        self.row().2
    }

    /// What exactly was wrong, for the access log; empty where the reason is enough.
    pub(crate) fn detail(self) -> &'static str {
        match self {
            Self::UpstreamBroken(fault) => fault.word(),
            Self::Unreachable(failure) | Self::ConnectTimeout(failure) => failure.word(),
            other => other.detail_of_request(),
        }
    }

    /// What exactly was wrong with the request. The client gets no details about endpoints.
    fn detail_of_request(self) -> &'static str {
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
        match self.detail_of_request() {
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
            assert_eq!(Denial::REASONS.get(denial.index()), Some(&reason));
            seen.push(reason);
        };
        check(Denial::Malformed("x"), 400, 13, "malformed");
        check(Denial::Desync(DesyncReason::BadUri), 400, 13, "malformed");
        for fault in TokenFault::ALL {
            let (word, status) = fault.row();
            check(Denial::Token(fault, "x"), status, 16, word);
        }
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
        seen.dedup();
        assert_eq!(seen, Denial::REASONS);
    }
}
