//! JWT authentication: which tokens are accepted, and which requests need one
//! (`envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication`).

use std::collections::BTreeMap;
use std::time::Duration;

use crate::{
    DataSource, Name, RequestFacts, RouteMatch, StringMatch, is_header_name, is_identity_header,
};

/// Which tokens are accepted, and which requests need one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtPolicy {
    /// The issuers by name.
    pub providers: BTreeMap<Name, JwtProvider>,
    /// The rules; the first that matches a request applies. Without one, no token is needed.
    pub rules: Vec<JwtRule>,
    /// Whether CORS preflight requests need no token (`bypass_cors_preflight`).
    pub passes_preflight: bool,
}

impl JwtPolicy {
    /// The index of the rule for a request; none when it needs no token.
    #[must_use]
    pub fn rule(&self, facts: &dyn RequestFacts) -> Option<usize> {
        if self.passes_preflight && is_preflight(facts) {
            return None;
        }
        self.rules.iter().position(|rule| rule.matches.covers(facts))
    }
}

/// Whether a request is a CORS preflight (the Fetch standard, "CORS-preflight request").
fn is_preflight(facts: &dyn RequestFacts) -> bool {
    let has = |name: &str| facts.has_header(name, &mut |value| !value.is_empty());
    facts.method() == "OPTIONS" && has("origin") && has("access-control-request-method")
}

/// An issuer of tokens (`JwtProvider`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtProvider {
    /// The required `iss` claim.
    pub issuer: String,
    /// Accepted `aud` claims; the token must have one of them. Empty: any audience.
    pub audiences: Vec<String>,
    /// The condition on the `sub` claim (`subjects`).
    pub subject: Option<StringMatch>,
    /// Conditions on other claims.
    pub claims: Vec<ClaimRule>,
    /// The longest accepted lifetime of a token, from its `iat` or `nbf` (`max_lifetime`).
    pub longest_life: Option<Duration>,
    /// Where the keys come from.
    pub keys: KeySource,
    /// Where a token may be in a request (`from_headers`, `from_params`, `from_cookies`); empty: a bearer token in the
    /// `authorization` header.
    pub token_locations: Vec<TokenLocation>,
    /// Whether the token is forwarded to the service (`forward`).
    pub forward: bool,
    /// Claims that are forwarded to the service, each with its header (`claim_to_headers`). A claim name with dots is
    /// a path into objects.
    pub claim_headers: Vec<(String, String)>,
    /// The header in which the payload is forwarded, base64url (`forward_payload_header`).
    pub payload_header: Option<String>,
    /// The metadata key under which policies see the payload (`payload_in_metadata`).
    pub payload_name: Option<Name>,
    /// The tolerated clock difference (`clock_skew_seconds`).
    pub leeway: Duration,
    /// Whether the token must be bound to the client's certificate (`cnf`, `x5t#S256`; RFC 8705, section 3.1). A token
    /// that is bound to another certificate is always refused.
    pub bound: bool,
    /// Whether a stream is aborted when its token expires.
    pub ends_streams: bool,
}

/// Where a token may be in a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenLocation {
    /// In a header, after a prefix.
    Header {
        /// The header name, lower case.
        name: String,
        /// The text before the token.
        prefix: String,
    },
    /// In a query parameter.
    QueryParameter(String),
    /// In a cookie.
    Cookie(String),
}

/// A condition on a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimRule {
    /// The claim's name.
    pub name: String,
    /// How the claim encodes its values.
    pub format: ClaimFormat,
    /// The required values.
    pub values: Vec<String>,
    /// Whether all values are required; otherwise one suffices.
    pub all: bool,
}

/// How a claim encodes its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClaimFormat {
    /// A string that is the value.
    Single,
    /// An array of strings.
    Array,
    /// A string of values with spaces between them (RFC 8693, section 4.2).
    Spaced,
}

impl ClaimFormat {
    /// Every format with its name in configurations.
    pub const WORDS: [(&'static str, Self); 3] = [
        ("single-string", Self::Single),
        ("string-array", Self::Array),
        ("space-separated-values", Self::Spaced),
    ];
}

/// The most redirects that a fetch of a key set may follow.
pub const REDIRECTS_LIMIT: u8 = 5;

/// Where a key set (RFC 7517) comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// Inline or in a file.
    Local(DataSource),
    /// Fetched over HTTP.
    Http {
        /// The URI.
        uri: String,
        /// The cluster that serves it.
        cluster: Name,
        /// How long a fetch may take.
        timeout: Duration,
        /// How long a fetched set is used, unless the response sets it.
        cache: Duration,
        /// How many redirects are followed; 0 by default.
        redirects: u8,
    },
}

