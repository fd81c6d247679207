//! Pipelined requests, and effects of a request on its connection: persistence, expectations, upgrades and tunnels
//! (RFC 9110, sections 7.6, 7.8, 9.3.6 and 10.1.1; RFC 9112, section 9).

use super::{Case, Expected, SMUGGLED, case, get, line, noncompliant, post, refused, served};

pub(super) fn cases() -> Vec<Case> {
    [pipelines(), after_refused(), persistence(), http10(), expectations(), upgrades(), tunnels()]
        .concat()
}

fn pipelines() -> Vec<Case> {
    let one = |target: &str| format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n");
    let length = post("Content-Length: 5", "hello");
    let chunked = post("Transfer-Encoding: chunked", "5\r\nhello\r\n0\r\n\r\n");
    let all = |received: &[&'static str]| Expected::Served(received.to_vec());
    vec![
        case(one("/1") + &one("/2"), all(&["GET /1 a", "GET /2 a"])),
        case(one("/1").repeat(20), all(&["GET /1 a"; 20])),
        case(length.clone() + &one("/2"), all(&["POST / a hello", "GET /2 a"])),
        case(chunked.clone() + &one("/2"), all(&["POST / a hello", "GET /2 a"])),
        case(
            length + &chunked + &one("/3"),
            all(&["POST / a hello", "POST / a hello", "GET /3 a"]),
        ),
        case(
            format!("HEAD /1 HTTP/1.1\r\nHost: a\r\n\r\n{}", one("/2")),
            all(&["HEAD /1 a", "GET /2 a"]),
        ),
        // A parser that ignores the body finds a request in it.
        case(
            post(&format!("Content-Length: {}", SMUGGLED.len()), SMUGGLED) + &one("/2"),
            all(&["POST / a GET /smuggled HTTP/1.1\r\nHost: a", "GET /2 a"]),
        ),
        case(
            post(
                "Transfer-Encoding: chunked",
                &format!("{:x}\r\n{SMUGGLED}\r\n0\r\n\r\n", SMUGGLED.len()),
            ),
            all(&["POST / a GET /smuggled HTTP/1.1\r\nHost: a"]),
        ),
        // An empty line after a body is not skipped before the next request.
        case(
            post("Content-Length: 5", "hello\r\n") + &one("/2"),
            Expected::Refused(vec!["POST / a hello"], 400),
        ),
        case(
            post("Content-Length: 5", "hellox") + &one("/2"),
            all(&["POST / a hello", "xGET /2 a"]),
        ),
    ]
}

/// The client of a refused request may read the bytes that follow in another way than the sidecar.
fn after_refused() -> Vec<Case> {
    let with = |headers: &str| post(headers, SMUGGLED);
    vec![
        refused(format!("{}{SMUGGLED}", line("GET / HTTP/2.0")), 505),
        refused(format!("GET / HTTP/1.1\r\n\r\n{SMUGGLED}"), 400),
        refused(with("Transfer-Encoding: gzip"), 501),
        refused(format!("{}{SMUGGLED}", line("GET /../x HTTP/1.1")), 400),
        noncompliant(with("Content-Length: x"), "BadContentLength", ""),
        noncompliant(with("X"), "MissingHeaderColon", ""),
        noncompliant(with("X: y\r\n z"), "MultilineHeader", ""),
        noncompliant(format!("{}{SMUGGLED}", line("GET /# HTTP/1.1")), "AmbiguousUri", ""),
        case(
            format!("{}{}{SMUGGLED}", line("GET /1 HTTP/1.1"), line("GET / HTTP/2.0")),
            Expected::Refused(vec!["GET /1 a"], 505),
        ),
        case(
            post("Transfer-Encoding: chunked", &format!("x\r\n{SMUGGLED}")),
            Expected::Refused(Vec::new(), 400),
        ),
        // A forwarded noncompliant request closes the connection: the bytes after it are not a request.
        noncompliant(
            get("Content-Length: 5\r\nTransfer-Encoding: chunked") + "0\r\n\r\n" + SMUGGLED,
            "BothTeClPresent",
            "GET / a",
        ),
        // A refusal of a request whose body was not read.
        case(
            format!(
                "TRACE / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{SMUGGLED}",
                SMUGGLED.len()
            ),
            Expected::Refused(Vec::new(), 405),
        ),
    ]
}

fn persistence() -> Vec<Case> {
    let last = |headers: &str| {
        case(format!("{}{SMUGGLED}", get(headers)), Expected::Last(vec!["GET / a"]))
    };
    let stays = |headers: &str| served(get(headers), "GET / a");
    vec![
        last("Connection: close"),
        last("CONNECTION: CLOSE"),
        last("Connection: keep-alive, close"),
        last("Connection: keep-alive\r\nConnection: close"),
        last("Connection: x, close, y"),
        last("Connection: ,,close"),
        stays("Connection: keep-alive"),
        stays("Connection:"),
        stays("Connection: x"),
        stays("Connection: closed"),
        stays("Connection: \"close\""),
        stays("Keep-Alive: timeout=5"),
        stays("Proxy-Connection: close"),
        // `connection` does not remove headers that frame or route the message.
        served(post("Connection: content-length\r\nContent-Length: 5", "hello"), "POST / a hello"),
        served(
            post(
                "Connection: transfer-encoding\r\nTransfer-Encoding: chunked",
                "5\r\nhello\r\n0\r\n\r\n",
            ),
            "POST / a hello",
        ),
        stays("Connection: host"),
        stays("Connection: Host, Content-Length, Transfer-Encoding"),
        stays("Connection: x-y\r\nX-Y: z"),
        stays("TE: trailers, chunked"),
        stays("Connection: TE\r\nTE: trailers"),
        stays("Trailer: Content-Length"),
        stays("Expect: x"),
    ]
}

/// HTTP/1.0, which has neither a required `host` nor chunked bodies.
fn http10() -> Vec<Case> {
    let last = |bytes: &str, received: &'static str| {
        case(format!("{bytes}{SMUGGLED}"), Expected::Last(vec![received]))
    };
    vec![
        last("GET / HTTP/1.0\r\n\r\n", "GET / localhost"),
        last("GET / HTTP/1.0\r\nHost: a\r\n\r\n", "GET / a"),
        last("POST / HTTP/1.0\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", "POST / a hello"),
        last("GET http://b/ HTTP/1.0\r\n\r\n", "GET / b"),
        last(
            "POST / HTTP/1.0\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nhello",
            "POST / a hello",
        ),
        served("GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n", "GET / a"),
        last("GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive, close\r\n\r\n", "GET / a"),
        last(
            "GET / HTTP/1.0\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
            "GET / a",
        ),
        refused("POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        refused(
            "POST / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\
             Content-Length: 5\r\n\r\n0\r\n\r\n",
            400,
        ),
        refused("GET / HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        noncompliant(
            "POST / HTTP/1.0\r\nHost: a\r\nContent-Length: x\r\n\r\n",
            "BadContentLength",
            "",
        ),
    ]
}

