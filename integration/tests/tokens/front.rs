//! A sidecar that requires a token of the issuer, in front of a service that records requests.

use serde_json::{Value, json};
use weft_integration::bootstrap::require_token;
use weft_integration::http1::{self, Http1Response};
use weft_integration::http2::{self, request};
use weft_integration::origin_server::OriginServer;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};

use crate::issuer::{AUDIENCE, ISSUER, SigningKey, TokenIssuer};

/// The name of a case, and the bytes to send.
pub(crate) type TokenCase = (String, String);

/// Makes a case.
pub(crate) fn case(name: impl Into<String>, sent: impl Into<String>) -> TokenCase {
    (name.into(), sent.into())
}

/// The `www-authenticate` header of a 401 for an invalid token (RFC 6750, section 3).
pub(crate) const INVALID: &str = "Bearer error=\"invalid_token\"";
/// The `www-authenticate` header of a 401 for a request without token.
pub(crate) const MISSING: &str = "Bearer";

/// The sidecar and the service.
pub(crate) struct TokenFront {
    origin: OriginServer,
    pub(crate) sidecar: SingleSidecar,
    /// A published key, so that a valid token can prove that the setup works.
    reference: SigningKey,
}

impl TokenFront {
    /// Starts a sidecar with these keys.
    pub(crate) fn start(published: &[Value]) -> Self {
        let reference = SigningKey::ecdsa("ES256").with_member("kid", "reference");
        let keys: Vec<&Value> = published.iter().chain([&reference.jwk]).collect();
        let keys = json!({"keys": keys}).to_string();
        let origin = OriginServer::start();
        let sidecar = requiring_token(&keys, origin.port, UpstreamHttp::Http1).start();
        Self { origin, sidecar, reference }
    }

    /// Starts a sidecar with an issuer's keys.
    pub(crate) fn of(issuer: &TokenIssuer) -> Self {
        Self::start(&issuer.published())
    }

    /// Sends a GET for a path with these header lines.
    pub(crate) fn ask(&self, path: &str, lines: &str) -> Http1Response {
        let head = format!("GET {path} HTTP/1.1\r\nhost: a.example\r\n{lines}\r\n");
        http1::ask(self.sidecar.port, &head)
    }

    /// Checks that these tokens are accepted and not forwarded to the service.
    #[track_caller]
    pub(crate) fn assert_accepted(&self, cases: &[TokenCase]) {
        let mut wrong = Vec::new();
        for (name, token) in cases {
            let answer = self.ask(&path("taken", name), &bearer(token));
            let is_forwarded = answer.body.contains("authorization");
            if (answer.status, is_forwarded) != (200, false) {
                wrong.push(format!("{name}: {} {}", answer.status, answer.body));
            }
        }
        self.assert_expected(wrong, cases);
    }

    /// Checks that these tokens are rejected over both HTTP versions and for gRPC.
    #[track_caller]
    pub(crate) fn assert_rejected(&self, cases: &[TokenCase]) {
        let lines: Vec<TokenCase> =
            cases.iter().map(|(name, token)| case(name, bearer(token))).collect();
        let mut wrong = self.unexpected_responses(&lines, INVALID);
        let grpc = [("content-type", "application/grpc"), ("te", "trailers")];
        let ask = |(name, token): &TokenCase| {
            let header = format!("Bearer {token}");
            let path = path("refused", name);
            let fields = [("authorization", header.as_str())];
            [
                request("GET", &path, &fields),
                request("POST", &path, &[&grpc[..], &fields[..]].concat()),
            ]
        };
        let requests: Vec<Value> = cases.iter().flat_map(ask).collect();
        let answers = http2::ask(self.sidecar.port, &requests);
        for ((name, _), answers) in cases.iter().zip(answers.chunks(2)) {
            let [http, grpc] = [&answers[0], &answers[1]];
            let observed =
                (http.status(), http.header("www-authenticate"), grpc.header("grpc-status"));
            if observed != (401, Some(INVALID), Some("16")) {
                wrong.push(format!("{name}, over HTTP/2: {observed:?} {}", http.body()));
            }
        }
        self.assert_expected(wrong, cases);
    }

    /// Checks that requests with these header lines are rejected with this challenge.
    #[track_caller]
    pub(crate) fn assert_lines_rejected(&self, challenge: &str, cases: &[TokenCase]) {
        self.assert_expected(self.unexpected_responses(cases, challenge), cases);
    }

    fn unexpected_responses(&self, cases: &[TokenCase], challenge: &str) -> Vec<String> {
        let mut wrong = Vec::new();
        for (name, lines) in cases {
            let answer = self.ask(&path("refused", name), lines);
            let observed = (answer.status, answer.header("www-authenticate"));
            if observed != (401, Some(challenge)) {
                wrong.push(format!("{name}: {observed:?} {}", answer.body));
            }
        }
        wrong
    }

    /// Checks that no case failed, and that exactly the expected requests reached the service.
    #[track_caller]
    fn assert_expected(&self, mut wrong: Vec<String>, cases: &[TokenCase]) {
        let mut names: Vec<&String> = cases.iter().map(|(name, _)| name).collect();
        names.sort();
        wrong.extend(
            names
                .windows(2)
                .filter(|pair| pair[0] == pair[1])
                .map(|pair| format!("{}: two cases have the same name", pair[0])),
        );
        // When this request has reached the service, any request before it would have reached it
        // too.
        let last = self.ask("/last", &bearer(&self.reference.good()));
        assert_eq!(last.status, 200, "{last:?}");
        let seen = self.origin.seen();
        assert!(seen.iter().any(|line| line == "head GET /last"), "{seen:#?}");
        wrong.extend(seen.into_iter().filter(|line| line.contains("/refused/")));
        assert!(wrong.is_empty(), "{} of {}: {wrong:#?}", wrong.len(), cases.len());
    }
}

/// The configuration of a sidecar that requires a token signed by one of these keys.
pub(crate) fn requiring_token(keys: &str, port: u16, speaks: UpstreamHttp) -> SingleSidecarConfig {
    // Headers longer than the token limit must get as far as the check of the token.
    SingleSidecarConfig::for_upstream(port, speaks)
        .with_filter(require_token(ISSUER, AUDIENCE, keys))
        .with("max_request_headers_kb", json!(96))
        .with_weft_metadata("field_limit_bytes", json!(80 * 1024))
}

/// A header line with a token.
pub(crate) fn bearer(token: &str) -> String {
    format!("authorization: Bearer {token}\r\n")
}

/// A path that identifies a case.
fn path(what: &str, name: &str) -> String {
    let word = |letter: char| if letter.is_ascii_alphanumeric() { letter } else { '-' };
    let name: String = name.chars().map(word).collect();
    format!("/{what}/{name}")
}
