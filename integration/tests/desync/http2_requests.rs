//! HTTP/2 requests that would become other requests when written as HTTP/1.1 (RFC 9113, sections 8 and 10.3): the
//! service receives a request with one reading, or none.

use serde_json::json;
use weft_integration::http2_frames::{Http2FrameClient, StreamOutcome, flag, frame, headers, kind};

use crate::front::{Front, probe, recorded_probe};
use crate::http2_corpus::{
    authorities, framing, identity_headers, ignored_violations, invalid_names, methods, misplaced,
    names, paths, pseudo_headers, schemes, surrounding_whitespace, trailers, values,
};
use crate::strict_parser::Request;

pub(crate) type Header = (String, String);

/// The expected handling of a request. A served request is given as the service records it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Expected {
    Served(&'static str),
    Refused,
    /// Both are allowed.
    ServedOrRefused(&'static str),
}

/// An HTTP/2 request and its expected handling.
#[derive(Debug, Clone)]
pub(crate) struct Http2Case {
    pub(crate) headers: Vec<Header>,
    pub(crate) data: Option<&'static str>,
    pub(crate) trailers: Vec<Header>,
    pub(crate) expected: Expected,
}

pub(crate) fn owned(headers: &[(&str, &str)]) -> Vec<Header> {
    headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// A request with this method for `/`, with these headers after the pseudo-headers.
pub(crate) fn request(method: &str, headers: &[(&str, &str)], expected: Expected) -> Http2Case {
    let pseudo = [(":method", method), (":scheme", "http"), (":authority", "a"), (":path", "/")];
    let headers = [owned(&pseudo), owned(headers)].concat();
    Http2Case { headers, data: None, trailers: Vec::new(), expected }
}

/// A GET with another value of one pseudo-header, or without it for `None`.
pub(crate) fn changed(name: &str, value: Option<&str>, expected: Expected) -> Http2Case {
    let mut case = request("GET", &[], expected);
    case.headers.retain_mut(|(own, old)| {
        if *own == name {
            value.unwrap_or_default().clone_into(old);
        }
        *own != name || value.is_some()
    });
    case
}

pub(crate) fn with_data(
    headers: &[(&str, &str)],
    data: &'static str,
    expected: Expected,
) -> Http2Case {
    Http2Case { data: Some(data), ..request("POST", headers, expected) }
}

pub(crate) fn with_trailer(trailer: (&str, &str), expected: Expected) -> Http2Case {
    Http2Case { trailers: owned(&[trailer]), ..with_data(&[], "hello", expected) }
}

pub(crate) const HELLO: Expected = Expected::Served("POST / a hello");
pub(crate) const PLAIN: Expected = Expected::Served("GET / a");

fn send(case: &Http2Case, port: u16) -> StreamOutcome {
    let coded = |flags: u8, fields: &[Header]| {
        let fields: Vec<(&str, &str)> =
            fields.iter().map(|(name, value)| (&**name, &**value)).collect();
        headers(flags | flag::END_HEADERS, 1, &fields)
    };
    let ends = |last: bool| if last { flag::END_STREAM } else { flag::NONE };
    let mut bytes = coded(ends(case.data.is_none() && case.trailers.is_empty()), &case.headers);
    if let Some(data) = case.data {
        bytes.extend(frame(kind::DATA, ends(case.trailers.is_empty()), 1, data.as_bytes()));
    }
    if !case.trailers.is_empty() {
        bytes.extend(coded(flag::END_STREAM, &case.trailers));
    }
    let mut client = Http2FrameClient::connect(port);
    client.send(&bytes);
    client.outcome(1)
}

/// Sends a request. Returns an error if a result is wrong.
fn check(front: &Front, case: &Http2Case) -> Result<(), String> {
    drop(front.recorder.take());
    let outcome = send(case, front.sidecar.port);
    let was_served = outcome == StreamOutcome::Answered(200);
    let served = match case.expected {
        Expected::Served(summary) if was_served => Some(summary),
        Expected::ServedOrRefused(summary) => was_served.then_some(summary),
        Expected::Refused
            if !was_served
                && !matches!(outcome, StreamOutcome::Silent | StreamOutcome::LeftOpen(_)) =>
        {
            None
        }
        Expected::Served(_) | Expected::Refused => return Err(format!("{outcome:?}")),
    };
    probe(&mut front.client(), "next")?;
    let recorded = front.recorder.take();
    if let Some(violation) = recorded.violations.first() {
        return Err(format!("not strict: {violation}"));
    }
    let received: Vec<String> = recorded.requests.iter().map(Request::summary).collect();
    let expected: Vec<String> =
        served.map(str::to_owned).into_iter().chain([recorded_probe("next")]).collect();
    if received != expected {
        return Err(format!("the service received {received:?}, not {expected:?}"));
    }
    let mut headers = recorded.requests.iter().flat_map(|r| r.headers.iter().chain(&r.trailers));
    match headers.find(|(_, value)| value.contains("forged")) {
        Some(header) => Err(format!("the service received {header:?}")),
        None => Ok(()),
    }
}

fn run(cases: &[Http2Case]) {
    let mut front = Front::start(&[], &json!({}), &json!({"path": "strict"}));
    let failures: Vec<String> = cases
        .iter()
        .filter_map(|case| check(&front, case).err().map(|reason| format!("{case:?}: {reason}")))
        .collect();
    assert!(
        failures.is_empty(),
        "{} of {} cases:\n{}",
        failures.len(),
        cases.len(),
        failures.join("\n")
    );
    front.assert_healthy();
}

#[test]
fn http2_requests_do_not_become_other_http1_requests() {
    let heads = [values(), names(), framing(), paths(), methods(), authorities(), pseudo_headers()]
        .concat();
    let cases = [heads, trailers(), identity_headers()].concat();
    assert!(cases.len() > 200, "{}", cases.len());
    run(&cases);
}

#[test]
fn http2_header_values_do_not_reach_the_service_with_surrounding_whitespace() {
    run(&surrounding_whitespace());
}

#[test]
fn http2_header_names_that_are_not_tokens_do_not_reach_the_service() {
    run(&invalid_names());
}

#[test]
#[ignore = "the h2 library removes fragments, and drops trailers that begin with a colon"]
fn http2_violations_that_the_library_ignores_are_refused() {
    run(&ignored_violations(|_| Expected::Refused));
}

#[test]
fn http2_violations_that_the_library_ignores_do_not_reach_the_service() {
    run(&ignored_violations(Expected::ServedOrRefused));
}

#[test]
fn http2_trailers_that_must_be_headers_do_not_reach_the_service() {
    run(&misplaced());
}

#[test]
fn http2_request_with_an_invalid_scheme_is_refused() {
    run(&schemes());
}
