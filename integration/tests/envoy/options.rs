//! What the options of a connection manager mean.

use serde_json::{Value, json};

use crate::peers::{Case, Wanted, case, compare, get, serving, told};

fn options() -> Vec<(&'static str, Value)> {
    let slashes = |action: &str| {
        serving(json!({"normalize_path": true, "path_with_escaped_slashes_action": action}))
    };
    let common = |field: &str, value: Value| {
        serving(json!({"common_http_protocol_options": {field: value}}))
    };
    vec![
        ("bare", serving(json!({"path_with_escaped_slashes_action": "KEEP_UNCHANGED"}))),
        ("normal", serving(json!({"normalize_path": true}))),
        ("merged", serving(json!({"merge_slashes": true}))),
        ("both", serving(json!({"normalize_path": true, "merge_slashes": true}))),
        ("reject", slashes("REJECT_REQUEST")),
        ("keep", slashes("KEEP_UNCHANGED")),
        ("unescape", slashes("UNESCAPE_AND_FORWARD")),
        ("any port", serving(json!({"strip_any_host_port": true}))),
        ("own port", serving(json!({"strip_matching_host_port": true}))),
        ("edge", serving(json!({"use_remote_address": true}))),
        ("skip", serving(json!({"use_remote_address": true, "skip_xff_append": true}))),
        ("inner", serving(json!({}))),
        ("underscores", common("headers_with_underscores_action", json!("REJECT_REQUEST"))),
        ("count", common("max_headers_count", json!(10))),
        ("once", common("max_requests_per_connection", json!(1))),
        ("twice", common("max_requests_per_connection", json!(2))),
        ("kilobyte", serving(json!({"max_request_headers_kb": 1}))),
    ]
}

fn paths() -> Vec<Case> {
    let mut cases = Vec::new();
    for listener in ["bare", "normal", "merged", "both", "reject", "keep", "unescape"] {
        for target in [
            "/a/b",
            "/a/./b",
            "/a/../b",
            "/a/..",
            "/a/.",
            "/..",
            "/a//b",
            "//a",
            "/a//",
            "/%61",
            "/%2e%2e/a",
            "/a/%2E%2e/b",
            "/a%2fb",
            "/a%2Fb",
            "/a%5cb",
            "/a%2f..%2fb",
            "/a\\b",
            "/a%20b",
            "/%c3%a9",
            "/%",
            "/%zz",
            "/%00",
            "/a;x/b",
            "/a/..;/b",
            "/a?b=/../c//d%2fe",
            "/A/b",
        ] {
            // Slashes are a matter of the last three alone.
            if matches!(listener, "bare" | "normal" | "merged" | "both")
                || target.contains('%')
                || target.contains('\\')
            {
                cases.push(get(listener, target));
            }
        }
    }
    cases
}

fn hosts_and_addresses() -> Vec<Case> {
    let mut cases = Vec::new();
    for listener in ["any port", "own port", "inner"] {
        for host in [
            "a.example",
            "a.example:80",
            "a.example:443",
            "a.example:8443",
            "[::1]:80",
            "[::1]",
            "A.Example:80",
            "127.0.0.1:80",
        ] {
            cases.push(told(listener, &format!("host: {host}")));
        }
    }
    for listener in ["edge", "skip", "inner"] {
        for lines in [
            "",
            "x-forwarded-for: 10.0.0.1\r\n",
            "x-forwarded-for: 10.0.0.1, ::1\r\nx-forwarded-for: 10.0.0.2\r\n",
            "x-forwarded-for: nonsense\r\n",
            "x-forwarded-for:\r\n",
        ] {
            cases.push(told(listener, &format!("{lines}host: a.example")));
        }
    }
    let many = ["10.0.0.1"; 31].join(", ");
    for listener in ["edge", "inner"] {
        let bytes = format!("GET / HTTP/1.1\r\nhost: a.example\r\nx-forwarded-for: {many}\r\n\r\n");
        cases.push(case(listener, &format!("{listener} 31 addresses"), bytes));
    }
    cases
}

fn limits() -> Vec<Case> {
    let fields = |count: usize| (1..count).map(|n| format!("x-{n}: 1\r\n")).collect::<String>();
    let mut cases = vec![
        told("underscores", "host: a.example\r\nx_a: 1"),
        told("underscores", "host: a.example\r\nx-a: a_b"),
        told("inner", "host: a.example\r\nx_a: 1"),
        get("once", "/"),
        get("twice", "/"),
        get("inner", "/"),
    ];
    for count in [9, 10, 11, 12] {
        let bytes = format!("GET / HTTP/1.1\r\n{}host: a.example\r\n\r\n", fields(count));
        cases.push(case("count", &format!("{count} of 10 fields"), bytes));
    }
    for bytes in [900, 1200] {
        let long = "x".repeat(bytes);
        let request = format!("GET / HTTP/1.1\r\nhost: a.example\r\nx: {long}\r\n\r\n");
        cases.push(case("kilobyte", &format!("{bytes} of 1024 bytes"), request));
    }
    cases
}

#[test]
fn options_mean_what_they_mean_to_envoy() {
    let cases = [paths(), hosts_and_addresses(), limits()].concat();
    compare(&options(), &cases, OPTIONS, true);
}