fn expectations() -> Vec<Case> {
    let expecting = |value: &str| {
        served(post(&format!("Expect: {value}\r\nContent-Length: 5"), "hello"), "POST / a hello")
    };
    vec![
        expecting("100-continue"),
        expecting("100-CONTINUE"),
        expecting("200-ok"),
        expecting(""),
        expecting("100-continue, x"),
        expecting("100-continue\r\nExpect: 100-continue"),
        expecting("y 100-continue"),
        served(get("Expect: 100-continue"), "GET / a"),
        served(
            post("Expect: 100-continue\r\nTransfer-Encoding: chunked", "5\r\nhello\r\n0\r\n\r\n"),
            "POST / a hello",
        ),
        noncompliant(
            post(
                "Expect: 100-continue\r\nContent-Length: 5\r\nTransfer-Encoding: chunked",
                "0\r\n\r\n",
            ),
            "BothTeClPresent",
            "POST / a",
        ),
    ]
}

const UPGRADE: &str = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
    Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==";

/// The service does not accept the upgrade, so the bytes that follow are HTTP.
fn upgrades() -> Vec<Case> {
    let with_body = format!("{UPGRADE}\r\nContent-Length: 5");
    let chunked = format!("{UPGRADE}\r\nTransfer-Encoding: chunked");
    vec![
        served(get(UPGRADE), "GET / a"),
        case(
            get(UPGRADE) + "GET /2 HTTP/1.1\r\nHost: a\r\n\r\n",
            Expected::Served(vec!["GET / a", "GET /2 a"]),
        ),
        served(post(&with_body, "hello"), "POST / a hello"),
        served(post(&chunked, "5\r\nhello\r\n0\r\n\r\n"), "POST / a hello"),
        noncompliant(get(&with_body) + "hello", "UndefinedContentLengthSemantics", "GET / a hello"),
        noncompliant(
            get(&chunked) + "5\r\nhello\r\n0\r\n\r\n",
            "UndefinedTransferEncodingSemantics",
            "GET / a hello",
        ),
        served(post(UPGRADE, ""), "POST / a"),
        served(
            get("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk"),
            "GET / a",
        ),
        served(get("Connection: Upgrade\r\nUpgrade: TLS/1.0"), "GET / a"),
        served(get("Connection: Upgrade\r\nUpgrade: h2c, websocket"), "GET / a"),
        served(get("Upgrade: websocket"), "GET / a"),
        served(get("Connection: Upgrade"), "GET / a"),
        // Accepted, although the client already sent bytes that could be a request.
        case(
            format!("GET /agreed HTTP/1.1\r\nHost: a\r\n{UPGRADE}\r\n\r\n{SMUGGLED}"),
            Expected::RefusedAfterForwarding("GET /agreed a", 400),
        ),
    ]
}

