//! The first line: method, target, version, and what is between (RFC 9112, section 3).

use super::{Case, SMUGGLED, Wanted, case, departs, line, refused, served};

pub(super) fn cases() -> Vec<Case> {
    [methods(), versions(), targets(), absolute(), between()].concat()
}

fn methods() -> Vec<Case> {
    let bad = |method: &str| departs(line(&format!("{method} / HTTP/1.1")), "BadMethod", "");
    let mut cases: Vec<Case> = [
        "G@T",
        "GET\t",
        "\tGET",
        "GET,POST",
        "\"GET\"",
        "GET\0",
        "\0GET",
        "G\u{c9}T",
        "GET:",
        "GET;",
        "G(T",
        "GET\u{b}",
        "\u{feff}GET",
        "GET/",
        "GET\r",
        "{}",
        "[GET]",
    ]
    .into_iter()
    .map(bad)
    .collect();
    cases.extend([
        // A policy for GET does not cover it, and some services take it for GET.
        refused(line("get / HTTP/1.1"), 400),
        refused(line("Delete / HTTP/1.1"), 400),
        served(line("purge / HTTP/1.1"), "purge / a"),
        served(line("GETS / HTTP/1.1"), "GETS / a"),
        served(line("M-SEARCH / HTTP/1.1"), "M-SEARCH / a"),
        served(line("!#$%&'*+-.^_`|~ / HTTP/1.1"), "!#$%&'*+-.^_`|~ / a"),
        case(line("TRACE / HTTP/1.1"), Wanted::Declined(405)),
        // It is the first word of HTTP/2, whose preface this is not.
        case(line("PRI / HTTP/1.1"), Wanted::Closed),
    ]);
    cases
}

fn versions() -> Vec<Case> {
    let bad = |version: &str| departs(line(&format!("GET / {version}")), "BadVersion", "");
    let mut cases: Vec<Case> = [
        "HTTP/1",
        "HTTP/1.",
        "HTTP/.1",
        "HTTP/11",
        "HTTP/1.11",
        "HTTP/01.1",
        "HTTP/1.01",
        "HTTP/1,1",
        "HTTP/1.1.1",
        "HTTP/1.1x",
        "xHTTP/1.1",
        "http/1.1",
        "Http/1.1",
        "HTTP /1.1",
        "HTTP-1.1",
        "HTTPS/1.1",
        "HTP/1.1",
        "HTTP/1.\u{661}",
        "HTTP/1.1\0",
        "HTTP/1.1\t",
        "HTTP/1.1\r",
        "HTTP/-1.1",
        "HTTP/+1.1",
        "HTTP/1.+1",
        "HTTP/a.b",
        "1.1",
        "ICY",
        "RTSP/1.0\t",
        "HTTP\\1.1",
        "HTTP/1.1\u{a0}",
    ]
    .into_iter()
    .filter(|version| !version.contains(' '))
    .map(bad)
    .collect();
    cases.extend([
        refused(line("GET / HTTP/2.0"), 505),
        refused(line("GET / HTTP/3.0"), 505),
        refused(line("GET / HTTP/0.9"), 505),
        refused(line("GET / HTTP/0.0"), 505),
        refused(line("GET / HTTP/9.9"), 505),
        departs(line("GET / HTTP/1.2"), "NonCompliantVersion", "GET / a"),
        departs(line("GET / HTTP/1.9"), "NonCompliantVersion", "GET / a"),
        departs(line("GET /"), "BadVersion", ""),
        departs("GET /\r\n\r\n", "BadVersion", ""),
        departs("GET /\n", "BadVersion", ""),
    ]);
    cases
}

