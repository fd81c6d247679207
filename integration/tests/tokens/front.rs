//! A sidecar that wants a token of the issuer, before a service that notes what reaches it.

use serde_json::{Value, json};
use weft_integration::bootstrap::{http, require_token, route_to};
use weft_integration::http1::{self, Http1Response};
use weft_integration::http2::{self, request};
use weft_integration::origin_server::OriginServer;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};

use crate::issuer::{AUDIENCE, ISSUER, Issuer, Key};

/// What is sent, and what it is called.
pub(crate) type Case = (String, String);

/// A case.
pub(crate) fn case(name: impl Into<String>, sent: impl Into<String>) -> Case {
    (name.into(), sent.into())
}

/// How a 401 asks for a token (RFC 6750, section 3), where one was sent.
pub(crate) const INVALID: &str = "Bearer error=\"invalid_token\"";
/// The same where none was sent.
pub(crate) const MISSING: &str = "Bearer";

/// The sidecar and the service.
pub(crate) struct Front {
    origin: OriginServer,
    pub(crate) alone: SingleSidecar,
    /// A key that is always among those that count, so that a good token shows that the rest is well.
    reference: Key,
}

impl Front {
    /// One that knows these keys.
    pub(crate) fn start(published: &[Value]) -> Self {
        let reference = Key::ecdsa("ES256").saying("kid", "reference");
        let keys: Vec<&Value> = published.iter().chain([&reference.jwk]).collect();
        let keys = json!({"keys": keys}).to_string();
        let origin = OriginServer::start();
        let alone = wanting(&keys, origin.port, UpstreamHttp::Http1).start();
        Self { origin, alone, reference }
    }

    /// One that knows an issuer's keys.
    pub(crate) fn of(issuer: &Issuer) -> Self {
        Self::start(&issuer.published())
    }

    /// Asks for a path with these lines in the head.
    pub(crate) fn ask(&self, path: &str, lines: &str) -> Http1Response {
        let head = format!("GET {path} HTTP/1.1\r\nhost: a.example\r\n{lines}\r\n");
        http1::ask(self.alone.port, &head)
    }

    /// Holds that these tokens are taken, and are not told to the service.
    #[track_caller]
    pub(crate) fn takes(&self, cases: &[Case]) {
        let mut wrong = Vec::new();
        for (name, token) in cases {
            let answer = self.ask(&path("taken", name), &bearer(token));
            let is_told = answer.body.contains("authorization");
            if (answer.status, is_told) != (200, false) {
                wrong.push(format!("{name}: {} {}", answer.status, answer.body));
            }
        }
        self.hold(wrong, cases);
    }

    /// Holds that these tokens are refused over both versions, and to gRPC as well.
    #[track_caller]
    pub(crate) fn refuses(&self, cases: &[Case]) {
        let lines: Vec<Case> =
            cases.iter().map(|(name, token)| case(name, bearer(token))).collect();
        let mut wrong = self.wrongly_answered(&lines, INVALID);
        let grpc = [("content-type", "application/grpc"), ("te", "trailers")];
        let ask = |(name, token): &Case| {
            let field = format!("Bearer {token}");
            let path = path("refused", name);
            let fields = [("authorization", field.as_str())];
            [
                request("GET", &path, &fields),
                request("POST", &path, &[&grpc[..], &fields[..]].concat()),
            ]
        };
        let requests: Vec<Value> = cases.iter().flat_map(ask).collect();
        let answers = http2::ask(self.alone.port, &requests);
        for ((name, _), answers) in cases.iter().zip(answers.chunks(2)) {
            let [http, grpc] = [&answers[0], &answers[1]];
            let told = (http.status(), http.header("www-authenticate"), grpc.header("grpc-status"));
            if told != (401, Some(INVALID), Some("16")) {
                wrong.push(format!("{name}, over HTTP/2: {told:?} {}", http.body()));
            }
        }
        self.hold(wrong, cases);
    }

    /// Holds that requests with these lines in their heads are refused, and how a token is asked for.
    #[track_caller]
    pub(crate) fn refuses_lines(&self, challenge: &str, cases: &[Case]) {
        self.hold(self.wrongly_answered(cases, challenge), cases);
    }

    fn wrongly_answered(&self, cases: &[Case], challenge: &str) -> Vec<String> {
        let mut wrong = Vec::new();
        for (name, lines) in cases {
            let answer = self.ask(&path("refused", name), lines);
            let told = (answer.status, answer.header("www-authenticate"));
            if told != (401, Some(challenge)) {
                wrong.push(format!("{name}: {told:?} {}", answer.body));
            }
        }
        wrong
    }

    /// Holds that nothing was wrong, and that nothing reached the service but what should.
    #[track_caller]
    fn hold(&self, mut wrong: Vec<String>, cases: &[Case]) {
        let mut names: Vec<&String> = cases.iter().map(|(name, _)| name).collect();
        names.sort();
        wrong.extend(
            names
                .windows(2)
                .filter(|pair| pair[0] == pair[1])
                .map(|pair| format!("{}: two cases have this name", pair[0])),
        );
        // When this has come through, whatever was sent before it would have as well.
        let last = self.ask("/last", &bearer(&self.reference.good()));
        assert_eq!(last.status, 200, "{last:?}");
        let seen = self.origin.seen();
        assert!(seen.iter().any(|line| line == "head GET /last"), "{seen:#?}");
        wrong.extend(seen.into_iter().filter(|line| line.contains("/refused/")));
        assert!(wrong.is_empty(), "{} of {}: {wrong:#?}", wrong.len(), cases.len());
    }
}

/// A sidecar that wants a token, signed by one of these keys.
pub(crate) fn wanting(keys: &str, port: u16, speaks: UpstreamHttp) -> SingleSidecarConfig {
    let mut wanted = SingleSidecarConfig::for_upstream(port, speaks);
    wanted.http = http(&route_to("service", 15), &[require_token(ISSUER, AUDIENCE, keys)]);
    // What is longer than a token may be must come as far as where tokens are looked at.
    wanted
        .with("max_request_headers_kb", json!(96))
        .with_weft_metadata("field_limit_bytes", json!(80 * 1024))
}

/// The line of a head that carries a token.
pub(crate) fn bearer(token: &str) -> String {
    format!("authorization: Bearer {token}\r\n")
}

/// A path that tells of a case.
fn path(what: &str, name: &str) -> String {
    let word = |letter: char| if letter.is_ascii_alphanumeric() { letter } else { '-' };
    let name: String = name.chars().map(word).collect();
    format!("/{what}/{name}")
}
