//! HTTP/1 messages, well-formed and malformed, compared with Envoy.

use serde_json::json;

use crate::comparison::{Case, Difference, case, compare, get, serving};

const HEADS: &[(&str, &str)] = &[
    ("TRACE", "TRACE / HTTP/1.1\r\nhost: a.example\r\n\r\n"),
    ("CONNECT", "CONNECT a.example:443 HTTP/1.1\r\nhost: a.example:443\r\n\r\n"),
    ("lower case", "get / HTTP/1.1\r\nhost: a.example\r\n\r\n"),
    ("OPTIONS *", "OPTIONS * HTTP/1.1\r\nhost: a.example\r\n\r\n"),
    ("1.0", "GET /x HTTP/1.0\r\nhost: a.example\r\n\r\n"),
    ("1.0 keep-alive", "GET /x HTTP/1.0\r\nhost: a.example\r\nconnection: keep-alive\r\n\r\n"),
    ("1.0 without host", "GET /x HTTP/1.0\r\n\r\n"),
    ("1.0 chunked response", "GET /chunked HTTP/1.0\r\nhost: a.example\r\n\r\n"),
    ("1.0 with a length", "POST /x HTTP/1.0\r\nhost: a.example\r\ncontent-length: 4\r\n\r\nbody"),
    ("close", "GET /x HTTP/1.1\r\nhost: a.example\r\nconnection: close\r\n\r\n"),
    ("Close", "GET /x HTTP/1.1\r\nhost: a.example\r\nConnection: Close\r\n\r\n"),
    ("keep-alive", "GET /x HTTP/1.1\r\nhost: a.example\r\nconnection: keep-alive\r\n\r\n"),
    (
        "hops",
        "GET /x HTTP/1.1\r\nhost: a.example\r\nconnection: x-hop\r\nx-hop: 1\r\n\
         keep-alive: 5\r\n\r\n",
    ),
    (
        "proxy-connection",
        "GET /x HTTP/1.1\r\nhost: a.example\r\nproxy-connection: keep-alive\r\n\r\n",
    ),
    (
        "proxy authorization",
        "GET /x HTTP/1.1\r\nhost: a.example\r\nproxy-authorization: Basic eA==\r\n\r\n",
    ),
    ("te", "GET /x HTTP/1.1\r\nhost: a.example\r\nte: trailers\r\nconnection: te\r\n\r\n"),
    (
        "unknown upgrade",
        "GET /x HTTP/1.1\r\nhost: a.example\r\nconnection: upgrade\r\nupgrade: own\r\n\r\n",
    ),
    (
        "upgrade to h2c",
        "GET /x HTTP/1.1\r\nhost: a.example\r\nconnection: upgrade, http2-settings\r\n\
         upgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n\r\n",
    ),
    ("absolute", "GET http://b.example/x?y HTTP/1.1\r\nhost: a.example\r\n\r\n"),
    ("absolute without a path", "GET http://b.example HTTP/1.1\r\nhost: b.example\r\n\r\n"),
    (
        "many values",
        "GET /x HTTP/1.1\r\nhost: a.example\r\naccept: a\r\naccept: b\r\ncookie: a=1\r\n\
         cookie: b=2\r\n\r\n",
    ),
    (
        "an empty value",
        "GET /x HTTP/1.1\r\nhost: a.example\r\nx-empty:\r\nx-spaces:   a  b  \r\n\r\n",
    ),
    (
        "identity and proxy headers",
        "GET /x HTTP/1.1\r\nhost: a.example\r\nx-forwarded-client-cert: By=x\r\n\
         x-forwarded-host: b\r\nforwarded: for=x\r\nvia: 1.0 b\r\n\r\n",
    ),
    ("underscore", "GET /x HTTP/1.1\r\nhost: a.example\r\nx_own: 1\r\n\r\n"),
    ("an empty line before", "\r\nGET /x HTTP/1.1\r\nhost: a.example\r\n\r\n"),
];

fn methods_and_versions() -> Vec<Case> {
    let mut cases = Vec::new();
    for method in ["GET", "HEAD", "OPTIONS", "DELETE", "POST", "PUT", "PATCH", "PROPFIND", "X-OWN"]
    {
        let bytes = format!("{method} /x HTTP/1.1\r\nhost: a.example\r\n\r\n");
        cases.push(case("plain", method, bytes));
    }
    for target in
        ["/204", "/304", "/404", "/503", "/chunked", "/trailers", "/cookies", "/hops", "/close"]
    {
        cases.push(get("plain", target));
        let name = format!("HEAD {target}");
        // A service may send the same headers to HEAD, without a body.
        if matches!(target, "/204" | "/304") {
            cases.push(case(
                "plain",
                &name,
                format!("HEAD {target} HTTP/1.1\r\nhost: a.example\r\n\r\n"),
            ));
        }
    }
    cases.extend(HEADS.iter().map(|(name, bytes)| case("plain", name, *bytes)));
    cases.push(case(
        "no 1.0",
        "1.0 where it is disabled",
        "GET /x HTTP/1.0\r\nhost: a.example\r\n\r\n",
    ));
    cases
}

