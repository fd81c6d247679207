//! Route matching and route actions, compared with Envoy.

#![expect(clippy::needless_pass_by_value, reason = "JSON values are passed where they are made")]

use serde_json::{Value, json};
use weft_integration::bootstrap::any;

use crate::comparison::{Case, Difference, case, compare, get, get_with_headers, serving};

fn to(cluster: &str, matches: Value) -> Value {
    json!({"match": matches, "route": {"cluster": cluster}})
}

fn direct(matches: Value, body: &str) -> Value {
    json!({"match": matches, "direct_response": {"status": 200, "body": {"inline_string": body}}})
}

fn redirected(prefix: &str, redirect: Value) -> Value {
    json!({"match": {"prefix": prefix}, "redirect": redirect})
}

/// Routes of each kind. Each direct response has the route's name as its body.
fn routes() -> Vec<Value> {
    let header = |prefix: &str, header: Value, body: &str| {
        direct(json!({"prefix": prefix, "headers": [header]}), body)
    };
    let query = |parameter: Value, body: &str| {
        direct(json!({"prefix": "/query", "query_parameters": [parameter]}), body)
    };
    let text =
        |name: &str, form: &str, value: &str| json!({"name": name, "string_match": {form: value}});
    vec![
        direct(json!({"path": "/exact"}), "exact"),
        direct(json!({"path_separated_prefix": "/segments"}), "segments"),
        direct(json!({"prefix": "/prefix"}), "prefix"),
        header("/header", text("x-one", "exact", "yes"), "exact"),
        header("/header", text("x-one", "prefix", "pre"), "prefix"),
        header("/header", text("x-one", "suffix", "suf"), "suffix"),
        header("/header", text("x-one", "contains", "con"), "contains"),
        header("/header", json!({"name": "x-two", "present_match": true}), "present"),
        header(
            "/header",
            json!({"name": "x-three", "string_match": {"exact": "IC", "ignore_case": true}}),
            "case",
        ),
        header(
            "/absent",
            json!({"name": "x-two", "present_match": true, "invert_match": true}),
            "absent",
        ),
        header("/method", text(":method", "exact", "PUT"), "put"),
        header("/host", text(":authority", "exact", "a.example"), "authority"),
        query(text("q", "exact", "1"), "exact"),
        query(text("q", "prefix", "p"), "prefix"),
        query(json!({"name": "r", "present_match": true}), "present"),
        redirected("/to-host", json!({"host_redirect": "b.example"})),
        redirected("/to-path", json!({"path_redirect": "/new", "response_code": "FOUND"})),
        redirected(
            "/to-https",
            json!({"https_redirect": true, "response_code": "PERMANENT_REDIRECT"}),
        ),
        redirected(
            "/to-scheme",
            json!({"scheme_redirect": "http", "host_redirect": "c.example",
                "response_code": "SEE_OTHER"}),
        ),
        redirected(
            "/to-all",
            json!({"host_redirect": "d.example", "path_redirect": "/e?f=1",
                "response_code": "TEMPORARY_REDIRECT"}),
        ),
        json!({"match": {"prefix": "/empty"}, "direct_response": {"status": 203}}),
        json!({"match": {"prefix": "/rewrite/"},
            "route": {"cluster": "service", "prefix_rewrite": "/new/"}}),
        json!({"match": {"prefix": "/top"},
            "route": {"cluster": "service", "prefix_rewrite": "/"}}),
        json!({"match": {"path": "/whole"},
            "route": {"cluster": "service", "prefix_rewrite": "/other"}}),
        json!({"match": {"prefix": "/with_values"},
            "route": {"cluster": "service", "host_rewrite_literal": "new.example"}}),
        json!({"match": {"prefix": "/weighted"}, "route": {"weighted_clusters":
            {"clusters": [{"name": "nowhere", "weight": 0}, {"name": "other", "weight": 100}]}}}),
        to("nowhere", json!({"prefix": "/nowhere"})),
        to("service", json!({"prefix": "/service"})),
    ]
}

fn routing() -> Value {
    let host = |name: &str, domains: &[&str]| {
        json!({"name": name, "domains": domains,
        "routes": [direct(json!({"prefix": "/"}), name)]})
    };
    serving(json!({"route_config": {"name": "all", "virtual_hosts": [
        host("b", &["b.example"]),
        host("any of c", &["*.c.example"]),
        host("any of c of c", &["*.c.c.example"]),
        host("d of any", &["d.*"]),
        host("with a port", &["e.example:81"]),
        {"name": "a", "domains": ["a.example"], "routes": routes()},
    ]}}))
}