/// Which tokens matching requests need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtRule {
    /// Which requests match.
    pub matches: RouteMatch,
    /// The requirement; none: no token is needed.
    pub requires: Option<JwtRequirement>,
}

/// Which tokens a request needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JwtRequirement {
    /// A token of this provider, for one of these audiences; empty: the provider's audiences.
    Provider(Name, Vec<String>),
    /// One of these requirements.
    Any(Vec<Self>),
    /// All of these requirements.
    All(Vec<Self>),
    /// No token (`allow_missing`). A token that is present must meet another requirement of the list.
    Missing,
}

/// Checks the name of a header for a token, its payload or one of its claims, and returns it in lower case. `_` is not
/// accepted, because services may treat it as `-`.
///
/// # Errors
/// When the text is not a header name, or names a header that frames the message or is hop-by-hop.
pub fn token_header(name: &str) -> Result<String, String> {
    const FRAMING: [&str; 8] = [
        "connection",
        "content-length",
        "expect",
        "host",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    let lower = name.to_ascii_lowercase();
    if FRAMING.contains(&lower.as_str()) {
        return Err(format!(
            "invalid header {name:?}: must not be a header that frames the message or a hop-by-hop header"
        ));
    }
    if !is_header_name(&lower) || lower.contains('_') {
        return Err(format!(
            "invalid header name {name:?}: must consist of letters, digits and !#$%&'*+-.^`|~"
        ));
    }
    Ok(lower)
}

/// Checks the name of a header that forwards a claim or the payload of a token to the service, and returns it in lower
/// case.
///
/// # Errors
/// When [`token_header`] refuses the name; when the header states the client's identity or address, because a claim
/// would replace verified data; when it is `authorization` or `cookie`, in which tokens are sent.
pub fn claim_header(name: &str) -> Result<String, String> {
    const OF_CLIENTS: [&str; 3] = ["authorization", "cookie", "forwarded"];
    let lower = token_header(name)?;
    let is_reserved = OF_CLIENTS.contains(&lower.as_str())
        || lower.starts_with("x-forwarded-")
        || lower.starts_with("x-envoy-")
        || is_identity_header(lower.as_bytes());
    if is_reserved {
        return Err(format!(
            "invalid header {name:?}: must not be an identity header, x-forwarded-*, x-envoy-*, forwarded, \
             authorization or cookie"
        ));
    }
    Ok(lower)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_request::TestRequest;

    fn asking(method: &str, headers: &[(&str, &str)]) -> TestRequest {
        let header = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        TestRequest {
            method: method.into(),
            headers: headers.iter().map(header).collect(),
            ..TestRequest::default()
        }
    }

    const ASKED: (&str, &str) = ("access-control-request-method", "POST");
    const ORIGIN: (&str, &str) = ("origin", "https://a.test");

    fn policy(passes_preflight: bool) -> JwtPolicy {
        let rule = JwtRule {
            matches: RouteMatch::any(),
            requires: Some(JwtRequirement::Provider("p".into(), Vec::new())),
        };
        JwtPolicy { providers: BTreeMap::new(), rules: vec![rule], passes_preflight }
    }

    #[test]
    fn claim_headers_must_not_state_the_clients_identity_or_address() {
        for name in ["x-user", "X-Email", "x-forwardedfor"] {
            assert_eq!(claim_header(name), Ok(name.to_ascii_lowercase()));
        }
        for name in [
            "x-weft-peer",
            "X-Forwarded-Client-Cert",
            "x-amzn-mtls-clientcert-subject",
            "x-forwarded-for",
            "x-envoy-internal",
            "Authorization",
            "cookie",
            "forwarded",
            "host",
            "x_user",
            "",
        ] {
            assert!(claim_header(name).is_err(), "{name}");
        }
    }

    #[test]
    fn cors_preflight_needs_no_token_with_bypass_cors_preflight() {
        let preflight = asking("OPTIONS", &[ORIGIN, ASKED]);
        assert_eq!(policy(true).rule(&preflight), None);
        assert_eq!(policy(false).rule(&preflight), Some(0));
    }

    #[test]
    fn request_other_than_a_cors_preflight_needs_a_token() {
        for request in [
            asking("POST", &[ORIGIN, ASKED]),
            asking("OPTIONS", &[ORIGIN]),
            asking("OPTIONS", &[ASKED]),
            asking("OPTIONS", &[("origin", ""), ASKED]),
            asking("OPTIONS", &[]),
        ] {
            assert_eq!(policy(true).rule(&request), Some(0), "{request:?}");
        }
    }
}