fn bodies() -> Vec<Case> {
    let post = |headers: &str, body: &str| {
        format!("POST /x HTTP/1.1\r\nhost: a.example\r\n{headers}\r\n\r\n{body}")
    };
    let chunked = "transfer-encoding: chunked";
    [
        ("a length", post("content-length: 4", "body")),
        ("no length", post("content-length: 0", "")),
        ("chunks", post(chunked, "2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n")),
        ("no chunks", post(chunked, "0\r\n\r\n")),
        ("a chunk's extension", post(chunked, "4;a=b\r\nbody\r\n0\r\n\r\n")),
        ("chunk sizes of zeros", post(chunked, "0004\r\nbody\r\n0\r\n\r\n")),
        ("Chunked", post("transfer-encoding: Chunked", "4\r\nbody\r\n0\r\n\r\n")),
        (
            "trailers",
            post(&format!("{chunked}\r\ntrailer: x-sum"), "4\r\nbody\r\n0\r\nX-Sum: 1\r\n\r\n"),
        ),
        ("expect", post("expect: 100-continue\r\ncontent-length: 4", "body")),
        ("Expect", post("expect: 100-Continue\r\ncontent-length: 4", "body")),
        (
            "expect with chunks",
            post(&format!("expect: 100-continue\r\n{chunked}"), "4\r\nbody\r\n0\r\n\r\n"),
        ),
        ("another expectation", post("expect: own\r\ncontent-length: 4", "body")),
        (
            "two in one",
            post("content-length: 4", "bodyGET /second HTTP/1.1\r\nhost: a.example\r\n\r\n"),
        ),
        ("large", post("content-length: 100000", &"x".repeat(100_000))),
        ("GET with a body", post("content-length: 4", "body").replacen("POST", "GET", 1)),
        ("GET with no body", post("content-length: 0", "").replacen("POST", "GET", 1)),
        ("GET with chunks", post(chunked, "4\r\nbody\r\n0\r\n\r\n").replacen("POST", "GET", 1)),
        ("DELETE with a body", post("content-length: 4", "body").replacen("POST", "DELETE", 1)),
    ]
    .map(|(name, bytes)| case("plain", name, bytes))
    .into()
}

fn large_heads() -> Vec<Case> {
    let header = |bytes: usize| {
        format!("GET / HTTP/1.1\r\nhost: a.example\r\nx: {}\r\n\r\n", "x".repeat(bytes))
    };
    let headers = |count: usize| {
        let lines: String = (0..count).map(|number| format!("x-{number}: 1\r\n")).collect();
        format!("GET / HTTP/1.1\r\nhost: a.example\r\n{lines}\r\n")
    };
    let target =
        |bytes: usize| format!("GET /{} HTTP/1.1\r\nhost: a.example\r\n\r\n", "x".repeat(bytes));
    [
        ("a header of 4 KiB", header(4096)),
        ("a header of 15 KiB", header(15 * 1024)),
        ("a header of 17 KiB", header(17 * 1024)),
        ("a header of 59 KiB", header(59 * 1024)),
        ("a header of 64 KiB", header(64 * 1024)),
        ("90 headers", headers(90)),
        ("110 headers", headers(110)),
        ("a target of 4 KiB", target(4096)),
        ("a target of 15 KiB", target(15 * 1024)),
        ("a target of 17 KiB", target(17 * 1024)),
        ("a target of 64 KiB", target(64 * 1024)),
    ]
    .map(|(name, bytes)| case("plain", name, bytes))
    .into()
}

#[test]
fn http1_messages_are_forwarded_as_by_envoy() {
    let listeners = [
        ("plain", serving(json!({}))),
        ("no 1.0", serving(json!({"http_protocol_options": {"enable_trailers": true}}))),
    ];
    let cases = [methods_and_versions(), bodies(), large_heads()].concat();
    compare(&listeners, &cases, MESSAGES, true);
}

