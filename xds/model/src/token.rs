//! Which tokens count, and which requests need one
//! (`envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication`).

use std::collections::BTreeMap;
use std::time::Duration;

use crate::{
    DataSource, Name, RequestFacts, RouteMatch, StringMatch, is_header_name, is_identity_header,
};

/// Which tokens count, and which requests need one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtPolicy {
    /// The issuers by name.
    pub providers: BTreeMap<Name, JwtProvider>,
    /// The first rule that covers a request says what it needs; none: nothing.
    pub rules: Vec<JwtRule>,
    /// Whether CORS preflight requests need no token (`bypass_cors_preflight`).
    pub passes_preflight: bool,
}

impl JwtPolicy {
    /// The index of the rule that a request falls under; none when it needs no token.
    #[must_use]
    pub fn rule(&self, facts: &dyn RequestFacts) -> Option<usize> {
        if self.passes_preflight && is_preflight(facts) {
            return None;
        }
        self.rules.iter().position(|rule| rule.matches.covers(facts))
    }
}

/// Whether a browser asks if it may send a request (the Fetch standard, "CORS-preflight request").
fn is_preflight(facts: &dyn RequestFacts) -> bool {
    let has = |name: &str| facts.has_header(name, &mut |value| !value.is_empty());
    facts.method() == "OPTIONS" && has("origin") && has("access-control-request-method")
}

/// An issuer of tokens (`JwtProvider`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtProvider {
    /// The `iss` claim, compared whole. Always asked for.
    pub issuer: String,
    /// The `aud` claims of which the token must have one. Always asked for, never empty.
    pub audiences: Vec<String>,
    /// What the `sub` claim must be (`subjects`).
    pub subject: Option<StringMatch>,
    /// What other claims must be.
    pub claims: Vec<ClaimRule>,
    /// How long a token may be good at most, from its `iat` or `nbf` on (`max_lifetime`).
    pub longest_life: Option<Duration>,
    /// The keys.
    pub keys: KeySource,
    /// Where a token may stand (`from_headers`, `from_params`, `from_cookies`); empty: in the
    /// `authorization` field, as a bearer token.
    pub token_locations: Vec<TokenLocation>,
    /// Whether the token goes on to the service (`forward`).
    pub forward: bool,
    /// Which claims are told to the service, and in which field (`claim_to_headers`). A name with dots is
    /// a way into objects.
    pub claim_headers: Vec<(String, String)>,
    /// The field in which the service is told the payload, base64url (`forward_payload_header`).
    pub payload_header: Option<String>,
    /// The name under which policies see the payload (`payload_in_metadata`).
    pub payload_name: Option<Name>,
    /// How far the clocks may differ (`clock_skew_seconds`).
    pub leeway: Duration,
    /// Whether the token must name the client's certificate (`cnf`, `x5t#S256`; RFC 8705, section 3.1). One
    /// that names another is refused in any case.
    pub bound: bool,
    /// Whether a stream ends when its token does.
    pub ends_streams: bool,
}

/// Where a token may stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenLocation {
    /// In a field, behind a prefix.
    Header {
        /// The field, lower case.
        name: String,
        /// What stands before the token.
        prefix: String,
    },
    /// In a query parameter.
    QueryParameter(String),
    /// In a cookie.
    Cookie(String),
}

/// What a claim must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimRule {
    /// Its name.
    pub name: String,
    /// How it says what it says.
    pub format: ClaimFormat,
    /// The values.
    pub values: Vec<String>,
    /// Whether it must have all of them; else one suffices.
    pub all: bool,
}

/// How a claim says what it says.
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
    /// Every format, with its word.
    pub const WORDS: [(&'static str, Self); 3] = [
        ("single-string", Self::Single),
        ("string-array", Self::Array),
        ("space-separated-values", Self::Spaced),
    ];
}

/// The most redirects of one fetch.
pub const REDIRECTS_LIMIT: u8 = 5;

/// Where a key set (RFC 7517) comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// In place or in a file.
    Local(DataSource),
    /// Fetched over HTTP.
    Http {
        /// The URI.
        uri: String,
        /// The cluster that serves it.
        cluster: Name,
        /// How long a fetch may take.
        timeout: Duration,
        /// How long a fetched set is good, unless the answer says.
        cache: Duration,
        /// How many redirects are followed: none unless the configuration says so.
        redirects: u8,
    },
}

/// What the requests of a match need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtRule {
    /// Which requests.
    pub matches: RouteMatch,
    /// What they need; none: nothing.
    pub requires: Option<JwtRequirement>,
}

/// What a request needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JwtRequirement {
    /// A token of this provider, for one of these audiences; empty: one of the provider's.
    Provider(Name, Vec<String>),
    /// One of these.
    Any(Vec<Self>),
    /// All of these.
    All(Vec<Self>),
    /// That no token is there (`allow_missing`): one that is there must be good, by what stands beside this.
    Missing,
}

/// Checks the name of a header that carries a token, its payload or one of its claims, and gives the name in lower case.
/// `_` is not accepted: services may take it for `-`.
///
/// # Errors
/// It is no name, or frames a message or belongs to one connection.
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
            "invalid header {name:?}: it frames the message or belongs to one connection"
        ));
    }
    if !is_header_name(&lower) || lower.contains('_') {
        return Err(format!(
            "invalid header name {name:?}: must be of letters, digits and !#$%&'*+-.^`|~"
        ));
    }
    Ok(lower)
}

/// Checks the name of a header that tells a service a claim or the payload of a token, and gives the name in lower case.
///
/// # Errors
/// What [`token_header`] refuses; a header that says who the client is, or by which way it came, since a claim would
/// take the place of what was proved; `authorization` or `cookie`, in which tokens come.
pub fn claim_header(name: &str) -> Result<String, String> {
    const OF_CLIENTS: [&str; 3] = ["authorization", "cookie", "forwarded"];
    let lower = token_header(name)?;
    let is_reserved = OF_CLIENTS.contains(&lower.as_str())
        || lower.starts_with("x-forwarded-")
        || lower.starts_with("x-envoy-")
        || is_identity_header(lower.as_bytes());
    if is_reserved {
        return Err(format!(
            "invalid header {name:?}: a claim must not replace what says who the client is or how it came \
             (identity headers, x-forwarded-*, x-envoy-*, forwarded, authorization, cookie)"
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
    fn claims_are_told_in_headers_that_say_nothing_of_the_client() {
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
    fn cors_preflight_needs_no_token_where_that_is_set() {
        let preflight = asking("OPTIONS", &[ORIGIN, ASKED]);
        assert_eq!(policy(true).rule(&preflight), None);
        assert_eq!(policy(false).rule(&preflight), Some(0));
    }

    #[test]
    fn request_that_is_no_cors_preflight_needs_a_token() {
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
