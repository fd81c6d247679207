//! How large the parts of a request may be, and what is answered above: each below, at and above its limit,
//! in both versions.

use serde_json::{Value, json};
use weft_integration::alone::{Alone, Speaks, Wanted};
use weft_integration::backend::Backend;
use weft_integration::http1;
use weft_integration::http2::{self, request};

/// The statuses below, at and above a limit, by a request that has so much of something.
#[track_caller]
fn check_limit(alone: &Alone, limit: usize, above: u16, request: impl Fn(usize) -> String) {
    for (amount, status) in [(limit - 1, 200), (limit, 200), (limit + 1, above)] {
        let answer = http1::ask(alone.port, &request(amount));
        assert_eq!(answer.status, status, "{amount} of {limit} by HTTP/1.1: {}", answer.head);
    }
}

#[track_caller]
fn check_limit_of_http2(alone: &Alone, limit: usize, above: u16, request: impl Fn(usize) -> Value) {
    let requests = [limit - 1, limit, limit + 1].map(request);
    let statuses: Vec<u16> =
        http2::ask(alone.port, &requests).iter().map(http2::Answer::status).collect();
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
    let alone = Wanted::before(Backend::telling_heads().port, Speaks::Http1).start();
    check_limit(&alone, 16 * KIB, 414, with_target);
    check_limit(&alone, 16 * KIB, 431, with_field);
    check_limit(&alone, 60 * KIB, 431, |bytes| with_head(bytes, 10_000));
    check_limit(&alone, 100, 431, with_fields);
    let count = || alone.metric("weft_sidecar_denied_total{reason=\"target_too_long\"}");
    let counted = count();
    check_limit_of_http2(&alone, 16 * KIB, 414, |bytes| request("GET", &target(bytes), &[]));
    assert_eq!(count(), counted + 1);
    check_limit_of_http2(&alone, 16 * KIB, 431, with_field_of_http2);
    check_limit_of_http2(&alone, 60 * KIB, 431, |bytes| with_head_of_http2(bytes, 10_000));
    check_limit_of_http2(&alone, 100, 431, |count| request("GET", "/", &vec![("x", "y"); count]));
}

#[test]
fn sizes_may_have_other_limits() {
    let alone = Wanted::before(Backend::telling_heads().port, Speaks::Http1)
        .with("max_request_headers_kb", json!(2))
        .with("common_http_protocol_options", json!({"max_headers_count": 5}))
        .with_ours("target_limit_bytes", json!(100))
        .with_ours("field_limit_bytes", json!(1000))
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