const MESSAGES: &[Difference] = &[
    ("OPTIONS | PROPFIND", "service -content-length: 0", "the sidecar adds no content-length"),
    ("X-OWN", "refused 400 / 200", "any token is a method (RFC 9110, section 9.1)"),
    (
        "plain /hops",
        "client -x-hop: 1",
        "headers that `connection` names are not forwarded (RFC 9110, section 7.6.1)",
    ),
    (
        "TRACE",
        "200 / refused 405",
        "a TRACE response would show the client headers that it must not see",
    ),
    ("CONNECT", "refused 404 / refused 405", "tunnels are disabled by default"),
    ("OPTIONS *", "refused 404 / 200", "it is addressed to the server, not to a path"),
    ("1.0 without host", "refused 400 / 200", "HTTP/1.0 does not require host"),
    ("proxy authorization", "service -proxy-authorization: Basic eA==", "a hop-by-hop header"),
    ("unknown upgrade", "refused 403 / 200", "an upgrade may be ignored (RFC 9110, section 7.8)"),
    (
        "many values",
        "service -accept: a,b; service +accept: a; service +accept: b",
        "the same list",
    ),
    ("an empty line before", "200 / refused 400", "parsers disagree about lines before a request"),
    ("1.0 where it is disabled", "refused 426 / 200", "HTTP/1.0 is always enabled"),
    (
        "another expectation",
        "interim -HTTP/1.1 100 Continue; service -expect: own",
        "only 100-continue is defined",
    ),
    (
        "GET with a body | GET with chunks",
        "service +connection: close",
        "services disagree about such bodies, so the upstream connection is not reused",
    ),
    ("GET with no body", "service -content-length: 0", "a length of 0 means the same as no length"),
    (
        "a target of 64 KiB",
        "refused 431 / refused 414",
        "414 distinguishes a long target from large headers",
    ),
];

const MALFORMED_BYTES: &[(&str, &str)] = &[
    ("no host", "GET / HTTP/1.1\r\n\r\n"),
    ("two hosts", "GET / HTTP/1.1\r\nhost: a.example\r\nhost: b.example\r\n\r\n"),
    ("an empty host", "GET / HTTP/1.1\r\nhost:\r\n\r\n"),
    ("a host with a path", "GET / HTTP/1.1\r\nhost: a.example/x\r\n\r\n"),
    ("a host with a user", "GET / HTTP/1.1\r\nhost: u@a.example\r\n\r\n"),
    ("a host with a space", "GET / HTTP/1.1\r\nhost: a b\r\n\r\n"),
    ("a target with a space", "GET /a b HTTP/1.1\r\nhost: a.example\r\n\r\n"),
    ("a target with a fragment", "GET /a#b HTTP/1.1\r\nhost: a.example\r\n\r\n"),
    ("a relative target", "GET a HTTP/1.1\r\nhost: a.example\r\n\r\n"),
    ("no target", "GET HTTP/1.1\r\nhost: a.example\r\n\r\n"),
    ("no version", "GET /\r\nhost: a.example\r\n\r\n"),
    ("version 2.0", "GET / HTTP/2.0\r\nhost: a.example\r\n\r\n"),
    ("version 1.2", "GET / HTTP/1.2\r\nhost: a.example\r\n\r\n"),
    ("version 0.9", "GET / HTTP/0.9\r\nhost: a.example\r\n\r\n"),
    ("another protocol", "GET / HTTQ/1.1\r\nhost: a.example\r\n\r\n"),
    ("a method with a colon", "G:T / HTTP/1.1\r\nhost: a.example\r\n\r\n"),
    ("two spaces", "GET  / HTTP/1.1\r\nhost: a.example\r\n\r\n"),
    ("a tab", "GET\t/ HTTP/1.1\r\nhost: a.example\r\n\r\n"),
    ("bare LF", "GET / HTTP/1.1\nhost: a.example\n\n"),
    ("bare LF in a header", "GET / HTTP/1.1\r\nhost: a.example\nx-a: 1\r\n\r\n"),
    ("bare CR in a header", "GET / HTTP/1.1\r\nhost: a.example\r\nx-a: 1\r2\r\n\r\n"),
    ("NUL in a header", "GET / HTTP/1.1\r\nhost: a.example\r\nx-a: 1\x002\r\n\r\n"),
    ("a control in a header", "GET / HTTP/1.1\r\nhost: a.example\r\nx-a: 1\x012\r\n\r\n"),
    ("not ASCII in a header", "GET / HTTP/1.1\r\nhost: a.example\r\nx-a: \u{e9}\r\n\r\n"),
    ("not ASCII in a name", "GET / HTTP/1.1\r\nhost: a.example\r\nx-\u{e9}: 1\r\n\r\n"),
    ("not ASCII in a target", "GET /\u{e9} HTTP/1.1\r\nhost: a.example\r\n\r\n"),
    ("a space before the colon", "GET / HTTP/1.1\r\nhost: a.example\r\nx-a : 1\r\n\r\n"),
    ("a space in a name", "GET / HTTP/1.1\r\nhost: a.example\r\nx a: 1\r\n\r\n"),
    ("no name", "GET / HTTP/1.1\r\nhost: a.example\r\n: 1\r\n\r\n"),
    ("no colon", "GET / HTTP/1.1\r\nhost: a.example\r\nx-a\r\n\r\n"),
    ("a folded header", "GET / HTTP/1.1\r\nhost: a.example\r\nx-a: 1\r\n 2\r\n\r\n"),
    ("a folded first header", "GET / HTTP/1.1\r\n x: 1\r\nhost: a.example\r\n\r\n"),
    (
        "both",
        "POST / HTTP/1.1\r\nhost: a.example\r\ncontent-length: 4\r\n\
         transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "two lengths",
        "POST / HTTP/1.1\r\nhost: a.example\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nbody",
    ),
    (
        "one length twice",
        "POST / HTTP/1.1\r\nhost: a.example\r\ncontent-length: 4\r\ncontent-length: 4\r\n\r\nbody",
    ),
    ("a list of lengths", "POST / HTTP/1.1\r\nhost: a.example\r\ncontent-length: 4, 4\r\n\r\nbody"),
    ("a signed length", "POST / HTTP/1.1\r\nhost: a.example\r\ncontent-length: +4\r\n\r\nbody"),
    ("a negative length", "POST / HTTP/1.1\r\nhost: a.example\r\ncontent-length: -1\r\n\r\n"),
    ("a length in words", "POST / HTTP/1.1\r\nhost: a.example\r\ncontent-length: four\r\n\r\nbody"),
    (
        "a length beyond 64 bits",
        "POST / HTTP/1.1\r\nhost: a.example\r\ncontent-length: 99999999999999999999\r\n\r\n",
    ),
    ("another coding", "POST / HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: gzip\r\n\r\n"),
    (
        "two codings",
        "POST / HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "chunked twice",
        "POST / HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked, chunked\r\n\r\n\
         0\r\n\r\n",
    ),
    (
        "chunked and identity",
        "POST / HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked\r\n\
         transfer-encoding: identity\r\n\r\n0\r\n\r\n",
    ),
    (
        "xchunked",
        "POST / HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "1.0 chunked",
        "POST / HTTP/1.0\r\nhost: a.example\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "a chunk size in words",
        "POST / HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n\r\n",
    ),
    (
        "a signed chunk size",
        "POST / HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked\r\n\r\n+4\r\n\
         body\r\n0\r\n\r\n",
    ),
    (
        "a chunk size with 0x",
        "POST / HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked\r\n\r\n0x4\r\n\
         body\r\n0\r\n\r\n",
    ),
    (
        "a chunk longer than its size",
        "POST / HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked\r\n\r\n4\r\n\
         bodyXX\r\n0\r\n\r\n",
    ),
    (
        "bare LF after a chunk size",
        "POST / HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked\r\n\r\n4\nbody\r\n\
         0\r\n\r\n",
    ),
    (
        "a bad trailer",
        "POST / HTTP/1.1\r\nhost: a.example\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\
         x a: 1\r\n\r\n",
    ),
    ("an incomplete header section", "GET / HTTP/1.1\r\nhost: a.example\r\n"),
    ("an incomplete body", "POST / HTTP/1.1\r\nhost: a.example\r\ncontent-length: 4\r\n\r\nbo"),
    ("not HTTP", "hello\r\n\r\n"),
    ("TLS", "\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"),
];

