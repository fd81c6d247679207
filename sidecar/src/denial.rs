//! Every way the sidecar says no to a request.
//!
//! The set is closed: each variant gives the status the client sees, the gRPC status, the word in
//! logs and metrics. A label is never found by looking into an error.

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Denial {
    /// It breaks the rules of HTTP, or could be read in two ways.
    Malformed(&'static str),
    /// It needs a token and has none.
    TokenMissing,
    /// Its token is not good.
    TokenInvalid(&'static str),
    /// No policy allows it.
    NotAllowed,
    /// No route leads anywhere for it.
    NoRoute,
    /// Its head took too long to arrive.
    HeadTimeout,
    /// Its body is larger than we carry.
    BodyTooLarge,
    /// Its head is larger than allowed.
    HeadTooLarge,
    /// The endpoint broke off or answered with something else than HTTP.
    UpstreamBroken,
    /// As many requests are open as are allowed.
    Overloaded,
    /// The service has no endpoint to offer, or is not known here.
    NoEndpoint,
    /// No endpoint could be reached, or none proved who it is.
    Unreachable,
    /// The answer took too long.
    UpstreamTimeout,
    /// The client was gone before there was an answer. Nobody sees this status; it is nginx's.
    ClientGone,
}

impl Denial {
    /// How many reasons there are, for the counters.
    pub(crate) const COUNT: usize = 14;

    /// The position of its counter.
    pub(crate) fn index(self) -> usize {
        match self {
            Self::Malformed(_) => 0,
            Self::TokenMissing => 1,
            Self::TokenInvalid(_) => 2,
            Self::NotAllowed => 3,
            Self::NoRoute => 4,
            Self::HeadTimeout => 5,
            Self::BodyTooLarge => 6,
            Self::HeadTooLarge => 7,
            Self::UpstreamBroken => 8,
            Self::Overloaded => 9,
            Self::NoEndpoint => 10,
            Self::Unreachable => 11,
            Self::UpstreamTimeout => 12,
            Self::ClientGone => 13,
        }
    }

    /// The words of all reasons, by the position of their counters.
    pub(crate) const REASONS: [&'static str; Self::COUNT] = [
        "malformed",
        "token_missing",
        "token_invalid",
        "not_allowed",
        "no_route",
        "head_timeout",
        "body_too_large",
        "head_too_large",
        "upstream_broken",
        "overloaded",
        "no_endpoint",
        "unreachable",
        "upstream_timeout",
        "client_gone",
    ];

    /// The word in logs and metrics.
    pub(crate) fn reason(self) -> &'static str {
        Self::REASONS.get(self.index()).copied().unwrap_or("unknown")
    }

    /// What exactly was wrong, where there is more to say than the reason.
    pub(crate) fn detail(self) -> &'static str {
        match self {
            Self::Malformed(detail) | Self::TokenInvalid(detail) => detail,
            _ => "",
        }
    }

    /// The HTTP status the client sees.
    pub(crate) fn status(self) -> u16 {
        match self {
            Self::Malformed(_) => 400,
            Self::TokenMissing | Self::TokenInvalid(_) => 401,
            Self::NotAllowed => 403,
            Self::NoRoute => 404,
            Self::HeadTimeout => 408,
            Self::BodyTooLarge => 413,
            Self::HeadTooLarge => 431,
            Self::ClientGone => 499,
            Self::UpstreamBroken => 502,
            Self::Overloaded | Self::NoEndpoint | Self::Unreachable => 503,
            Self::UpstreamTimeout => 504,
        }
    }

    /// The gRPC status (grpc/grpc `doc/http-grpc-status-mapping.md`, and DEADLINE_EXCEEDED and
    /// RESOURCE_EXHAUSTED where we know more than the mapping).
    pub(crate) fn grpc_status(self) -> u8 {
        match self {
            Self::Malformed(_) => 13,
            Self::TokenMissing | Self::TokenInvalid(_) => 16,
            Self::NotAllowed => 7,
            Self::NoRoute => 12,
            Self::BodyTooLarge | Self::HeadTooLarge | Self::Overloaded => 8,
            Self::UpstreamBroken | Self::NoEndpoint | Self::Unreachable => 14,
            Self::HeadTimeout | Self::UpstreamTimeout => 4,
            Self::ClientGone => 1,
        }
    }

    /// The body of the answer: the reason, a word for people, never anything of the request.
    pub(crate) fn body(self) -> String {
        match self.detail() {
            "" => format!("{}\n", self.reason()),
            detail => format!("{}: {detail}\n", self.reason()),
        }
    }

    /// The `www-authenticate` value of a 401 (RFC 6750, section 3).
    pub(crate) fn challenge(self) -> Option<&'static str> {
        match self {
            Self::TokenMissing => Some("Bearer"),
            Self::TokenInvalid(_) => Some("Bearer error=\"invalid_token\""),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_status_and_its_counter() {
        let check = |denial: Denial, status: u16, grpc: u8, reason: &str| {
            assert_eq!(
                (denial.status(), denial.grpc_status(), denial.reason()),
                (status, grpc, reason)
            );
        };
        check(Denial::Malformed("x"), 400, 13, "malformed");
        check(Denial::TokenMissing, 401, 16, "token_missing");
        check(Denial::TokenInvalid("x"), 401, 16, "token_invalid");
        check(Denial::NotAllowed, 403, 7, "not_allowed");
        check(Denial::NoRoute, 404, 12, "no_route");
        check(Denial::HeadTimeout, 408, 4, "head_timeout");
        check(Denial::BodyTooLarge, 413, 8, "body_too_large");
        check(Denial::HeadTooLarge, 431, 8, "head_too_large");
        check(Denial::UpstreamBroken, 502, 14, "upstream_broken");
        check(Denial::Overloaded, 503, 8, "overloaded");
        check(Denial::NoEndpoint, 503, 14, "no_endpoint");
        check(Denial::Unreachable, 503, 14, "unreachable");
        check(Denial::UpstreamTimeout, 504, 4, "upstream_timeout");
        check(Denial::ClientGone, 499, 1, "client_gone");
    }
}
