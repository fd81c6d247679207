//! Headers: names, values, line ends, sizes, and `host` (RFC 9112, sections 2.2, 3.2 and 5).

use super::{Case, Expected, SMUGGLED, case, get, noncompliant, refused, served};

pub(super) fn cases() -> Vec<Case> {
    [names(), values(), line_ends(), hosts(), sizes()].concat()
}

fn names() -> Vec<Case> {
    let bad = |headers: &str| noncompliant(get(headers), "BadHeader", "");
    let mut cases: Vec<Case> = [
        "X : y",
        "X\t: y",
        "X Y: z",
        "X\u{b}: y",
        "X\0: y",
        "X(: y",
        "X): y",
        "X,: y",
        "X/: y",
        "X;: y",
        "X<: y",
        "X=: y",
        "X>: y",
        "X?: y",
        "X@: y",
        "X[: y",
        "X\\: y",
        "X]: y",
        "X{: y",
        "X}: y",
        "\"X\": y",
        "X\u{7f}: y",
        "\u{e9}: y",
        "X\u{1}: y",
        "X\r: y",
    ]
    .into_iter()
    .map(bad)
    .collect();
    cases.extend([
        noncompliant(get(": y"), "EmptyHeader", ""),
        noncompliant(get(":"), "EmptyHeader", ""),
        noncompliant(get(":authority: b"), "EmptyHeader", ""),
        noncompliant(get("X"), "MissingHeaderColon", ""),
        noncompliant(get("X y"), "MissingHeaderColon", ""),
        noncompliant(get("X\r\nY: z"), "MissingHeaderColon", ""),
        noncompliant(get("GET /smuggled HTTP/1.1"), "MissingHeaderColon", ""),
        noncompliant(get(" X: y"), "MultilineHeader", ""),
        noncompliant(get("X: y\r\n z"), "MultilineHeader", ""),
        noncompliant(get("X: y\r\n\tz"), "MultilineHeader", ""),
        noncompliant(get("X: y\r\n : z"), "MultilineHeader", ""),
        noncompliant(get("X: y\r\n Host: b"), "MultilineHeader", ""),
        noncompliant("GET / HTTP/1.1\r\n Host: a\r\n\r\n", "MultilineHeader", ""),
        noncompliant("GET / HTTP/1.1\r\n X: y\r\nHost: a\r\n\r\n", "MultilineHeader", ""),
        served(get("X!#$%&'*+-.^`|~0: y"), "GET / a"),
        served(get("X_Y: z"), "GET / a"),
        served(get("X:y"), "GET / a"),
        served(get("X:"), "GET / a"),
        served(get("X: \t "), "GET / a"),
    ]);
    cases
}

fn values() -> Vec<Case> {
    let bad = |value: &str| noncompliant(get(&format!("X: {value}")), "BadHeader", "");
    let mut cases: Vec<Case> = [
        "y\0",
        "\0",
        "y\u{1}",
        "y\u{8}z",
        "y\u{b}",
        "y\u{c}",
        "y\u{1b}[m",
        "y\u{7f}",
        "y\rz",
        "y\r",
    ]
    .into_iter()
    .map(bad)
    .collect();
    let beyond = |bytes: &[u8]| {
        let request = [b"GET / HTTP/1.1\r\nHost: a\r\nX: ", bytes, b"\r\n\r\n"].concat();
        noncompliant(request, "NonCompliantHeader", "GET / a")
    };
    cases.extend([
        beyond("\u{e9}".as_bytes()),
        beyond("\u{560a}\u{560d}Content-Length: 5".as_bytes()),
        beyond(&[0x80]),
        beyond(&[0xff, 0xfe]),
        beyond(&[0xc0, 0x8a]),
        served(get("X: y\tz"), "GET / a"),
        served(get("X: %0d%0aContent-Length: 5"), "GET / a"),
        served(get("X: \\r\\nContent-Length: 5"), "GET / a"),
    ]);
    cases
}