#[test]
fn malformed_http1_messages_are_refused_if_envoy_refuses_them() {
    let mut cases = vec![get("plain", "/")];
    cases.extend(MALFORMED_BYTES.iter().map(|(name, bytes)| case("plain", name, *bytes)));
    compare(&[("plain", serving(json!({})))], &cases, MALFORMED, false);
}

const MALFORMED: &[Difference] = &[
    ("two hosts", "200 / refused 400", "RFC 9112, section 3.2"),
    (
        "an empty host",
        "200 / refused 400",
        "an http URI must not have an empty host (RFC 9110, section 4.2.1)",
    ),
    (
        "a host with a user",
        "200 / refused 400",
        "user information can disguise the host (RFC 9110, section 4.2.4)",
    ),
    (
        "version 2.0 | version 0.9",
        "200 / refused 505",
        "these versions have another message format",
    ),
    (
        "version 1.2",
        "then 0 / 200; client -connection: close",
        "treated as 1.1 (RFC 9110, section 2.5)",
    ),
    (
        "two spaces | a tab | bare LF | bare LF in a header | bare CR in a header | a folded header",
        "200 / refused 400",
        "other parsers read another request",
    ),
    (
        "1.0 chunked",
        "200 / refused 400",
        "HTTP/1.0 must not use transfer-encoding (RFC 9112, section 6.1)",
    ),
    ("a chunk longer than its size", "200 / refused 400", "other parsers find another next chunk"),
];