fn targets() -> Vec<Case> {
    let get = |target: &str| line(&format!("GET {target} HTTP/1.1"));
    let ambiguous = |target: &str| departs(get(target), "AmbiguousUri", "");
    let bad = |target: &str| departs(get(target), "BadUri", "");
    let spaced = |target: &str| departs(get(target), "SpaceInUri", "");
    let mut cases = Vec::new();
    cases.extend(
        [
            "/\u{e9}", "/a#b", "/#", "/\t", "/a\tb", "/\u{1}", "/\u{7f}", "/\u{b}", "/a?b#c",
            "/\u{85}",
        ]
        .map(ambiguous),
    );
    cases.extend(
        [
            "/\0",
            "/a\0b",
            "/\r",
            "/a\rb",
            "a",
            "a/b",
            "ftp://a/",
            "file:///etc",
            "a:80",
            "?x",
            "*",
            "@a/",
        ]
        .map(bad),
    );
    cases.extend(
        ["javascript:x", "http:/a/", "http:a", "htp://a/", "ws://a/", "\\a", "..", ".", "%2f", "&"]
            .map(bad),
    );
    cases.extend(
        ["/a b", "/ ", "/ HTTP/1.1", "/x HTTP/1.1 y", "/a  b", " /", "/ HTTP/1.1 /b"].map(spaced),
    );
    cases.extend([
        departs("GET  HTTP/1.1\r\nHost: a\r\n\r\n", "MissingUri", ""),
        departs("GET HTTP/1.1\r\nHost: a\r\n\r\n", "MissingUri", ""),
        departs("GET\r\nHost: a\r\n\r\n", "MissingUri", ""),
        departs("GET \r\nHost: a\r\n\r\n", "MissingUri", ""),
        departs("x\r\n\r\n", "MissingUri", ""),
        departs([b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n".as_slice()].concat(), "AmbiguousUri", ""),
        departs(
            [b"GET /\xc0\xaf HTTP/1.1\r\nHost: a\r\n\r\n".as_slice()].concat(),
            "AmbiguousUri",
            "",
        ),
        served(get("/a?b=/../c//d%00"), "GET /a?b=/../c//d%00 a"),
        served(get("/a%0d%0aX:y"), "GET /a%0D%0AX:y a"),
        served(get("/a%20HTTP/1.1"), "GET /a%20HTTP/1.1 a"),
        served(get("/a;b=c,d@e:f!$&'()*+"), "GET /a;b=c,d@e:f!$&'()*+ a"),
        refused(get(&format!("/{}", "x".repeat(16 * 1024))), 414),
        refused(format!("GET /{}", "x".repeat(70 * 1024)), 414),
        served(line("OPTIONS * HTTP/1.1"), "OPTIONS * a"),
        departs(line("POST * HTTP/1.1"), "BadUri", ""),
        departs(line("OPTIONS ** HTTP/1.1"), "BadUri", ""),
    ]);
    cases.extend(
        [
            "//a", "/a//b", "/../a", "/a/./b", "/a/..", "/a%2fb", "/a%5Cb", "/a\\b", "/%", "/%zz",
            "/a%00",
        ]
        .map(|target| refused(get(target), 400)),
    );
    cases
}

/// A first line that has more than it may have, and yet no end.
pub(crate) fn slow_to_end() -> Case {
    refused(format!("GET /{}", "x".repeat(17 * 1024)), 414)
}

/// The authority of an absolute target counts, not `host`, and both are one on the way on (RFC 9112,
/// section 3.2.2).
fn absolute() -> Vec<Case> {
    let get = |target: &str| line(&format!("GET {target} HTTP/1.1"));
    let mut cases: Vec<Case> = [
        "http://",
        "http:///",
        "http:///a",
        "http://:80/",
        "http://u@b/",
        "http://u:p@b/",
        "http://b:x/",
        "http://b:65536/",
        "http://b:1:2/",
        "http://b\\c/",
        "http://b,c/",
        "http://[::1/",
        "http://[x]/",
        "http://?x",
        "http://b%2fc/",
        "http://b@c@d/",
        "https://@b/",
    ]
    .iter()
    .map(|target| refused(get(target), 400))
    .collect();
    cases.extend([
        served(get("http://b/x"), "GET /x b"),
        served(get("http://b"), "GET / b"),
        served(get("http://b?x"), "GET /?x b"),
        served(get("HTTP://b:80/"), "GET / b:80"),
        served(get("https://b/"), "GET / b"),
        served(get("http://[::1]:80/"), "GET / [::1]:80"),
        served("GET http://b/ HTTP/1.1\r\nHost: u.example\r\n\r\n", "GET / b"),
        refused("GET http://b/ HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        refused("GET http://b/ HTTP/1.1\r\nHost: u@a\r\n\r\n", 400),
        departs(get("http://b/#c"), "AmbiguousUri", ""),
        departs(get("http://b/ c"), "SpaceInUri", ""),
        departs(get("http://b#c/"), "AmbiguousUri", ""),
        refused(get("http://b/../c"), 400),
        refused(get("http://b//c"), 400),
    ]);
    cases
}

/// What stands before, between and behind the parts.
fn between() -> Vec<Case> {
    vec![
        departs(line(" GET / HTTP/1.1"), "SpaceInUri", ""),
        departs(line("GET / HTTP/1.1 "), "SpaceInUri", ""),
        departs(line("GET\t/\tHTTP/1.1"), "MissingUri", ""),
        departs(line("GET\t/ HTTP/1.1"), "MissingUri", ""),
        departs(line("GET /\tHTTP/1.1"), "BadVersion", ""),
        departs(line("GET\u{b}/ HTTP/1.1"), "MissingUri", ""),
        departs(line("GET/ HTTP/1.1"), "MissingUri", ""),
        refused(format!("\r\n{}", line("GET / HTTP/1.1")), 400),
        refused(format!("\n{}", line("GET / HTTP/1.1")), 400),
        refused(format!("\r\n\r\n{SMUGGLED}"), 400),
        departs(format!("\r{}", line("GET / HTTP/1.1")), "BadMethod", ""),
        departs(format!("\r\r\n{}", line("GET / HTTP/1.1")), "MissingUri", ""),
        departs(b"\x16\x03\x01\x00\x05hello\r\n\r\n".as_slice(), "MissingUri", ""),
        departs("SSH-2.0-x\r\n", "MissingUri", ""),
        departs("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "BadMethod", ""),
        case("PRI * HTTP/1.1\r\nHost: a\r\n\r\n", Wanted::Closed),
    ]
}