const OPTIONS: &[Wanted] = &[
    (
        "bare /a\\b | normal /a\\b | merged /a\\b | both /a\\b | reject /a\\b | keep /a\\b | \
        unescape /a\\b",
        "200 / refused 400",
        "some take a backslash for a slash",
    ),
    (
        "bare /% | bare /%zz | bare /%00 | normal /% | normal /%zz | merged /% | merged /%zz | \
        merged /%00 | both /% | both /%zz | reject /% | reject /%zz | keep /% | keep /%zz | \
        unescape /% | unescape /%zz",
        "200 / refused 400",
        "it is no escape, or one that ends the path for some",
    ),
    (
        "bare /a/..;/b | normal /a/..;/b | merged /a/..;/b | both /a/..;/b",
        "200 / refused 400",
        "servlet containers cut parameters off before they look for dots",
    ),
    (
        "normal /a//b | normal //a | normal /a//",
        "200 / refused 400",
        "nothing says that slashes are merged, and some do",
    ),
    (
        "normal /.. | normal /%2e%2e/a | both /.. | both /%2e%2e/a | reject /%2e%2e/a | \
        keep /%2e%2e/a | unescape /%2e%2e/a",
        "200 / refused 400",
        "it leads above the root",
    ),
    (
        "normal /a%2fb | normal /a%2Fb | normal /a%5cb | normal /a%2f..%2fb | merged /a%2fb | \
        merged /a%2Fb | merged /a%5cb | merged /a%2f..%2fb | both /a%2fb | both /a%2Fb | \
        both /a%5cb | both /a%2f..%2fb | unescape /a%5cb",
        "200 / refused 400",
        "encoded slashes are refused unless something else is said",
    ),
    (
        "bare /a/./b | bare /a/../b | bare /a/.. | bare /a/. | bare /.. | bare /a//b | bare //a \
        | bare /a// | bare /%61 | bare /%2e%2e/a | bare /a/%2E%2e/b | merged /a/./b | \
        merged /a/../b | merged /a/.. | merged /a/. | merged /.. | merged /%61 | \
        merged /%2e%2e/a | merged /a/%2E%2e/b",
        "200 / refused 400",
        "the path has a second form, and nothing says that it is brought into that",
    ),
    (
        "bare /a%2fb | keep /a%2fb",
        "service -GET /a%2fb HTTP/1.1; service +GET /a%2Fb HTTP/1.1",
        "escapes are in upper case (RFC 3986, section 6.2.2.1)",
    ),
    (
        "bare /a%5cb | keep /a%5cb",
        "service -GET /a%5cb HTTP/1.1; service +GET /a%5Cb HTTP/1.1",
        "escapes are in upper case (RFC 3986, section 6.2.2.1)",
    ),
    (
        "bare /a%2f..%2fb | keep /a%2f..%2fb",
        "service -GET /a%2f..%2fb HTTP/1.1; service +GET /a%2F..%2Fb HTTP/1.1",
        "escapes are in upper case (RFC 3986, section 6.2.2.1)",
    ),
    (
        "bare /%c3%a9 | normal /%c3%a9 | merged /%c3%a9 | both /%c3%a9 | reject /%c3%a9 | keep \
        /%c3%a9 | unescape /%c3%a9",
        "service -GET /%c3%a9 HTTP/1.1; service +GET /%C3%A9 HTTP/1.1",
        "escapes are in upper case (RFC 3986, section 6.2.2.1)",
    ),
    (
        "edge x-forwarded-for: 10.0.0.1 + host: a.example",
        "service -x-forwarded-for: 10.0.0.1,127.0.0.1; service +x-forwarded-for: 10.0.0.1, \
        127.0.0.1",
        "the same list",
    ),
    (
        "edge x-forwarded-for: nonsense + host: a.example",
        "service -x-forwarded-for: nonsense,127.0.0.1; service +x-forwarded-for: nonsense, \
        127.0.0.1",
        "the same list",
    ),
    (
        "edge x-forwarded-for: 10.0.0.1, ::1 + x-forwarded-for: 10.0.0.2 + host: a.example",
        "service -x-forwarded-for: 10.0.0.1, ::1,10.0.0.2,127.0.0.1; service +x-forwarded-for: \
        10.0.0.1, ::1, 10.0.0.2, 127.0.0.1",
        "the same list",
    ),
    (
        "skip x-forwarded-for: 10.0.0.1, ::1 + x-forwarded-for: 10.0.0.2 + host: a.example | \
        inner x-forwarded-for: 10.0.0.1, ::1 + x-forwarded-for: 10.0.0.2 + host: a.example",
        "service -x-forwarded-for: 10.0.0.1, ::1,10.0.0.2; service +x-forwarded-for: 10.0.0.1, \
        ::1; service +x-forwarded-for: 10.0.0.2",
        "the same list",
    ),
    (
        "edge 31 addresses | inner 31 addresses",
        "200 / refused 463",
        "a chain of forwarders ends somewhere",
    ),
    (
        "inner host: a.example + x_a: 1",
        "service -x_a: 1",
        "services of CGI take it for another name; dropped by default",
    ),
];
