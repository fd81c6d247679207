//! Size limits of requests and responses: below, at and above each limit, over HTTP/1.1 and HTTP/2.

use serde_json::{Value, json};
use weft_integration::bootstrap::any;
use weft_integration::http1;
use weft_integration::http2::{self, request};
use weft_integration::scripted_server::ScriptedServer;
use weft_integration::single_sidecar::{SingleSidecar, SingleSidecarConfig, UpstreamHttp};

/// Checks the statuses below, at and above a limit; `request` makes a request of a size.
#[track_caller]
fn check_limit(
    sidecar: &SingleSidecar,
    limit: usize,
    above: u16,
    request: impl Fn(usize) -> String,
) {
    for (amount, status) in [(limit - 1, 200), (limit, 200), (limit + 1, above)] {
        let answer = http1::ask(sidecar.port, &request(amount));
        assert_eq!(answer.status, status, "{amount} of {limit} over HTTP/1.1: {}", answer.head);
    }
}

#[track_caller]
fn check_limit_over_http2(
    sidecar: &SingleSidecar,
    limit: usize,
    above: u16,
    request: impl Fn(usize) -> Value,
) {
    let requests = [limit - 1, limit, limit + 1].map(request);
    let statuses: Vec<u16> =
        http2::ask(sidecar.port, &requests).iter().map(http2::Http2Response::status).collect();
    assert_eq!(statuses, [200, 200, above], "{limit} by HTTP/2");
}

fn target(bytes: usize) -> String {
    format!("/{}", "x".repeat(bytes - 1))
}

fn with_target(bytes: usize) -> String {
    format!("GET {} HTTP/1.1\r\nhost: a\r\n\r\n", target(bytes))
}

/// A request with a header of this size, name and value together.
fn with_header(bytes: usize) -> String {
    format!("GET / HTTP/1.1\r\nhost: a\r\nx-long: {}\r\n\r\n", "x".repeat(bytes - 6))
}

fn with_header_over_http2(bytes: usize) -> Value {
    request("GET", "/", &[("x-long", &"x".repeat(bytes - 6))])
}

/// A request whose header section has this size, in headers of at most `each` bytes.
fn with_head(bytes: usize, each: usize) -> String {
    let mut head = "GET / HTTP/1.1\r\nhost: a\r\n".to_owned();
    while head.len() + 2 < bytes {
        let left = bytes - head.len() - 2;
        // The last header needs room for its name.
        let now = if left > each && left - each < 8 { each - 8 } else { left.min(each) };
        head += &format!("x: {}\r\n", "x".repeat(now - 5));
    }
    head + "\r\n"
}

/// The same for HTTP/2, where sizes are counted as in RFC 9113, section 10.5.1.
fn with_head_over_http2(bytes: usize, each: usize) -> Value {
    let mut fields = Vec::new();
    let mut left = bytes;
    while left > 0 {
        let now = if left > each && left - each < 40 { each - 40 } else { left.min(each) };
        fields.push("x".repeat(now - 33));
        left -= now;
    }
    let fields: Vec<_> = fields.iter().map(|value| ("x", value.as_str())).collect();
    request("GET", "/", &fields)
}

fn with_headers(count: usize) -> String {
    // `host` is one of the headers.
    format!("GET / HTTP/1.1\r\nhost: a\r\n{}\r\n", "x: y\r\n".repeat(count - 1))
}

#[test]
fn request_above_a_default_size_limit_is_rejected() {
    const KIB: usize = 1024;
    let sidecar = SingleSidecarConfig::for_upstream(
        ScriptedServer::echoing_heads().port,
        UpstreamHttp::Http1,
    )
    .with_weft_metadata("target_limit_bytes", json!(16 * KIB))
    .with_weft_metadata("field_limit_bytes", json!(16 * KIB))
    .start();
    check_limit(&sidecar, 16 * KIB, 414, with_target);
    check_limit(&sidecar, 16 * KIB, 431, with_header);
    check_limit(&sidecar, 60 * KIB, 431, |bytes| with_head(bytes, 10_000));
    check_limit(&sidecar, 100, 431, with_headers);
    let count = || sidecar.metric("weft_sidecar_requests_denied_total{reason=\"target_too_long\"}");
    let counted = count();
    check_limit_over_http2(&sidecar, 16 * KIB, 414, |bytes| request("GET", &target(bytes), &[]));
    assert_eq!(count(), counted + 1);
    check_limit_over_http2(&sidecar, 16 * KIB, 431, with_header_over_http2);
    check_limit_over_http2(&sidecar, 60 * KIB, 431, |bytes| with_head_over_http2(bytes, 10_000));
    check_limit_over_http2(&sidecar, 100, 431, |count| {
        request("GET", "/", &vec![("x", "y"); count])
    });
}

