//! Options of the HTTP connection manager, compared with Envoy.

use serde_json::{Value, json};

use crate::comparison::{Case, Difference, case, compare, get, get_with_headers, serving};

fn options() -> Vec<(&'static str, Value)> {
    let slashes = |action: &str| {
        serving(json!({"normalize_path": true, "path_with_escaped_slashes_action": action}))
    };
    let common = |field: &str, value: Value| {
        serving(json!({"common_http_protocol_options": {field: value}}))
    };
    vec![
        ("default", serving(json!({}))),
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
        ("dropped", common("headers_with_underscores_action", json!("DROP_HEADER"))),
        ("allowed", common("headers_with_underscores_action", json!("ALLOW"))),
        ("count", common("max_headers_count", json!(10))),
        ("once", common("max_requests_per_connection", json!(1))),
        ("twice", common("max_requests_per_connection", json!(2))),
        ("kilobyte", serving(json!({"max_request_headers_kb": 1}))),
    ]
}

fn paths() -> Vec<Case> {
    let mut cases = Vec::new();
    for listener in ["default", "normal", "merged", "both", "reject", "keep", "unescape"] {
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
            "//",
            "///a//",
            "/a/../../b",
            "/@babel%2fcore",
            "/%7Euser/%2E",
            "/100%",
            "/a%2e%2f%2E./b",
            "/a//../b",
            "/{a}|^",
            "/%25%32%65",
            "/a?b=/../c//d%2fe",
            "/A/b",
        ] {
            // The last three options affect escaped slashes and backslashes only.
            if matches!(listener, "default" | "normal" | "merged" | "both")
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
            cases.push(get_with_headers(listener, &format!("host: {host}")));
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
            cases.push(get_with_headers(listener, &format!("{lines}host: a.example")));
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
    let headers = |count: usize| (1..count).map(|n| format!("x-{n}: 1\r\n")).collect::<String>();
    let mut cases = vec![
        get_with_headers("underscores", "host: a.example\r\nx_a: 1"),
        get_with_headers("underscores", "host: a.example\r\nx-a: a_b"),
        get_with_headers("inner", "host: a.example\r\nx_a: 1"),
        get_with_headers("allowed", "host: a.example\r\nx_a: 1\r\nX_B: 2"),
        get_with_headers("dropped", "host: a.example\r\nx_a: 1\r\nX_B: 2\r\nx-c: 3"),
        get("once", "/"),
        get("twice", "/"),
        get("inner", "/"),
    ];
    for count in [9, 10, 11, 12] {
        let bytes = format!("GET / HTTP/1.1\r\n{}host: a.example\r\n\r\n", headers(count));
        cases.push(case("count", &format!("{count} headers of 10"), bytes));
    }
    for bytes in [900, 1200] {
        let long = "x".repeat(bytes);
        let request = format!("GET / HTTP/1.1\r\nhost: a.example\r\nx: {long}\r\n\r\n");
        cases.push(case("kilobyte", &format!("{bytes} bytes of 1024"), request));
    }
    cases
}

#[test]
fn connection_manager_options_behave_as_in_envoy() {
    let cases = [paths(), hosts_and_addresses(), limits()].concat();
    compare(&options(), &cases, OPTIONS, true);
}

const OPTIONS: &[Difference] = &[
    (
        "default /a\\b | merged /a\\b",
        "200 / refused 400",
        "some services treat a backslash as a slash",
    ),
    ("default /%00 | merged /%00", "200 / refused 400", "NUL ends the path for some services"),
    (
        "normal /a/..;/b | both /a/..;/b",
        "service -GET /b HTTP/1.1; service +GET /a/..;/b HTTP/1.1",
        "path parameters are not removed; policies must allow both readings",
    ),
    (
        "merged // | both //",
        "service -GET // HTTP/1.1; service +GET / HTTP/1.1",
        "all adjacent slashes are merged",
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
        "the number of forwarded addresses is limited",
    ),
];
