//! Fields: their names, values and ends of lines, and `host` (RFC 9112, sections 2.2, 3.2 and 5).

use super::{Case, SMUGGLED, Wanted, case, departs, get, refused, served};

pub(super) fn cases() -> Vec<Case> {
    [names(), values(), line_ends(), hosts(), sizes()].concat()
}

fn names() -> Vec<Case> {
    let bad = |fields: &str| departs(get(fields), "BadHeader", "");
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
        departs(get(": y"), "EmptyHeader", ""),
        departs(get(":"), "EmptyHeader", ""),
        departs(get(":authority: b"), "EmptyHeader", ""),
        departs(get("X"), "MissingHeaderColon", ""),
        departs(get("X y"), "MissingHeaderColon", ""),
        departs(get("X\r\nY: z"), "MissingHeaderColon", ""),
        departs(get("GET /smuggled HTTP/1.1"), "MissingHeaderColon", ""),
        departs(get(" X: y"), "MultilineHeader", ""),
        departs(get("X: y\r\n z"), "MultilineHeader", ""),
        departs(get("X: y\r\n\tz"), "MultilineHeader", ""),
        departs(get("X: y\r\n : z"), "MultilineHeader", ""),
        departs(get("X: y\r\n Host: b"), "MultilineHeader", ""),
        departs("GET / HTTP/1.1\r\n Host: a\r\n\r\n", "MultilineHeader", ""),
        departs("GET / HTTP/1.1\r\n X: y\r\nHost: a\r\n\r\n", "MultilineHeader", ""),
        served(get("X!#$%&'*+-.^`|~0: y"), "GET / a"),
        served(get("X_Y: z"), "GET / a"),
        served(get("X:y"), "GET / a"),
        served(get("X:"), "GET / a"),
        served(get("X: \t "), "GET / a"),
    ]);
    cases
}

fn values() -> Vec<Case> {
    let bad = |value: &str| departs(get(&format!("X: {value}")), "BadHeader", "");
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
        departs(request, "NonCompliantHeader", "GET / a")
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

/// A lone line feed ends a line for some, a lone carriage return for few.
fn line_ends() -> Vec<Case> {
    let lone = |bytes: &str, told: &'static str| departs(bytes, "NonCrLfLineTermination", told);
    vec![
        lone("GET / HTTP/1.1\nHost: a\n\n", "GET / a"),
        lone("GET / HTTP/1.1\nHost: a\r\n\r\n", "GET / a"),
        lone("GET / HTTP/1.1\r\nHost: a\n\r\n", "GET / a"),
        lone("GET / HTTP/1.1\r\nHost: a\r\n\n", "GET / a"),
        lone("GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n", "GET / a"),
        lone("POST / HTTP/1.1\r\nHost: a\nContent-Length: 5\n\nhello", "POST / a hello"),
        lone(&format!("GET / HTTP/1.1\r\nHost: a\n\n{SMUGGLED}"), "GET / a"),
        departs("GET / HTTP/1.1\r\nHost: a\nX\r\n\r\n", "MissingHeaderColon", ""),
        departs("GET / HTTP/1.1\r\nHost: a\n X: y\r\n\r\n", "MultilineHeader", ""),
        departs("GET / HTTP/1.1\r\nHost: a\rX: y\r\n\r\n", "BadHeader", ""),
        departs("GET / HTTP/1.1\r\nHost: a\r\r\n\r\n", "BadHeader", ""),
        departs("GET / HTTP/1.1\r\nHost: a\r\n\rX: y\r\n\r\n", "BadHeader", ""),
        departs("GET / HTTP/1.1\rHost: a\r\n\r\n", "SpaceInUri", ""),
        Case { ends: true, ..departs("GET / HTTP/1.1\r\nHost: a\r\n", "MissingLastEmptyLine", "") },
        Case {
            ends: true,
            ..departs(
                "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n",
                "MissingLastEmptyLine",
                "",
            )
        },
        Case {
            ends: true,
            ..departs("GET / HTTP/1.1\r\nHost: a\r\nX: y", "PartialHeaderLine", "")
        },
        Case { ends: true, ..departs("GET / HTTP/1.1\r\nHost: a\r\n\r", "PartialHeaderLine", "") },
        Case { ends: true, ..departs("GET /", "PartialHeaderLine", "") },
    ]
}

fn hosts() -> Vec<Case> {
    let host = |field: &str| format!("GET / HTTP/1.1\r\n{field}\r\n\r\n");
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
    // A port that is not there is no port to some (RFC 3986, section 3.2.3), and is read alike by all.
    .filter(|field| **field != "Host: a:")
    .map(|field| refused(host(field), 400))
    .collect();
    cases.extend([
        departs(host("Host : a"), "BadHeader", ""),
        departs(host("Host: a\0"), "BadHeader", ""),
        departs(host("Host\0: a"), "BadHeader", ""),
        departs(host("Host a"), "MissingHeaderColon", ""),
        departs(host("Host: a\r\n b"), "MultilineHeader", ""),
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
        case(get(&format!("Host: {}", long(1025))), Wanted::Refused(Vec::new(), 400)),
    ]
}
