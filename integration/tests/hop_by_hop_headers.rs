//! Hop-by-hop headers: those that `connection` names, and the trailers that `trailer` announces.

use serde_json::{Value, json};
use weft_integration::bootstrap::{any, with};
use weft_integration::http1;
use weft_integration::http2::{self, request};
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::single_sidecar::{SidecarPerHttpVersion, SingleSidecarConfig, UpstreamHttp};

/// An RBAC filter with this action for requests that have the header `x-mark`.
fn rbac_on_mark(action: &str) -> Value {
    let rules = json!({"action": action, "policies": {"marked": {
        "permissions": [{"header": {"name": "x-mark", "present_match": true}}],
        "principals": [{"any": true}]}}});
    let message = "envoy.extensions.filters.http.rbac.v3.RBAC";
    json!({"name": "rbac", "typed_config": any(message, json!({"rules": rules}))})
}

fn get(lines: &str) -> String {
    format!("GET /x HTTP/1.1\r\nhost: a\r\n{lines}\r\n\r\n")
}

#[test]
fn header_named_by_connection_is_evaluated_by_policies_and_then_removed() {
    let deny = SidecarPerHttpVersion::start(|config| config.with_filter(rbac_on_mark("DENY")));
    let allow = SidecarPerHttpVersion::start(|config| config.with_filter(rbac_on_mark("ALLOW")));
    for (denying, allowing) in deny.ports().into_iter().zip(allow.ports()) {
        for connection in ["close, x-mark", "X-Mark", "keep-alive,x-mark", "x-other, x-mark"] {
            let marked = get(&format!("connection: {connection}\r\nx-mark: 1"));
            assert_eq!(http1::ask(denying.1, &marked).status, 403, "{denying:?}: {connection}");
            let answer = http1::ask(allowing.1, &marked);
            assert_eq!(answer.status, 200, "{allowing:?}: {connection}");
            let received = answer.body.to_ascii_lowercase();
            assert!(!received.contains("x-mark"), "{allowing:?}: {connection}: {received}");
        }
        let unmarked = get("connection: close, x-mark");
        assert_eq!(http1::ask(denying.1, &unmarked).status, 200, "{denying:?}");
        assert_eq!(http1::ask(allowing.1, &unmarked).status, 403, "{allowing:?}");
    }
}

#[test]
fn end_to_end_headers_named_by_connection_reach_the_service() {
    let both =
        SidecarPerHttpVersion::start(|config| config.with("use_remote_address", json!(true)));
    for (version, port) in both.ports() {
        for (name, value) in [
            ("authorization", "Basic eDp5"),
            ("cookie", "a=1"),
            ("x-forwarded-host", "b.example"),
            ("x-real-ip", "10.1.1.1"),
            ("forwarded", "for=10.1.1.1"),
            ("x-request-id", "1"),
        ] {
            let request = get(&format!("connection: close, {name}\r\n{name}: {value}"));
            let received = http1::ask(port, &request).body;
            assert!(received.contains(&format!("{name}: {value}")), "{version}: {received}");
        }
        let request = get("connection: x-forwarded-for\r\nx-forwarded-for: 10.1.1.1");
        let received = http1::ask(port, &request).body;
        assert!(received.contains("x-forwarded-for: 10.1.1.1, 127.0.0.1"), "{version}: {received}");
    }
}

/// The `trailer` header and the trailers that a service received, in order.
fn trailers_received(received: &str) -> Vec<String> {
    let lines = received.lines().map(str::to_ascii_lowercase);
    lines.filter(|line| line.starts_with("trailer")).collect()
}

const ANNOUNCED: &str = "x-sum, X-Weft-Peer, x-gone";

#[test]
fn trailer_header_of_a_request_names_only_the_trailers_that_follow() {
    let rules = SidecarPerHttpVersion::plain();
    for (version, port) in rules.ports() {
        let head = format!(
            "POST /x HTTP/1.1\r\nhost: a\r\nconnection: x-gone\r\ntrailer: {ANNOUNCED}\r\n"
        );
        let trailers = "x-sum: 1\r\nx-weft-peer: 1\r\nx-gone: 1\r\n";
        let chunked =
            format!("{head}transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n{trailers}\r\n");
        let received = http1::ask(port, &chunked).body;
        assert_eq!(
            trailers_received(&received),
            ["trailer: x-sum", "trailer x-sum: 1"],
            "{version}"
        );
        let framed = format!("{head}content-length: 1\r\n\r\nx");
        let received = http1::ask(port, &framed).body;
        assert_eq!(trailers_received(&received), [""; 0], "{version}");
        for length in [None, Some("1")] {
            let mut headers = vec![("trailer", "x-sum, x-weft-peer")];
            headers.extend(length.map(|length| ("content-length", length)));
            let post = with(request("POST", "/x", &headers), "body", json!("x"));
            let post = with(post, "trailers", json!([("x-sum", "1"), ("x-weft-peer", "1")]));
            let answer = http2::ask_one(port, post);
            let received = trailers_received(answer.body());
            assert_eq!(received, ["trailer: x-sum", "trailer x-sum: 1"], "{version}: {answer:?}");
        }
    }
}

