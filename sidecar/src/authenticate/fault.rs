//! Why a token is rejected.

use weft_runtime::access::{RefusalInfo, ResponseFlag};

macro_rules! token_faults {
    ($($(#[doc = $doc:literal])+ $name:ident: $word:literal, $status:literal, $action:literal;)+) => {
        /// Why a token is rejected. The words are those of the AWS load balancer's access log.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum TokenFault {
            $($(#[doc = $doc])+ $name,)+
        }

        impl TokenFault {
            /// Every fault.
            pub(crate) const ALL: &[Self] = &[$(Self::$name,)+];

            /// What logs, metrics and clients get.
            pub(crate) const fn info(self) -> RefusalInfo {
                match self {
                    $(Self::$name => RefusalInfo {
                        reason: $word,
                        status: $status,
                        grpc_status: 16,
                        flag: Some(ResponseFlag::Unauthorized),
                        details: $word,
                        meaning: &[$($doc),+],
                        action: $action,
                    },)+
                }
            }
        }
    };
}

token_faults! {
    /// The request has no token.
    Missing: "jwt_header_not_present", 401, "Send a token in `authorization: Bearer`.";
    /// The token is malformed, or there are several tokens.
    Format: "jwt_request_format_invalid", 401, "Send one signed token.";
    /// No key of the issuer verifies the signature.
    Signature: "jwt_signature_validation_error", 401, "Check that the issuer's key set has the key of the token.";
    /// A required claim is missing.
    ClaimMissing: "jwt_claim_not_present", 401, "Request a token with the claim that `error_detail` names.";
    /// A claim has the wrong type.
    ClaimFormat: "jwt_claim_format_invalid", 401, "Correct the issuer.";
    /// A claim has a value that is not accepted, such as an expiry in the past.
    ClaimValue: "jwt_claim_value_invalid", 401, "Renew the token; check issuer, audience and clocks.";
    /// The issuer's keys were not fetched in time.
    KeysTimeout: "jwks_request_timeout", 500, "Check that the sidecar reaches the key server.";
    /// The issuer's key set exceeds a size limit.
    KeysTooLarge: "jwks_response_size_exceeded", 500, "Remove old keys from the key set.";
    /// The issuer's keys could not be fetched.
    KeysFailed: "jwks_request_failed", 562, "Check that the sidecar reaches the key server; its log has the error.";
    /// The response of the key server is not a key set.
    KeysInvalid: "jwks_response_invalid", 562, "Check the URI of the key set.";
    /// An internal error.
    Internal: "jwt_validation_internal_error", 500, "Report the log of the sidecar.";
}

impl TokenFault {
    /// The detail for other credentials in place of a bearer token.
    pub(crate) const NO_BEARER: &'static str = "not a bearer token";
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