/// For each route, targets that match and targets that nearly match.
const TARGETS: &str = "/exact /exact?x=1 /exact/ /exactly /Exact /segments /segments/ /segments/x /segments?x=1 \
    /segmentsx /prefix /prefix/x /prefixx?y /absent /method /host /query /query?q=1 /query?q=2 \
    /query?q=2&q=1 /query?q=pre /query?r /query?r= /query?x=1&q=1 /query?q=%31 /query?Q=1 \
    /to-host /to-host/x?y=1 /to-path /to-https/x?y=1 /to-scheme/x /to-all?z=1 \
    /empty /rewrite/ /rewrite/x?y=1 /rewrite/204 /top /top/x /topx /whole /whole?x=1 \
    /with_values/x /weighted /weighted/x?y=1 /nowhere /service/x?y=%20&z /service? /nothing / \
    /service/404 /service/503";

#[test]
fn requests_take_the_same_routes_as_with_envoy() {
    let mut cases: Vec<Case> =
        TARGETS.split_whitespace().map(|target| get("routes", target)).collect();
    for lines in [
        "x-one: yes",
        "x-one: no",
        "X-One: yes",
        "x-one: prefix",
        "x-one: a suf",
        "x-one: a con b",
        "x-one: YES",
        "x-two: ",
        "x-two: 1",
        "x-three: ic",
    ] {
        let bytes = format!("GET /header HTTP/1.1\r\nhost: a.example\r\n{lines}\r\n\r\n");
        cases.push(case("routes", &lines.replace("\r\n", " + "), bytes));
    }
    for host in [
        "b.example",
        "B.Example",
        "b.example:80",
        "x.c.example",
        "c.example",
        "x.y.c.example",
        "x.c.c.example",
        "d.example",
        "d.",
        "e.example:81",
        "e.example",
        "f.example",
        "a.example.",
    ] {
        cases.push(get_with_headers("routes", &format!("host: {host}")));
    }
    cases.push(case(
        "routes",
        "host in the target",
        "GET http://b.example/x HTTP/1.1\r\nhost: a.example\r\n\r\n",
    ));
    let values = "x-one: yes\r\nx-one: no";
    let bytes = format!("GET /header HTTP/1.1\r\nhost: a.example\r\n{values}\r\n\r\n");
    cases.push(case("routes", "the first of two values", bytes));
    compare(&[("routes", routing())], &cases, ROUTES, true);
}

const ROUTES: &[Difference] = &[(
    "routes /top/x",
    "service -GET //x HTTP/1.1; service +GET /x HTTP/1.1",
    "a rewrite adds no empty segment, because services read those in different ways",
)];

#[test]
fn repeated_headers_and_empty_bodies_are_handled_as_by_envoy() {
    let with_header =
        |line: &str| format!("GET /header HTTP/1.1\r\nhost: a.example\r\n{line}\r\n\r\n");
    let put = "PUT /method HTTP/1.1\r\nhost: a.example\r\ncontent-length: 0\r\n\r\n";
    let cases = [
        get("routes", "/exact"),
        get("routes", "/to-path/x?y=1"),
        case("routes", "the second of two values", with_header("x-one: no\r\nx-one: yes")),
        case("routes", "an empty body", put),
    ];
    compare(&[("routes", routing())], &cases, &[], true);
}

/// A listener that refuses requests with `x-one: bad`.
fn deny_bad() -> Value {
    let rules = json!({"action": "DENY", "policies": {"bad": {
        "permissions": [{"header": {"name": "x-one", "string_match": {"exact": "bad"}}}],
        "principals": [{"any": true}]}}});
    let rbac = any("envoy.extensions.filters.http.rbac.v3.RBAC", json!({"rules": rules}));
    let router = any("envoy.extensions.filters.http.router.v3.Router", json!({}));
    serving(json!({"http_filters": [
        {"name": "rbac", "typed_config": rbac}, {"name": "router", "typed_config": router}]}))
}

fn with_values(values: &[&str]) -> Case {
    let lines: Vec<String> = values.iter().map(|value| format!("x-one: {value}")).collect();
    get_with_headers("guarded", &format!("host: a.example\r\n{}", lines.join("\r\n")))
}

#[test]
fn policy_on_a_repeated_header_denies_as_by_envoy() {
    let cases = [with_values(&["good"]), with_values(&["bad"]), with_values(&["bad", "good"])];
    compare(&[("guarded", deny_bad())], &cases, &[], true);
}

#[test]
fn policy_denies_a_value_in_any_position_of_a_repeated_header() {
    let cases = [with_values(&["good"]), with_values(&["good", "bad"])];
    compare(&[("guarded", deny_bad())], &cases, &[], true);
}