fn tunnels() -> Vec<Case> {
    let connect = |target: &str, headers: &str| {
        format!("CONNECT {target} HTTP/1.1\r\nHost: a\r\n{headers}\r\n")
    };
    let mut cases: Vec<Case> = [
        "/",
        "a",
        "*",
        "http://a:1/",
        "a:1/",
        "u@a:1",
        "a:x",
        "a:65536",
        ":1",
        "a:1:2",
        "a b:1",
        "[::1]",
        "a,b:1",
    ]
    .iter()
    .filter(|target| !target.contains(' '))
    .map(|target| refused(connect(target, ""), 400))
    .collect();
    cases.extend([
        refused(connect("a:1", "Content-Length: 5\r\n") + "hello", 400),
        refused(connect("a:1", "Transfer-Encoding: chunked\r\n") + "0\r\n\r\n", 400),
        refused(connect("a:1", "Content-Length: 0\r\n"), 400),
        noncompliant(connect("a b:1", ""), "SpaceInUri", ""),
        noncompliant(connect("a:1#b", ""), "AmbiguousUri", ""),
        // Accepted, although the client already sent bytes.
        case(
            connect("a:1", "") + SMUGGLED,
            Expected::RefusedAfterForwarding("CONNECT a:1 a:1", 400),
        ),
    ]);
    cases
}

/// Cases whose first response refuses a tunnel. The client may already have sent bytes for the tunnel, so nothing
/// after the CONNECT is parsed as a request (RFC 9931, which updates RFC 9112).
pub(crate) fn refused_tunnels() -> Vec<Case> {
    let connect = |target: &str| format!("CONNECT {target} HTTP/1.1\r\nHost: a\r\n\r\n{SMUGGLED}");
    vec![case(
        connect("declined:1"),
        Expected::RefusedAfterForwarding("CONNECT declined:1 declined:1", 403),
    )]
}

/// A CONNECT to a sidecar that serves no tunnels.
pub(crate) fn tunnel_where_connect_is_disabled() -> Case {
    refused(format!("CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n{SMUGGLED}"), 405)
}
