//! Why a token is rejected.

/// Why a token is rejected. The words are those of the AWS load balancer's access log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenFault {
    /// The request has no token.
    Missing,
    /// The token is malformed, or there are several tokens.
    Format,
    /// No key of the issuer verifies the signature.
    Signature,
    /// A required claim is missing.
    ClaimMissing,
    /// A claim has the wrong type.
    ClaimFormat,
    /// A claim has a value that is not accepted.
    ClaimValue,
    /// The issuer's keys were not fetched in time.
    KeysTimeout,
    /// The issuer's key set exceeds a size limit.
    KeysTooLarge,
    /// The issuer's keys could not be fetched.
    KeysFailed,
    /// The response of the key server is not a key set.
    KeysInvalid,
    /// An internal error.
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

    /// The detail for other credentials in place of a bearer token.
    pub(crate) const NO_BEARER: &'static str = "not a bearer token";

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

/// A fault with its detail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TokenRejection {
    pub(crate) fault: TokenFault,
    pub(crate) detail: &'static str,
}

impl TokenRejection {
    /// The token is from another issuer. A rejection by the token's own issuer takes precedence.
    pub(crate) const OTHER_ISSUER: Self =
        Self::new(TokenFault::ClaimValue, "its issuer is not accepted here");

    pub(crate) const MISSING: Self = Self::new(TokenFault::Missing, "");

    /// There are other credentials in place of a token. They do not matter where no token is required.
    pub(crate) const NO_BEARER: Self = Self::format(TokenFault::NO_BEARER);

    pub(crate) const fn new(fault: TokenFault, detail: &'static str) -> Self {
        Self { fault, detail }
    }

    pub(crate) const fn format(detail: &'static str) -> Self {
        Self::new(TokenFault::Format, detail)
    }

    /// The more specific one of two rejections.
    pub(crate) fn or(self, other: Self) -> Self {
        const RANKS: [TokenRejection; 3] =
            [TokenRejection::MISSING, TokenRejection::NO_BEARER, TokenRejection::OTHER_ISSUER];
        let rank = |refused: Self| RANKS.iter().position(|known| *known == refused).unwrap_or(3);
        if rank(other) > rank(self) { other } else { self }
    }
}
