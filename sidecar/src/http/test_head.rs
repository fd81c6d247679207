//! Heads of requests, as they are received over each HTTP version, for tests.

use http::{HeaderMap, HeaderName, HeaderValue, Method};

use super::head::{HttpVersion, RequestHead};
use super::headers::{BufferedHeaders, HeaderSpan, Headers};

/// The authority of the requests.
pub(crate) const AUTHORITY: &str = "a.test";

/// A request of HTTP/1.1 without a body.
pub(crate) fn request(method: &str, target: &str, headers: &[(&str, &str)]) -> RequestHead {
    RequestHead {
        method: Method::from_bytes(method.as_bytes()).expect("a method"),
        target: target.into(),
        readings: None,
        authority: AUTHORITY.into(),
        headers: buffered_headers(headers),
        upgrade: None,
        content_length: None,
        version: HttpVersion::Http11,
        desync: None,
        is_isolated: false,
    }
}

/// A request of HTTP/2 without a body.
pub(crate) fn http2_request(method: &str, target: &str, headers: &[(&str, &str)]) -> RequestHead {
    let headers = Headers::from(header_map(headers));
    RequestHead { headers, version: HttpVersion::Http2, ..request(method, target, &[]) }
}

/// A `GET` request of HTTP/1.1 without headers.
pub(crate) fn get(target: &str) -> RequestHead {
    request("GET", target, &[])
}

/// Headers as they are received over HTTP/1.1.
pub(crate) fn buffered_headers(lines: &[(&str, &str)]) -> Headers {
    let mut buffer = Vec::new();
    let mut spans = Vec::new();
    for (name, value) in lines {
        let mut put = |text: &str| {
            let start = u32::try_from(buffer.len()).expect("a short text");
            buffer.extend_from_slice(text.as_bytes());
            (start, u32::try_from(buffer.len()).expect("a short text"))
        };
        let name = put(name);
        let value = put(value);
        spans.push(HeaderSpan { name, value });
    }
    Headers::from(BufferedHeaders::new(buffer.into(), spans))
}

/// Headers as they are received over HTTP/2.
pub(crate) fn header_map(lines: &[(&str, &str)]) -> HeaderMap {
    let line = |(name, value): &(&str, &str)| {
        let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
        (name, HeaderValue::from_str(value).expect("a value"))
    };
    let mut map = HeaderMap::new();
    for (name, value) in lines.iter().map(line) {
        map.append(name, value);
    }
    map
}

/// The headers as sorted lines.
pub(crate) fn header_lines(headers: &Headers) -> Vec<String> {
    let map = headers.to_map();
    let line = |(name, value): (&HeaderName, &HeaderValue)| {
        format!("{name}: {}", String::from_utf8_lossy(value.as_bytes()))
    };
    let mut lines: Vec<String> = map.iter().map(line).collect();
    lines.sort();
    lines
}
