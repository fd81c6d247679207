//! Headers that `connection` names: what a policy sees of them, and what the service does.

use serde_json::{Value, json};
use weft_integration::bootstrap::any;

use crate::peers::{Case, Wanted, case, compare, serving};

/// Serves by rules of this action for requests that have `x-mark`.
fn judging(action: &str) -> Value {
    let rules = json!({"action": action, "policies": {"marked": {
        "permissions": [{"header": {"name": "x-mark", "present_match": true}}],
        "principals": [{"any": true}]}}});
    let rbac = any("envoy.extensions.filters.http.rbac.v3.RBAC", json!({"rules": rules}));
    let router = any("envoy.extensions.filters.http.router.v3.Router", json!({}));
    serving(json!({"http_filters": [
        {"name": "rbac", "typed_config": rbac}, {"name": "router", "typed_config": router}]}))
}

fn asked(listener: &'static str, lines: &str) -> Case {
    let name = format!("{listener} {}", lines.replace("\r\n", " + "));
    case(listener, &name, format!("GET / HTTP/1.1\r\nhost: a.example\r\n{lines}\r\n\r\n"))
}

#[test]
fn headers_that_connection_names_are_judged_and_end_here() {
    let listeners =
        [("deny", judging("DENY")), ("allow", judging("ALLOW")), ("plain", serving(json!({})))];
    let mut cases = Vec::new();
    for listener in ["deny", "allow"] {
        for connection in ["close, x-mark", "x-mark", "keep-alive, X-Mark", "close", "x-other"] {
            cases.push(asked(listener, &format!("connection: {connection}\r\nx-mark: 1")));
        }
    }
    for name in [
        "x-mark",
        "authorization",
        "cookie",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-proto",
        "x-real-ip",
        "x-request-id",
        "forwarded",
        "via",
        "content-type",
        "cache-control",
        "origin",
        "traceparent",
    ] {
        cases.push(asked("plain", &format!("connection: {name}\r\n{name}: 10.0.0.1")));
    }
    compare(&listeners, &cases, CONNECTION, true);
}

/// Why a header stays that `connection` names.
const FOR_ALL: &str =
    "it is meant for every recipient, so it must not be named (RFC 9110, section 7.6.1)";

const CONNECTION: &[Wanted] = &[
    (
        "deny connection: close, x-mark + x-mark: 1 | deny connection: x-mark + x-mark: 1 | \
         deny connection: keep-alive, X-Mark + x-mark: 1",
        "200 / refused 403",
        "a client must not hide a header from a policy by naming it",
    ),
    (
        "allow connection: close, x-mark + x-mark: 1 | allow connection: x-mark + x-mark: 1 | \
         allow connection: keep-alive, X-Mark + x-mark: 1",
        "refused 403 / 200",
        "policies judge what was sent",
    ),
    (
        "plain connection: x-forwarded-for + x-forwarded-for: 10.0.0.1 | \
         plain connection: x-forwarded-host + x-forwarded-host: 10.0.0.1 | \
         plain connection: x-forwarded-proto + x-forwarded-proto: 10.0.0.1",
        "refused 400 / 200",
        "the header stays, so nothing is hidden",
    ),
    (
        "plain connection: authorization + authorization: 10.0.0.1",
        "service +authorization: 10.0.0.1",
        FOR_ALL,
    ),
    ("plain connection: cookie + cookie: 10.0.0.1", "service +cookie: 10.0.0.1", FOR_ALL),
    ("plain connection: x-real-ip + x-real-ip: 10.0.0.1", "service +x-real-ip: 10.0.0.1", FOR_ALL),
    ("plain connection: forwarded + forwarded: 10.0.0.1", "service +forwarded: 10.0.0.1", FOR_ALL),
    ("plain connection: via + via: 10.0.0.1", "service +via: 10.0.0.1", FOR_ALL),
    (
        "plain connection: content-type + content-type: 10.0.0.1",
        "service +content-type: 10.0.0.1",
        FOR_ALL,
    ),
    (
        "plain connection: cache-control + cache-control: 10.0.0.1",
        "service +cache-control: 10.0.0.1",
        FOR_ALL,
    ),
    ("plain connection: origin + origin: 10.0.0.1", "service +origin: 10.0.0.1", FOR_ALL),
    (
        "plain connection: traceparent + traceparent: 10.0.0.1",
        "service +traceparent: 10.0.0.1",
        FOR_ALL,
    ),
];
