//! Completes the WebSocket handshake between HTTP/1.1 and HTTP/2. Only HTTP/1.1 has the headers `sec-websocket-key` and
//! `sec-websocket-accept` (RFC 6455, section 4; RFC 8441, section 5).

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderName, HeaderValue};

use crate::http::headers::Headers;

const KEY: HeaderName = HeaderName::from_static("sec-websocket-key");
const ACCEPT: HeaderName = HeaderName::from_static("sec-websocket-accept");
/// The GUID of RFC 6455, section 1.3.
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Removes the key from a request that is forwarded over HTTP/2. Returns the `sec-websocket-accept` value that the
/// client expects.
pub(super) fn take_key(headers: &mut Headers) -> Option<HeaderValue> {
    let accept = accept_of(headers.get(KEY.as_str())?);
    headers.remove(|name| name.eq_ignore_ascii_case(KEY.as_str().as_bytes()));
    Some(accept)
}

/// Adds a key to a request that was received over HTTP/2. Returns the `sec-websocket-accept` value that the service
/// must respond with.
pub(super) fn add_key(headers: &mut Headers) -> HeaderValue {
    headers.remove(|name| name.eq_ignore_ascii_case(KEY.as_str().as_bytes()));
    // The key only proves that the service understood the handshake. It is not a secret.
    let key = STANDARD.encode(fastrand::u128(..).to_be_bytes());
    let accept = accept_of(key.as_bytes());
    if let Ok(key) = HeaderValue::try_from(key) {
        headers.add(KEY, key);
    }
    accept
}

/// Removes `sec-websocket-accept` from a response. Returns whether it had the expected value.
pub(super) fn take_accept(headers: &mut Headers, expected: &HeaderValue) -> bool {
    let is_expected = headers.get(ACCEPT.as_str()) == Some(expected.as_bytes());
    headers.remove(|name| name.eq_ignore_ascii_case(ACCEPT.as_str().as_bytes()));
    is_expected
}

/// Adds `sec-websocket-accept` to a response.
pub(super) fn add_accept(headers: &mut Headers, accept: HeaderValue) {
    headers.add(ACCEPT, accept);
}

fn accept_of(key: &[u8]) -> HeaderValue {
    let hashed = digest(&SHA1_FOR_LEGACY_USE_ONLY, &[key, GUID].concat());
    HeaderValue::try_from(STANDARD.encode(hashed)).unwrap_or(HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_value_matches_rfc_6455() {
        // RFC 6455, section 1.3.
        assert_eq!(accept_of(b"dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        let mut headers = Headers::from(http::HeaderMap::new());
        let expected = add_key(&mut headers);
        let accept = take_key(&mut headers).expect("a key");
        assert_eq!(accept, expected);
        add_accept(&mut headers, accept);
        assert!(take_accept(&mut headers, &expected));
        assert!(!take_accept(&mut headers, &expected), "the header was removed");
    }
}