#[test]
fn trailer_header_of_a_response_names_only_the_trailers_that_follow() {
    let response = "HTTP/1.1 200 OK\r\nconnection: close, x-gone\r\ntrailer: x-sum, x-gone\r\n\
         transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nx-sum: 1\r\nx-gone: 1\r\n\r\n";
    let sidecar = SingleSidecarConfig::for_upstream(
        ScriptedServer::replying_once(response).port,
        UpstreamHttp::Http1,
    )
    .start();
    let by_http1 = http1::ask(sidecar.port, &get("te: trailers"));
    assert_eq!(by_http1.header("trailer"), Some("x-sum"));
    assert_eq!(by_http1.trailers, "x-sum: 1\r\n");
    let by_http2 = http2::ask_one(sidecar.port, request("GET", "/", &[]));
    assert_eq!(by_http2.header("trailer"), Some("x-sum"));
    assert_eq!((by_http2.trailer("x-sum"), by_http2.trailer("x-gone")), (Some("1"), None));
    // HTTP/1.0 has no trailers.
    let old = http1::ask(sidecar.port, "GET / HTTP/1.0\r\nhost: a\r\n\r\n");
    assert_eq!((old.status, old.header("trailer"), old.body.as_str()), (200, None, "x"));
    let framed = "HTTP/1.1 200 OK\r\ntrailer: x-sum\r\ncontent-length: 1\r\n\r\nx";
    let sidecar = SingleSidecarConfig::for_upstream(
        ScriptedServer::replying_once(framed).port,
        UpstreamHttp::Http1,
    )
    .start();
    let by_http1 = http1::ask(sidecar.port, &get("te: trailers"));
    assert_eq!((by_http1.header("trailer"), by_http1.header("content-length")), (None, Some("1")));
    let by_http2 = http2::ask_one(sidecar.port, request("GET", "/", &[]));
    assert_eq!(by_http2.header("trailer"), None);
}

#[test]
fn forbidden_trailers_of_a_response_are_dropped_and_the_rest_is_forwarded() {
    let names = ["set-cookie", "cache-control", "www-authenticate", "te", "host", "connection"];
    let trailers: String = names.iter().map(|name| format!("{name}: x\r\n")).collect();
    let response = format!(
        "HTTP/1.1 200 OK\r\ntrailer: x-sum, {}\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\
         {trailers}x-sum: 1\r\n\r\n",
        names.join(", ")
    );
    let sidecar = SingleSidecarConfig::for_upstream(
        ScriptedServer::replying_once(response).port,
        UpstreamHttp::Http1,
    )
    .start();
    let by_http1 = http1::ask(sidecar.port, &get("te: trailers"));
    assert_eq!((by_http1.status, &*by_http1.body, by_http1.broken), (200, "x", false));
    assert_eq!(by_http1.header("trailer"), Some("x-sum"));
    assert_eq!(by_http1.trailers, "x-sum: 1\r\n");
    let by_http2 = http2::ask_one(sidecar.port, request("GET", "/", &[]));
    assert_eq!((by_http2.status(), by_http2.body()), (200, "x"));
    assert_eq!(by_http2.header("trailer"), Some("x-sum"));
    assert_eq!(by_http2.trailer("x-sum"), Some("1"));
    for name in names {
        assert_eq!(by_http2.trailer(name), None, "{name}");
    }
}

#[test]
fn trailers_of_an_http2_service_are_announced_to_http1_and_http2_clients() {
    let both = SidecarPerHttpVersion::plain();
    let port = both.http2.1.port;
    let by_http1 = http1::ask(port, "GET /announced HTTP/1.1\r\nhost: a\r\nte: trailers\r\n\r\n");
    assert_eq!(by_http1.header("trailer"), Some("x-checksum"), "{by_http1:?}");
    assert_eq!(by_http1.trailers, "x-checksum: 1\r\n");
    let by_http2 = http2::ask_one(port, request("GET", "/announced", &[]));
    assert_eq!(by_http2.header("trailer"), Some("x-checksum"));
    assert_eq!(by_http2.trailer("x-checksum"), Some("1"));
}