/// Some parsers accept a bare line feed as a line end, few a bare carriage return.
fn line_ends() -> Vec<Case> {
    let bare_lf = |bytes: &str, received: &'static str| {
        noncompliant(bytes, "NonCrLfLineTermination", received)
    };
    vec![
        bare_lf("GET / HTTP/1.1\nHost: a\n\n", "GET / a"),
        bare_lf("GET / HTTP/1.1\nHost: a\r\n\r\n", "GET / a"),
        bare_lf("GET / HTTP/1.1\r\nHost: a\n\r\n", "GET / a"),
        bare_lf("GET / HTTP/1.1\r\nHost: a\r\n\n", "GET / a"),
        bare_lf("GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n", "GET / a"),
        bare_lf("POST / HTTP/1.1\r\nHost: a\nContent-Length: 5\n\nhello", "POST / a hello"),
        bare_lf(&format!("GET / HTTP/1.1\r\nHost: a\n\n{SMUGGLED}"), "GET / a"),
        noncompliant("GET / HTTP/1.1\r\nHost: a\nX\r\n\r\n", "MissingHeaderColon", ""),
        noncompliant("GET / HTTP/1.1\r\nHost: a\n X: y\r\n\r\n", "MultilineHeader", ""),
        noncompliant("GET / HTTP/1.1\r\nHost: a\rX: y\r\n\r\n", "BadHeader", ""),
        noncompliant("GET / HTTP/1.1\r\nHost: a\r\r\n\r\n", "BadHeader", ""),
        noncompliant("GET / HTTP/1.1\r\nHost: a\r\n\rX: y\r\n\r\n", "BadHeader", ""),
        noncompliant("GET / HTTP/1.1\rHost: a\r\n\r\n", "SpaceInUri", ""),
        Case {
            closes: true,
            ..noncompliant("GET / HTTP/1.1\r\nHost: a\r\n", "MissingLastEmptyLine", "")
        },
        Case {
            closes: true,
            ..noncompliant(
                "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n",
                "MissingLastEmptyLine",
                "",
            )
        },
        Case {
            closes: true,
            ..noncompliant("GET / HTTP/1.1\r\nHost: a\r\nX: y", "PartialHeaderLine", "")
        },
        Case {
            closes: true,
            ..noncompliant("GET / HTTP/1.1\r\nHost: a\r\n\r", "PartialHeaderLine", "")
        },
        Case { closes: true, ..noncompliant("GET /", "PartialHeaderLine", "") },
    ]
}

fn hosts() -> Vec<Case> {
    let host = |line: &str| format!("GET / HTTP/1.1\r\n{line}\r\n\r\n");
    let mut cases: Vec<Case> = [
        "X: y",
        "Host: a\r\nHost: a",
        "Host: a\r\nHost: b",
        "Host: a\r\nhost: a",
        "Host: a\r\nX: y\r\nHOST: b",
        "Host: a\r\nHost:",
        "Host:\r\nHost: a",
        "Host:",
        "Host: ",
        "Host: a b",
        "Host: a, b",
        "Host: a,b",
        "Host: a/",
        "Host: a/b",
        "Host: a?b",
        "Host: a#b",
        "Host: a\\b",
        "Host: u@a",
        "Host: u:p@a",
        "Host: @a",
        "Host: http://a",
        "Host: //a",
        "Host: a:",
        "Host: a:b",
        "Host: a:1:2",
        "Host: a:-1",
        "Host: a:+80",
        "Host: a:65536",
        "Host: a:80 ,b",
        "Host: :80",
        "Host: [::1",
        "Host: ::1",
        "Host: [::1]b",
        "Host: [a]",
        "Host: []",
        "Host: [::1%25eth0]",
        "Host: a\tb",
        "Host: a%00b",
        "Host: a%2fb",
        "Host: \"a\"",
        "Host: <a>",
        "Host: a\u{e9}",
        "Host: a^b",
        "Host: a|b",
    ]
    .iter()
    // An empty port is allowed (RFC 3986, section 3.2.3), and all parsers read it the same way.
    .filter(|line| **line != "Host: a:")
    .map(|line| refused(host(line), 400))
    .collect();
    cases.extend([
        noncompliant(host("Host : a"), "BadHeader", ""),
        noncompliant(host("Host: a\0"), "BadHeader", ""),
        noncompliant(host("Host\0: a"), "BadHeader", ""),
        noncompliant(host("Host a"), "MissingHeaderColon", ""),
        noncompliant(host("Host: a\r\n b"), "MultilineHeader", ""),
        served(host("hOsT:a"), "GET / a"),
        served(host("Host: \ta\t"), "GET / a"),
        served(host("Host: a:80"), "GET / a:80"),
        served(host("Host: A.Example:8080"), "GET / A.Example:8080"),
        served(host("Host: [::1]:80"), "GET / [::1]:80"),
        served(host("Host: 127.0.0.1"), "GET / 127.0.0.1"),
        served(host("Host: a\r\nX-Host: b"), "GET / a"),
        served(host("Host: a\r\nHost_: b"), "GET / a"),
        served(host("Host: a\r\nX-Forwarded-Host: b"), "GET / a"),
    ]);
    cases
}

fn sizes() -> Vec<Case> {
    let long = |bytes: usize| "y".repeat(bytes);
    vec![
        served(get(&format!("X: {}", long(16_000))), "GET / a"),
        refused(get(&format!("X: {}", long(16 * 1024))), 431),
        refused(get(&format!("{}: y", long(16 * 1024))), 431),
        served(get(&format!("{}X: y", "X: y\r\n".repeat(98))), "GET / a"),
        refused(get(&format!("{}X: y", "X: y\r\n".repeat(99))), 431),
        refused(get(&format!("X: {}", long(70_000))), 431),
        refused(get(&format!("{}X: y", format!("X: {}\r\n", long(15_000)).repeat(5))), 431),
        refused(get(&long(70_000)), 431),
        case(get(&format!("Host: {}", long(1025))), Expected::Refused(Vec::new(), 400)),
    ]
}