/// Cookies and tokens of real applications need this much.
#[test]
fn single_header_or_target_may_use_the_whole_head_limit() {
    const KIB: usize = 1024;
    let sidecar = SingleSidecarConfig::for_upstream(
        ScriptedServer::echoing_heads().port,
        UpstreamHttp::Http1,
    )
    .start();
    for (bytes, header, line) in [(50 * KIB, 200, 200), (61 * KIB, 431, 414), (200 * KIB, 431, 414)]
    {
        assert_eq!(http1::ask(sidecar.port, &with_header(bytes)).status, header, "{bytes}");
        assert_eq!(http1::ask(sidecar.port, &with_target(bytes)).status, line, "{bytes}");
    }
    let requests = [
        with_header_over_http2(50 * KIB),
        request("GET", &target(50 * KIB), &[]),
        with_header_over_http2(61 * KIB),
        request("GET", &target(61 * KIB), &[]),
    ];
    let statuses: Vec<u16> =
        http2::ask(sidecar.port, &requests).iter().map(http2::Http2Response::status).collect();
    assert_eq!(statuses, [200, 200, 431, 414]);
}

#[test]
fn header_limit_of_96_kib_passes_90_kib() {
    const KIB: usize = 1024;
    let sidecar = SingleSidecarConfig::for_upstream(
        ScriptedServer::echoing_heads().port,
        UpstreamHttp::Http1,
    )
    .with("max_request_headers_kb", json!(96))
    .start();
    assert_eq!(http1::ask(sidecar.port, &with_header(90 * KIB)).status, 200);
    assert_eq!(http2::ask_one(sidecar.port, with_header_over_http2(90 * KIB)).status(), 200);
}

#[test]
fn response_headers_above_the_limit_of_their_cluster_are_rejected() {
    let answering = |count: usize| {
        let headers = "x: y\r\n".repeat(count - 1);
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n{headers}\r\n");
        SingleSidecarConfig::for_upstream(
            ScriptedServer::replying_once(answer).port,
            UpstreamHttp::Http1,
        )
    };
    let status = |sidecar: &SingleSidecar| {
        http1::ask(sidecar.port, "GET / HTTP/1.1\r\nhost: a\r\n\r\n").status
    };
    assert_eq!(status(&answering(1000).start()), 200);
    for (count, wanted) in [(200, 200), (201, 502)] {
        let message = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
        let options = json!({"explicit_http_config": {"http_protocol_options": {}},
            "common_http_protocol_options": {"max_headers_count": 200}});
        let sidecar = answering(count)
            .with_cluster(
                "typed_extension_protocol_options",
                &json!({message: any(message, options)}),
            )
            .start();
        assert_eq!(status(&sidecar), wanted, "{count}");
    }
}

#[test]
fn configured_size_limits_replace_the_defaults() {
    let sidecar = SingleSidecarConfig::for_upstream(
        ScriptedServer::echoing_heads().port,
        UpstreamHttp::Http1,
    )
    .with("max_request_headers_kb", json!(2))
    .with("common_http_protocol_options", json!({"max_headers_count": 5}))
    .with_weft_metadata("target_limit_bytes", json!(100))
    .with_weft_metadata("field_limit_bytes", json!(1000))
    .start();
    check_limit(&sidecar, 100, 414, with_target);
    check_limit(&sidecar, 1000, 431, with_header);
    check_limit(&sidecar, 2048, 431, |bytes| with_head(bytes, 900));
    check_limit(&sidecar, 5, 431, with_headers);
    check_limit_over_http2(&sidecar, 100, 414, |bytes| request("GET", &target(bytes), &[]));
    check_limit_over_http2(&sidecar, 1000, 431, with_header_over_http2);
    check_limit_over_http2(&sidecar, 2048, 431, |bytes| with_head_over_http2(bytes, 900));
    check_limit_over_http2(&sidecar, 5, 431, |count| request("GET", "/", &vec![("x", "y"); count]));
}
