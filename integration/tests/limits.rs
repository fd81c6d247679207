//! How large the parts of a request may be, and what is answered above: each below, at and above its limit,
//! in both versions.

use serde_json::{Value, json};
use weft_integration::bootstrap::any;
use weft_integration::http1;
use weft_integration::http2::{self, request};
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};

/// The statuses below, at and above a limit, by a request that has so much of something.
#[track_caller]
fn check_limit(alone: &SingleSidecar, limit: usize, above: u16, request: impl Fn(usize) -> String) {
    for (amount, status) in [(limit - 1, 200), (limit, 200), (limit + 1, above)] {
        let answer = http1::ask(alone.port, &request(amount));
        assert_eq!(answer.status, status, "{amount} of {limit} by HTTP/1.1: {}", answer.head);
    }
}

#[track_caller]
fn check_limit_of_http2(
    alone: &SingleSidecar,
    limit: usize,
    above: u16,
    request: impl Fn(usize) -> Value,
) {
    let requests = [limit - 1, limit, limit + 1].map(request);
    let statuses: Vec<u16> =
        http2::ask(alone.port, &requests).iter().map(http2::Http2Response::status).collect();
    assert_eq!(statuses, [200, 200, above], "{limit} by HTTP/2");
}

fn target(bytes: usize) -> String {
    format!("/{}", "x".repeat(bytes - 1))
}

fn with_target(bytes: usize) -> String {
    format!("GET {} HTTP/1.1\r\nhost: a\r\n\r\n", target(bytes))
}

/// Name and value together.
fn with_field(bytes: usize) -> String {
    format!("GET / HTTP/1.1\r\nhost: a\r\nx-long: {}\r\n\r\n", "x".repeat(bytes - 6))
}

fn with_field_of_http2(bytes: usize) -> Value {
    request("GET", "/", &[("x-long", &"x".repeat(bytes - 6))])
}

/// A head of so many bytes, in fields of `each` at most.
fn with_head(bytes: usize, each: usize) -> String {
    let mut head = "GET / HTTP/1.1\r\nhost: a\r\n".to_owned();
    while head.len() + 2 < bytes {
        let left = bytes - head.len() - 2;
        // What is left for the last must be enough for a field.
        let now = if left > each && left - each < 8 { each - 8 } else { left.min(each) };
        head += &format!("x: {}\r\n", "x".repeat(now - 5));
    }
    head + "\r\n"
}

/// The same as RFC 9113, section 10.5.1, counts.
fn with_head_of_http2(bytes: usize, each: usize) -> Value {
    let (mut fields, mut left) = (Vec::new(), bytes);
    while left > 0 {
        let now = if left > each && left - each < 40 { each - 40 } else { left.min(each) };
        fields.push("x".repeat(now - 33));
        left -= now;
    }
    let fields: Vec<_> = fields.iter().map(|value| ("x", value.as_str())).collect();
    request("GET", "/", &fields)
}

fn with_fields(count: usize) -> String {
    // The host is one of them.
    format!("GET / HTTP/1.1\r\nhost: a\r\n{}\r\n", "x: y\r\n".repeat(count - 1))
}

#[test]
fn sizes_have_limits() {
    const KIB: usize = 1024;
    let alone = SingleSidecarConfig::for_upstream(
        ScriptedServer::echoing_heads().port,
        UpstreamHttp::Http1,
    )
    .with_weft_metadata("target_limit_bytes", json!(16 * KIB))
    .with_weft_metadata("field_limit_bytes", json!(16 * KIB))
    .start();
    check_limit(&alone, 16 * KIB, 414, with_target);
    check_limit(&alone, 16 * KIB, 431, with_field);
    check_limit(&alone, 60 * KIB, 431, |bytes| with_head(bytes, 10_000));
    check_limit(&alone, 100, 431, with_fields);
    let count = || alone.metric("weft_sidecar_requests_denied_total{reason=\"target_too_long\"}");
    let counted = count();
    check_limit_of_http2(&alone, 16 * KIB, 414, |bytes| request("GET", &target(bytes), &[]));
    assert_eq!(count(), counted + 1);
    check_limit_of_http2(&alone, 16 * KIB, 431, with_field_of_http2);
    check_limit_of_http2(&alone, 60 * KIB, 431, |bytes| with_head_of_http2(bytes, 10_000));
    check_limit_of_http2(&alone, 100, 431, |count| request("GET", "/", &vec![("x", "y"); count]));
}

