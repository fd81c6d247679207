//! HTTP/2 requests to an HTTP/1.1 service, compared with Envoy.

use serde_json::{Value, json};
use weft_integration::bootstrap::with;
use weft_integration::http2::{self, Http2Response, request};

use crate::comparison::{Difference, Outcome, both, check, differences, serving};

/// The response headers that are compared.
const COMPARED_HEADERS: &[&str] = &[
    "content-type",
    "content-length",
    "connection",
    "transfer-encoding",
    "keep-alive",
    "x-answer",
    "x-hop",
    "etag",
    "retry-after",
    "set-cookie",
];

fn with_body(method: &str, path: &str, fields: &[(&str, &str)]) -> Value {
    with(request(method, path, fields), "body", json!("body"))
}

fn cases() -> Vec<(String, Value)> {
    let paths = [
        "/x",
        "/204",
        "/304",
        "/404",
        "/503",
        "/chunked",
        "/trailers",
        "/cookies",
        "/hops",
        "/close",
    ];
    let methods = ["HEAD", "OPTIONS", "DELETE", "POST", "PUT", "PATCH"];
    let gets = paths.map(|path| (path.to_owned(), request("GET", path, &[])));
    let other_methods = methods.map(|method| (method.to_owned(), request(method, "/x", &[])));
    let trailing = with_body("POST", "/x", &[("trailer", "x-sum")]);
    let trailing = with(trailing, "trailers", json!([("x-sum", "1")]));
    let expecting = request("POST", "/x", &[("expect", "100-continue")]);
    let expecting = with(expecting, "on_continue", json!("body"));
    let get = |name: &str, fields: &[(&str, &str)]| (name.to_owned(), request("GET", "/x", fields));
    let bare = |name: &str, fields: Value| (name.to_owned(), json!({"fields": fields}));
    let named = [
        ("a body".to_owned(), with_body("POST", "/x", &[])),
        ("a body with its length".to_owned(), with_body("POST", "/x", &[("content-length", "4")])),
        (
            "a body with another length".to_owned(),
            with_body("POST", "/x", &[("content-length", "5")]),
        ),
        ("trailers".to_owned(), trailing),
        ("expect".to_owned(), expecting),
        get("cookies", &[("cookie", "a=1"), ("cookie", "b=2")]),
        get("te", &[("te", "trailers")]),
        get("te with gzip", &[("te", "gzip")]),
        get("connection", &[("connection", "close")]),
        get("transfer-encoding", &[("transfer-encoding", "chunked")]),
        get("upper case", &[("X-Own", "1")]),
        get("a space in a name", &[("x own", "1")]),
        get("a line end in a value", &[("x-own", "1\r\nx-two: 2")]),
        get("the same host", &[("host", "a.example")]),
        get("another host", &[("host", "b.example")]),
        get("an unknown pseudo-header", &[(":own", "1")]),
        bare(
            "no path",
            json!([(":method", "GET"), (":scheme", "http"), (":authority", "a.example")]),
        ),
        bare(
            "no method",
            json!([(":path", "/"), (":scheme", "http"), (":authority", "a.example")]),
        ),
        bare(
            "an empty path",
            json!([
                (":method", "GET"),
                (":scheme", "http"),
                (":authority", "a.example"),
                (":path", "")
            ]),
        ),
        bare(
            "no authority",
            json!([
                (":method", "GET"),
                (":scheme", "http"),
                (":path", "/x"),
                ("host", "a.example")
            ]),
        ),
    ];
    gets.into_iter().chain(other_methods).chain(named).collect()
}

fn outcome(answer: &Http2Response, received: &[String]) -> Outcome {
    let header = |name: &&str| answer.header(name).map(|value| format!("{name}: {value}"));
    Outcome {
        status: answer.status(),
        interim: answer.interim().iter().map(|status| (*status).to_owned()).collect(),
        headers: COMPARED_HEADERS.iter().filter_map(header).collect(),
        body: answer.body().to_owned(),
        trailers: answer.trailer("x-checksum").unwrap_or_default().to_owned(),
        broken: !answer.is_whole(),
        service: received.to_vec(),
        ..Outcome::default()
    }
}

#[test]
fn http2_requests_are_forwarded_as_by_envoy() {
    let mut cases = cases();
    for (number, (_, request)) in cases.iter_mut().enumerate() {
        let fields = request
            .get_mut("fields")
            .and_then(Value::as_array_mut)
            .expect("the headers are a list");
        fields.push(json!(["x-case", format!("{number}.")]));
    }
    let requests: Vec<Value> = cases.iter().map(|(_, request)| request.clone()).collect();
    let (envoys, wefts) = both(&[("plain", serving(json!({})))], |setup, service| {
        let answers = http2::ask(setup.port("plain"), &requests);
        let received = service.take();
        let of_case = |number: usize| -> Vec<String> {
            let mark = format!("x-case: {number}.");
            received.iter().filter(|request| request.contains(&mark)).cloned().collect()
        };
        answers
            .iter()
            .enumerate()
            .map(|(number, answer)| outcome(answer, &of_case(number)))
            .collect()
    });
    let names = cases.iter().map(|(name, _)| name.clone());
    check(&differences(names, &envoys, &wefts, false), HTTP2);
}

const HTTP2: &[Difference] = &[
    (
        "/hops",
        "client -x-hop: 1",
        "headers that `connection` names are not forwarded (RFC 9110, section 7.6.1)",
    ),
    ("OPTIONS", "service -content-length: 0", "the sidecar adds no content-length"),
    ("another host", "200 / refused 400", "host must equal :authority (RFC 9113, section 8.3.1)"),
];
