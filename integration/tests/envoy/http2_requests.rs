//! Requests of HTTP/2, before the same service of HTTP/1.1.

use serde_json::{Value, json};
use weft_integration::bootstrap::with;
use weft_integration::http2::{self, Http2Response, request};

use crate::peers::{Outcome, Wanted, both, check, differences, serving};

/// The fields of an answer that are looked at.
const FIELDS: &[&str] = &[
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
    let asked = methods.map(|method| (method.to_owned(), request(method, "/x", &[])));
    let trailing = with_body("POST", "/x", &[("trailer", "x-sum")]);
    let trailing = with(trailing, "trailers", json!([("x-sum", "1")]));
    let expecting = request("POST", "/x", &[("expect", "100-continue")]);
    let expecting = with(expecting, "on_continue", json!("body"));
    let of = |name: &str, fields: &[(&str, &str)]| (name.to_owned(), request("GET", "/x", fields));
    let bare = |name: &str, fields: Value| (name.to_owned(), json!({"fields": fields}));
    let named = [
        ("a body".to_owned(), with_body("POST", "/x", &[])),
        ("a body of a length".to_owned(), with_body("POST", "/x", &[("content-length", "4")])),
        (
            "a body of another length".to_owned(),
            with_body("POST", "/x", &[("content-length", "5")]),
        ),
        ("trailers".to_owned(), trailing),
        ("expected".to_owned(), expecting),
        of("cookies", &[("cookie", "a=1"), ("cookie", "b=2")]),
        of("te", &[("te", "trailers")]),
        of("te of more", &[("te", "gzip")]),
        of("connection", &[("connection", "close")]),
        of("transfer-encoding", &[("transfer-encoding", "chunked")]),
        of("upper case", &[("X-Own", "1")]),
        of("a space in a name", &[("x own", "1")]),
        of("a line in a value", &[("x-own", "1\r\nx-two: 2")]),
        of("the same host", &[("host", "a.example")]),
        of("another host", &[("host", "b.example")]),
        of("an unknown pseudo-field", &[(":own", "1")]),
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
    gets.into_iter().chain(asked).chain(named).collect()
}

fn outcome(answer: &Http2Response, told: &[String]) -> Outcome {
    let field = |name: &&str| answer.header(name).map(|value| format!("{name}: {value}"));
    Outcome {
        status: answer.status(),
        interim: answer.interim().iter().map(|status| (*status).to_owned()).collect(),
        fields: FIELDS.iter().filter_map(field).collect(),
        body: answer.body().to_owned(),
        trailers: answer.trailer("x-checksum").unwrap_or_default().to_owned(),
        broken: !answer.is_whole(),
        service: told.to_vec(),
        ..Outcome::default()
    }
}

#[test]
fn requests_of_http2_are_carried_as_envoy_carries_them() {
    let mut cases = cases();
    for (number, (_, request)) in cases.iter_mut().enumerate() {
        let fields = request.get_mut("fields").and_then(Value::as_array_mut).expect("a list");
        fields.push(json!(["x-case", format!("{number}.")]));
    }
    let requests: Vec<Value> = cases.iter().map(|(_, request)| request.clone()).collect();
    let (envoys, wefts) = both(&[("plain", serving(json!({})))], |setup, service| {
        let answers = http2::ask(setup.port("plain"), &requests);
        let told = service.take();
        let of = |number: usize| -> Vec<String> {
            let mark = format!("x-case: {number}.");
            told.iter().filter(|told| told.contains(&mark)).cloned().collect()
        };
        answers.iter().enumerate().map(|(number, answer)| outcome(answer, &of(number))).collect()
    });
    let names = cases.iter().map(|(name, _)| name.clone());
    check(&differences(names, &envoys, &wefts, false), HTTP2);
}

const HTTP2: &[Wanted] = &[
    (
        "/hops",
        "client -x-hop: 1",
        "what `connection` names ends at this hop (RFC 9110, section 7.6.1)",
    ),
    ("OPTIONS", "service -content-length: 0", "no length is said that the client did not say"),
    ("another host", "200 / refused 400", "one request, one host (RFC 9113, section 8.3.1)"),
];