/// Cookies and tokens of real applications need it.
#[test]
fn one_header_or_target_may_fill_the_head() {
    const KIB: usize = 1024;
    let alone = SingleSidecarConfig::for_upstream(
        ScriptedServer::echoing_heads().port,
        UpstreamHttp::Http1,
    )
    .start();
    for (bytes, header, line) in [(50 * KIB, 200, 200), (61 * KIB, 431, 414), (200 * KIB, 431, 414)]
    {
        assert_eq!(http1::ask(alone.port, &with_field(bytes)).status, header, "{bytes}");
        assert_eq!(http1::ask(alone.port, &with_target(bytes)).status, line, "{bytes}");
    }
    let requests = [
        with_field_of_http2(50 * KIB),
        request("GET", &target(50 * KIB), &[]),
        with_field_of_http2(61 * KIB),
        request("GET", &target(61 * KIB), &[]),
    ];
    let statuses: Vec<u16> =
        http2::ask(alone.port, &requests).iter().map(http2::Http2Response::status).collect();
    assert_eq!(statuses, [200, 200, 431, 414]);
}

#[test]
fn header_limit_of_96_kib_passes_90_kib() {
    const KIB: usize = 1024;
    let alone = SingleSidecarConfig::for_upstream(
        ScriptedServer::echoing_heads().port,
        UpstreamHttp::Http1,
    )
    .with("max_request_headers_kb", json!(96))
    .start();
    assert_eq!(http1::ask(alone.port, &with_field(90 * KIB)).status, 200);
    assert_eq!(http2::ask_one(alone.port, with_field_of_http2(90 * KIB)).status(), 200);
}

#[test]
fn response_headers_have_the_limit_of_their_cluster() {
    let answering = |count: usize| {
        let headers = "x: y\r\n".repeat(count - 1);
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n{headers}\r\n");
        SingleSidecarConfig::for_upstream(
            ScriptedServer::replying_once(answer).port,
            UpstreamHttp::Http1,
        )
    };
    let status =
        |alone: &SingleSidecar| http1::ask(alone.port, "GET / HTTP/1.1\r\nhost: a\r\n\r\n").status;
    assert_eq!(status(&answering(1000).start()), 200);
    for (count, wanted) in [(200, 200), (201, 502)] {
        let message = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
        let options = json!({"explicit_http_config": {"http_protocol_options": {}},
            "common_http_protocol_options": {"max_headers_count": 200}});
        let alone = answering(count)
            .with_cluster(
                "typed_extension_protocol_options",
                &json!({message: any(message, options)}),
            )
            .start();
        assert_eq!(status(&alone), wanted, "{count}");
    }
}

#[test]
fn sizes_may_have_other_limits() {
    let alone = SingleSidecarConfig::for_upstream(
        ScriptedServer::echoing_heads().port,
        UpstreamHttp::Http1,
    )
    .with("max_request_headers_kb", json!(2))
    .with("common_http_protocol_options", json!({"max_headers_count": 5}))
    .with_weft_metadata("target_limit_bytes", json!(100))
    .with_weft_metadata("field_limit_bytes", json!(1000))
    .start();
    check_limit(&alone, 100, 414, with_target);
    check_limit(&alone, 1000, 431, with_field);
    check_limit(&alone, 2048, 431, |bytes| with_head(bytes, 900));
    check_limit(&alone, 5, 431, with_fields);
    check_limit_of_http2(&alone, 100, 414, |bytes| request("GET", &target(bytes), &[]));
    check_limit_of_http2(&alone, 1000, 431, with_field_of_http2);
    check_limit_of_http2(&alone, 2048, 431, |bytes| with_head_of_http2(bytes, 900));
    check_limit_of_http2(&alone, 5, 431, |count| request("GET", "/", &vec![("x", "y"); count]));
}
