//! What may be wrong with a token, or with the keys that it needs.

/// Why a token does not count. The words are those that AWS' load balancer has in its access log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenFault {
    /// There is none.
    Missing,
    /// It is no token, or there are several.
    Format,
    /// No key of the issuer has signed it.
    Signature,
    /// It has not a claim that it must have.
    ClaimMissing,
    /// A claim says what it says in another way than it must.
    ClaimFormat,
    /// A claim says something else than it must.
    ClaimValue,
    /// The issuer's keys are not there: they did not come in time.
    KeysTimeout,
    /// The issuer's keys are not there: they are too many, or too long.
    KeysTooLarge,
    /// The issuer's keys are not there: they cannot be had.
    KeysFailed,
    /// The issuer's keys are not there: what came is no set of keys.
    KeysInvalid,
    /// Something else.
    Internal,
}

impl TokenFault {
    /// Every fault.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 11] = [
        Self::Missing,
        Self::Format,
        Self::Signature,
        Self::ClaimMissing,
        Self::ClaimFormat,
        Self::ClaimValue,
        Self::KeysTimeout,
        Self::KeysTooLarge,
        Self::KeysFailed,
        Self::KeysInvalid,
        Self::Internal,
    ];

    /// What is told where something else stands than a bearer token.
    pub(crate) const NO_BEARER: &'static str = "it is no bearer token";

    /// The word in logs and metrics, and the HTTP status.
    pub(crate) fn row(self) -> (&'static str, u16) {
        match self {
            Self::Missing => ("jwt_header_not_present", 401),
            Self::Format => ("jwt_request_format_invalid", 401),
            Self::Signature => ("jwt_signature_validation_error", 401),
            Self::ClaimMissing => ("jwt_claim_not_present", 401),
            Self::ClaimFormat => ("jwt_claim_format_invalid", 401),
            Self::ClaimValue => ("jwt_claim_value_invalid", 401),
            Self::KeysTimeout => ("jwks_request_timeout", 500),
            Self::KeysTooLarge => ("jwks_response_size_exceeded", 500),
            Self::KeysFailed => ("jwks_request_failed", 562),
            Self::KeysInvalid => ("jwks_response_invalid", 562),
            Self::Internal => ("jwt_validation_internal_error", 500),
        }
    }
}

/// A fault, and what exactly was wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TokenRejection {
    pub(crate) fault: TokenFault,
    pub(crate) detail: &'static str,
}

impl TokenRejection {
    /// That the token is somebody else's: whatever another issuer says of it counts for more.
    pub(crate) const OTHER_ISSUER: Self =
        Self::new(TokenFault::ClaimValue, "its issuer is not accepted here");

    pub(crate) const MISSING: Self = Self::new(TokenFault::Missing, "");

    /// That something else stands where a token would: where none is needed, it is nobody's business.
    pub(crate) const NO_BEARER: Self = Self::format(TokenFault::NO_BEARER);

    pub(crate) const fn new(fault: TokenFault, detail: &'static str) -> Self {
        Self { fault, detail }
    }

    pub(crate) const fn format(detail: &'static str) -> Self {
        Self::new(TokenFault::Format, detail)
    }

    /// The one of two that tells more.
    pub(crate) fn or(self, other: Self) -> Self {
        const RANKS: [TokenRejection; 3] =
            [TokenRejection::MISSING, TokenRejection::NO_BEARER, TokenRejection::OTHER_ISSUER];
        let rank = |refused: Self| RANKS.iter().position(|known| *known == refused).unwrap_or(3);
        if rank(other) > rank(self) { other } else { self }
    }
}
