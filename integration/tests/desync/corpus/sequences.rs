//! Requests behind requests, and what a request asks of its connection: persistence, expectations,
//! upgrades and tunnels (RFC 9110, sections 7.6, 7.8, 9.3.6 and 10.1.1; RFC 9112, section 9).

use super::{Case, SMUGGLED, Wanted, case, departs, get, line, post, refused, served};

pub(super) fn cases() -> Vec<Case> {
    [pipelines(), behind_refused(), persistence(), old(), expectations(), upgrades(), tunnels()]
        .concat()
}

fn pipelines() -> Vec<Case> {
    let one = |target: &str| format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n");
    let length = post("Content-Length: 5", "hello");
    let chunked = post("Transfer-Encoding: chunked", "5\r\nhello\r\n0\r\n\r\n");
    let all = |told: &[&'static str]| Wanted::Served(told.to_vec());
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
        // Who does not see the body finds a request in it.
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
        // An empty line behind a body is not taken for the start of a request.
        case(
            post("Content-Length: 5", "hello\r\n") + &one("/2"),
            Wanted::Refused(vec!["POST / a hello"], 400),
        ),
        case(
            post("Content-Length: 5", "hellox") + &one("/2"),
            all(&["POST / a hello", "xGET /2 a"]),
        ),
    ]
}

/// Whoever was refused may mean something else by what follows than we do.
fn behind_refused() -> Vec<Case> {
    let with = |fields: &str| post(fields, SMUGGLED);
    vec![
        refused(format!("{}{SMUGGLED}", line("GET / HTTP/2.0")), 505),
        refused(format!("GET / HTTP/1.1\r\n\r\n{SMUGGLED}"), 400),
        refused(with("Transfer-Encoding: gzip"), 501),
        refused(format!("{}{SMUGGLED}", line("GET /../x HTTP/1.1")), 400),
        departs(with("Content-Length: x"), "BadContentLength", ""),
        departs(with("X"), "MissingHeaderColon", ""),
        departs(with("X: y\r\n z"), "MultilineHeader", ""),
        departs(format!("{}{SMUGGLED}", line("GET /# HTTP/1.1")), "AmbiguousUri", ""),
        case(
            format!("{}{}{SMUGGLED}", line("GET /1 HTTP/1.1"), line("GET / HTTP/2.0")),
            Wanted::Refused(vec!["GET /1 a"], 505),
        ),
        case(
            post("Transfer-Encoding: chunked", &format!("x\r\n{SMUGGLED}")),
            Wanted::Refused(Vec::new(), 400),
        ),
        // What is let through on its own ends the connection: nothing behind it is a request.
        departs(
            get("Content-Length: 5\r\nTransfer-Encoding: chunked") + "0\r\n\r\n" + SMUGGLED,
            "BothTeClPresent",
            "GET / a",
        ),
        // A refusal with a body that was not taken in.
        case(
            format!(
                "TRACE / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{SMUGGLED}",
                SMUGGLED.len()
            ),
            Wanted::Refused(Vec::new(), 405),
        ),
    ]
}

fn persistence() -> Vec<Case> {
    let last =
        |fields: &str| case(format!("{}{SMUGGLED}", get(fields)), Wanted::Last(vec!["GET / a"]));
    let stays = |fields: &str| served(get(fields), "GET / a");
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
        // What frames and routes a message is no field of a connection, whoever says so.
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

/// HTTP/1.0, which has neither `host` nor chunks.
fn old() -> Vec<Case> {
    let last = |bytes: &str, told: &'static str| {
        case(format!("{bytes}{SMUGGLED}"), Wanted::Last(vec![told]))
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
        departs("POST / HTTP/1.0\r\nHost: a\r\nContent-Length: x\r\n\r\n", "BadContentLength", ""),
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
        departs(
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

/// The service does not take the upgrade, so what comes behind it is HTTP.
fn upgrades() -> Vec<Case> {
    let with_body = format!("{UPGRADE}\r\nContent-Length: 5");
    let chunked = format!("{UPGRADE}\r\nTransfer-Encoding: chunked");
    vec![
        served(get(UPGRADE), "GET / a"),
        case(
            get(UPGRADE) + "GET /2 HTTP/1.1\r\nHost: a\r\n\r\n",
            Wanted::Served(vec!["GET / a", "GET /2 a"]),
        ),
        served(post(&with_body, "hello"), "POST / a hello"),
        served(post(&chunked, "5\r\nhello\r\n0\r\n\r\n"), "POST / a hello"),
        departs(get(&with_body) + "hello", "UndefinedContentLengthSemantics", "GET / a hello"),
        departs(
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
        // Agreed to, with bytes that came before: they could as well be a request.
        case(
            format!("GET /agreed HTTP/1.1\r\nHost: a\r\n{UPGRADE}\r\n\r\n{SMUGGLED}"),
            Wanted::RefusedBehind("GET /agreed a", 400),
        ),
    ]
}

fn tunnels() -> Vec<Case> {
    let connect = |target: &str, fields: &str| {
        format!("CONNECT {target} HTTP/1.1\r\nHost: a\r\n{fields}\r\n")
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
        departs(connect("a b:1", ""), "SpaceInUri", ""),
        departs(connect("a:1#b", ""), "AmbiguousUri", ""),
        // Agreed to, with bytes that came before.
        case(connect("a:1", "") + SMUGGLED, Wanted::RefusedBehind("CONNECT a:1 a:1", 400)),
    ]);
    cases
}

/// Cases whose first answer turns a tunnel down. Who sends it may have sent bytes for the tunnel
/// already, so nothing behind it is a request (RFC 9931, which updates RFC 9112).
pub(crate) fn tunnels_turned_down() -> Vec<Case> {
    let connect = |target: &str| format!("CONNECT {target} HTTP/1.1\r\nHost: a\r\n\r\n{SMUGGLED}");
    vec![case(connect("declined:1"), Wanted::RefusedBehind("CONNECT declined:1 declined:1", 403))]
}

/// The same where no tunnel is ever served.
pub(crate) fn tunnel_where_none_is_served() -> Case {
    refused(format!("CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n{SMUGGLED}"), 405)
}
