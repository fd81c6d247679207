//! Headers that `connection` names, as policies and the service see them, compared with Envoy.

use serde_json::{Value, json};
use weft_integration::bootstrap::any;

use crate::comparison::{Case, Difference, case, compare, serving};

/// A listener with an RBAC filter of this action for requests that have `x-mark`.
fn rbac_on_mark(action: &str) -> Value {
    let rules = json!({"action": action, "policies": {"marked": {
        "permissions": [{"header": {"name": "x-mark", "present_match": true}}],
        "principals": [{"any": true}]}}});
    let rbac = any("envoy.extensions.filters.http.rbac.v3.RBAC", json!({"rules": rules}));
    let router = any("envoy.extensions.filters.http.router.v3.Router", json!({}));
    serving(json!({"http_filters": [
        {"name": "rbac", "typed_config": rbac}, {"name": "router", "typed_config": router}]}))
}

fn request(listener: &'static str, lines: &str) -> Case {
    let name = format!("{listener} {}", lines.replace("\r\n", " + "));
    case(listener, &name, format!("GET / HTTP/1.1\r\nhost: a.example\r\n{lines}\r\n\r\n"))
}

#[test]
fn headers_named_by_connection_are_evaluated_by_policies_and_not_forwarded() {
    let listeners = [
        ("deny", rbac_on_mark("DENY")),
        ("allow", rbac_on_mark("ALLOW")),
        ("plain", serving(json!({}))),
    ];
    let mut cases = Vec::new();
    for listener in ["deny", "allow"] {
        for connection in ["close, x-mark", "x-mark", "keep-alive, X-Mark", "close", "x-other"] {
            cases.push(request(listener, &format!("connection: {connection}\r\nx-mark: 1")));
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
        cases.push(request("plain", &format!("connection: {name}\r\n{name}: 10.0.0.1")));
    }
    compare(&listeners, &cases, CONNECTION, true);
}

/// The reason for which a header is forwarded although `connection` names it.
const END_TO_END: &str =
    "an end-to-end header must not be named by connection (RFC 9110, section 7.6.1)";

const CONNECTION: &[Difference] = &[
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
        "policies evaluate the request as it was sent",
    ),
    (
        "plain connection: x-forwarded-for + x-forwarded-for: 10.0.0.1 | \
         plain connection: x-forwarded-host + x-forwarded-host: 10.0.0.1 | \
         plain connection: x-forwarded-proto + x-forwarded-proto: 10.0.0.1",
        "refused 400 / 200",
        "the header is forwarded, so the client hides nothing",
    ),
    (
        "plain connection: authorization + authorization: 10.0.0.1",
        "service +authorization: 10.0.0.1",
        END_TO_END,
    ),
    ("plain connection: cookie + cookie: 10.0.0.1", "service +cookie: 10.0.0.1", END_TO_END),
    (
        "plain connection: x-real-ip + x-real-ip: 10.0.0.1",
        "service +x-real-ip: 10.0.0.1",
        END_TO_END,
    ),
    (
        "plain connection: forwarded + forwarded: 10.0.0.1",
        "service +forwarded: 10.0.0.1",
        END_TO_END,
    ),
    ("plain connection: via + via: 10.0.0.1", "service +via: 10.0.0.1", END_TO_END),
    (
        "plain connection: content-type + content-type: 10.0.0.1",
        "service +content-type: 10.0.0.1",
        END_TO_END,
    ),
    (
        "plain connection: cache-control + cache-control: 10.0.0.1",
        "service +cache-control: 10.0.0.1",
        END_TO_END,
    ),
    ("plain connection: origin + origin: 10.0.0.1", "service +origin: 10.0.0.1", END_TO_END),
    (
        "plain connection: traceparent + traceparent: 10.0.0.1",
        "service +traceparent: 10.0.0.1",
        END_TO_END,
    ),
];
