//! Request lines: method, target, version, and the separators (RFC 9112, section 3).

use super::{Case, Expected, SMUGGLED, case, line, noncompliant, refused, served};

pub(super) fn cases() -> Vec<Case> {
    [methods(), versions(), targets(), absolute(), separators()].concat()
}

fn methods() -> Vec<Case> {
    let bad = |method: &str| noncompliant(line(&format!("{method} / HTTP/1.1")), "BadMethod", "");
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
        // A policy for GET does not cover this method, and some services treat it as GET.
        refused(line("get / HTTP/1.1"), 400),
        refused(line("Delete / HTTP/1.1"), 400),
        served(line("purge / HTTP/1.1"), "purge / a"),
        served(line("GETS / HTTP/1.1"), "GETS / a"),
        served(line("M-SEARCH / HTTP/1.1"), "M-SEARCH / a"),
        served(line("!#$%&'*+-.^_`|~ / HTTP/1.1"), "!#$%&'*+-.^_`|~ / a"),
        case(line("TRACE / HTTP/1.1"), Expected::Declined(405)),
        // `PRI` begins the HTTP/2 preface, which this is not.
        case(line("PRI / HTTP/1.1"), Expected::Closed),
    ]);
    cases
}

fn versions() -> Vec<Case> {
    let bad = |version: &str| noncompliant(line(&format!("GET / {version}")), "BadVersion", "");
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
        noncompliant(line("GET / HTTP/1.2"), "NonCompliantVersion", "GET / a"),
        noncompliant(line("GET / HTTP/1.9"), "NonCompliantVersion", "GET / a"),
        noncompliant(line("GET /"), "BadVersion", ""),
        noncompliant("GET /\r\n\r\n", "BadVersion", ""),
        noncompliant("GET /\n", "BadVersion", ""),
    ]);
    cases
}

fn targets() -> Vec<Case> {
    let get = |target: &str| line(&format!("GET {target} HTTP/1.1"));
    let ambiguous = |target: &str| noncompliant(get(target), "AmbiguousUri", "");
    let bad = |target: &str| noncompliant(get(target), "BadUri", "");
    let spaced = |target: &str| noncompliant(get(target), "SpaceInUri", "");
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
        noncompliant("GET  HTTP/1.1\r\nHost: a\r\n\r\n", "MissingUri", ""),
        noncompliant("GET HTTP/1.1\r\nHost: a\r\n\r\n", "MissingUri", ""),
        noncompliant("GET\r\nHost: a\r\n\r\n", "MissingUri", ""),
        noncompliant("GET \r\nHost: a\r\n\r\n", "MissingUri", ""),
        noncompliant("x\r\n\r\n", "MissingUri", ""),
        noncompliant(
            [b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n".as_slice()].concat(),
            "AmbiguousUri",
            "",
        ),
        noncompliant(
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
        noncompliant(line("POST * HTTP/1.1"), "BadUri", ""),
        noncompliant(line("OPTIONS ** HTTP/1.1"), "BadUri", ""),
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

/// A request line that exceeds the limit without an end.
pub(crate) fn endless_request_line() -> Case {
    refused(format!("GET /{}", "x".repeat(17 * 1024)), 414)
}

/// The authority of an absolute target takes precedence over `host`, and replaces it in the forwarded request (RFC
/// 9112, section 3.2.2).
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
        noncompliant(get("http://b/#c"), "AmbiguousUri", ""),
        noncompliant(get("http://b/ c"), "SpaceInUri", ""),
        noncompliant(get("http://b#c/"), "AmbiguousUri", ""),
        refused(get("http://b/../c"), 400),
        refused(get("http://b//c"), 400),
    ]);
    cases
}

/// Bytes before, between and after the parts of the request line.
fn separators() -> Vec<Case> {
    vec![
        noncompliant(line(" GET / HTTP/1.1"), "SpaceInUri", ""),
        noncompliant(line("GET / HTTP/1.1 "), "SpaceInUri", ""),
        noncompliant(line("GET\t/\tHTTP/1.1"), "MissingUri", ""),
        noncompliant(line("GET\t/ HTTP/1.1"), "MissingUri", ""),
        noncompliant(line("GET /\tHTTP/1.1"), "BadVersion", ""),
        noncompliant(line("GET\u{b}/ HTTP/1.1"), "MissingUri", ""),
        noncompliant(line("GET/ HTTP/1.1"), "MissingUri", ""),
        refused(format!("\r\n{}", line("GET / HTTP/1.1")), 400),
        refused(format!("\n{}", line("GET / HTTP/1.1")), 400),
        refused(format!("\r\n\r\n{SMUGGLED}"), 400),
        noncompliant(format!("\r{}", line("GET / HTTP/1.1")), "BadMethod", ""),
        noncompliant(format!("\r\r\n{}", line("GET / HTTP/1.1")), "MissingUri", ""),
        noncompliant(b"\x16\x03\x01\x00\x05hello\r\n\r\n".as_slice(), "MissingUri", ""),
        noncompliant("SSH-2.0-x\r\n", "MissingUri", ""),
        noncompliant("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "BadMethod", ""),
        case("PRI * HTTP/1.1\r\nHost: a\r\n\r\n", Expected::Closed),
    ]
}
